"""Stop a run in good order: it saves a checkpoint, then leaves, and is not restarted. `python -m cluster.cancel RUN [--now]`

Of a sweep, all its points.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from cluster import points, slurm
from cluster.run_directory import follower, read_state, runs_training, saved_images, shown, write_atomically
from data_pipeline.command import command_line

LOOK_SECONDS = 0.5


@command_line()
def main(argv: list[str] | None = None) -> int:
    """Ask the run to stop, wait until it has, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cluster.cancel", description="Stop a run: save, then leave.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run or sweep directory")
    parser.add_argument(
        "--now", action="store_true", help="do not wait for a checkpoint: lose what came after the last one"
    )
    arguments = parser.parse_args(argv)
    run = arguments.run.resolve()
    for line in cancel_sweep(run, arguments.now) if points.is_sweep(run) else [cancel(run, arguments.now)]:
        print(line, flush=True)
    return 0


def cancel_sweep(folder: Path, now: bool) -> Iterator[str]:
    """Stop all points of a sweep and yield a line for each that was active; ValueError when none was."""
    active = [folder / name for name in points.recorded(folder) if slurm.active_state(folder / name)]
    if not active:
        _cancel_here(folder, now)
        yield f"{shown(folder)} is stopped; the same --sweep command goes on with it"
        return
    # those that wait go first: they would start when the one that they wait for has left
    for run in sorted(active, key=lambda run: slurm.active_state(run) == "RUNNING"):
        if slurm.active_state(run):
            yield cancel(run, now)


def cancel(run: Path, now: bool) -> str:
    """Stop the run and return a line that says what happened; ValueError when nothing of it is active."""
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{shown(run)}: no run directory (it has no config.yaml); try: ls runs")
    state = slurm.active_state(run)
    if state:
        return _cancel_job(run, slurm.job_of(run), state, now)
    return _cancel_here(run, now)


def _cancel_here(run: Path, now: bool) -> str:
    pid, host = follower(run)
    trainer = read_state(run)
    if pid and host != socket.gethostname():
        raise ValueError(f"{shown(run)} is followed by pid {pid} on {host}; run this there")
    if not pid and trainer.get("host") == socket.gethostname() and runs_training(int(trainer.get("pid") or 0)):
        pid = int(trainer["pid"])  # started by hand
    if not pid:
        raise ValueError(f"{shown(run)} is not active; python -m cluster.status {shown(run)} says how it stands")
    for _ in range(2 if now else 1):  # the second Ctrl-C kills
        os.kill(pid, signal.SIGINT)
        time.sleep(LOOK_SECONDS)
    _wait(lambda: follower(run)[0] == pid or runs_training(pid), f"pid {pid}")
    return f"{shown(run)} is stopped at {saved_images(run)} images"


def _cancel_job(run: Path, job_id: str, state: str, now: bool) -> str:
    write_atomically(run / "logs" / "cancelled.json", json.dumps({"job_id": job_id}))  # cluster/requeue.py heeds it
    signals = [] if now or state not in ("RUNNING", "SUSPENDED") else ["--signal=INT"]
    done = subprocess.run(["scancel", *signals, job_id], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"scancel {job_id}: {done.stderr.strip()}")
    _wait(lambda: slurm.state_of(job_id) not in slurm.OVER, f"Slurm job {job_id}")
    return f"{shown(run)} is stopped at {saved_images(run)} images; Slurm job {job_id} is {slurm.state_of(job_id) or 'gone'}"


def _wait(active, what: str) -> None:
    started = told = time.monotonic()
    while active():
        time.sleep(LOOK_SECONDS)
        if time.monotonic() - told > 5:
            told = time.monotonic()
            print(f"waiting for {what} to save and leave, {told - started:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
