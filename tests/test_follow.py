"""A local run saves when it is told to stop, comes back where that helps, and leaves no process behind, whoever dies."""

import json
import os
import signal
import subprocess
import sys
import tracemalloc

import pytest

from cluster.follow import Tail, describe, duration, short
from tests import small_checkout
from tests.small_checkout import PATIENCE_SECONDS, held, interrupt, processes_of, release, start, submit, wait_for


@pytest.fixture
def root(tmp_path):
    root = small_checkout.make(tmp_path)
    yield root
    small_checkout.check_nothing_left(root)


def test_run_to_the_end_then_submitted_again(root):
    status, out, err = submit(root, "cluster.finish_sigma_rel=0.13", "data.encode_from=somewhere")
    assert (status, err) == (0, "")
    assert out.startswith("starting runs/small\n")
    run = root / "runs" / "small"
    assert json.loads((root / "data/small/source.json").read_text())[0] == "somewhere"
    for rank in (0, 1):
        assert f"rank {rank} of 2 at 127.0.0.1" in (run / f"logs/0001_rank{rank}.log").read_text()
    snapshot = run / "posthoc" / "phema-0000000400-0.13000.safetensors"
    assert snapshot.read_text() == f"{run} --sigma-rel 0.13 --out {snapshot}"
    assert (run / "samples/grid.png").read_text().startswith(f"{snapshot} --classes all --per-class 8 --out")
    assert "runs/small/samples/grid.png" in out and out.count(" -m trainer.") == 3
    status, out, err = submit(root, "cluster.finish_sigma_rel=0.13", "data.encode_from=somewhere")
    assert (
        status == 0 and out.startswith("runs/small is finished at 400 images") and "runs/small/samples/grid.png" in out
    )
    assert not (run / "logs/0002_rank0.log").exists()


def test_ctrl_c_saves_and_the_next_submission_goes_on(root):
    process = held(root, behave={"save_seconds": 1}, clock=100)
    interrupt(process)
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130 and err == ""
    assert "stopping: saving a checkpoint ..." in out
    (saved,) = (root / "runs/small/checkpoints").glob("[0-9]*")
    assert int(saved.name) == 100 and "stopped at 100 images" in out
    status, out, _ = submit(root)
    assert status == 0 and out.startswith("resuming runs/small at 100 images\n")


@pytest.mark.parametrize("words", [[], ["data.encode_from=slow"]])
def test_ctrl_c_while_the_trainer_starts_or_encodes(root, words):
    process = start(root, *words, behave={"deaf_seconds": 3, "hold": 20})
    wait_for((root / "runs/small/logs/submitit/0001/rank0.json").exists)
    interrupt(process)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130


def test_ctrl_c_twice_kills(root):
    process = held(root, behave={"save_seconds": 600})
    interrupt(process)
    wait_for(lambda: "saving" in process.stdout.readline())
    interrupt(process)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_stop_from_outside_saves_and_ends_with_75(root, number):
    process = held(root)
    run = root / "runs" / "small"
    process.send_signal(number)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 75 and list((run / "checkpoints").glob("[0-9]*"))
    assert not (run / "logs/0002_rank0.log").exists()


def test_killed_submitter_lets_the_run_save_and_the_next_go_on(root):
    process = held(root, behave={"save_seconds": 0.5})
    process.kill()
    process.communicate()
    wait_for(lambda: not processes_of(root))
    assert list((root / "runs/small/checkpoints").glob("[0-9]*"))
    status, out, _ = submit(root)
    assert status == 0 and out.startswith("resuming runs/small at ")


@pytest.mark.parametrize("victim", [pytest.param("_local", marks=pytest.mark.slow), "_submit"])
def test_killed_controller_or_task_is_restarted(root, victim):
    process = held(root)
    pid = next(
        line.split(":")[0]
        for line in processes_of(root)
        if f"submitit.{'local' if victim == '_local' else 'core'}.{victim}" in line
    )
    os.kill(int(pid), signal.SIGKILL)
    if victim == "_submit":  # whose peer is asked by nobody
        release(root / "runs/small")
    out, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, out
    assert "restarting from the last checkpoint" in out and "is finished at 400 images" in out


