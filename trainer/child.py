"""Child processes of a command: none outlives it, however it ends."""

import ctypes
import os
import signal
import subprocess

LEAVE_SECONDS = 10.0  # for removing temporary folders, after which it is killed with all it has started


def die_with_parent() -> None:
    """Have the kernel send SIGTERM to this process, just forked, when its parent dies (Linux: PR_SET_PDEATHSIG is 1)."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    except (OSError, AttributeError):
        pass  # no Linux: an orphan ends by itself, at the end of its work


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    """Run a command to its end and return what it wrote, as text; on Ctrl-C it is told to leave first."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(command, preexec_fn=die_with_parent, process_group=0, **pipes, **options)
    try:
        out, err = child.communicate()
    except BaseException:
        _end(child)
        raise
    return subprocess.CompletedProcess(command, child.returncode, out, err)


def _end(child: subprocess.Popen) -> None:
    child.terminate()
    try:
        child.communicate(timeout=LEAVE_SECONDS)
    except subprocess.TimeoutExpired:
        pass  # deep in a compiler, for instance
    try:
        os.killpg(child.pid, signal.SIGKILL)  # compilers that it has started, too
    except ProcessLookupError:
        return  # nothing is left of it
    child.wait()
