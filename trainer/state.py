"""RUN/state.json: one of the two words between trainer and cluster (the other is the exit status).

Written atomically by rank 0 of the trainer, read only by others. Torch-free, so that a login node can read it.
"""

import contextlib
import errno
import json
import os
import socket
import struct
import sys
import time
from pathlib import Path

from data_pipeline.durable import write_atomically

VERSION = 1
# no mistake of the user: a file server's trouble, a disk that somebody may clear; another start may fare better
MAY_PASS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT)
PREDECESSOR_SECONDS = 120.0  # as long as a save may take that Slurm's warning leaves time for
_LONGEST_HEADER_BYTES = 100_000_000  # of a safetensors file


def read(run: str | os.PathLike) -> dict:
    """Return the run's state, {} where the run has none yet; raise ValueError, in one line, where it is damaged."""
    path = Path(run) / "state.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(
            f"{path}: damaged ({error}); remove it, the checkpoints hold all that training needs"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no object; remove it, the checkpoints hold all that training needs")
    return found


class RunState:
    """What others may know of a run: status, clock, attempt (which start of the run this is), last checkpoint, last error."""

    def __init__(self, run: str | os.PathLike, rank: int, duration_images: int):
        self.path, self.rank = Path(run) / "state.json", rank
        before = read(run)
        if rank == 0:
            for left in self.path.parent.glob(f".{self.path.name}.*"):  # of a life that was killed while it wrote
                left.unlink(missing_ok=True)
        self.values = {
            "version": VERSION,
            "status": "starting",
            "clock": before.get("clock", 0),
            "duration": duration_images,
            "attempt": max(before.get("attempt") or _written_life(Path(run)), _saved_life(Path(run))) + 1,
            "last_checkpoint": before.get("last_checkpoint", 0),
            "last_error": "",
            "parent": before.get("parent", ""),  # the run this one was forked from
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "born": _born(os.getpid()),
        }

    @property
    def attempt(self) -> int:
        """Count the starts of this run; each is a life that checkpoints and snapshots name."""
        return self.values["attempt"]

    def write(self, **changes) -> None:
        """Merge `changes` and replace the file in one step; ranks other than 0 only remember. Raise Superseded as `check` does."""
        self.values.update(changes, time=time.time())
        if self.rank == 0:
            self.check()
            write_atomically(self.path, json.dumps(self.values, indent=1).encode())

    def check(self) -> None:
        """Raise Superseded where a later start of the run has begun: of a node that was given up and lives, nothing may be kept."""
        try:
            there = read(self.path.parent)
        except (OSError, ValueError):  # damaged, or no disk at present: no later start has left a word
            return
        if there.get("attempt", 0) > self.attempt:
            raise Superseded(
                f"attempt {there['attempt']} of this run has begun on {there.get('host')}; attempt {self.attempt} ends"
            )


class Superseded(ValueError):
    """A later start of the run has begun."""


class BeingTrained(ValueError):
    """An earlier start of the run goes on."""


def await_predecessor(run: str | os.PathLike, seconds: float = PREDECESSOR_SECONDS) -> None:
    """Return when the run's last start, if it lives on this machine, has ended, or has given no sign of life for `seconds`.

    It may be saving still, after whoever watched it was killed. Raise BeingTrained where it goes on training.
    """
    before, until = read(run), time.monotonic() + seconds
    pid = before.get("pid")
    if before.get("host") != socket.gethostname() or not before.get("born") or pid == os.getpid():
        return
    if _born(pid) == before["born"]:
        tell(f"waiting for attempt {before.get('attempt')} of {run}, which lives as pid {pid}, to end")
    while _born(pid) == before["born"]:
        now = read(run)
        if now.get("status") == "running" and now.get("clock", 0) > before.get("clock", 0):
            raise BeingTrained(f"{run}: is being trained by pid {pid}; stop that first (kill {pid} saves)")
        if time.monotonic() > until:  # it hangs; `RunState.check` keeps it from saving should it wake up
            tell(f"warning: attempt {before.get('attempt')} lives as pid {pid} and does nothing; going on without it")
            return
        time.sleep(0.2)


def _born(pid: int) -> str:
    """Return what tells a process from a later one of the same pid, "" where there is none: its start since the boot, the boot."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else f"{fields[19]} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    except (OSError, IndexError):
        return ""


def _saved_life(run: Path) -> int:
    """Return the newest life that a checkpoint names: should state.json be lost, lives go on counting all the same."""
    newest = 0
    for manifest in (run / "checkpoints").glob("[0-9]*/manifest.json"):
        with contextlib.suppress(
            OSError, ValueError, KeyError, TypeError
        ):  # a damaged one is reported where it is read
            newest = max(newest, int(json.loads(manifest.read_text())["life"]))
    return newest


def _written_life(run: Path) -> int:
    """Return the newest life that a snapshot names: one that ended before its first checkpoint may have left these alone."""
    newest = 0
    for snapshot in (run / "snapshots").glob("ema-*.safetensors"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, struct.error):
            with open(snapshot, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                entries = json.loads(file.read(min(length, _LONGEST_HEADER_BYTES)))
            newest = max(newest, int(json.loads(entries["__metadata__"]["evenkeel"])["life"]))
    return newest


def fail(run: str | os.PathLike, error: Exception) -> None:
    """Record why this start of the run ended; any rank may, and the first is kept: the others fail because of it."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, Superseded | BeingTrained):
        return  # the file is the other start's
    # a full disk or a damaged state.json: often the very reason, and the caller prints it, too
    with contextlib.suppress(OSError, ValueError):
        before = read(run)
        if before.get("status") != "failed":
            values = before | {"status": "failed", "last_error": text, "time": time.time()}
            write_atomically(Path(run) / "state.json", json.dumps(values, indent=1).encode())


def is_full(error: OSError) -> bool:
    """Say whether a write was refused for lack of space: a full disk, or a quota that is used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def tell(line: str, stream=None) -> None:
    """Print a line (to stderr) wherever it goes: a log on a full disk must not stop what it tells about."""
    with contextlib.suppress(OSError):
        print(line, file=stream or sys.stderr, flush=True)
