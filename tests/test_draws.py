"""Randomness is a pure function of (seed, stream, position): no layout, no order, no batch size leaves a trace."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import draws

# Salmon et al. 2011, known-answer tests of Philox4x32-10 in Random123: (counter, key, result)
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, result", KNOWN)
def test_philox_gives_the_published_answers(counter, key, result):
    words = draws.philox(key[0] | key[1] << 32, *(torch.tensor(c) for c in counter))
    assert tuple(int(w) for w in words) == result


@given(st.lists(st.integers(0, 2**45), min_size=1, max_size=20), st.integers(0, 2**63 - 1), st.randoms())
@settings(max_examples=30, deadline=None)
def test_a_sample_gets_the_same_numbers_wherever_it_stands(positions, seed, random):
    whole = draws.normal(seed, "noise", torch.tensor(positions), (3, 5))
    order = list(range(len(positions)))
    random.shuffle(order)
    for i in order:
        assert torch.equal(draws.normal(seed, "noise", torch.tensor([positions[i]]), (3, 5))[0], whole[i])


def test_streams_seeds_and_positions_are_independent():
    at = torch.arange(4096)
    rows = {
        "a": draws.normal(1, "noise", at),
        "other stream": draws.normal(1, "posterior", at),
        "other seed": draws.normal(2, "noise", at),
        "high half of the seed": draws.normal(1 + 2**32, "noise", at),
        "next position": draws.normal(1, "noise", at + 1),
        "far position": draws.normal(1, "noise", at + 2**32),
    }
    correlations = np.corrcoef(torch.stack([r.flatten() for r in rows.values()]).numpy())
    assert np.abs(correlations - np.eye(len(rows))).max() < 5 / 64  # five standard errors


def test_normals_and_uniforms_have_their_moments():
    n = draws.normal(7, "noise", torch.arange(2000), (4, 8, 8)).double()
    assert n.dtype == torch.float64 and abs(n.mean()) < 0.006 and abs(n.var() - 1) < 0.01
    assert abs((n**4).mean() - 3) < 0.06 and 4.2 < n.abs().max() < 6.8
    u = draws.uniform(7, "label dropout", torch.arange(200_000))
    assert u.min() > 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.004 and abs(u.var() - 1 / 12) < 0.002


@given(st.integers(0, 12), st.integers(0, 2**40), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_every_aligned_block_of_positions_is_stratified(k, block, seed):
    size = 2**k
    u = draws.sigma_uniform(seed, torch.arange(size) + block * size)
    assert sorted((u * size).long().tolist()) == list(range(size))


def test_each_point_of_the_sequence_is_uniform_over_seeds():
    u = torch.cat([draws.sigma_uniform(seed, torch.tensor([12345])) for seed in range(4000)])
    counts = torch.histc(u, 10, 0, 1)
    assert float(((counts - 400) ** 2 / 400).sum()) < 33.7  # chi-squared, 9 degrees of freedom, p = 1e-4


def test_the_sequence_goes_on_beyond_32_bits_with_another_scramble():
    at = torch.arange(256)
    assert not torch.equal(draws.sigma_uniform(0, at), draws.sigma_uniform(0, at + 2**32))


@pytest.mark.parametrize("shape", [(5,), (3, 4, 8), (1, 3, 3)])
def test_a_mask_is_the_uniform_draw_compared(shape):
    for where, bound in ((torch.tensor([0, 7, 2**40]), 0.1), (torch.tensor([5]), 0.5), (torch.arange(3), 0.0)):
        expected = draws.uniform(3, "dropout 4", where, shape) >= bound
        assert torch.equal(draws.at_least(bound, 3, "dropout 4", where, shape), expected)


def test_no_counter_is_taken_for_an_index():
    """Inductor folds arithmetic on arange into 32-bit indices on GPUs (torch 2.11), where Philox's multipliers overflow."""
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda where: draws.normal(0, "noise", where, (4, 8, 8)))(torch.arange(3) + 10**9).graph
    pending = [n for n in graph.nodes if n.op == "call_function" and "arange" in str(n.target)]
    assert pending
    while pending:  # what may be folded: arange, its views, and sums and products of these
        for user in pending.pop().users:
            name = str(user.target)
            assert "mul" not in name and "add" not in name, user
            pending += [user] if "view" in name or "expand" in name else []
