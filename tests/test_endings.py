"""The translation of how a child ends, and whose end decides for all ranks."""

import json
import signal
from pathlib import Path

import pytest

from cluster.endings import (
    FINISHED,
    INTERRUPTED,
    KILLED,
    START_AGAIN,
    Outcome,
    asked_status,
    count_idle,
    read_outcome,
    translate,
)
from cluster.run_directory import next_attempt, read_json


@pytest.mark.parametrize(
    ("returncode", "wanted", "status"),
    [
        (0, 0, 0),
        (2, 0, 2),
        (75, signal.SIGTERM, 75),
        (130, signal.SIGINT, 130),
        (1, signal.SIGTERM, 1),  # a crash while it saved is a crash
        (-9, 0, 137),
        (-15, 0, 143),
        (-15, signal.SIGTERM, 75),  # asked before its handlers were there
        (-12, signal.SIGUSR2, 75),
        (-15, signal.SIGINT, 130),  # encoding and drawing are sent SIGTERM
        (-9, signal.SIGTERM, 137),
        (-11, 0, 139),
    ],
)
def test_translation(returncode, wanted, status):
    assert translate(returncode, wanted) == status


def test_what_a_signal_asks_for():
    assert [asked_status(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)] == [130, 75, 75]


@pytest.mark.parametrize(
    ("endings", "rank", "status"),
    [
        ([(0, 1.0, "self"), (0, 2.0, "self")], 0, FINISHED),
        ([(1, 5.0, "self"), (1, 4.0, "self")], 1, 1),  # the first to end is the guilty one
        (
            [(1, 5.0, "self"), (137, 5.3, "self")],
            1,
            KILLED,
        ),  # a killed rank brings its peers down, not the other way round
        ([(137, 9.0, "peer"), (3, 4.0, "self")], 1, 3),  # killed by us for its peer's sake
        ([(134, 5.5, "self"), (1, 5.0, "self")], 1, 1),  # an abort in a broken collective follows
        ([(0, 1.0, "self"), (1, 5.0, "self")], 1, 1),
        ([(137, 9.0, "peer"), (2, 4.0, "self")], 1, 2),
        ([(75, 9.0, "self"), (7, 4.0, "self")], 1, 7),  # srun asks the others to stop when one has crashed
        ([(75, 4.0, "self"), (75, 3.0, "self")], 1, START_AGAIN),
        ([(1, 4.0, "self"), (75, 3.0, "self")], 1, START_AGAIN),  # left early, and the other stumbled
        ([(130, 4.0, "self"), (130, 3.0, "self")], 1, INTERRUPTED),
        ([(1, 4.0, "self"), None], 1, KILLED),  # its task could not even write that it ended
    ],
)
def test_whose_end_decides(tmp_path, endings, rank, status):
    for k, ending in enumerate(endings):
        record = {"log": "", "stage": "train", "status": None}
        if ending:
            record.update(zip(("status", "time", "by"), ending))
        (tmp_path / f"rank{k}.json").write_text(json.dumps(record))
    outcome = read_outcome(tmp_path, [Path("a"), Path("b")], silent_are_guilty=True)
    assert (outcome.rank, outcome.status, outcome.log) == (rank, status, Path("ab"[rank]))


def test_under_srun_the_silent_ones_are_victims(tmp_path):
    for k, status in enumerate((None, 7)):
        (tmp_path / f"rank{k}.json").write_text(
            json.dumps({"log": "", "stage": "train", "status": status, "time": 4.0 + k})
        )
    outcome = read_outcome(tmp_path, [Path("a"), Path("b")], silent_are_guilty=False)
    assert (outcome.rank, outcome.status, outcome.asked) == (1, 7, False)


@pytest.mark.parametrize(
    ("idle", "reached", "clock", "status", "asked", "then"),
    [(2, 100, 101, 1, False, 0), (0, 100, 100, 1, False, 1), (2, 100, 90, 75, False, 3), (2, 100, 100, 75, True, 2)],
)
def test_attempts_without_progress_are_counted_unless_they_were_told_to_stop(idle, reached, clock, status, asked, then):
    assert count_idle(idle, reached, clock, Outcome(status, 0, "train", Path("a"), asked))[0] == then


def test_a_task_that_never_began(tmp_path):
    outcome = read_outcome(tmp_path, [Path("a")], silent_are_guilty=True)
    assert (outcome.status, outcome.stage) == (KILLED, "start")


def test_attempts_count_on(tmp_path):
    assert next_attempt(tmp_path) == 1
    (tmp_path / "logs/submitit/0004").mkdir(parents=True)
    (tmp_path / "logs/0005_rank0.log").touch()
    assert next_attempt(tmp_path) == 6


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a"'])
def test_half_written_json_is_nothing(tmp_path, text):
    (tmp_path / "x").write_text(text)
    assert read_json(tmp_path / "x") == {} and read_json(tmp_path / "y") == {}
