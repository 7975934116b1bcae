"""RUN/state.json is whole or absent, says what is wrong with it, and its loss does not confuse the lives of a run."""

import itertools
import json
import subprocess
import threading
import time

import pytest

from data_pipeline import durable
from trainer import state
from trainer.metrics import Metrics


def test_a_damaged_state_is_one_line_and_lives_go_on_counting_without_it(tmp_path):
    for life in (3, 5):
        folder = tmp_path / f"checkpoints/{life:010d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"life": life}))
    (tmp_path / "checkpoints/0000000009").mkdir()
    (tmp_path / "checkpoints/0000000009/manifest.json").write_text("{")
    (tmp_path / "state.json").write_text('{"att')
    with pytest.raises(ValueError, match="state.json: damaged .* remove it"):
        state.RunState(tmp_path, 0, 64)
    state.fail(tmp_path, ValueError("told"))  # no exception on top
    (tmp_path / "state.json").unlink()
    (tmp_path / ".state.json.host.1").write_text("half")
    run = state.RunState(tmp_path, 0, 64)
    assert run.attempt == 6, "a life that counted from 1 again would look older than what it continues"
    assert not list(tmp_path.glob(".*"))
    run.write(clock=7)
    assert state.read(tmp_path)["attempt"] == 6 and state.RunState(tmp_path, 1, 64).attempt == 7


def test_two_threads_that_write_at_once_leave_one_whole_file(tmp_path):
    def write(letter: bytes):
        for _ in range(50):
            durable.write_atomically(tmp_path / "file", letter * 5000)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b")]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    content = (tmp_path / "file").read_bytes()
    assert len(content) == 5000 and len(set(content)) == 1 and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_line_of_metrics_that_a_kill_cut_off_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"clock": 1}\n{"clo')
    for attempt in (2, 3):
        metrics = Metrics(tmp_path, 0, attempt, "127.0.0.1", 0)
        metrics.publish(attempt)
        metrics.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"clock": 1} and [line["attempt"] for line in lines[1:]] == [2, 3]


def test_lives_count_on_from_snapshots_too_where_the_state_is_lost(tmp_path):
    import torch

    from trainer import snapshots, tensor_file

    folder = tmp_path / "snapshots"
    folder.mkdir()

    def write(clock: int, life: int, start: int) -> None:
        header = {"kind": "ema", "clock": clock, "sigma_rel": 0.05, "life": life, "life_start": start}
        header["dtype"] = "fp32"
        tensor_file.write(folder / snapshots.file_name(clock, 0.05), header, {"w": torch.ones(3)})

    write(64, 1, 0)
    write(128, 1, 0)
    write(192, 3, 64)  # life 3 was killed before its first checkpoint, and state.json is gone
    (folder / snapshots.file_name(256, 0.05)).write_bytes(b"damaged")
    run = state.RunState(tmp_path, 0, 64)
    (folder / snapshots.file_name(256, 0.05)).unlink()
    assert run.attempt == 4
    write(96, run.attempt, 64)
    left_out = [s.clock for s in snapshots.abandoned(snapshots.list_snapshots(tmp_path))]
    assert left_out == [128, 192], "what the living one writes is not what is left out"


def test_a_start_that_was_given_up_and_lives_writes_no_more(tmp_path):
    old = state.RunState(tmp_path, 0, 64)
    old.write(clock=7)
    new = state.RunState(tmp_path, 0, 64)
    new.write(status="running", clock=3)
    with pytest.raises(state.Superseded, match="attempt 2 of this run has begun"):
        old.write(clock=8)
    state.fail(tmp_path, state.Superseded("told"))
    new.write(clock=4)
    assert (state.read(tmp_path)["clock"], state.read(tmp_path)["status"]) == (4, "running")


def test_a_start_waits_for_the_one_before_to_end_and_for_no_stranger(tmp_path, capsys):
    with subprocess.Popen(["sleep", "60"]) as other:
        run = state.RunState(tmp_path, 0, 64)
        run.write(status="running", clock=7, pid=other.pid, born=state._born(other.pid))
        state.await_predecessor(tmp_path, 0.5)  # gives no sign of life
        assert f"pid {other.pid} and does nothing" in capsys.readouterr().err
        ended = threading.Event()

        def train():
            for clock in itertools.count(8):
                run.write(clock=clock)
                if ended.wait(0.1):
                    return

        training = threading.Thread(target=train)
        training.start()
        try:
            with pytest.raises(ValueError, match=f"is being trained by pid {other.pid}"):
                state.await_predecessor(tmp_path, 60)
        finally:
            ended.set()
            training.join()
        begun = time.monotonic()
        threading.Timer(0.5, other.kill).start()
        state.await_predecessor(tmp_path, 60)
        assert 0.5 <= time.monotonic() - begun < 60
    with subprocess.Popen(["sleep", "60"]) as stranger:  # has the pid that the run's trainer had
        run.write(pid=stranger.pid)
        state.await_predecessor(tmp_path, 60)
        stranger.kill()
