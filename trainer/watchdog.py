"""Finds a rank that hangs, names it, and ends the job with "start me again".

Each rank's thread watches the time since its own last sign of life. When it runs out, every rank writes its stacks and what it was
doing to RUN/logs/; the one that has been silent longest, or does not answer at all, is named. The thread needs no collective: a
hang is just what breaks those. Should the interpreter itself be stuck, faulthandler's C thread ends the process a little later.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from pathlib import Path

from trainer import state
from trainer.stop import START_AGAIN

FIRST_STEP_FACTOR = 10  # compilation, cold caches
ANSWER_SECONDS = 3.0  # how long to wait for the other ranks' word on who hangs


class Watchdog:
    """Call `alive` wherever the loop gets on; 0 seconds switch it off."""

    def __init__(self, run: Path, rank: int, world: int, attempt: int, limit_seconds: float):
        self.run, self.rank, self.world, self.attempt, self.limit = run, rank, world, attempt, limit_seconds
        self.doing, self.since, self.steps = "starting", time.time(), 0
        self._ended = threading.Event()
        if limit_seconds:
            (run / "logs").mkdir(exist_ok=True)
            self._stacks = open(self._file(rank, "stacks"), "w")
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def alive(self, doing: str) -> None:
        """Say what begins now."""
        self.doing, self.since = doing, time.time()
        if doing == "optimizer":
            self.steps += 1

    def close(self) -> None:
        """End the watch; without stacks to show, leave no file."""
        self._ended.set()
        if self.limit:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            self._stacks.close()
            self._file(self.rank, "stacks").unlink(missing_ok=True)

    def _file(self, rank: int, kind: str) -> Path:
        return self.run / "logs" / f"{self.attempt:04d}_rank{rank}.{kind}"

    def _watch(self) -> None:
        poll = min(1.0, self.limit / 4)
        while not self._ended.wait(poll):
            limit = self.limit * (FIRST_STEP_FACTOR if self.steps < 2 else 1)
            faulthandler.dump_traceback_later(2 * limit + 30, exit=True, file=self._stacks)
            if time.time() - self.since > limit:
                self._bark(limit)

    def _bark(self, limit: float) -> None:
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        self._stacks.flush()
        self._file(self.rank, "hang").write_text(json.dumps({"doing": self.doing, "since": self.since}))
        time.sleep(ANSWER_SECONDS + limit / 4)
        known = {}
        for rank in range(self.world):
            try:
                known[rank] = json.loads(self._file(rank, "hang").read_text())
            except (OSError, ValueError):  # it never got to say: the likeliest culprit
                known[rank] = None
        silent = [rank for rank, word in known.items() if word is None]
        guilty = silent or [min(known, key=lambda rank: known[rank]["since"])]
        words = ", ".join(f"rank {r}: {w['doing'] if w else 'no answer'}" for r, w in known.items())
        if time.time() - self.since < limit:  # it was only slow: the loop has got on meanwhile
            self._file(self.rank, "hang").unlink(missing_ok=True)
            return
        text = (
            f"no step for {limit:.0f} s; rank {guilty[0]} hangs ({words}); stacks in {self._file(self.rank, 'stacks')}"
        )
        print(f"error: {text}", file=sys.stderr, flush=True)
        state.fail(self.run, TimeoutError(text))
        os._exit(START_AGAIN)
