"""Drawing: image i is a function of (network, seed, i), whatever else is asked for."""

import argparse
import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import denoiser, magnitude
from trainer import evaluate, evaluations, features, generate, tensor_file
from trainer.drawing import Drawing, Settings, positions_of
from trainer.drawing_options import activations_of, add_drawing_options, find_snapshot, open_drawing, settings_of
from trainer.snapshots import Snapshot, file_name, load_denoiser

TINY = {
    **{"family": "edm2", "resolution": 8, "channels": 1, "label_dim": 10, "model_channels": 16, "channel_mult": [1, 2]},
    **{"num_blocks": 1, "attn_resolutions": [4], "channels_per_head": 16, "logvar_channels": 16, "sigma_data": 0.5},
}
DATA = {
    **{"codec": "pixels", "codec_hash": "", "moments": "mean", "mean": [78.0], "std": [96.0], "shape": [1, 8, 8]},
    **{"label_dim": 10, "digest": "d"},
}


def write_network(path, seed=0, clock=64, sigma_rel=0.1, life=1, kind="ema", data=None, **changes):
    """Write a snapshot of an untrained network whose gains are not zero, so that it does something."""
    torch.manual_seed(seed)
    network = denoiser.build(TINY | changes)
    magnitude.normalize_rows_(network)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("gain"):
                parameter.fill_(0.3)
    header = {"kind": kind, "run": "r", "life": life, "clock": clock, "sigma_rel": sigma_rel, "dtype": "fp32"}
    header |= {"model": TINY | changes, "data": data or DATA, "buffers": [n for n, _ in network.named_buffers()]}
    path = Path(path)
    path = path / "snapshots" / file_name(clock, sigma_rel) if path.suffix == "" else path
    path.parent.mkdir(parents=True, exist_ok=True)
    tensor_file.write(path, header, {n: t.detach() for n, t in network.state_dict().items()})
    return path


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    return write_network(tmp_path_factory.mktemp("run") / "a.safetensors")


def drawing(path, *arguments):
    """Open a drawing as the command does."""
    parser = argparse.ArgumentParser()
    add_drawing_options(parser)
    options = parser.parse_args(["--steps", "4", *arguments])
    return open_drawing(path, options, settings_of(options))[0]


def close(a, b):
    # another batch may take another kernel: rounding, not randomness
    return (a - b).abs().max() < 1e-4 * a.abs().max()


@pytest.mark.parametrize("churn", ["0", "10"])
def test_image_i_does_not_depend_on_the_batch(snapshot, churn):
    made = drawing(snapshot, "--seed", "3", "--churn", churn)
    whole = made.latents(torch.arange(12))
    assert close(whole[5:6], made.latents(torch.tensor([5])))
    assert close(whole[[7, 2]], made.latents(torch.tensor([7, 2])))
    assert not close(whole, drawing(snapshot, "--seed", "4", "--churn", churn).latents(torch.arange(12)))
    parts = torch.cat([x for _, x in made.batches(range(12), 5)])
    assert close(whole, parts)


def test_an_image_keeps_its_noise_whatever_classes_are_asked_for(snapshot):
    some, every = positions_of([3, 7], 2, 10), positions_of(range(10), 3, 10)
    assert some == [3, 13, 7, 17] and set(some) < set(every) and sorted(every) == list(range(30))
    made = drawing(snapshot)
    assert made.label_dim == 10
    assert close(made.latents(torch.tensor(some)), made.latents(torch.tensor(every))[[every.index(i) for i in some]])


SELF = ["--guidance", "2", "--guide", "self"]


