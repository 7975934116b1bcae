"""Signals become one agreed stop at a step boundary.

A signal to any one rank leads all ranks to the same boundary: each step's vote is an all-reduce on the CPU group that is
started after the step and read after the next one, so that it never waits for a device. Torch-free until voting begins:
`listen` runs before the slow imports, so that a signal during start-up is kept, not lost.
"""

import contextlib
import os
import signal
import sys
import threading

# exit statuses, by how they are understood in cluster/job.py; the larger one wins a vote
START_AGAIN = 75  # EX_TEMPFAIL: saved, start me again
INTERRUPTED = 130  # saved after Ctrl-C, don't restart

ALONE_SECONDS = 5.0  # for the other ranks to come after all, with which to agree
STATUS = {signal.SIGTERM: START_AGAIN, signal.SIGUSR2: START_AGAIN, signal.SIGINT: INTERRUPTED}


class Stop:
    """A request to stop, voted on by all ranks."""

    def __init__(self):
        self.requested = 0
        self._pending = None
        self._group = None

    def listen(self) -> "Stop":
        """Install the handlers; a handler only notes the request."""
        for number, status in STATUS.items():
            signal.signal(number, lambda *_, status=status: self.request(status))
        return self

    def request(self, status: int) -> None:
        """Ask for a stop with this exit status."""
        self.requested = max(self.requested, status)

    @contextlib.contextmanager
    def alone(self, seconds: float = ALONE_SECONDS):
        """Let a signal end this process where the block, a wait for other ranks, goes on for `seconds` after it: nothing is lost.

        The wait is the library's, in which no handler of Python runs: a thread hears of the signal through a pipe.
        """
        heard, told = os.pipe()
        os.set_blocking(told, False)
        done = threading.Event()

        def watch() -> None:
            while number := os.read(heard, 1):
                status = STATUS.get(number[0])
                if status and not done.wait(seconds):
                    print("error: stopped before all ranks had come", file=sys.stderr, flush=True)
                    os._exit(status)

        thread = threading.Thread(target=watch, name="alone", daemon=True)
        before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        if self.requested:  # before, while libraries were loaded
            os.write(told, bytes([next(n for n, status in STATUS.items() if status == self.requested)]))
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            done.set()
            os.close(told)
            thread.join()
            os.close(heard)

    def settle(self) -> None:
        """Ignore further signals: the exit status stands, and the interpreter's end would answer them with death."""
        for number in STATUS:
            signal.signal(number, signal.SIG_IGN)

    def vote_in(self, group) -> None:
        """Vote in this process group of CPU tensors (None: a single process)."""
        self._group = group

    def agreed(self) -> int:
        """Return the exit status all ranks agreed on with the previous call's vote, 0 to go on; cast this step's vote."""
        import torch
        import torch.distributed as dist

        if self._group is None:
            return self.requested
        result = 0
        if self._pending is not None:
            work, ballot = self._pending
            work.wait()
            result = int(ballot)
        ballot = torch.tensor(self.requested, dtype=torch.int32)
        self._pending = (dist.all_reduce(ballot, op=dist.ReduceOp.MAX, group=self._group, async_op=True), ballot)
        return result

    def finish(self) -> None:
        """Wait for the vote still under way, so that the group can be left."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None
