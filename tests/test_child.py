"""No child outlives the command that started it, whatever ends that: Ctrl-C, SIGTERM or kill -9."""

import signal
import subprocess
import sys

import pytest

from tests.small_checkout import wait_for
from trainer import child
from trainer.config import ROOT

STARTS = "import sys; from trainer import child; child.run(sys.argv[1:])"
TELLS = "import os, sys, time; print(os.getpid(), file=open(sys.argv[1], 'w'), flush=True); time.sleep(300)"


def alive(pid: int) -> bool:
    """Say whether the process runs: one that has ended may wait for somebody to look at its status."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_it_wrote_comes_back():
    done = child.run([sys.executable, "-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"])
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 3)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_its_parent(sent, tmp_path):
    told = tmp_path / "pid"
    parent = subprocess.Popen(
        [sys.executable, "-c", STARTS, sys.executable, "-c", TELLS, str(told)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: told.exists() and told.read_text().endswith("\n"))
    parent.send_signal(sent)
    parent.wait(timeout=60)
    wait_for(lambda: not alive(int(told.read_text())), 60)  # it would sleep for longer
