"""Submitting: a mistake costs one line and no torch; a run keeps its code and config; ours wins over foreign packages."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import small_checkout
from tests.small_checkout import ROOT, submit


@pytest.fixture
def root(tmp_path):
    root = small_checkout.make(tmp_path)
    config = root / "configs/small.yaml"
    config.write_text(config.read_text().replace("ranks_per_node: 2", "ranks_per_node: 1"))
    return root


def run_in_repository(*words, cwd=ROOT, **variables):
    command = [sys.executable, str(ROOT / "cluster/submit.py"), *words]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["no config given", "python cluster/submit.py configs/quickstart.yaml"]),
        (["configs/quikstart.yaml"], ["quikstart", "did you mean configs/quickstart.yaml?"]),
        (["configs/quickstart.yaml", "lr.ref_lrr=1"], ["lr.ref_lrr", "did you mean lr.ref_lr?"]),
        (["configs/quickstart.yaml", "global_batch=abc"], ["global_batch", "abc"]),
        (["configs/quickstart.yaml", "global_batch=100"], ["global_batch=100", "multiple"]),
        (["configs/quickstart.yaml", "global_batch"], ["global_batch", "key=value"]),
        (["configs/quickstart.yaml", "--dryrun"], ["--dryrun", "did you mean --dry-run?"]),
        (["configs/quickstart.yaml", "--seed=3"], ["--seed=3", "key=value"]),
        (["configs/quickstart.yaml", "--fork"], ["--fork", "argument"]),
        (["configs/quickstart.yaml", "cluster.nodes=2", "micro_batch=64"], ["cluster.nodes=2", "cluster.kind=slurm"]),
        (["configs/quickstart.yaml", "run=configs"], ["configs", "holds other things", "run=runs/"]),
        (["configs/quickstart.yaml", "run=/proc/nowhere"], ["/proc/nowhere"]),
    ],
)
def test_mistakes_cost_one_line_and_less_than_two_seconds(words, parts):
    started = time.monotonic()
    done = run_in_repository(*words)
    assert time.monotonic() - started < 2
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr


def test_no_torch_on_the_login_node():
    code = f"import sys; sys.argv[0] = {str(ROOT / 'cluster/submit.py')!r}\n" + (
        "from cluster.submit import main\n"
        "assert main(['configs/quickstart.yaml', 'seed=1', '--dry-run']) == 0\n"
        "import cluster.job, cluster.status\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_dry_run_prints_the_config_and_touches_nothing(root):
    status, out, err = submit(root, "lr.ref_lr=0.5", "--dry-run", "seed=7")
    assert (status, err) == (0, "") and not (root / "runs").exists()
    assert "ref_lr: 0.5" in out and "seed: 7" in out and f"run: {root}/runs/small" in out


def test_dry_run_prints_the_batch_script(root):
    words = [
        "cluster.kind=slurm",
        "cluster.nodes=2",
        "cluster.gpus_per_node=8",
        "cluster.time_minutes=90",
        "cluster.partition=a100",
    ]
    words += [
        "cluster.reservation=paper",
        "cluster.slurm_parameters.dependency=afterok:12",
        "cluster.setup=['export A=1']",
    ]
    status, out, err = submit(root, *words, "--dry-run")
    lines = out.partition("# sbatch script:\n")[2].splitlines()
    assert (status, err) == (0, "") and lines[0] == "#!/bin/bash"
    for name, value in {
        "nodes": 2, "ntasks-per-node": 1, "gpus-per-node": 8, "time": 90, "partition": "a100", "reservation": "paper",
        "dependency": "afterok:12", "signal": "USR2@120", "open-mode": "append",
    }.items():  # fmt: skip
        assert f"#SBATCH --{name}={value}" in lines
    assert "#SBATCH --requeue" in lines and not any("wckey" in line or "mem" in line for line in lines)
    assert lines.index("export A=1") < next(
        i for i, line in enumerate(lines) if line.startswith("srun ") and "--kill-on-bad-exit=1" in line
    )


def test_run_directory(root):
    status, _, _ = submit(root)
    run = root / "runs/small"
    assert status == 0
    assert f"path: {root}/data/small" in (run / "config.yaml").read_text()
    assert (run / "code/cluster/job.py").is_file() and (run / "code/COMMIT.json").is_file()
    assert sorted(p.name for p in run.iterdir() if not p.name.startswith(".")) == [
        "checkpoints", "code", "config.yaml", "logs", "metrics.jsonl", "state.json",
    ]  # fmt: skip


def test_an_edit_does_not_change_a_run(root):
    wrong = [{"lives": [1], "clock": 100, "ranks": [0, 1], "status": 130, "save": True}]
    status, _, _ = submit(root, behave={"wrongs": wrong})
    assert status == 130
    (root / "trainer/train.py").write_text("raise SystemExit(9)")
    (root / "cluster/job.py").write_text(
        "raise SystemExit(9)\n" + (root / "cluster/job.py").read_text().replace("137", "9")
    )
    done = subprocess.run(
        [sys.executable, "runs/small/code/cluster/submit.py", "runs/small"], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("resuming runs/small at 100 images"), done.stderr


def test_a_changed_config_is_refused_with_the_differences(root):
    assert submit(root)[0] == 0
    status, out, err = submit(root, "lr.ref_lr=0.5", "model.num_blocks=7")
    assert status == 2 and out == ""
    assert "--fork NAME" in err and "\n  model.num_blocks: 3 -> 7\n  lr.ref_lr: 0.01 -> 0.5\n" in err


def test_where_it_runs_may_change(root):
    wrong = [{"lives": [1], "clock": 100, "ranks": [0, 1], "status": 130, "save": True}]
    assert submit(root, behave={"wrongs": wrong})[0] == 130
    status, out, _ = submit(root, "cluster.ranks_per_node=2")
    assert status == 0 and out.startswith("resuming runs/small at 100 images\n  cluster.ranks_per_node: 1 -> 2\n")
    assert "ranks_per_node: 2" in (root / "runs/small/config.yaml").read_text()


def test_fork_starts_another_run_from_the_last_checkpoint(root):
    assert "is no run yet" in submit(root, "--fork", "child")[2]
    wrong = [{"lives": [1], "clock": 100, "ranks": [0, 1], "status": 130, "save": True}]
    assert submit(root, behave={"wrongs": wrong})[0] == 130
    run, child = root / "runs/small", root / "runs/child"
    (run / "checkpoints/0000000100/part").write_text("weights")
    (run / "snapshots").mkdir()
    for name in ("ema-0000000100-0.050.safetensors", "ema-0000000200-0.050.safetensors"):
        (run / "snapshots" / name).write_text(name)
    status, out, err = submit(root, "--fork", "child", "lr.ref_lr=0.5")
    assert status == 0 and out.startswith("starting runs/child from runs/small at 100 images\n"), err
    assert (child / "checkpoints/0000000100/part").read_text() == "weights"
    assert [p.name for p in (child / "snapshots").iterdir()] == ["ema-0000000100-0.050.safetensors"]
    assert "ref_lr: 0.5" in (child / "config.yaml").read_text() and "ref_lr: 0.01" in (run / "config.yaml").read_text()
    assert json.loads((child / "logs/forked_from.json").read_text()) == {"run": str(run), "images": 100}
    assert "exists; name a new run" in submit(root, "--fork", "child")[2]


def test_ours_wins_over_foreign_packages(root, tmp_path):
    foreign = tmp_path / "site"
    for name in ("trainer", "cluster", "models", "data_pipeline"):
        (foreign / name).mkdir(parents=True)
        (foreign / name / "__init__.py").write_text("raise SystemExit('foreign package imported')")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, str(root / "cluster/submit.py"), str(root / "configs/small.yaml")],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(foreign)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert f"{root}/runs/small/code/trainer/train.py" in (root / "runs/small/logs/0001_rank0.log").read_text()


def test_from_anywhere_with_relative_paths(root, tmp_path):
    done = subprocess.run([sys.executable, "../checkout/cluster/submit.py", "../checkout/configs/small.yaml", "--dry-run"],
                          cwd=_made(tmp_path / "other"), capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and f"run: {root}/runs/small" in done.stdout


def _made(path: Path) -> Path:
    path.mkdir()
    return path
