"""A task outlives what its disk does: the trainer that it looks after goes on."""

import os
import signal

import pytest

from cluster import job, local
from tests import small_checkout
from tests.small_checkout import wait_for
from tests.small_disk import disk, full  # noqa: F401 - disk is a fixture


@pytest.fixture
def task(disk, monkeypatch):  # noqa: F811
    place = {"EXECUTOR": "local", "LOCAL_JOB_ID": "1", "LOCAL_GLOBALRANK": "0", "LOCAL_LOCALID": "0"}
    place |= {"LOCAL_NODEID": "0", "LOCAL_NTASKS": "1", "LOCAL_JOB_NUM_NODES": "1"}
    for name, value in place.items():
        monkeypatch.setenv(f"SUBMITIT_{name}", value)
    (disk / "config.yaml").write_text(small_checkout.CONFIG.replace("ranks_per_node: 2", "ranks_per_node: 1"))
    (disk / "code").mkdir()
    (disk / "logs").mkdir()
    return job.Task({"run": str(disk), "attempt": 1, "master_port": 1, "submitter": os.getpid()})


def test_a_full_disk_ends_no_training(task, disk, monkeypatch):  # noqa: F811
    monkeypatch.setattr(job, "HEARTBEAT_SECONDS", 0.2)
    task.write(stage="train", status=None)
    with full(disk):
        assert task.supervise(["-c", "import time; time.sleep(1)"]) == 0
        task.say("a word")
    task.write(status=0)
    assert job.read_json(task.control / "rank0.json")["status"] == 0


def test_how_a_rank_ended_is_written_as_soon_as_there_is_space(task, disk, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(job, "LAST_WORD_SECONDS", 0.5)
    task.control.mkdir(parents=True)
    with full(disk):
        task.write(status=75)
    assert "cannot tell how it stands" in capsys.readouterr().out and not list(task.control.glob("*.json"))
    task.write(status=75)
    assert job.read_json(task.control / "rank0.json")["status"] == 75


def test_a_stop_that_no_file_can_tell_is_told_by_the_signal(tmp_path, monkeypatch):
    got = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: got.append(number))
    attempt = object.__new__(local.Attempt)
    attempt.folder, attempt.world = tmp_path / "file", 2
    attempt.folder.write_text("no folder")
    monkeypatch.setattr(attempt, "ranks", lambda: [{"pid": os.getpid(), "status": None}, {}])
    attempt.stop(signal.SIGUSR2)
    wait_for(lambda: got)
    signal.signal(signal.SIGUSR2, before)
    assert got == [signal.SIGUSR2]
