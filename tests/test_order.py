"""Order laws: every sample once per epoch, from any position, on any layout, the same for ever."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import order

sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda s: sum(s) > 0)


@settings(deadline=None, max_examples=150)
@given(sizes, st.integers(0, 2**64), st.integers(1, 15), st.integers(0, 3))
def test_every_sample_once_per_epoch(shard_sizes, seed, window, epoch):
    n = sum(shard_sizes)
    ids = order.sample_at(seed, np.arange(epoch * n, (epoch + 1) * n), shard_sizes, window)
    assert sorted(ids.tolist()) == list(range(n))


@settings(deadline=None, max_examples=100)
@given(sizes, st.integers(1, 5), st.integers(1, 8), st.integers(0, 50), st.randoms())
def test_same_batch_however_it_is_split(shard_sizes, window, world, start, random):
    positions = np.arange(start, start + 4 * world)
    whole = order.sample_at(7, positions, shard_sizes, window)
    parts = [order.sample_at(7, positions[rank::world], shard_sizes, window) for rank in range(world)]
    assert all((whole[rank::world] == part).all() for rank, part in enumerate(parts))
    shuffled = np.array(random.sample(range(len(positions)), len(positions)))
    assert (order.sample_at(7, positions[shuffled], shard_sizes, window) == whole[shuffled]).all()


def test_window_bounds_what_is_open():
    shard_sizes, window = [10] * 12, 3
    ids = order.sample_at(0, np.arange(120), shard_sizes, window)
    for k in range(4):
        assert len(set((ids[k * 30 : (k + 1) * 30] // 10).tolist())) == 3
    assert (
        order.sample_at(0, np.arange(120), shard_sizes, 12) == order.sample_at(0, np.arange(120), shard_sizes, 99)
    ).all()


def test_epochs_and_seeds_differ():
    def epoch(seed, number):
        return order.sample_at(seed, np.arange(number * 500, (number + 1) * 500), [50] * 10, 4).tolist()

    assert len({tuple(epoch(seed, number)) for seed in range(4) for number in range(4)}) == 16


def test_order_is_frozen():
    """Data order is part of every checkpoint: these numbers must never change."""
    assert order.permutation(8, 1, 2, 3).tolist() == FROZEN_PERMUTATION
    assert order.sample_at(42, np.arange(5, 25), [3, 1, 4, 2], 2).tolist() == FROZEN_ORDER


FROZEN_PERMUTATION = [7, 6, 1, 3, 2, 0, 4, 5]
FROZEN_ORDER = [4, 9, 5, 7, 8, 9, 3, 8, 1, 7, 4, 2, 5, 0, 6, 1, 0, 9, 2, 8]


def test_permutation_is_uniform():
    """All 24 permutations of 4 turn up evenly: chi-square with 23 degrees of freedom, far below its 1e-6 quantile of 70."""
    counts = {}
    for seed in range(4800):
        key = tuple(order.permutation(4, seed, 0).tolist())
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 24 and sum((c - 200) ** 2 / 200 for c in counts.values()) < 70


def distance_to_permutation(window, num_shards=64, per_shard=64, epochs=4):
    """Measure how far a window's order is from a full permutation.

    Returns the mean squared displacement between a sample's place in the dataset and in the epoch, over that of a random
    permutation, and the mean number of shards in 256 consecutive samples, over that of a random permutation.
    """
    n, batch = num_shards * per_shard, 256
    moves, spread = [], []
    for epoch in range(epochs):
        ids = order.sample_at(1, np.arange(epoch * n, (epoch + 1) * n), [per_shard] * num_shards, window)
        moves.append(np.mean((ids - np.arange(n)) ** 2.0) / (n**2 / 6))
        spread += [len(np.unique(part // per_shard)) for part in ids.reshape(-1, batch)]
    return np.mean(moves), np.mean(spread) / (num_shards * (1 - (1 - 1 / num_shards) ** batch))


def test_quality_of_windows():
    """Samples leave their place as in a full permutation for every window; a batch mixes up to `window` shards."""
    for window, shards in ((1, 4 / 63), (16, 16 / 63), (64, 1.0)):
        moved, spread = distance_to_permutation(window)
        assert moved == pytest.approx(1, abs=0.12)
        assert spread == pytest.approx(shards, rel=0.05)


def test_an_imagenet_epoch_starts_quickly():
    shard_sizes = [1024] * 1251
    start = time.thread_time()  # of the processor: a busy machine must not fail the test
    order.sample_at(3, np.arange(700_000, 702_048), shard_sizes, 16)
    assert time.thread_time() - start < 0.5
    start = time.thread_time()
    order.sample_at(3, np.arange(700_000, 702_048), shard_sizes, 1251)
    assert time.thread_time() - start < 2  # a full permutation of 1.28 M: 0.2 s


def test_the_held_out_part_is_a_function_of_the_number_alone():
    chosen = order.held_out(100_000, 0.01)
    assert abs(chosen.sum() - 1000) < 4 * 1000**0.5  # binomial
    assert (order.held_out(40_000, 0.01) == chosen[:40_000]).all(), "shards that are added later move nobody"
    assert not (chosen & ~order.held_out(100_000, 0.02)).any(), "a larger part holds a smaller one"
    assert np.flatnonzero(order.held_out(100, 0.1)).tolist() == FROZEN_HELD_OUT  # part of every run that uses it
    by_residue = [order.held_out(100_000, 0.1)[k::10].mean() for k in range(10)]
    assert max(by_residue) - min(by_residue) < 0.02, "it follows no pattern of the numbering"
    for n, fraction in ((100, -0.1), (100, 1.0), (100, float("nan")), (3, 1e-9)):
        with pytest.raises(ValueError, match="heldout="):
            order.held_out(n, fraction)


FROZEN_HELD_OUT = [2, 19, 56, 72, 79, 84, 91]


@pytest.mark.parametrize("arguments", [([-1], [3], 1), ([0], [0], 1), ([0], [3], 0), ([0], [3, -1], 1)])
def test_nonsense_is_refused(arguments):
    with pytest.raises(ValueError):
        order.sample_at(0, np.array(arguments[0]), *arguments[1:])
