"""What is known to be bad, and what takes its place.

A replacement is a function of the sample's number, the quarantine list and the state of the shards: no rank, no clock, no random
number. So every layout of ranks makes the same replacements of the same damage, and a resumed run, which takes the list from its
checkpoint, makes them again even where the damage was repaired meanwhile. A maintainer must keep it so.
"""

import errno
import threading

import numpy as np

from data_pipeline import order

_OWN_FAULTS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class BadSample(ValueError):
    """One sample that is not what the index says; every other error is about the whole shard."""


def split(sizes: np.ndarray, heldout: float, part: str) -> tuple[np.ndarray | None, np.ndarray]:
    """Return the sample ids of one part of a dataset, ascending (None: all of them), and how many of them each shard has."""
    if part not in ("train", "heldout"):
        raise ValueError(f"part {part!r} is none of train, heldout")
    if heldout == 0 and part == "train":
        return None, sizes
    chosen = order.held_out(int(sizes.sum()), heldout) == (part == "heldout")
    before = np.concatenate([[0], np.cumsum(chosen)])
    ends = np.cumsum(sizes)
    return np.flatnonzero(chosen), before[ends] - before[ends - sizes]


class Quarantine:
    """The bad samples and shards of a dataset, and the policy. Thread-safe."""

    def __init__(
        self, names: list[str], sizes: np.ndarray, members: np.ndarray | None, on_bad: str, max_bad: int | None
    ):
        if on_bad not in ("stop", "replace"):
            raise ValueError(f"on_bad {on_bad!r} is none of stop, replace")
        self.names, self.sizes, self.starts, self.members = names, sizes, np.cumsum(sizes) - sizes, members
        self.on_bad = on_bad
        # Past one sample in ten thousand the data is no longer what the manifest names.
        self.max_bad = max(1, int(sizes.sum()) // 10_000) if max_bad is None else max_bad
        self.shards: set[int] = set()
        self.samples: set[int] = set()
        self._lock = threading.Lock()

    @property
    def empty(self) -> bool:
        return not self.shards and not self.samples

    def holds(self, shard: int, sample: int) -> bool:
        """Say whether a sample is known to be bad."""
        return shard in self.shards or sample in self.samples

    def note(self, shard: int, sample: int, error: Exception):
        """Add what is bad: a sample, or else its shard; raise ValueError when the policy or its limit says stop."""
        message = str(error)
        if getattr(error, "errno", None) in _OWN_FAULTS:
            raise error  # of this process, not of the data
        if isinstance(error, OSError):
            message = f"shard {self.names[shard]}: {error}; restore it or set on_bad=replace"
        with self._lock:
            if self.on_bad == "stop":
                raise ValueError(message) from None
            if isinstance(error, BadSample):
                self.samples.add(sample)
            else:
                self.shards.add(shard)
            bad = self.count()
            if bad > self.max_bad:
                raise ValueError(
                    f"{bad} samples are bad, more than max_bad={self.max_bad}; the last: {message}"
                ) from None

    def count(self) -> int:
        """Return the number of bad samples, those of bad shards included, each once."""
        whole = sum(int(self.sizes[shard]) for shard in self.shards)
        return whole + sum(
            int(np.searchsorted(self.starts, s, side="right")) - 1 not in self.shards for s in self.samples
        )

    def substitute(self, shard: int, sample: int) -> int:
        """Name what replaces a bad sample: the next one, or the same row of the next shard when all of its shard is bad.

        Where that belongs to the other part of the dataset, the next one that does not.
        """
        if shard in self.shards:
            following = (shard + 1) % len(self.sizes)
            row = (sample - int(self.starts[shard])) % max(1, int(self.sizes[following]))
            found = int(self.starts[following]) + row
        else:
            found = (sample + 1) % int(self.sizes.sum())
        if self.members is None:
            return found
        return int(self.members[np.searchsorted(self.members, found) % len(self.members)])

    def state(self) -> dict:
        """Return the list, for a checkpoint."""
        with self._lock:
            return {"version": 1, "shards": sorted(self.shards), "samples": sorted(self.samples)}

    def add(self, state: dict) -> bool:
        """Take over a list, or several ranks' lists one after another; say whether anything in it was new."""
        with self._lock:
            before = len(self.shards) + len(self.samples)
            self.shards.update(int(s) for s in state["shards"])
            self.samples.update(int(s) for s in state["samples"])
            return len(self.shards) + len(self.samples) > before
