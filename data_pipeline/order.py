"""(seed, position) -> sample: the order of training data, pure and elastic.

An epoch permutes the shards, cuts that sequence into windows of `window` shards, and shuffles the samples inside each
window, so that an object store sees sequential reads of a few shards at a time; with window >= number of shards it is a full
permutation. Nothing but integers goes in: any position can be started from, on any number of ranks. The hash is ours
(splitmix64, Steele et al. 2014) and the sort is stable, so the order depends on no library's generator. A maintainer must
never change what it returns.

Quality, measured over 64 shards of 64 (tests/test_order.py): whatever the window, samples move as far from their place as by a
full permutation; but 256 consecutive samples mix `window` shards only (at least four): 16 of 64 at window 16, 62.9 by a full
permutation. So shards must not be sorted by class: `encode` and `convert` mix a source over its shards, once; for shards that
someone else sorted, set the window to the number of shards.
"""

from functools import lru_cache

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MASK = 2**64 - 1
_SHARDS, _SAMPLES, _HELD_OUT = 1, 2, 3  # streams


def _mix(z: np.ndarray) -> np.ndarray:
    """Return splitmix64's finaliser of uint64 values: a bijection with full avalanche."""
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _key(*words: int) -> np.uint64:
    """Fold integers into one 64-bit key."""
    key = np.uint64(0)
    for word in words:
        with np.errstate(over="ignore"):
            key = _mix(np.asarray((key + _GAMMA) ^ np.uint64(word & _MASK)))[()]
    return key


def permutation(n: int, *words: int) -> np.ndarray:
    """Permute range(n) by sorting the hashes of a counter under the key of `words`; int64 [n]."""
    with np.errstate(over="ignore"):
        hashes = _mix(_key(*words) + _GAMMA * np.arange(1, n + 1, dtype=np.uint64))
    return np.argsort(hashes, kind="stable")


def held_out(n: int, fraction: float) -> np.ndarray:
    """Say which of n samples belong to the held-out part; bool [n].

    A sample's side depends on its number in the dataset and on nothing else (no training seed: runs with several seeds share one
    split), a larger fraction holds all that a smaller one does, and shards that are added later move nobody.
    Raises ValueError where one side of the split would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"heldout={fraction} must be at least 0 and below 1; try 0.01")
    with np.errstate(over="ignore"):
        hashes = _mix(_key(_HELD_OUT) + _GAMMA * np.arange(1, n + 1, dtype=np.uint64))
    chosen = hashes < np.uint64(int(fraction * 2**64))
    if chosen.all() or not chosen.any():
        raise ValueError(
            f"heldout={fraction} of {n} samples leaves one side empty; use a larger dataset or another part"
        )
    return chosen


@lru_cache(maxsize=4)
def _totals(sizes: bytes) -> tuple[int, int]:
    """Return the number of samples and of shards."""
    counts = np.frombuffer(sizes, dtype=np.int64)
    total = int(counts.sum())
    if total < 1 or (counts < 0).any():
        raise ValueError(f"{total} samples in {len(counts)} shards: need a sample, and no negative size")
    return total, len(counts)


@lru_cache(maxsize=4)
def _shard_order(sizes: bytes, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the epoch's shard order, where each starts in the epoch, and where each shard starts among the sample ids."""
    counts = np.frombuffer(sizes, dtype=np.int64)
    shards = permutation(len(counts), seed, epoch, _SHARDS)
    starts = np.concatenate([[0], np.cumsum(counts[shards])])
    first_ids = np.concatenate([[0], np.cumsum(counts)])
    return shards, starts, first_ids


@lru_cache(maxsize=4)  # a window of 1.28 M samples is 10 MB
def _window_ids(sizes: bytes, seed: int, epoch: int, window: int, number: int) -> np.ndarray:
    """Return the sample ids of one window in their order."""
    shards, _, first_ids = _shard_order(sizes, seed, epoch)
    members = shards[number * window : (number + 1) * window]
    ids = np.concatenate([np.arange(first_ids[s], first_ids[s + 1], dtype=np.int64) for s in members])
    return ids[permutation(len(ids), seed, epoch, _SAMPLES, number)]


def sample_at(seed: int, positions, shard_sizes, window: int) -> np.ndarray:
    """Return the sample id (its place in the dataset, shard after shard) at each global position; int64 [N].

    Position p is in epoch p // num_samples, and each epoch holds every sample once.
    """
    positions = np.asarray(positions, dtype=np.int64)
    packed = np.ascontiguousarray(shard_sizes, dtype=np.int64).tobytes()
    total, count = _totals(packed)
    window = min(int(window), count)
    first, last = (int(positions.min()), int(positions.max())) if positions.size else (0, 0)
    if window < 1 or first < 0:
        raise ValueError(f"window {window}, position {first}: need window >= 1 and no negative position")
    epoch, offset = divmod(first, total)
    window_starts = _shard_order(packed, seed, epoch)[1][:-1][::window]
    # Empty shards make several windows start at one offset; side="right" picks the last, which is the one that has samples.
    number = int(np.searchsorted(window_starts, offset, side="right")) - 1
    end = int(window_starts[number + 1]) if number + 1 < len(window_starts) else total
    if last < epoch * total + end:  # nearly always: one window
        start = epoch * total + int(window_starts[number])
        return _window_ids(packed, seed, epoch, window, number)[positions - start]
    ids, inside = np.empty(positions.shape, dtype=np.int64), positions < epoch * total + end
    for chosen in (inside, ~inside):  # the first window, then what lies beyond it
        ids[chosen] = sample_at(seed, positions[chosen], shard_sizes, window)
    return ids


def shards_ahead(seed: int, position: int, shard_sizes, window: int) -> list[int]:
    """Return the shards of the window at a position and of the window after it: what a remote source fetches ahead."""
    sizes = np.ascontiguousarray(shard_sizes, dtype=np.int64)
    window = min(int(window), len(sizes))
    epoch, offset = divmod(int(position), int(sizes.sum()))
    shards, starts, _ = _shard_order(sizes.tobytes(), seed, epoch)
    number = int(np.searchsorted(starts[:-1][::window], offset, side="right")) - 1
    found = shards[number * window : (number + 2) * window].tolist()
    if (number + 1) * window >= len(shards):  # the next window is the next epoch's first
        found += _shard_order(sizes.tobytes(), seed, epoch + 1)[0][:window].tolist()
    return list(dict.fromkeys(found))
