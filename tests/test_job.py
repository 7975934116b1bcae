"""The translation of how a child ends, and whose end decides for all ranks."""

import json
import signal
from pathlib import Path

import pytest

from cluster.job import FINISHED, INTERRUPTED, KILLED, START_AGAIN, asked_status, read_outcome, translate
from cluster.run_directory import differences, next_attempt, read_json


@pytest.mark.parametrize(
    ("returncode", "forwarded", "status"),
    [
        (0, set(), 0),
        (2, set(), 2),
        (75, {signal.SIGTERM}, 75),
        (130, {signal.SIGINT}, 130),
        (1, {signal.SIGTERM}, 1),  # a crash while it saved is a crash
        (-9, set(), 137),
        (-15, set(), 143),
        (-15, {signal.SIGTERM}, 75),  # asked before its handlers were there
        (-12, {signal.SIGUSR2}, 75),
        (-2, {signal.SIGINT}, 130),
        (-9, {signal.SIGTERM}, 137),
        (-11, set(), 139),
    ],
)
def test_translation(returncode, forwarded, status):
    assert translate(returncode, forwarded) == status


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
        ([(1, 3.0, "self"), (2, 4.0, "self")], 1, 2),
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
    outcome = read_outcome(tmp_path, [Path("a"), Path("b")])
    assert (outcome.rank, outcome.status, outcome.log) == (rank, status, Path("ab"[rank]))


def test_a_task_that_never_began(tmp_path):
    outcome = read_outcome(tmp_path, [Path("a")])
    assert (outcome.status, outcome.stage) == (KILLED, "start")


def test_differences_name_every_leaf():
    old, new = {"a": 1, "b": {"c": [1], "d": 2}, "e": 0}, {"a": 1, "b": {"c": [1, 2], "d": 2}, "f": 3}
    assert differences(old, new) == [("b.c", [1], [1, 2]), ("e", 0, None), ("f", None, 3)]


def test_attempts_count_on(tmp_path):
    assert next_attempt(tmp_path) == 1
    (tmp_path / "logs/submitit/0004").mkdir(parents=True)
    (tmp_path / "logs/0005_rank0.log").touch()
    assert next_attempt(tmp_path) == 6


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a"'])
def test_half_written_json_is_nothing(tmp_path, text):
    (tmp_path / "x").write_text(text)
    assert read_json(tmp_path / "x") == {} and read_json(tmp_path / "y") == {}
