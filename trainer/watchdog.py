"""Finds a rank that hangs, names it, and ends the job with "start me again".

Each rank's thread watches the time since its own last sign of life. When one runs out it asks, every rank says what it is doing
(RUN/logs/*.hang), and the one that does not answer, or else has been silent longest, is named. The thread needs no collective: a
hang is just what breaks those. A rank that waits for the filesystem does not hang; it is given more time, and said so. Should
the interpreter itself be stuck, faulthandler's C thread ends the process a little later.
"""

import faulthandler
import itertools
import json
import os
import statistics
import threading
import time
from collections import deque
from pathlib import Path

from data_pipeline import durable
from trainer import state
from trainer.stop import START_AGAIN

PATIENCE_FACTOR = 10  # more time for what is done for the first time (compilation, cold caches) and for the filesystem
USUAL_STEPS = 32  # whose median is the usual time of a step
SHORTEST_SECONDS = 120.0  # however short the steps are: a shard may have to be fetched again, a machine may be busy
DEAF_FACTOR = 2  # times its patience, and a rank that cannot even ask the others (a full disk) ends by itself
ANSWER_SECONDS = 3.0  # how long to wait for the other ranks' word on who hangs, beyond the time in which they look
LONGEST_POLL_SECONDS = 5.0
FILESYSTEM = ("checkpoint", "snapshot", "state", "last save")


def request(run: Path, attempt: int) -> Path:
    """Return the file by which a rank asks all others what they are doing."""
    return run / "logs" / f"{attempt:04d}.hang"


class Watchdog:
    """Call `alive` wherever the loop gets on; 0 seconds switch it off.

    Patience with computing and communication is `limit_steps` times the usual time of a step, at least SHORTEST_SECONDS and at most
    `limit_seconds`, which holds for all else, and where `limit_steps` is 0.
    """

    def __init__(self, run: Path, rank: int, world: int, attempt: int, limit_seconds: float, limit_steps: int = 0):
        self.run, self.rank, self.world, self.attempt, self.limit = run, rank, world, attempt, limit_seconds
        self.limit_steps, self._stepped = limit_steps, deque(maxlen=USUAL_STEPS + 1)
        self.doing, self.since = "starting", time.monotonic()  # a host's clock may be set; only words to others name it
        self._done: set[str] = set()  # what this start has done once already
        self._steps = 0
        self._asked_at = 0.0
        self._request = request(run, attempt)
        self._ended = threading.Event()
        if limit_seconds:
            (run / "logs").mkdir(exist_ok=True)
            self._stacks = open(self._file(rank, "stacks"), "w")
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def alive(self, doing: str) -> None:
        """Say what begins now."""
        self._steps += doing == "optimizer"
        self._done.add(self.doing)
        self.doing, self.since = doing, time.monotonic()
        if doing == "optimizer":
            self._stepped.append(self.since)

    def close(self) -> None:
        """End the watch; without stacks to show, leave no file."""
        self._ended.set()
        if self.limit:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            self._stacks.close()
            for kind in ("stacks", "hang"):
                self._file(self.rank, kind).unlink(missing_ok=True)

    def _file(self, rank: int, kind: str) -> Path:
        return self.run / "logs" / f"{self.attempt:04d}_rank{rank}.{kind}"

    def _allowed(self) -> float:
        # the second step may compile again; so does the first forward that collects magnitudes, under a name of its own
        slow = self.doing in FILESYSTEM or self.doing not in self._done or self._steps < 2
        return self._patience() * (PATIENCE_FACTOR if slow else 1)

    def _patience(self) -> float:
        stepped = self._stepped.copy()  # the loop goes on meanwhile
        elsewhere = self.doing in (*FILESYSTEM, "data")  # what takes its time there has nothing to do with a step's
        if not self.limit_steps or elsewhere or len(stepped) <= USUAL_STEPS:
            return self.limit
        usual = statistics.median(after - before for before, after in itertools.pairwise(stepped))
        return min(self.limit, max(SHORTEST_SECONDS, self.limit_steps * usual))

    def _watch(self) -> None:
        poll = min(LONGEST_POLL_SECONDS, self.limit / 4)
        while not self._ended.wait(poll):
            faulthandler.dump_traceback_later(2 * PATIENCE_FACTOR * self.limit + 30, exit=True, file=self._stacks)
            try:
                self._look(2 * poll + ANSWER_SECONDS)
            except OSError as error:  # a full disk: nobody can ask or answer, and the watch must outlast it
                state.tell(f"warning: rank {self.rank} cannot tell the others what it does: {error}")
                seconds = time.monotonic() - self.since
                if seconds > DEAF_FACTOR * self._allowed():
                    self._end(
                        f"rank {self.rank}: no step for {seconds:.0f} s ({self.doing}), and nobody can be asked: {error}"
                    )

    def _look(self, wait_seconds: float) -> None:
        """Answer a question that another rank has asked; ask one where this rank is late."""
        if question := self._question():
            self._answer(question)
        late = time.monotonic() - max(self.since, self._asked_at)
        if late > self._allowed() or (self.doing in FILESYSTEM and late > self._patience()):
            self._ask(wait_seconds)

    def _question(self) -> str:
        try:
            return self._request.read_text()
        except OSError:  # nobody asks
            return ""

    def _answer(self, question: str) -> None:
        since = time.time() - (time.monotonic() - self.since)
        word = {"to": question, "doing": self.doing, "since": since, "until": since + self._allowed()}
        beside = self._file(self.rank, "hang.writing")
        beside.write_text(json.dumps(word))
        os.replace(beside, self._file(self.rank, "hang"))

    def _ask(self, wait_seconds: float) -> None:
        """Find out which rank all wait for; end the process unless that one is only slow."""
        self._asked_at, since = time.monotonic(), self.since
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        self._stacks.flush()
        question = self._question() or f"rank {self.rank} at {time.time()}"
        durable.write_atomically(self._request, question.encode())
        self._answer(question)
        time.sleep(wait_seconds)
        known = {rank: self._word(rank, question) for rank in range(self.world)}
        words = ", ".join(f"rank {r}: {w['doing'] if w else 'no answer'}" for r, w in known.items())
        silent = [rank for rank, word in known.items() if word is None]
        guilty = silent[0] if silent else min(known, key=lambda rank: known[rank]["since"])
        word, seconds = known[guilty], time.monotonic() - since
        waits = word is not None and word["doing"] in FILESYSTEM
        what = f"waits for the filesystem ({word['doing']})" if waits else "hangs"
        text = (
            f"no step for {seconds:.0f} s; rank {guilty} {what} ({words}); stacks in {self._file(self.rank, 'stacks')}"
        )
        if self.since != since or (word and time.time() < word["until"]):  # it was, or is, only slow
            if self.since == since and waits:
                state.tell(f"warning: {text}")
            self._request.unlink(missing_ok=True)
            return
        self._end(text)

    def _end(self, text: str) -> None:
        state.tell(f"error: {text}")
        state.fail(self.run, TimeoutError(text))
        os._exit(START_AGAIN)

    def _word(self, rank: int, question: str) -> dict | None:
        try:
            word = json.loads(self._file(rank, "hang").read_text())
        except (OSError, ValueError):  # it never got to say: the likeliest culprit
            return None
        return word if word["to"] == question else None  # an answer to an earlier question says nothing of now