@pytest.mark.parametrize(
    "more", [[], ["--guidance-interval", "0.1", "20"], ["--churn", "10"], ["--solver", "dpm-solver-2m"]]
)
def test_a_network_guides_itself_in_one_batch_as_in_two(snapshot, more):
    one, two = (drawing(snapshot, *SELF, *more) for _ in range(2))
    assert one.one_batch
    two.one_batch = False
    sizes = {made: [] for made in (one, two)}
    for made, seen in sizes.items():
        made.network.register_forward_hook(lambda _, given, __, seen=seen: seen.append(len(given[0])))
    where = torch.arange(6) + 3
    assert close(two.latents(where), one.latents(where))
    inside = [0.1 < s <= 20 if "--guidance-interval" in more else True for s in evaluated(one)]
    assert sizes[one] == [12 if guided else 6 for guided in inside]
    assert sizes[two] == [6 for guided in inside for _ in range(1 + guided)]
    assert close(one.latents(where)[2:3], one.latents(torch.tensor([5]))), "an image does not depend on its batch"


def evaluated(made) -> list[float]:
    """The noise levels at which a solver evaluates the network, without churn."""
    levels = [float(s) for s in made.sigmas[:-1]]
    if made.settings.solver != "heun":
        return levels
    return [s for now, after in zip(levels, [*levels[1:], 0.0], strict=True) for s in (now, after) if s]


def test_guidance_moves_away_from_the_guide(snapshot, tmp_path):
    guide = write_network(tmp_path / "g.safetensors", seed=1)
    where = torch.arange(3)
    plain, other = drawing(snapshot).latents(where), drawing(guide).latents(where)
    guided = drawing(snapshot, "--guidance", "2", "--guide", str(guide)).latents(where)
    assert not close(plain, guided)
    zero = drawing(snapshot, "--guidance", "0", "--guide", str(guide)).latents(where)
    assert close(zero, other)  # weight 0 is the guide alone
    nowhere = ["--guidance", "2", "--guide", str(guide), "--guidance-interval", "90", "100"]
    assert close(plain, drawing(snapshot, *nowhere).latents(where))
    assert not close(plain, drawing(snapshot, "--guidance", "2", "--guide", "self").latents(where))
    unlabelled = write_network(tmp_path / "u.safetensors", seed=1, label_dim=0)
    assert not close(plain, drawing(snapshot, "--guidance", "2", "--guide", str(unlabelled)).latents(where))


def run(*arguments):
    return generate.main([str(a) for a in arguments])


def test_grid_has_a_row_per_class(snapshot, tmp_path):
    out = tmp_path / "new" / "grid.png"
    assert run(snapshot, "--out", out, "--classes", "0,4", "--per-class", 3, "--steps", 2, "--batch", 4) == 0
    picture = Image.open(out)
    assert picture.mode == "L" and picture.size == (3 * 34 + 2, 2 * 34 + 2)  # 8 pixels enlarged to 32, gaps of 2
    assert json.loads(picture.text["evenkeel"])["snapshot"] == "a.safetensors"
    tile = np.asarray(picture)[36:68, 2:34][::4, ::4]
    made = drawing(snapshot, "--steps", "2")
    wanted = made.decode(made.latents(torch.tensor([4])))[0, 0].numpy()
    assert np.abs(tile.astype(int) - wanted).max() <= 1


def folder_of(path, out):
    assert run(path, "--out", out / "folder", "--steps", 2, "--per-class", 1, "--batch", 3) == 0
    assert len(list((out / "folder").glob("*.png"))) == 10


def grid_of(path, out):
    assert run(path, "--out", out / "grid.png", "--steps", 2, "--per-class", 1, "--batch", 3) == 0


def grid_of_a_follower(path, out):
    evaluations.COLUMNS = 1
    evaluations._draw(out, Snapshot(path, 64, 0.1, {}), drawing(path), 3)


def features_of(path, out):
    made, extract = drawing(path), features.Features("f", lambda x, decode: decode(x).flatten(1), False)
    assert len(evaluate._stream(extract, made, made.batches(range(10), 3))[1]) == 10


