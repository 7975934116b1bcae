"""Published pickles as a series: what is rebuilt from them is what the solved coefficients make of their tensors."""

import collections
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models import denoiser, import_edm2
from tests.test_generate import TINY
from tests.test_import_edm2 import persistent, pickled, saved, stand_in, tensor_of
from trainer import ema_profiles, posthoc, snapshots

CLASSES = {"Denoiser": "Precond", "UNet": "UNet", "MPConv": "MPConv", "MPFourier": "MPFourier"}
CLOCKS = range(16, 65, 16)  # kimg, as the names have them: 8 is 8192 images
LOOSE = ("--max-error", "1")  # few clocks, to be quick


class ModuleDict:
    """Pickles as torch's container of this state."""

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return stand_in("torch.nn.modules.container", "ModuleDict"), (), self.state


def tensor(name, value):
    value = import_edm2.to_reference(name, value.detach()).half().contiguous()
    with warnings.catch_warnings(action="ignore"):
        storage = torch.storage.TypedStorage(value.flatten().tolist(), dtype=torch.float16)
    return tensor_of(saved(storage), 0, tuple(value.shape), value.stride())


def module(node, prefix="", options=None):
    """Return what pickles as the reference pickles the module at `prefix`."""
    state = {
        "_parameters": {n: tensor(prefix + n, p) for n, p in node._parameters.items() if p is not None},
        "_buffers": {n: tensor(prefix + n, b) for n, b in node._buffers.items() if b is not None},
        "_modules": collections.OrderedDict(
            (n, module(child, f"{prefix}{n}.")) for n, child in node._modules.items() if child is not None
        ),
    }
    if isinstance(node, torch.nn.ModuleDict):
        return ModuleDict(state)
    state |= {"_init_args": (), "_init_kwargs": options or {}}
    return persistent(CLASSES.get(type(node).__name__, "Block"), state)


def write_pickle(folder, kimg, sigma_rel, network, name="network-snapshot"):
    names = {ours: theirs for theirs, ours in import_edm2.RENAMED.items()}
    options = {names.get(k, k): v for k, v in TINY.items() if k != "family"}
    path = folder / f"{name}-{kimg:07d}-{sigma_rel:.3f}.pkl"
    path.write_bytes(pickled({"ema": module(network, options=options)}))
    return path


def network_of(seed):
    torch.manual_seed(0)  # the buffers of one run
    network = denoiser.build(TINY)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.normal_()
    return network


@pytest.fixture
def folder(tmp_path):
    write_pickle(tmp_path, 0, 0.05, network_of(0))  # before training
    for i, kimg in enumerate(CLOCKS):
        for j, sigma_rel in enumerate((0.05, 0.1)):
            write_pickle(tmp_path, kimg, sigma_rel, network_of(1 + 2 * i + j))
    return tmp_path


def test_what_comes_out_is_what_the_coefficients_make_of_the_tensors(folder, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert posthoc.main([str(folder), "--sigma-rel", "0.08", "--out", str(out), "--dtype", "fp32", *LOOSE]) == 0
    assert "8 of 8 pickles converted" in capsys.readouterr().out
    clocks = [-(-kimg * 1000 // 1024) * 1024 for kimg in CLOCKS]
    gammas = [ema_profiles.gamma_from_sigma_rel(s) for s in (0.05, 0.1)]
    x = ema_profiles.solve_weights(
        np.repeat(clocks, 2), np.tile(gammas, 4), clocks[-1], ema_profiles.gamma_from_sigma_rel(0.08)
    )[:, 0]
    made = load_file(out)
    for name in ("unet.out_gain", "unet.enc.4x4_block0.attn_qkv.weight", "unet.emb_label.weight"):
        stored = torch.stack([network_of(1 + i).state_dict()[name].half().double() for i in range(8)])
        wanted = (torch.from_numpy(x).view(-1, *[1] * (stored.ndim - 1)) * stored).sum(0)
        assert (made[name] - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    network, header = snapshots.load_denoiser(out)
    assert header["clock"] == clocks[-1] and header["model"]["model_channels"] == TINY["model_channels"]


def test_converted_once_and_gone_on_with(folder, tmp_path, capsys):
    arguments = [str(folder), "--sigma-rel", "0.1", "--out", str(tmp_path / "a.safetensors"), *LOOSE]
    assert posthoc.main(arguments) == 0
    files = sorted((folder / "snapshots").iterdir())
    times = [p.stat().st_mtime_ns for p in files]
    files[3].unlink()  # as if it had been stopped
    capsys.readouterr()
    assert posthoc.main(arguments) == 0
    assert "1 of 8 pickles converted" in capsys.readouterr().out
    assert [p.stat().st_mtime_ns for p in files][:3] == times[:3] and files[3].is_file()


def test_what_is_no_series_is_one_line(folder, tmp_path, capsys):
    out = tmp_path / "x.safetensors"
    arguments = [str(folder), "--sigma-rel", "0.1", "--out", str(out), *LOOSE]
    for name, content, expected in (
        ("weights.pkl", b"", "tells no clock"),
        ("network-snapshot-0000072-0.050.pkl", b"cut off", "no readable pickle"),
        ("other-0000064-0.050.pkl", b"", "keep one network per folder"),
    ):
        (folder / name).write_bytes(content)
        assert posthoc.main(arguments) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1
        (folder / name).unlink()
    assert not out.exists() and not list((folder / "snapshots").glob(".*"))
