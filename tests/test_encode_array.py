"""Encoding by many processes: on this machine, restarted where one crashes, and one manifest at the end."""

import json
import os
import signal
import subprocess
import sys

import pytest

from cluster import encode, encode_task
from tests.small_checkout import ROOT, wait_for


def run_command(*words, **how):
    return subprocess.run(
        [sys.executable, "cluster/encode.py", *words], cwd=ROOT, capture_output=True, text=True, **how
    )


@pytest.mark.parametrize(
    ("words", "part"),
    [
        pytest.param(["nowhere", "x"], "nowhere not found", marks=pytest.mark.slow),
        pytest.param(["sklearn:digits", "x", "--codec", "pixxels"], "none of pixels", marks=pytest.mark.slow),
        (["sklearn:digits", "x", "--tasks", "0"], "--tasks 0"),
        (["sklearn:digits", "x", "--part", "0/2"], "--tasks"),
        (["sklearn:digits", "x", "cluster.partitionn=3"], "did you mean cluster.partition"),
        (["sklearn:digits", "x", "cluster=slurmm"], "there are local, slurm"),
        (["sklearn:digits", "x", "--after", "3"], "cluster=slurm"),
    ],
)
def test_mistakes_cost_one_line(tmp_path, capsys, monkeypatch, words, part):
    monkeypatch.chdir(tmp_path)
    assert encode.main(words) == 2
    out, err = capsys.readouterr()
    assert part in err and err.count("\n") == 1 and out == "" and list(tmp_path.iterdir()) == []


def test_cluster_keys_are_those_of_a_run():
    c = encode.compose(
        ["cluster=slurm", "cluster.partition=cpu", "cluster.environment.A=1", "cluster.setup=[module load x]"]
    )
    assert (c.kind, c.partition, c.environment, c.setup, c.ranks_per_node) == (
        "slurm",
        "cpu",
        {"A": 1},
        ["module load x"],
        8,
    )


def test_who_starts_again():
    law = {(0, 0): False, (2, 0): False, (75, 9): True, (1, 2): True, (1, 3): False, (137, 0): True}
    assert {key: encode_task.again(*key, 3, "RUNNING") for key in law} == law
    assert not any(encode_task.again(*key, 3, "CANCELLED") for key in law)


@pytest.mark.slow
def test_a_task_that_is_killed_is_restarted_and_one_manifest_comes(tmp_path):
    folder = tmp_path / f"digits-{os.getpid()}"
    words = ["sklearn:digits", str(folder), "--samples-per-shard", "50", "--tasks", "3"]
    job = ROOT / "runs" / f"encode_{folder.name}"
    command = [sys.executable, "cluster/encode.py", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        victim = wait_for(lambda: _children(process.pid, "part 1/3"))
        os.kill(victim[0], signal.SIGKILL)
        out = process.communicate(timeout=300)[0]
        assert process.returncode == 0 and "task 1 ended with status -9; starting it again" in out
        made = json.loads((folder / "manifest.json").read_text())
        assert sum(shard["samples"] for shard in made["shards"]) == 1797 and len(made["shards"]) == 36
        assert "is made: 1797 samples" in run_command(*words).stdout
        assert not any(p.name.startswith(".") for p in folder.iterdir())
    finally:
        process.kill()
        subprocess.run(["rm", "-r", str(job)])


def _children(pid, words):
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", words], capture_output=True, text=True).stdout.split()
    return [int(p) for p in found]
