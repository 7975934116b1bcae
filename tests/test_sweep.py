"""A sweep: measured once, gone on with after a stop, told as table, picture and best network; here and on Slurm."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cluster import sweep, sweep_array, sweep_plot
from data_pipeline import encode, manifest
from tests import slurm_machine
from tests.gloo import Forked
from tests.test_generate import DATA, write_network
from trainer import config, evaluate
from trainer.snapshots import verify

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Return a run of eight clocks of two lengths with the data that it names."""
    folder = tmp_path_factory.mktemp("sweep")
    assert encode.main(["sklearn:digits", str(folder / "data")]) == 0
    m = manifest.load(folder / "data")
    data = DATA | {k: list(getattr(m, k)) for k in ("mean", "std", "shape")} | {"digest": m.digest}
    for clock in range(64, 577, 64):
        for sigma_rel in (0.05, 0.1):
            write_network(folder / "run", clock=clock, sigma_rel=sigma_rel, seed=0, data=data)
    (folder / "run" / "config.yaml").write_text(f"data: {{path: {folder / 'data'}}}")
    return folder / "run"


def run(*arguments):
    return sweep.main([str(a) for a in arguments])


def test_a_whole_sweep_and_going_on_with_it(run_dir, tmp_path, capsys, monkeypatch):
    called = []
    real = sweep_array.run_one

    def run_one(root, command):
        called.append(command)
        if len(called) < 3:
            real(root, command)
        else:  # without the seconds of importing
            forked = Forked(dict(os.environ), tmp_path / "said", tuple(command[1:]), module=command[0])
            assert forked.wait(300) == 0, (tmp_path / "said").read_text()

    monkeypatch.setattr(sweep_array, "run_one", run_one)
    options = ["--metric", "loss", "--data-images", 20]
    assert run(run_dir, "--sigma-rel", "0.06:0.10:0.02", *options) == 0
    out = run_dir / "sweep"
    rows = list(csv.DictReader((out / "sweep.csv").open()))
    assert [r["sigma_rel"] for r in rows] == ["0.06", "0.08", "0.1"] and all(float(r["loss"]) > 0 for r in rows)
    assert Image.open(out / "sweep.png").size == (sweep_plot.WIDTH, sweep_plot.HEIGHT)
    best = min(rows, key=lambda r: float(r["loss"]))
    assert verify(out / "best.safetensors")["sigma_rel"] == float(best["sigma_rel"])
    assert f"at sigma_rel {best['sigma_rel']}" in capsys.readouterr().out
    assert [c[0] for c in called] == ["trainer.posthoc", "trainer.evaluate"]  # one pass, one process
    assert not list(out.glob("*/phema-*"))

    assert run(run_dir, "--sigma-rel", "0.06:0.10:0.02,0.12", *options) == 0
    measured = [c for c in called[2:] if c[0] == "trainer.evaluate"]
    assert len(measured) == 1 and sum("phema" in word for word in measured[0]) == 1  # only what was missing
    assert len(list(csv.DictReader((out / "sweep.csv").open()))) == 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--sigma-rel", "0.3"], "0.2886"),
        (["--sigma-rel", "x"], "rising range"),
        (["--sigma-rel", "0.1", "--guidance", "1.0:2.0:0.5"], "needs a guide"),
        (["--sigma-rel", "0.1", "--guidance", "1.0:2.0:0.5", "--guide", "self"], "the loss is not guided"),
        (["--sigma-rel", "0.1", "--metric", "beauty"], "known are"),
        pytest.param(["--sigma-rel", "0.01"], "predicted error above", marks=pytest.mark.slow),
        pytest.param(["--sigma-rel", "0.1", "--data", "/nowhere"], "not found", marks=pytest.mark.slow),
        (["--sigma-rel", "0.1", "--at", "32"], "no snapshot lies between"),
    ],
)
def test_bad_input_is_one_line(run_dir, capsys, arguments, expected):
    assert run(run_dir, *arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and expected in lines[0]


def test_an_empty_run_is_one_line(tmp_path, capsys):
    assert run(tmp_path, "--sigma-rel", "0.1") == 2
    assert "no snapshots" in capsys.readouterr().err


def test_golden_section_finds_the_minimum(tmp_path, monkeypatch):
    made = sweep.Sweep(tmp_path, 1, ["loss"], [], "0.05")

    def measure(lengths, guidances):
        for s in lengths:
            path = made.result(s, 1.0)
            path.parent.mkdir(parents=True, exist_ok=True)
            value = {"value": (math.log(s) - math.log(0.0873)) ** 2, "better": "low"}
            path.write_text(json.dumps({"metrics": {"loss": value}}))

    monkeypatch.setattr(made, "measure", measure)
    grid = [0.04, 0.08, 0.12, 0.16]
    measure(grid, [1.0])
    probes = sweep.refine(made, grid, [1.0], 12)
    assert min(probes, key=lambda s: abs(s - 0.0873)) == pytest.approx(0.0873, abs=5e-4)
    assert sweep.refine(made, [0.12, 0.16], [1.0], 5) == []  # the best is an end: nothing to search between


def test_guides_are_named_only_where_they_guide(tmp_path):
    made = sweep.Sweep(tmp_path, 1, ["loss"], ["--guide", "g.safetensors", "--steps", "4"], "0.05")
    assert made.of_guidance(1.0) == ["--steps", "4"]
    assert made.of_guidance(1.4) == ["--guide", "g.safetensors", "--steps", "4"]
    other = sweep.Sweep(tmp_path, 1, ["loss"], ["--steps", "8"], "0.05")
    assert (
        made.folder != other.folder and made.folder != sweep.Sweep(tmp_path, 2, ["loss"], made.options, "0.05").folder
    )


def test_metrics_are_those_of_evaluate():
    assert set(sweep.METRICS) == set(evaluate.METRICS)


def test_ticks_are_round():
    assert sweep_plot.ticks(0.011, 0.209, 10) == [0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2]
    assert sweep_plot.ticks(0.4705, 0.4879) == [0.475, 0.48, 0.485]


def test_needs_no_torch_and_runs_by_path():
    code = "import sys, cluster.sweep; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    shown = subprocess.run(
        [sys.executable, ROOT / "cluster" / "sweep.py", "--help"], capture_output=True, text=True, cwd="/"
    )
    assert shown.returncode == 0 and "--sigma-rel" in shown.stdout


