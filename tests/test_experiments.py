"""An experiment runs every arm with every seed once, goes on where it was killed, and its table says what it ran."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from data_pipeline import encode
from trainer import config, experiment_report, experiments, state

TINY = """
arms:
  narrow: [quickstart, model.model_channels=8, model.channels_per_head=8]
  narrow_laplace: [quickstart, model.model_channels=8, model.channels_per_head=8, noise=laplace]
set: [data.heldout=0.1, global_batch=32, micro_batch=32, duration_images=1Ki, snapshots.every_images=1Ki, "ema.sigma_rel=[0.1]",
      checkpoints.every_images=64, metrics.every_images=64, cluster.ranks_per_node=1]
seeds: [7]
baseline: narrow
evaluate: --metric loss,denoise,chain --data-images 20
"""


@pytest.fixture
def tiny(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    assert encode.main(["sklearn:digits", str(tmp_path / "digits")]) == 0
    return [str(file), "--runs", str(tmp_path / "runs"), "--data", str(tmp_path / "digits")]


@pytest.mark.slow
def test_goes_on_in_the_middle_of_a_cell_and_tabulates_what_it_ran(tiny, tmp_path):
    first = tmp_path / "runs" / "tiny" / "narrow-seed7"
    command = [sys.executable, "-m", "trainer.experiments", *tiny]
    killed = subprocess.Popen(command, cwd=config.ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"))
    deadline = time.monotonic() + 120
    while state.read(first).get("clock", 0) < 64 and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert experiments.main(tiny) == 0
    said = (first / "trainer.log").read_text()
    assert "continuing at" in said, "the killed command's trainer saved, and the next went on from there"
    starts = state.read(first)["attempt"]

    rows = list(csv.DictReader((tmp_path / "runs/tiny/tiny.csv").open()))
    assert {(r["arm"], r["seed"], r["images"]) for r in rows} == {
        (a, "7", "1024") for a in ("narrow", "narrow_laplace")
    }
    for metric in ("loss", "denoise", "chain"):
        measured = json.loads(next(first.glob("experiment/*/*.json")).read_text())["metrics"][metric]["value"]
        row = next(r for r in rows if (r["arm"], r["metric"], r["at"]) == ("narrow", metric, ""))
        assert float(row["value"]) == measured
    table = (tmp_path / "runs/tiny/tiny.md").read_text()
    assert "| narrow_laplace |" in table and "(not resolved)" in table, "one seed resolves nothing"
    assert "| denoise, by noise | 0.03 |" in table and "| chain, by noise | 0.03 |" in table

    assert experiments.main(tiny) == 0
    assert state.read(first)["attempt"] == starts, "what is finished is not started again"
    assert experiments.main([*tiny, "lr.ref_lr=0.005"]) == 2, "another config does not take over the runs"


def test_the_experiments_of_this_repository_load_with_the_sizes_they_state(tmp_path):
    for path in experiments.FOLDER.glob("*.yaml"):
        experiment = experiments.read(path.stem)
        found = experiments.cells(experiment, tmp_path, None, experiment.seeds[:2], [])
        assert len({c.folder for c in found}) == len(found) == len(experiment.arms) * 2 >= 6
        assert len(experiment.seeds) >= 3
        assert [c.seed for c in found] == sorted(c.seed for c in found), "a seed is done for all arms before the next"
        common = [
            {**config.to_dict(c.config), "run": 0, "seed": 0, "model": 0, "noise": 0, "loss": 0, "lr": 0} for c in found
        ]
        assert all(c == common[0] for c in common), "budget and data are the same for all arms"


def test_every_experiment_says_how_it_is_run(tmp_path):
    """Every call in docs/experiments.md and in configs/experiments/ composes; its options are test_documented_commands' matter."""
    said = (config.ROOT / "docs/experiments.md").read_text()
    said += "".join(p.read_text().replace("\n# ", "\n") for p in experiments.FOLDER.glob("*.yaml"))
    calls = re.findall(r"python -m trainer\.experiments ([^\n`#]+)", said.replace("\\\n", " "))
    found = set()
    for call in calls:
        name, *rest = shlex.split(re.sub(r"\[--.*", "", call))  # what is optional is explained, not given
        overrides = [word for word in rest if re.fullmatch(r"[a-z_.]+=.*", word)]
        if overrides:  # without them they load in the test above
            assert experiments.cells(experiments.read(name), tmp_path, None, [0], overrides), call
        found.add(name)
    assert found == {p.stem for p in experiments.FOLDER.glob("*.yaml")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("baseline: narrow", "baseline: wide"), "baseline=wide: is no arm"),
        (("evaluate:", "evaluated:"), "did you mean evaluate"),
        (("[quickstart, model", "[quickstrat, model"), "no such config"),
    ],
)
def test_a_wrong_file_is_one_line(change, message, tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(TINY.replace(*change))
    assert experiments.main([str(tmp_path / "tiny.yaml"), "--runs", str(tmp_path / "runs")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--arms", "narrow,wide"], "--arms wide: is no arm; they are narrow, narrow_laplace"),
        (["--arms", "narrow_laplace"], "leaves out narrow"),
        (["--baseline", "wide"], "--baseline wide: is no arm"),
    ],
)
def test_arms_that_cannot_be_compared_are_one_line(option, message, tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(TINY)
    assert experiments.main([str(tmp_path / "tiny.yaml"), "--runs", str(tmp_path / "runs"), *option]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_difference_is_paired_and_resolved_by_student():
    seeds = {0: 10.0, 1: 20.0, 2: 30.0}
    mean, half, resolved = experiment_report.difference({0: 11.0, 1: 21.1, 2: 31.2}, seeds)
    assert (mean, half) == (pytest.approx(1.1), pytest.approx(4.303 * 0.1 / 3**0.5)) and resolved
    assert not experiment_report.difference({0: 11.0, 1: 19.0, 2: 30.5}, seeds)[2]
    assert not experiment_report.difference({0: 11.0}, seeds)[2]


def test_levels_are_tabulated_with_all_that_was_measured_of_them():
    sweep = [{"steps": 1, "psnr": 20.0}, {"steps": 2, "psnr": 22.0}]
    level = {"noise": 0.1, "steps": 2, "best": 22.0, "told": 20.0, "sweep": sweep}
    rows = []
    for seed, shift in ((0, 0.0), (1, 1.0)):
        values = {"levels": [level | {"best": 22.0 + shift, "SSIM": 0.5}, level | {"noise": 0.2}]}
        for at, value in experiment_report.curve("chain", values):
            rows.append({"arm": "edm2", "seed": seed, "metric": "chain", "at": at, "value": value})
    made = experiment_report.by_level(rows, "chain").splitlines()
    assert made[0] == "| chain, by noise | 0.1 | 0.2 |"
    assert made[2] == "| edm2 | 22.50 / 0.500, K 2.0 (20.00) | 22.00, K 2.0 (20.00) |"
    assert {"K1 0.1", "K2 0.2"} <= {r["at"] for r in rows} and experiment_report.by_level(rows, "loss") == ""
