"""The other ranks: waits for all of them at the start, and notices at once when one is gone.

A collective on a GPU waits for a dead rank until its timeout, and one on a CPU raises whatever its library says. Here each rank
listens, in a thread and over sockets of its own, to the next one: a process that dies closes its sockets, whatever killed it. Who
hears of a death tells the one before at once, so that the news is around the ring before anybody's grace is over. A machine that
loses its power closes nothing: that is the watchdog's case (trainer/watchdog.py).
"""

import contextlib
import os
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from trainer import state, watchdog
from trainer.stop import START_AGAIN

FOREVER = timedelta(days=365)
GRACE_SECONDS = (
    3.0  # for the training thread to end by itself: it may be about to fail for the same reason as the other rank
)
CONNECTING_SECONDS = 60.0  # at least: a thousand ranks take some, however short `engine.hang_seconds` is
KNOCK_SECONDS = 0.2  # between attempts to reach rank 0, in the end: most ranks start at about the same time
FAREWELL = -1  # instead of the rank that is gone
TELLING_SECONDS = 0.5  # how much earlier than this thread a collective may hear that a rank is gone


def meet(seconds: float) -> tuple[dist.Store, int, int]:
    """Return (store, rank, world) as the environment describes them, when all ranks are there.

    Raises TimeoutError where one has not come within `seconds`.
    """
    until = time.monotonic() + seconds
    try:
        if os.environ["RANK"] != "0":
            _await_first(until)
        left = timedelta(seconds=max(1.0, until - time.monotonic()))
        store, rank, world = next(dist.rendezvous("env://", timeout=left))
        if world > 1:
            store.set(f"evenkeel/here/{rank}", "")
            left = timedelta(seconds=max(1.0, until - time.monotonic()))
            store.wait([f"evenkeel/here/{r}" for r in range(world)], left)
    except (dist.DistError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise TimeoutError(
            f"not all {os.environ.get('WORLD_SIZE')} ranks came within {seconds:.0f} s (engine.hang_seconds); "
            f"the log of the one that is missing says why ({reason})"
        ) from None
    return store, rank, world


def _await_first(until: float) -> None:
    """Return when rank 0 can be reached; raise OSError where it can't by `until`: the store's own client then tries once more."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    pause = KNOCK_SECONDS / 16
    while True:
        try:
            socket.create_connection(address, timeout=max(0.1, until - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
        time.sleep(pause)
        pause = min(2 * pause, KNOCK_SECONDS)


@contextlib.contextmanager
def connected_within(seconds: float, run: Path | None):
    """End this rank where the block, in which all ranks connect, lasts longer: one that dies in it lets the others wait forever."""

    def give_up() -> None:
        error = TimeoutError(
            f"not all ranks were connected within {seconds:.0f} s; the log of the one that is gone says why"
        )
        state.tell(f"error: {error}")
        if run is not None:
            state.fail(run, error)
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class RankGone(ConnectionError):
    """Another rank is gone; `status` is the exit status that follows from it."""

    def __init__(self, text: str, status: int):
        super().__init__(text)
        self.status = status


class Peers:
    """End this rank soon after the next one is gone; `group` is a gloo group for this alone (None: a single process).

    `attempt` says which start this is, as soon as the ranks agree on it: whether one was ended for a hang is then known.
    """

    def __init__(self, run: Path, rank: int, world: int, group):
        self.run, self.rank, self.world, self.group, self.attempt = run, rank, world, group, 0
        self._gone: RankGone | None = None
        self._known = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="peers", daemon=True)
        if group is not None:
            self._thread.start()

    def gone(self) -> RankGone | None:
        """Return who is gone, if somebody is: what an error of a collective means."""
        if self.group is not None:
            self._known.wait(TELLING_SECONDS)
        return self._gone

    def close(self) -> None:
        """Say farewell; return when the next rank has done so too."""
        if self.group is not None:
            self._tell(FAREWELL, 0).wait()
            self._thread.join()

    def _tell(self, gone: int, status: int) -> dist.Work:
        """Send to the rank that listens to this one."""
        return dist.isend(torch.tensor([gone, status]), group=self.group, group_dst=(self.rank - 1) % self.world)

    def _listen(self) -> None:
        next_one = (self.rank + 1) % self.world
        heard = torch.zeros(2, dtype=torch.int64)
        try:
            dist.irecv(heard, group=self.group, group_src=next_one).wait()
            gone, status = heard.tolist()
        except RuntimeError:  # the other end of the socket is closed, and no farewell came
            hang = watchdog.request(self.run, self.attempt).exists()
            gone, status = next_one, START_AGAIN if hang else 1
        if gone == FAREWELL:
            return
        self._gone = RankGone(f"rank {gone} is gone; this start ends, the last checkpoint stands", status)
        with contextlib.suppress(RuntimeError):  # the one that listens may be gone as well
            if gone != (self.rank - 1) % self.world:
                self._tell(gone, status)  # before this rank's own thread may hear of it, and end
        self._known.set()
        time.sleep(GRACE_SECONDS)
        state.tell(f"error: {self._gone}")  # may go to a full disk: this rank must end all the same
        state.fail(self.run, self._gone)
        os._exit(self._gone.status)
