"""A rank that hangs is named, stacks are dumped, and the job asks to be started again."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.gloo import ROOT
from tests.test_resume import BATCH, data, finish, start, wait_for_clock  # noqa: F401 - data is a fixture
from trainer import watchdog
from trainer.stop import START_AGAIN


def test_a_hanging_rank_is_named_by_the_others_and_the_run_goes_on_afterwards(data, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    ranks = start(run, data, "engine.hang_seconds=5", "duration_images=1Mi")
    wait_for_clock(run, 128, ranks)
    ranks.processes[1].send_signal(signal.SIGSTOP)
    assert ranks.processes[0].wait(180) == START_AGAIN, ranks.output()
    ranks.kill()
    assert "rank 1 hangs" in ranks.output() and "rank 1: no answer" in ranks.output()
    stacks = next((run / "logs").glob("*_rank0.stacks")).read_text()
    assert "trainer/train.py" in stacks, "the stack shows where the main thread stood"
    saved = json.loads((run / "state.json").read_text())["last_checkpoint"]
    finish(run, data, f"duration_images={saved + 4 * BATCH}")
    assert json.loads((run / "state.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(("step", "most"), [(0.1, 120), (2, 200), (60, 600)])
def test_patience_is_a_number_of_usual_steps(tmp_path, monkeypatch, step, most):
    now = [1000.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    one = watchdog.Watchdog(tmp_path, 0, 1, 1, 0, 100)
    one.limit = 600  # without the thread that watches

    def steps(count, seconds):
        for _ in range(count):
            now[0] += seconds
            one.alive("optimizer")
            one.alive("data")
            one.alive("backward")

    steps(watchdog.USUAL_STEPS, step)
    assert one._patience() == 600, "what is usual is not known yet"
    steps(1, 500)  # a checkpoint between two steps is not usual
    steps(1, step)
    assert one._patience() == pytest.approx(most)
    for elsewhere in ("data", "checkpoint"):
        one.alive(elsewhere)
        assert one._patience() == 600
    one.alive("backward")
    one.limit_steps = 0
    assert one._patience() == 600


def test_a_watch_outlasts_a_disk_that_takes_no_files(tmp_path, capsys):
    one = watchdog.Watchdog(tmp_path, 0, 1, 1, 1)
    one.alive("checkpoint")
    (tmp_path / "logs").rename(tmp_path / "gone")
    while "cannot tell the others" not in capsys.readouterr().err:
        assert one._thread.is_alive() and time.monotonic() - one.since < 60
        time.sleep(0.05)
    (tmp_path / "gone").rename(tmp_path / "logs")
    one.alive("vote")
    assert one._thread.is_alive()
    one.close()
    assert list((tmp_path / "logs").iterdir()) == []


def test_a_clock_that_is_set_is_no_hang(tmp_path, monkeypatch):
    one, asked, now = watchdog.Watchdog(tmp_path, 0, 1, 1, 0), [], time.time()
    one.limit = 600  # without the thread that watches
    monkeypatch.setattr(one, "_ask", asked.append)
    one.alive("backward")
    monkeypatch.setattr(watchdog.time, "time", lambda: now + 1e6)
    one._look(0)
    assert asked == []


HANGS_ON_A_FULL_DISK = """
import os, sys, time
from pathlib import Path
from trainer import watchdog

watchdog.ANSWER_SECONDS, run, what = 0.1, Path(sys.argv[1]), sys.argv[2]
one = watchdog.Watchdog(run, 0, 1, 1, 0.1)
for _ in range(3):
    one.alive("optimizer")
    one.alive("backward")
    one.alive("backward")
if what == "log":
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
else:
    (run / "logs").rename(run / "gone")  # takes no file
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("what", ["log", "folder"])
def test_a_hang_ends_also_where_nothing_can_be_written(tmp_path, what):
    command = [sys.executable, "-c", HANGS_ON_A_FULL_DISK, str(tmp_path), what]
    assert subprocess.run(command, cwd=ROOT, timeout=50).returncode == START_AGAIN
