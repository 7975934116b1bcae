"""A process beside the training that looks at every snapshot: `trainer.evaluate RUN --follow`, on idle CPU time, without a GPU.

What must not break: it never delays the end of a run that was asked to stop, nor that of a finished one for long; what it left
undone, the next start or the same command by hand does.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

POLL_SECONDS = 0.2
PATIENCE_SECONDS = 600.0  # after the end of the run, while its job still holds its nodes
LOWEST_PRIORITY = 19


def start(run: Path, attempt: int, environment: dict[str, str], before: Callable[[], None]) -> subprocess.Popen:
    """Start it in RUN/code with its log in RUN/logs/; `before` runs in the new process."""

    def prepare() -> None:
        os.nice(LOWEST_PRIORITY)
        before()

    with open(run / "logs" / f"{attempt:04d}_evaluate.log", "a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "trainer.evaluate", str(run), "--follow", "--device", "cpu"],
            cwd=run / "code",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=prepare,
        )


def end(follower: subprocess.Popen, finished: bool, wanted: Callable[[], int]) -> bool:
    """Let it catch up after a finished run, unless a stop is `wanted`, then end it; say whether it had looked at everything."""
    until = time.monotonic() + (PATIENCE_SECONDS if finished else 0)
    while follower.poll() is None and time.monotonic() < until and not wanted():
        time.sleep(POLL_SECONDS)
    if follower.poll() is None:
        follower.terminate()
    return follower.wait() == 0