@pytest.mark.parametrize("command", [folder_of, grid_of, grid_of_a_follower, features_of])
def test_a_batch_is_decoded_while_the_next_is_drawn(snapshot, tmp_path, monkeypatch, command):
    """Each decoding waits here until the batch after it is begun: one after the other, neither would ever go on."""
    begun, late = [threading.Event() for _ in range(4)], []
    draw, decode, order = Drawing.latents, Drawing.pictures, iter(range(4))

    def drawing_begins(self, positions):
        begun[int(positions[0]) // 3].set()
        return draw(self, positions)

    def decoding_waits(self, x):
        following = next(order) + 1
        late.extend([following] if following < 4 and not begun[following].wait(10) else [])
        return decode(self, x)

    monkeypatch.setattr(Drawing, "latents", drawing_begins)
    monkeypatch.setattr(Drawing, "pictures", decoding_waits)
    monkeypatch.setattr(evaluations, "COLUMNS", evaluations.COLUMNS)
    command(snapshot, tmp_path)
    assert not late and next(order, None) is None


def test_folder_resumes_and_is_shared_between_ranks(snapshot, tmp_path, monkeypatch, capsys):
    options = ["--steps", 2, "--per-class", 2]
    assert run(snapshot, "--out", tmp_path / "one", *options) == 0
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in "210":
        monkeypatch.setenv("RANK", rank)
        assert run(snapshot, "--out", tmp_path / "three", *options, "--batch", 3) == 0
    monkeypatch.undo()
    names = sorted(p.name for p in (tmp_path / "one").glob("*.png"))
    assert len(names) == 20 and names[3] == "00000003-3.png"
    assert names == sorted(p.name for p in (tmp_path / "three").glob("*.png"))
    for name in names:
        one, three = (np.asarray(Image.open(tmp_path / d / name)).astype(int) for d in ("one", "three"))
        assert np.abs(one - three).max() <= 1
    (tmp_path / "one" / names[5]).unlink()
    capsys.readouterr()
    assert run(snapshot, "--out", tmp_path / "one", *options) == 0
    assert "wrote 1 images" in capsys.readouterr().out
    assert run(snapshot, "--out", tmp_path / "one", *options, "--seed", 1) == 2
    assert "another network, seed, sampler or type" in capsys.readouterr().err


def test_a_run_stands_for_its_newest_snapshot_of_the_nearest_length(tmp_path):
    for clock, sigma_rel in ((64, 0.05), (64, 0.1), (128, 0.05), (128, 0.1)):
        write_network(tmp_path, clock=clock, sigma_rel=sigma_rel)
    assert find_snapshot(tmp_path).name == "ema-0000000128-0.100.safetensors"
    assert find_snapshot(tmp_path, 0.06).name == "ema-0000000128-0.050.safetensors"
    made = write_network(tmp_path / "posthoc" / "p.safetensors", clock=128, sigma_rel=0.13, kind="posthoc")
    assert find_snapshot(tmp_path, 0.14) == made
    write_network(tmp_path, clock=96, sigma_rel=0.05, life=2)  # the run went back: 128 belongs to an abandoned life
    assert find_snapshot(tmp_path, 0.05).name == "ema-0000000096-0.050.safetensors"


def test_networks_without_labels_draw_one_row(tmp_path):
    path = write_network(tmp_path / "u.safetensors", label_dim=0)
    assert run(path, "--out", tmp_path / "u.png", "--per-class", 3, "--steps", 2) == 0
    assert Image.open(tmp_path / "u.png").size == (3 * 34 + 2, 36)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--classes", "10"], "no class of this network"),
        (["--classes", "a"], "must be 'all' or numbers"),
        (["--per-class", "0"], "at least 1"),
        (["--guidance", "2"], "guidance needs"),
        (["--guide", "x"], "guidance needs"),
        (["--guidance", "2", "--guide", "nowhere"], "no such snapshot"),
        (["--grid", "karras"], "known are"),
        (["--solver", "rk45"], "known are"),
        (["--steps", "0"], "at least one"),
        (["--churn", "1", "--solver", "euler"], "stochastic"),
        (["--batch", "0"], "at least 1"),
        (["--trained-range"], "does not state its noise density"),
        (["--trained-range", "0.7"], "must be a share below 0.5"),
        (["--trained-range", "--sigma-max", "10"], "leave the others out"),
        (["--trained-range", "--grid", "ays-sd15"], "leave the others out"),
        (["--device", "cuda:99"], "torch sees"),
        (["--device", "gpu"], "no such device"),
        (["--device", "meta"], "use cpu or cuda"),
    ],
)
def test_bad_input_is_one_line(snapshot, tmp_path, capsys, arguments, expected):
    assert run(snapshot, "--out", tmp_path / "x.png", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and expected in error
    assert not (tmp_path / "x.png").exists()


def test_the_trained_range_begins_where_data_still_show_through(tmp_path, capsys):
    noise = {"density": "laplace", "mu": 0.0, "b": 0.5}
    path = write_network(tmp_path / "with.safetensors")
    network, header = load_denoiser(path)
    header["noise"] = noise
    ranged = Drawing(network, header, Settings(trained_range=1e-3))
    low, high = (0.5 * math.exp(sign * math.log(500) / 4) for sign in (-1, 1))
    assert [ranged.sigmas[-2].item(), ranged.sigmas[0].item()] == pytest.approx([low, high])
    assert ranged.start == pytest.approx(math.hypot(high, 0.5))
    list(ranged.batches([0], 1))
    assert capsys.readouterr().err.count("warning") == 0
    usual = Drawing(network, header, Settings(steps=2))
    list(usual.batches([0, 1], 1)) + list(usual.batches([2], 1))
    assert usual.start == 80 and capsys.readouterr().err.count("warning: the grid edm goes from sigma 80 to 0.002") == 1


def test_activations_are_those_of_training_on_a_gpu_alone(tmp_path):
    """By the header; by the run's config where an earlier version wrote the snapshot; what is asked for is what is taken."""
    run = tmp_path / "run"
    path, alone = write_network(run), write_network(tmp_path / "a.safetensors")

    def found(device, where=path, asked="auto", **header):
        return activations_of(argparse.Namespace(device=device, activations=asked), where, header)

    assert found("cuda", activations="bf16") == "bf16" and found("cuda:1", activations="fp16") == "fp16"
    assert found("cpu", activations="bf16") == "fp32"
    assert found("cpu", asked="bf16") == "bf16" and found("cuda", asked="fp32", activations="bf16") == "fp32"
    assert found("cuda") == "fp32"
    (run / "config.yaml").write_text("engine: {activations: fp16}\n")
    assert found("cuda") == "fp16" and found("cuda", alone) == "fp32" and found("cuda", activations="bf16") == "bf16"
    with pytest.raises(SystemExit):
        drawing(path, "--activations", "half")


@pytest.mark.parametrize(("activations", "left"), [("fp32", False), ("bf16", True)])
def test_fp32_is_not_tf32(snapshot, monkeypatch, activations, left):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    drawing(snapshot, "--activations", activations)
    assert torch.backends.cudnn.allow_tf32 is left


def test_a_folder_of_other_activations_is_not_gone_on_with(snapshot, tmp_path, capsys):
    options = ["--out", tmp_path / "f", "--steps", 1, "--per-class", 1]
    assert run(snapshot, *options) == 0 and "activations" not in json.loads(
        (tmp_path / "f" / "origin.json").read_text()
    )
    assert run(snapshot, *options, "--activations", "bf16") == 2
    assert "type of activations" in capsys.readouterr().err


def test_bad_snapshots_are_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "p.safetensors").write_bytes(b"nothing")
    for path in ("nowhere", "empty", "p.safetensors"):
        assert run(tmp_path / path, "--out", tmp_path / "x.png") == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_guide_of_other_data_is_refused(snapshot, tmp_path, capsys):
    guide = write_network(tmp_path / "g.safetensors", data=DATA | {"std": [50.0]})
    arguments = ["--guidance", "2", "--guide", str(guide), "--out", str(tmp_path / "x.png")]
    assert generate.main([str(snapshot), *arguments]) == 2
    error = capsys.readouterr().err
    assert "another std" in error and error.count("\n") == 1 and not (tmp_path / "x.png").exists()
