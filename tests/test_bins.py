"""Sums per bin of logSNR: exact, so no order, no layout and no checkpoint in between changes a bit."""

import math

import pytest
import torch

from tests.gloo import on_ranks
from trainer.bins import CENTRES, Bins, means


def samples(count=1000):
    g = torch.Generator().manual_seed(0)
    sigma = 0.5 * torch.exp(-3 * torch.randn(count, generator=g))
    weighted = 0.01 + torch.rand(count, generator=g).square() * torch.arange(count) / 100
    return sigma, weighted, weighted.log()


def test_means_are_those_of_the_samples_in_the_bin():
    sigma, weighted, logvar = samples()
    bins = Bins("cpu", 0.5)
    bins.add(sigma, weighted, logvar)
    found = means(bins.total())
    index = (2 * torch.log(0.5 / sigma.double())).round().clamp(-10, 10)
    assert sum(found.count) == 1000
    for centre, n, loss, error, u in zip(CENTRES, *found, strict=True):
        here = weighted[index == centre].double()
        assert n == len(here)
        if n > 1:
            assert loss == pytest.approx(here.mean().item(), abs=1e-6)
            assert error == pytest.approx(here.std().item() / math.sqrt(n), abs=1e-5)
            assert u == pytest.approx(logvar[index == centre].mean().item(), abs=1e-6)


def test_any_order_in_any_pieces_gives_the_same_bits():
    sigma, weighted, logvar = samples()
    whole, pieces = Bins("cpu", 0.5), Bins("cpu", 0.5)
    whole.add(sigma, weighted, logvar)
    for part in torch.randperm(1000, generator=torch.Generator().manual_seed(1)).split(37):
        pieces.add(sigma[part], weighted[part], logvar[part])
    assert torch.equal(whole.sums, pieces.sums)


def test_what_is_not_finite_is_left_out_and_what_is_huge_is_cut():
    bins = Bins("cpu", 0.5)
    bins.add(torch.tensor([0.5, 0.5, 0.5]), torch.tensor([math.nan, math.inf, 1.0]), torch.tensor([0.0, 0.0, 2.0]))
    found = means(bins.total())
    assert (found.count[10], found.loss[10], found.logvar[10]) == (1, 1.0, 2.0) and math.isnan(found.error[10])
    for _ in range(64):
        bins.add(torch.full((2**12,), 0.5), torch.full((2**12,), 1e30), torch.zeros(2**12))
    assert (bins.sums >= 0).all()


def total_of_rank():
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    bins = Bins("cpu", 0.5)
    bins.add(*(x[rank::world] for x in samples()))
    return bins.total()


def test_ranks_add_up_exactly():
    whole = Bins("cpu", 0.5)
    whole.add(*samples())
    for total in on_ranks(2, total_of_rank):
        assert torch.equal(total, whole.sums)
