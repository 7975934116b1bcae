"""Hyper-parameter sweeps: nothing starts before all is checked, every point is a run, only what is missing starts again."""

import csv
import json

import pytest

from cluster import points
from cluster.submit import main
from tests import small_checkout
from tests.small_checkout import PATIENCE_SECONDS, interrupt, start, state, submit, wait_for
from trainer.config import load

FAIL_ONCE = {"wrongs": [{"lives": [1], "clock": 100, "status": 2}]}


@pytest.fixture
def root(tmp_path):
    root = small_checkout.make(tmp_path)
    config = root / "configs/small.yaml"
    config.write_text(config.read_text().replace("ranks_per_node: 2", "ranks_per_node: 1"))
    return root


def submit_here(root, capsys, *words):
    """Run the command in this process."""
    status = main([str(root / "configs/small.yaml"), f"run={root}/runs/small", *words])
    return status, *capsys.readouterr()


def table(root, name="small-sweep"):
    with open(root / "runs" / name / "sweep.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--sweep", "lr.ref_lr=0.1,abc"], ["lr.ref_lr=abc", "no number"]),
        (["--sweep", "seed=1", "--sweep", "global_batch=20,30"], ["seed=1 global_batch=30", "multiple"]),
        (["--sweep", "lr.ref_lr"], ["key=a,b,c"]),
        (["--sweep", "lr.ref_lr=0.1,,0.2"], ["key=a,b,c"]),
        (["--sweep", "lr.ref_lr=0.1,0.10"], ["the same"]),
        (["--sweep", "run=a,b"], ["run directory of its own"]),
        (["--sweep", "seed=1", "--sweep", "seed=2"], ["twice"]),
        (["--sweep", "seed=1,2", "--parallel", "2"], ["--parallel 2", "cluster.kind=slurm"]),
        (["--sweep", "seed=1,2", "--after", "12"], ["--after 12", "cluster.kind=slurm"]),
        (["--sweep", "seed=1,2", "--fork", "x"], ["--fork x"]),
        (["--parallel", "2"], ["--sweep"]),
    ],
)
def test_a_bad_point_costs_one_line_and_starts_nothing(root, capsys, words, parts):
    status, out, err = submit_here(root, capsys, *words)
    assert status == 2 and err.count("\n") == 1 and out == "", err
    assert [part for part in parts if part not in err] == [] and not (root / "runs").exists()


def test_the_points_are_all_combinations_with_names_for_paths(root):
    axes = points.parse(["model.channel_mult=[1,2],[1, 2, 2]", "lr.ref_lr=1e-2,0.02"])
    found = points.compose(str(root / "configs/small.yaml"), ["seed=3"], axes, root)
    assert [(p.config.model.channel_mult, p.config.lr.ref_lr) for p in found] == [
        ([1, 2], 0.01), ([1, 2], 0.02), ([1, 2, 2], 0.01), ([1, 2, 2], 0.02),
    ]  # fmt: skip
    assert found[3].name == "small_model.channel_mult=1-2-2_lr.ref_lr=0.02"
    assert {p.config.seed for p in found} == {3} and {p.run.parent for p in found} == {root / "runs/small-sweep"}
    long = points.name_of(load(root / "configs/small.yaml"), {"data.path": "x" * 300})
    assert len(long) < 140 and long != points.name_of(load(root / "configs/small.yaml"), {"data.path": "x" * 301})


def test_dry_run_lists_the_points_and_makes_nothing(root, capsys):
    status, out, err = submit_here(root, capsys, "--sweep", "seed=0,1", "--sweep", "lr.ref_lr=0.1,0.2", "--dry-run")
    assert (status, err) == (0, "") and not (root / "runs").exists()
    assert "small_seed=1_lr.ref_lr=0.2: new\n" in out and "4 points: " in out
    gpus = ["cluster.kind=slurm", "cluster.gpus_per_node=1", "cluster.gpu=A100", "duration_images=200k"]
    one, two = (submit_here(root, capsys, "--sweep", f"seed={seeds}", *gpus, "--dry-run")[1] for seeds in ("0", "0,1"))
    hours = [float(text.partition("points: ")[2].partition(" GPU-hours")[0]) for text in (one, two)]
    assert hours[1] == pytest.approx(2 * hours[0], abs=1)


def test_only_what_failed_or_is_missing_starts_again(root, capsys):
    assert submit(root, "--sweep", "lr.ref_lr=0.1")[0] == 0
    runs = [root / f"runs/small-sweep/small_lr.ref_lr={value}" for value in (0.1, 0.2)]
    status, out, err = submit(root, "--sweep", "lr.ref_lr=0.1,0.2", behave=FAIL_ONCE)
    assert status == 2 and [state(run)["clock"] for run in runs] == [400, 100]
    assert [row["images"] for row in table(root)] == ["400", "100"]
    (runs[1] / "evaluations.jsonl").write_text(
        '{"evenkeel_images_seen": 200, "mean": 0.1}\n'
        '{"evenkeel_images_seen": 400, "mean": 0.3}\n{"evenkeel_images_seen": 400, "mean": 0.25}\n{"evenkeel'
    )
    status, out, err = submit(root, "--sweep", "lr.ref_lr=0.1,0.2")
    assert (status, err) == (0, "") and [state(run)["attempt"] for run in runs] == [1, 2]
    rows = table(root)
    assert [row["lr.ref_lr"] for row in rows] == ["0.1", "0.2"] and [row["heldout_loss"] for row in rows] == [
        "",
        "0.25",
    ]
    assert {row["state"] for row in rows} == {"finished"} and {row["loss"] for row in rows} == {"0.5"}
    assert "ref_lr: 0.2" in (runs[1] / "config.yaml").read_text()
    status, out, err = submit_here(root, capsys, "--sweep", "lr.ref_lr=0.1", "seed=7")
    assert status == 2 and "a sweep of another config" in err and "seed: 0 -> 7" in err


@pytest.mark.slow
def test_ctrl_c_ends_the_sweep_and_the_same_command_goes_on(root):
    words = ["--sweep", "seed=1,2"]
    process = start(root, *words, behave={"hold": 40})
    first, second = (root / f"runs/small-sweep/small_seed={k}" for k in (1, 2))
    wait_for(lambda: state(first).get("clock", 0) == 40)
    interrupt(process)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130 and not second.exists() and state(first)["clock"] == 40
    assert submit(root, *words)[0] == 0 and state(first)["attempt"] == 2 and state(second)["clock"] == 400


def test_a_sweep_of_another_version_is_refused(root, capsys):
    folder = root / "runs/small-sweep"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps({"version": 99, "points": {}}))
    status, _, err = submit_here(root, capsys, "--sweep", "seed=1")
    assert status == 2 and "version 99" in err


def test_a_lane_goes_on_however_the_point_before_ended(tmp_path):
    lanes, given = points._Lanes(tmp_path, 2), []
    for job_id in ("7", "8", "9", "10"):
        lane, before = lanes.next()
        lanes.put(lane, job_id)
        given.append((lane, before))
    assert given == [(0, ""), (1, ""), (0, "afterany:7"), (1, "afterany:8")]
