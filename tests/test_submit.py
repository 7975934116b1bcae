"""Submitting: a mistake costs one line and no torch; a run keeps its code and config; ours wins over foreign packages."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import forecast, run_directory
from cluster.submit import main
from tests import shards, small_checkout
from tests.small_checkout import ROOT, submit
from trainer.config import load, to_dict
from trainer.size import count


@pytest.fixture
def root(tmp_path):
    root = small_checkout.make(tmp_path)
    config = root / "configs/small.yaml"
    config.write_text(config.read_text().replace("ranks_per_node: 2", "ranks_per_node: 1"))
    return root


def run_in_repository(*words, cwd=ROOT, **variables):
    command = [sys.executable, str(ROOT / "cluster/submit.py"), *words]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["no config given", "python cluster/submit.py configs/quickstart.yaml"]),
        (["configs/quikstart.yaml"], ["quikstart", "did you mean configs/quickstart.yaml"]),
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
def test_mistakes_cost_one_line(words, parts, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    for part in parts:
        assert part in err


def test_a_mistake_costs_less_than_two_seconds():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_in_repository("configs/quickstart.yaml", "lr.ref_lrr=1")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # of processors: a busy machine must not fail the test
    assert used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime < 2, "about 0.5 s"
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


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
        "cluster.dependency=afterok:12",
        "cluster.setup=['export A=1']",
        "cluster.umask='0027'",
        "cluster.srun_arguments=['--container-image=evenkeel.sqsh']",
    ]
    status, out, err = submit(root, *words, "--dry-run")
    lines = out.partition("# sbatch script:\n")[2].splitlines()
    assert (status, err) == (0, "") and lines[0] == "#!/bin/bash"
    for name, value in {
        "nodes": 2, "ntasks-per-node": 1, "gpus-per-node": 8, "time": 90, "partition": "a100", "reservation": "paper",
        "dependency": "afterok:12", "signal": "USR2@120", "open-mode": "append",
    }.items():  # fmt: skip
        assert f"#SBATCH --{name}={value}" in lines
    assert "#SBATCH --requeue" in lines and not any(
        line.startswith(("#SBATCH --wckey", "#SBATCH --mem")) for line in lines
    )
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
    shutil.copytree(run / "checkpoints/0000000100", run / "checkpoints/0000000999")  # of a life that was abandoned
    (run / "checkpoints/latest").write_text("0000000100\n")
    assert run_directory.saved_images(run) == 100
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
        timeout=180,
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


def test_dry_run_says_what_a_run_will_need_and_cost():
    done = run_in_repository(
        "configs/edm2_xl.yaml", "--dry-run", "cluster.gpu=H100", "cluster.nodes=1", "micro_batch=256"
    )
    said = dict(line.split(": ", 1) for line in done.stdout.partition("# what it will need\n")[2].splitlines() if line)
    assert said["network"].strip().startswith("1,119.3 M parameters, 804.0 GFLOP per forward")
    assert "of the 80 GB of one H100 - DOES NOT FIT" in said["memory"]
    assert "GPU-hours" in said["compute"] and "MFU of 0.35 (assumed: cluster.expected_mfu)" in said["compute"]
    assert "FID 1.96 at sigma_rel 0.085" in said["published"] and "snapshots and checkpoints" in said["disk"]


def test_memory_by_stage_and_world():
    config = load(ROOT / "configs/edm2_xl.yaml")
    size = count(to_dict(config)["model"])
    held = lambda world: forecast.rank_bytes(config, size, world)["weights and optimizer"] / size.parameters  # noqa: E731
    assert held(32) == 8 + 20 / 32 and held(8) == 8 + 20 / 8
    config.engine.zero_stage = 2
    assert held(32) == 4 + 24 / 32
    whole = forecast.rank_bytes(config, size, 32)["activations"]
    config.engine.activation_checkpointing = True
    assert forecast.rank_bytes(config, size, 32)["activations"] < whole / 5


def test_disk_counts_every_snapshot_and_the_checkpoints_kept(tmp_path):
    config = load(ROOT / "configs/edm2_xl.yaml")
    size = count(to_dict(config)["model"])
    one = 2 * size.parameters  # fp16
    assert forecast.disk_bytes(config, size) == 160 * 2 * one + 3 * 20 * size.parameters
    config.run = str(tmp_path / "not/yet/there")
    (warning,) = [w for w in forecast.shortages(config) if "disk" in w]
    assert "NOT ENOUGH" in warning and "\n" not in warning


def test_data_that_do_not_fit_the_config_are_refused_before_anything_is_made(root):
    shards.make_dataset(root / "data/small", shape=(1, 8, 8), codec="pixels")
    status, out, err = submit(root)
    assert status == 2 and err.count("\n") == 1 and "model.label_dim=10, but the dataset has label_dim 5" in err
    assert not (root / "runs").exists()
    status, out, err = submit(root, "model.label_dim=5", "cluster.environment.SEEN=yes")
    assert (status, err) == (0, "") and "warning" not in out


def test_a_group_can_read_a_run_whose_author_keeps_his_files_to_himself(root):
    for path in root.rglob("*"):
        path.chmod(0o700 if path.is_dir() or path.name == "submit.py" else 0o600)
    before = os.umask(0o077)
    try:
        status, _, err = submit(root, "cluster.umask='0027'")
    finally:
        os.umask(before)
    made = {p.relative_to(root): p.stat().st_mode & 0o777 for p in (root / "runs").rglob("*") if p.name != ".lock"}
    assert (status, err) == (0, "") and len(made) > 50
    wrong = {
        p: oct(mode) for p, mode in made.items() if mode not in ((0o750,) if (root / p).is_dir() else (0o640, 0o750))
    }
    assert wrong == {} and made[Path("runs/small/code/cluster/submit.py")] == 0o750


def test_data_that_are_not_there_yet_are_a_warning(root):
    status, out, err = submit(root)
    assert (status, err) == (0, "") and "warning: data/small holds no dataset yet" in out