@pytest.mark.slow
@pytest.mark.skipif(bool(slurm_machine.missing()), reason=slurm_machine.missing())
def test_on_slurm_a_task_per_network(run_dir):
    plain = (run_dir / "config.yaml").read_text()
    made = config.load(ROOT / "configs" / "quickstart.yaml", [f"run={run_dir}", f"data.path={run_dir.parent / 'data'}"])
    made.cluster.kind = "slurm"
    (run_dir / "config.yaml").write_text(config.dump(made))
    command = [sys.executable, "cluster/sweep.py", str(run_dir), "--sigma-rel", "0.07,0.09", "--data-images", "10"]
    with slurm_machine.SlurmMachine(nodes=2) as machine:
        environment = os.environ | machine.environment
        for expected in (2, 0):
            words = [*command, *(["--data", "/nowhere"] if expected else [])]
            done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
            assert done.returncode == expected, done.stdout + done.stderr
            if expected:
                assert done.stderr.startswith("error: ") and "not found" in done.stderr and "(Slurm job" in done.stderr
    (run_dir / "config.yaml").write_text(plain)
    assert "2 tasks" in done.stdout and "best loss" in done.stdout
    rows = list(csv.DictReader((run_dir / "sweep" / "sweep.csv").open()))
    assert [r["sigma_rel"] for r in rows] == ["0.07", "0.09"]
