"""The row of the reference: another's network behind its published interface is trained by our formulas and timed like ours.

The clone is a stand-in that the tests write, around a small network of our own: the reference itself is never here.
"""

import json
import sys

import pytest
import torch

from trainer.benchmark import main
from trainer.loss import denoising_loss
from trainer.preset_config import compose
from trainer.reference_loop import ReferenceLoop, find

TINY = ["model.model_channels=16", "model.resolution=16", "model.attn_resolutions=[4]", "model.num_blocks=1"]
NETWORK = """
import torch
from models.denoiser import build
seen = {}


class Precond(torch.nn.Module):
    def __init__(self, img_resolution, img_channels, label_dim, use_fp16=True, sigma_data=0.5, logvar_channels=128, **unet_kwargs):
        super().__init__()
        seen.update(unet_kwargs, use_fp16=use_fp16, logvar_channels=logvar_channels)
        known = {"model_channels": unet_kwargs["model_channels"], "channel_mult": [1, 2], "num_blocks": 1}
        sizes = {"resolution": img_resolution, "channels": img_channels, "label_dim": label_dim, "sigma_data": sigma_data}
        self.net = build(sizes | known)

    def forward(self, x, sigma, class_labels=None, force_fp32=False, return_logvar=False, **unet_kwargs):
        seen.update(shapes=(tuple(x.shape), tuple(sigma.shape), tuple(class_labels.shape)), training=self.training)
        denoised, logvar = self.net(x, sigma.flatten(), class_labels, return_logvar=True)
        return (denoised, logvar) if return_logvar else denoised
"""
AVERAGES = """
import copy


class PowerFunctionEMA:
    def __init__(self, net, stds=[0.050, 0.100]):
        self.stds, self.averages, self.updates = stds, [copy.deepcopy(net) for _ in stds], []

    def update(self, cur_nimg, batch_size):
        self.updates.append((cur_nimg, batch_size))
"""


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder like a clone of the reference; what is imported from it is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def forget():
        for name in [n for n in sys.modules if n.partition(".")[0] == "training"]:
            del sys.modules[name]

    forget()
    folder = tmp_path / "edm2"
    (folder / "training").mkdir(parents=True)
    (folder / "training/networks_edm2.py").write_text(NETWORK)
    (folder / "training/phema.py").write_text(AVERAGES)
    yield folder
    forget()


def test_it_is_trained_by_the_same_loss(clone):
    loop = ReferenceLoop(compose("xxs", TINY, 3, False), find(str(clone)))
    for p in loop.net.parameters():
        if p.shape == (1,):
            p.data.fill_(0.3)
    latents, noise = torch.randn(2, *loop.shape)
    sigma, labels = torch.rand(3) + 0.2, torch.tensor([0, 999, 5])
    expected, _ = denoising_loss(loop.net.net, latents, labels, sigma, noise)
    rows = torch.nn.functional.one_hot(labels, 1000).float()
    found = loop.loss(latents, rows, sigma.reshape(-1, 1, 1, 1), noise)
    assert float(found.detach()) == pytest.approx(float(expected.sum().detach()), 1e-5)


@pytest.mark.parametrize("rounds", [1, 2])
def test_steps_move_it_and_are_told_to_its_averages(rounds, clone):
    loop = ReferenceLoop(compose("xxs", [*TINY, f"global_batch={3 * rounds}"], 3, False), find(str(clone)))
    evaluated = []
    loop.net.register_forward_hook(lambda *_: evaluated.append(loop.clock))
    before = {name: p.detach().clone() for name, p in loop.net.named_parameters()}
    spoiled = next(p for name, p in loop.net.named_parameters() if name.endswith("logvar_linear.weight"))
    spoiled.register_hook(lambda gradient: gradient.index_fill(1, torch.tensor([1]), float("nan")))
    for _ in range(3):
        loop.step()
    assert loop.averages.updates == [(3 * rounds * n, 3 * rounds) for n in (1, 2, 3)] and loop.averages.stds == [
        0.05,
        0.10,
    ]
    assert evaluated == [3 * rounds * n for n in range(3) for _ in range(rounds)]
    after = dict(loop.net.named_parameters())
    assert all(p.isfinite().all() for p in after.values())
    moved = (after["net.logvar_linear.weight"] != before["net.logvar_linear.weight"])[0]
    assert moved[0] and not moved[1], "a gradient that is not finite counts as zero"
    assert {"examples", "forward", "backward", "optimizer"} <= set(loop.phases.take())


