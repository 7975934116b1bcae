"""The benchmark of presets: the configs are those of training, what is wrong is one line, the parts make up the step."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.test_child import alive
from trainer import flops, roofline
from trainer.bare import Bare
from trainer.benchmark import main
from trainer.config import ROOT, load, to_dict
from trainer.engine import build_denoiser
from trainer.micro_batch_search import fits, search
from trainer.preset_benchmark import alternate
from trainer.preset_config import compose

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
        (["--preset", "xs", "--micro-batch", "-1"], "--micro-batch -1: must be a number of images from 1, or auto"),
        (["--preset", "xs", "--micro-batch", "x"], "--micro-batch x: must be a number of images from 1, or auto"),
        (["--preset", "xs", "--steps", "0"], "--steps 0: must be at least 1"),
        (["--preset", "xs", "--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--preset", "xs", "--loop", "bare,bare"], "--loop bare,bare: must be of deepspeed, bare, with commas"),
        (["--preset", "xs", "--loop", "fast"], "--loop fast: must be of deepspeed, bare, with commas"),
        (
            ["--preset", "xs", "--profile", "/dev/null/traces"],
            "--profile /dev/null/traces: nothing can be written there (Not a d",
        ),
        (
            ["--preset", "xs", "--device", "cpu", "model.attn_resolutions=[4"],
            "'model.attn_resolutions=[4': cannot be read",
        ),
        (["--preset", "xs", "--device", "cpu", "run.x=4"], "'run.x=4': cannot be read"),
        (["--reference", "/tmp"], "--reference: goes with --preset"),
        (["--loop", "bare"], "--loop: goes with --preset"),
        (
            ["--preset", "xs", "--table", "sampling", "--profile", "x"],
            "--profile: goes with --preset",
        ),
        (["model.num_blocks=1"], "model.num_blocks=1: overrides go with --preset"),
        (["--table", "sampling", "model.num_blocks=1"], "model.num_blocks=1: overrides go with --preset"),
        (["--way", "fast"], "--way fast: must be one of eager, compiled, in-forward"),
        (["--table", "optimizer", "--steps", "0"], "--steps 0: must be at least 1"),
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


def device_of(fitting: int, fastest: int):
    """A device on which `fitting` images fit, and `fastest` are the fastest; it keeps what was asked of it."""
    asked = []

    def measure(micro_batch):
        asked.append(micro_batch)
        rate = min(micro_batch, fastest) - micro_batch / 1000
        return {"micro_batch": micro_batch, "images_per_second": rate} if micro_batch <= fitting else None

    return measure, asked


@pytest.mark.parametrize("fitting", [0, 1, 4, 64, 200, 5000])
@pytest.mark.parametrize("guess", [1, 16, 128, 5000])
def test_the_search_ends_at_the_largest_that_fits_a_gpu(fitting, guess):
    measure, asked = device_of(fitting, 10_000)
    found = search(measure, lambda micro_batch: micro_batch <= guess, on_gpu=True)
    fitting = min(fitting, 1024)
    assert len(asked) == len(set(asked)), "no size is compiled twice"
    assert max((r["micro_batch"] for r in found), default=0) == (2 ** (fitting.bit_length() - 1) if fitting else 0)


@pytest.mark.parametrize(("fastest", "tried"), [(32, [64, 128]), (64, [64, 128]), (128, [64, 128, 256])])
def test_the_search_on_a_gpu_ends_where_nothing_is_gained(fastest, tried):
    measure, asked = device_of(5000, fastest)
    search(measure, lambda micro_batch: micro_batch <= 128, on_gpu=True)
    assert asked == tried


def test_the_search_on_a_cpu_ends_where_nothing_is_gained_and_never_beyond_what_fits():
    measure, asked = device_of(5000, 8)
    search(measure, lambda micro_batch: True, on_gpu=False)
    assert asked == [1, 2, 4, 8, 16]
    measure, asked = device_of(5000, 5000)
    search(measure, lambda micro_batch: micro_batch <= 4, on_gpu=False)
    assert asked == [1, 2, 4]


def test_ratios_are_those_of_a_round():
    """A machine slows down by half from round to round: rates differ, ratios do not. The second loop does two images at once."""
    seconds = {"bare": 1.0, "deepspeed": 4.0}
    images, load = {"bare": 1, "deepspeed": 2}, iter([1, 1, 2, 2, 4, 4])

    def measure(row):
        loop, slow = row["loop"], next(load)
        took = {"step_seconds": seconds[loop] * slow, "host_cpu_seconds": seconds[loop] / 4}
        return {
            "loop": loop,
            "micro_batch": images[loop],
            "images_per_second": images[loop] / took["step_seconds"],
        } | took

    first = [measure({"loop": "bare"}), measure({"loop": "deepspeed"}), {"loop": "too large", "out_of_memory": True}]
    bare, deepspeed, large = alternate(first, 3, measure)
    assert bare["rounds"] == [1, 0.5, 0.25] and bare["images_per_second"] == 0.5 and "slower" not in bare
    assert deepspeed["rounds"] == [0.5, 0.25, 0.125] and deepspeed["slower_than"] == "bare"
    assert deepspeed["slower"] == deepspeed["more_host_cpu"] == 2
    assert large == first[2]


@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_times_its_algorithms_unless_a_run_must_repeat_itself(deterministic, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    config = compose("xxs", [*TINY, f"engine.deterministic={str(deterministic).lower()}"], 1, False)
    Bare(config, build_denoiser(config))
    assert torch.backends.cudnn.benchmark is not deterministic


@pytest.mark.slow
def test_it_measures(tmp_path, capsys):
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
        "bare,deepspeed",
    ]
    assert main([*arguments, "--json", "--profile", str(tmp_path / "new"), *TINY]) == 0
    rows = json.loads(capsys.readouterr().out)["training"]
    assert [r["loop"] for r in rows] == ["bare", "deepspeed"] and len({r["micro_batch"] for r in rows}) == 1
    assert str(rows[0]["micro_batch"]) in rows[0]["tried"] and rows[1]["slower_than"] == "bare"
    for found in rows:
        total = sum(value for name, value in found["part_seconds"].items() if name != "communication")
        assert 0.7 < total / found["step_seconds"] <= 1.02, "the parts make up the step"
        assert found["kernels_per_step"] > 100 and 0 < found["mfu"] < 1.5 and len(found["rounds"]) == 1
        trace = tmp_path / "new" / f"xxs-{found['loop']}-{found['micro_batch']}.json"
        assert json.loads(trace.read_text())["traceEvents"]


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(number) for number in file.read().split()]


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_ctrl_c_leaves_nothing_behind(sent, status, tmp_path):
    command = [sys.executable, "-m", "trainer.benchmark", "--preset", "xxs", "--device", "cpu", "--steps", "100000"]
    known = os.environ | {"TMPDIR": str(tmp_path)}
    parent = subprocess.Popen(
        [*command, "--micro-batch", "1", *TINY], cwd=ROOT, env=known, stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob("tmp*/data/manifest.json")):  # it measures
        assert parent.poll() is None
        time.sleep(0.1)
    (measuring,) = children(parent.pid)
    parent.send_signal(sent)
    told = parent.communicate(timeout=180)[1]
    assert parent.returncode == status and "Traceback" not in told
    deadline = time.monotonic() + 60
    while alive(measuring) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(measuring) and not list(tmp_path.glob("tmp*"))


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