def test_crashes_are_restarted_while_the_clock_advances(root):
    wrongs = [{"lives": [k], "clock": 60 * k, "ranks": [1], "status": -9} for k in (1, 2)]
    wrongs += [{"lives": [k], "clock": 60 * k, "ranks": [0], "status": 75, "save": True} for k in (1, 2)]
    status, out, _ = submit(root, "cluster.max_restarts=0", behave={"wrongs": wrongs})
    assert status == 0 and out.count("restarting from the last checkpoint") == 2


def test_crashes_without_progress_end_with_the_trainers_status_and_log(root):
    wrongs = [{"lives": [1, 2, 3, 4], "clock": 20, "ranks": [0, 1], "status": 7}]
    status, out, _ = submit(root, "cluster.max_restarts=1", behave={"wrongs": wrongs})
    assert status == 7
    assert out.count("restarting") == 2 and "giving up after 2 attempts without progress beyond 20 images" in out
    assert "  | something went wrong in rank" in out and "log: runs/small/logs/0003_rank" in out


def test_a_users_error_is_not_restarted(root):
    status, out, _ = submit(root, behave={"wrongs": [{"lives": [1], "clock": 20, "status": 2}]})
    assert status == 2 and "restarting" not in out and "something went wrong" in out
    status, out, _ = submit(root, "run=runs/other", "data.encode_from=wrong")
    assert status == 2 and "restarting" not in out and "| error: no such source" in out and "while encoding" in out


def test_a_rank_that_hangs_after_its_peers_end_is_killed(root):
    job = root / "cluster/job.py"
    job.write_text(job.read_text().replace("CRASH_GRACE_SECONDS = 5.0", "CRASH_GRACE_SECONDS = 0.5"))
    wrongs = [{"lives": [1], "clock": 20, "ranks": [1], "status": 2}]
    status, out, _ = submit(root, "duration_images=100000", behave={"wrongs": wrongs})
    assert status == 2 and "rank 1 ended with status 2" in out
    assert "killed, because rank 1 ended with status 2" in (root / "runs/small/logs/0001_rank0.log").read_text()


def test_two_submissions_of_one_run(root):
    process = held(root)
    status, _, err = submit(root)
    assert status == 2 and err.count("\n") == 1 and f"followed by pid {process.pid}" in err
    release(root / "runs/small")
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0


def test_cancel_from_another_terminal(root):
    process, run = held(root), root / "runs/small"
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cancel", "runs/small"], cwd=root, capture_output=True, text=True
    )
    process.communicate(timeout=PATIENCE_SECONDS)
    (saved,) = (run / "checkpoints").glob("[0-9]*")
    assert (process.returncode, done.returncode) == (130, 0), done.stderr
    assert done.stdout.endswith(f"runs/small is stopped at {int(saved.name)} images\n")  # waited for, on a busy machine
    again = subprocess.run(
        [sys.executable, "-m", "cluster.cancel", "runs/small"], cwd=root, capture_output=True, text=True
    )
    assert again.returncode == 2 and "is not active" in again.stderr


def test_tail_reads_whole_lines_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == {}
    path.write_bytes(b'{"a": 1, "b": 2}\n{"a": ')
    assert tail.read() == {"a": 1, "b": 2}
    with open(path, "ab") as f:
        f.write(b'3}\n{"a": torn\n')
    assert tail.read() == {"a": 3, "b": 2}
    path.write_bytes(b'{"a": 0}\n')  # cut back by a resumed trainer
    assert tail.read() == {"a": 0, "b": 2}


def test_numbers_in_words():
    values = {"evenkeel_images_per_second": 1234.5, "evenkeel_loss": float("nan"), "evenkeel_eta_seconds": 185}
    assert describe(3072, 163840, values) == "3Ki/160Ki images, 1,234 images/s, 3m05s left"
    assert (short(731), short(2**30 + 2**29), short(1536)) == ("731", "1.5Gi", "1.5Ki")
    assert (duration(59.4), duration(3600 * 7 + 720)) == ("59s", "7h12m")


def test_a_long_log_of_earlier_attempts_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = b'{"a": 1, "c": "' + b"x" * 1000 + b'"}\n'
    path.write_bytes(line * 30_000)  # of weeks it is ten times as much
    tail = Tail(path)
    tracemalloc.start()
    try:
        tail.skip()
        assert tail.read() == {}
        os.truncate(path, path.stat().st_size - 1500)
        assert tail.read()["a"] == 1
        with open(path, "ab") as f:
            f.write(b'\n{"b": 2}\n')
        assert tail.read()["b"] == 2 and tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