def test_it_is_told_the_preset_and_what_an_override_changes(clone):
    more = ["model.resolution=16", "model.residual_balance=0.4", "model.clip_act=0"]
    ReferenceLoop(compose("m", ["model.model_channels=16", *more], 2, False), find(str(clone))).step()
    seen = sys.modules["training.networks_edm2"].seen
    shapes = ((2, 4, 16, 16), (2, 1, 1, 1), (2, 1000))
    assert (seen.pop("shapes"), seen.pop("training")) == (shapes, True)
    plain = {"use_fp16": False, "model_channels": 16, "dropout": 0.1, "logvar_channels": 128}
    assert seen == plain | {"res_balance": 0.4, "clip_act": None}


OTHER = NETWORK.replace("return (denoised, logvar)", "return denoised")
WRONG = [
    ("networks_edm2", "import torch_utils_of_old", "import training.networks_edm2 failed with ModuleNotFoundError: No module"),
    ("networks_edm2", "def (", "import training.networks_edm2 failed with SyntaxError"),
    ("networks_edm2", "", "Precond failed with AttributeError"),
    ("networks_edm2", NETWORK.replace("label_dim,", "classes,"), "Precond failed with TypeError"),
    ("networks_edm2", OTHER, "net(x, sigma, labels, return_logvar=True) failed with"),
    ("phema", AVERAGES.replace("stds=", "lengths="), "PowerFunctionEMA failed with TypeError"),
    ("phema", AVERAGES.replace("cur_nimg", "now"), "PowerFunctionEMA.update(cur_nimg=..., batch_size=...) failed with TypeError"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "told"), WRONG)
def test_another_interface_is_one_line(name, content, told, clone):
    (clone / f"training/{name}.py").write_text(content)
    with pytest.raises(ValueError) as caught:
        ReferenceLoop(compose("xxs", TINY, 2, False), find(str(clone))).step()
    line = str(caught.value)
    assert line.startswith(f"--reference {clone}: ") and told in line and "\n" not in line
    assert "must be a clone of github.com/NVlabs/edm2" in line


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried to allocate", "CUDNN_STATUS_ALLOC_FAILED"])
def test_memory_that_runs_out_is_not_the_clones_fault(said, clone):
    """It is a RuntimeError, from which the command goes on to a smaller micro-batch."""
    text = NETWORK.replace(
        "        seen.update(shapes", f"        raise RuntimeError({said!r})\n        seen.update(shapes"
    )
    (clone / "training/networks_edm2.py").write_text(text)
    with pytest.raises(RuntimeError, match=said[:12]):
        ReferenceLoop(compose("xxs", TINY, 2, False), find(str(clone))).step()


def test_a_folder_that_is_none_is_one_line(clone, capsys):
    def tell(folder):
        assert main(["--preset", "xxs", "--device", "cpu", "--micro-batch", "1", "--reference", str(folder)]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        return line

    assert "no such folder; clone github.com/NVlabs/edm2" in tell(clone / "none")
    (clone / "training/phema.py").unlink()
    assert "has no training/phema.py; name the folder of a clone" in tell(clone)


@pytest.mark.slow
def test_the_command_measures_it_beside_ours(clone, capsys):
    arguments = ["--preset", "xxs", "--device", "cpu", "--micro-batch", "2", "--steps", "2", "--loop", "bare"]
    assert main([*arguments, "--reference", str(clone), "--json", *TINY]) == 0
    ours, theirs = json.loads(capsys.readouterr().out)["training"]
    assert (ours["loop"], theirs["loop"], theirs["slower_than"]) == ("bare", "reference", "bare")
    assert theirs["slower"] == pytest.approx(ours["images_per_second"] / theirs["images_per_second"])
    (clone / "training/networks_edm2.py").write_text("import torch_utils_of_old")
    assert main([*arguments, "--reference", str(clone), *TINY]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "No module named 'torch_utils_of_old'" in told
