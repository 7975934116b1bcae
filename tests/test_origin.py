"""A run may begin with the weights of another one: the same network, the same function, and every later file says so."""

import json
from types import SimpleNamespace

import pytest
import torch

from models import denoiser, magnitude
from tests.gloo import on_ranks
from tests.test_engine import MODEL, build, config_of, weights_of
from tests.test_import_edm2 import PICKLE
from tests.test_resume import BATCH, data, finish, start  # noqa: F401 - data is a fixture
from trainer import checkpoint, origin, posthoc, tensor_file
from trainer.config import from_dict, to_dict
from trainer.snapshots import list_snapshots, load_denoiser, read_header


def trained(path, **changes):
    """Write a snapshot of a network with rows as short as an average's; return its path."""
    torch.manual_seed(7)
    network = denoiser.build(MODEL)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(0.8) if p.ndim > 1 else p.fill_(0.5)
    tensors = {n: t.detach().clone() for n, t in network.state_dict().items()}
    facts = {"kind": "posthoc", "run": "a", "clock": 4096, "sigma_rel": 0.13, "life": 2, "dtype": "fp32"}
    whitening = {"codec": "pixels", "mean": [127.5, 127.5], "std": [63.75, 63.75]}
    facts |= {"model": to_dict(config_of())["model"], "data": whitening, "parent": "", "origin": {"run": "older"}}
    tensor_file.write(path, facts | {"buffers": [n for n, _ in network.named_buffers()]} | changes, tensors)
    return path


def config_from(path, **changes):
    plain = to_dict(config_of()) | {"start_from": str(path)}
    plain["data"] |= {"codec": "pixels"}
    for key, value in changes.items():
        group, _, name = key.partition("__")
        plain[group][name] = value
    return from_dict(plain)


def test_weights_mean_the_same_function_and_the_file_is_named(tmp_path):
    path = trained(tmp_path / "phema.safetensors")
    config = config_from(path, model__dropout=0.1)  # another regularisation is no other network
    module = denoiser.build(to_dict(config)["model"])
    said = []
    found = origin.begin(config, module, SimpleNamespace(mean=[127.5, 0.0], std=[63.75, 63.75]), said.append)
    assert "[127.5, 127.5] then, [127.5, 0.0] now" in said[0] and str(path) in said[1]
    for weight in magnitude.normalized_parameters(module).values():
        size = weight.square().mean(tuple(range(1, weight.ndim))).sqrt().detach()
        assert float((size - (1 - magnitude.EPS)).abs().max()) < 1e-5
    reference = load_denoiser(path)[0]
    x, sigma, labels = torch.randn(3, 2, 8, 8), torch.tensor([0.1, 1.0, 9.0]), torch.tensor([0, 2, -1])
    with torch.no_grad():
        ours, theirs = module.eval()(x, sigma, labels), reference(x, sigma, labels)
    assert float((ours - theirs).abs().max()) < 2e-3 * float(theirs.abs().max()), "rows differ by 1e-4 / RMS"
    assert (found["file"], found["run"], found["clock"], found["sigma_rel"]) == (path.name, "a", 4096, 0.13)
    assert found["origin"] == {"run": "older"} and "parent" not in found
    other = trained(tmp_path / "other.safetensors", run="b")
    assert origin.provenance(origin.read_header(other), other)["digest"] == found["digest"], "names the weights"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model__model_channels": 24}, r"holds another network \(model.model_channels=12; here 24\)"),
        ({"model__label_dim": 5, "model__prediction": "v"}, "model.label_dim=3"),
        ({"data__codec": "sd-vae-ft-mse"}, "was trained on pixels"),
    ],
)
def test_another_network_is_refused_in_one_line(changes, said, tmp_path):
    with pytest.raises(ValueError, match=said) as error:
        origin.check(config_from(trained(tmp_path / "a.safetensors"), **changes))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_files_of_other_kinds_are_refused_in_one_line(tmp_path):
    for name, content in (("a.pkl", b""), ("b.safetensors", b"short"), ("c.safetensors", b"\xff" * 64)):
        (tmp_path / name).write_bytes(content)
    for name in ("a.pkl", "b.safetensors", "c.safetensors", "absent.safetensors", "."):
        with pytest.raises(ValueError, match="start_from=") as error:
            origin.check(config_from(tmp_path / name))
        assert "\n" not in str(error.value)
    path = trained(tmp_path / "damaged.safetensors")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="differs from its checksum"):
        origin.load(denoiser.build(MODEL), path)


