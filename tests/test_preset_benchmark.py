"""The benchmark of presets: the configs are those of training, what is wrong is one line, the parts make up the step."""

import json
import os
import subprocess
import sys

import pytest
import torch

from trainer import flops, roofline
from trainer.benchmark import main
from trainer.config import ROOT, load, to_dict
from trainer.preset_benchmark import compose, fits

TINY = ["model.model_channels=16", "model.resolution=16", "model.attn_resolutions=[4]", "model.num_blocks=1"]


@pytest.mark.parametrize("preset", ["xxs", "xl"])
def test_a_preset_is_composed_as_hydra_does(preset):
    mine, theirs = to_dict(compose(preset, [], 4, True)), to_dict(load(f"configs/edm2_{preset}.yaml"))
    for key in ("run", "duration_images", "global_batch", "micro_batch", "cluster"):
        mine.pop(key), theirs.pop(key)
    assert mine == theirs


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--preset", "xs,huge"], "--preset huge: choose among l, m, s, xl, xs, xxl, xxs"),
        (["--preset", "xs", "--micro-batch", "0"], "--micro-batch 0: must be a number of images from 1, or auto"),
        (["--preset", "xs", "--steps", "0"], "--steps 0: must be at least 1"),
        (["--preset", "xs", "--device", "cpu", "engine.compil=true"], "did you mean engine.compile?"),
        (["--preset", "xs", "--device", "cpu", "nonsense"], "must be written key=value"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, line, capsys):
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert line in told.err and told.err.count("\n") == 1 and not told.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(capsys):
    assert main(["--preset", "xs", "--device", "cuda"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def test_the_roofline_counts_what_flops_counts():
    model = to_dict(compose("xxs", TINY, 1, False))["model"]
    counted, work = flops.count(model), roofline.count(model, "bf16", 4)
    assert work["forward"].flops == 4 * counted.forward_flops
    # two products for each of the forward's, but for the gradient of the first layer's input
    assert 1.9 < work["backward"].flops / work["forward"].flops <= 2
    sooner, later = (work["forward"].seconds(1e12, rate) for rate in (1e12, 1e9))
    assert sooner < later and sooner >= work["forward"].flops / 1e12
    twice = roofline.count(model, "bf16", 8)["forward"]
    assert twice.flops == 2 * work["forward"].flops and twice.matrix_bytes < 2 * work["forward"].matrix_bytes


def test_more_images_need_more_memory():
    assert fits(compose("xxs", [], 1, False), 4e9) and not fits(compose("xxs", [], 64, False), 4e9)


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["deepspeed", "bare"])
def test_it_measures(loop, tmp_path, capsys):
    arguments = [
        "--preset",
        "xxs",
        "--device",
        "cpu",
        "--micro-batch",
        "auto",
        "--steps",
        "2",
        "--loop",
        loop,
        "--json",
    ]
    assert main([*arguments, "--profile", str(tmp_path), *TINY]) == 0
    (found,) = json.loads(capsys.readouterr().out)["training"]
    assert found["loop"] == loop and (loop != "bare" or str(found["micro_batch"]) in found["tried"])
    total = sum(value for name, value in found["part_seconds"].items() if name != "communication")
    assert 0.7 < total / found["step_seconds"] <= 1.02, "the parts make up the step"
    assert found["kernels_per_step"] > 100 and 0 < found["mfu"] < 1.5
    assert json.loads((tmp_path / f"xxs-{found['micro_batch']}.json").read_text())["traceEvents"]


@pytest.mark.slow
def test_without_what_a_bare_machine_lacks(tmp_path):
    """Of the dependencies torch, numpy, rich, yaml and what checks data suffice: no DeepSpeed, Hydra, webdataset or submitit."""
    lacking = (
        "deepspeed",
        "hydra",
        "omegaconf",
        "webdataset",
        "submitit",
        "streaming",
        "sklearn",
        "matplotlib",
        "diffusers",
    )
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules.update(dict.fromkeys({lacking}))")
    arguments = [
        "--preset",
        "xxs",
        "--device",
        "cpu",
        "--micro-batch",
        "1",
        "--steps",
        "1",
        "--loop",
        "bare",
        "--json",
        *TINY,
    ]
    known = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "trainer.benchmark", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=known, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["training"][0]["images_per_second"] > 0