def test_a_published_network_fits_a_config_of_its_own_model(tmp_path):
    from models import import_edm2

    path = tmp_path / "imported.safetensors"
    assert import_edm2.main([str(PICKLE), str(path)]) == 0
    config = config_from(path, data__codec="sd-vae-ft-mse")
    config.model = from_dict(to_dict(config) | {"model": read_header(path)["model"]}).model
    header = origin.check(config)
    module = denoiser.build(to_dict(config)["model"])
    origin.load(module, path)
    assert PICKLE.name in origin.provenance(header, path)["parent"]
    manifest = SimpleNamespace(mean=(5.81, 3.25, 0.12, -2.15), std=(4.17, 4.62, 3.71, 3.28))
    assert origin.doubts(header, manifest) == []
    manifest.mean = (0.0,) * 4
    assert "whitened by mean" in origin.doubts(header, manifest)[0]


def begun(path: str) -> list[bool]:
    """On two ranks, at every stage: what the forward, the masters and both averages hold before the first step."""
    from trainer.engine import Engine, start_process_group

    start_process_group()
    expected = build(config_of())
    origin.load(expected, path)
    expected = {n: p.detach().clone() for n, p in expected.named_parameters()}
    equal = []
    for stage, weights in ((0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16"), (3, "bf16")):
        module = build(config_of(seed=5))
        origin.load(module, path)
        engine = Engine(config_of(engine__zero_stage=stage, engine__weights=weights), module)
        pieces = [(f, t) for kept in ([f.master for f in engine.fragments], *engine.ema.averages)
                  for f, t in zip(engine.fragments, kept, strict=True)]  # fmt: skip
        same = all(torch.equal(t, expected[f.name].flatten()[f.start : f.start + t.numel()]) for f, t in pieces)
        seen = weights_of(engine)
        equal.append(same and all(torch.equal(p, expected[n].to(p.dtype)) for n, p in seen.items()))
        engine._deepspeed.destroy()
    return equal


def alike(path, other) -> float:
    """Return the mean cosine of the angle between the weights of two files."""
    (a, b) = (dict(tensor_file.iterate_tensors(p)) for p in (path, other))
    cosines = [torch.cosine_similarity(t.flatten(), b[n].flatten(), 0) for n, t in a.items() if t.ndim > 1]
    return float(torch.stack(cosines).mean())


def test_masters_averages_and_copies_begin_with_the_file_at_every_stage(tmp_path):
    assert on_ranks(2, begun, str(trained(tmp_path / "a.safetensors"))) == [[True] * 6] * 2


@pytest.mark.slow
def test_provenance_goes_into_every_later_file_and_the_file_is_read_once(data, tmp_path):  # noqa: F811
    first, tuned = tmp_path / "first", tmp_path / "tuned"
    finish(first, data, world=1)
    made = tmp_path / "phema.safetensors"
    assert posthoc.main([str(first), "--sigma-rel", "0.08", "--out", str(made)]) == 0
    ranks = start(tuned, data, f"start_from={made}", "model.model_channels=16", "model.channels_per_head=16")
    assert ranks.wait() == [2, 2] and "holds another network" in ranks.output() and "Traceback" not in ranks.output()
    tuned = tmp_path / "tuned2"
    keys = [f"start_from={made}", "seed=9"]  # by itself it would begin elsewhere
    finish(tuned, data, *keys, f"duration_images={6 * BATCH}", "engine.zero_stage=2")
    began = tmp_path / "began.safetensors"
    assert checkpoint.main([str(tuned), "--consolidate", str(began)]) == 0
    assert alike(began, made) > 0.9, "six steps do not lead away from where it began"
    made.unlink()
    finish(tuned, data, *keys, world=1)
    expected = {"file": "phema.safetensors", "kind": "posthoc", "run": "first", "sigma_rel": 0.08}
    again = tmp_path / "again.safetensors"
    assert posthoc.main([str(tuned), "--sigma-rel", "0.07", "--out", str(again)]) == 0
    weights = tmp_path / "weights.safetensors"
    assert checkpoint.main([str(tuned), "--consolidate", str(weights)]) == 0
    snapshots = list_snapshots(tuned)
    headers = [s.header for s in snapshots] + [read_header(again), read_header(weights)]
    assert {s.header["life"] for s in snapshots} == {1, 2}
    manifests = [json.loads((p / "manifest.json").read_text()) for p in checkpoint.list_checkpoints(tuned)]
    for header in headers + [m["header"] for m in manifests]:
        assert header["origin"].items() >= expected.items() and len(header["origin"]["digest"]) == 16
    assert "origin" not in list_snapshots(first)[0].header
