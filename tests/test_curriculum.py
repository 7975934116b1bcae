"""What moves with the clock moves as a function of a sample's position, whatever the batch and the ranks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer import curriculum
from trainer.config import ROOT, load
from trainer.examples import micro_batches
from trainer.noise_levels import NoiseLevels

MOVES = ["noise=laplace", "noise.curriculum.to={mu: -1.5, b: 0.75}", "noise.curriculum.over_images=8Ki"]


def levels(*overrides) -> NoiseLevels:
    return NoiseLevels(load(ROOT / "configs/quickstart.yaml", overrides))


def test_parameters_go_from_the_groups_own_to_the_end():
    noise = {"mu": 0.0, "levels": 20, "curriculum": {"to": {"mu": -1.0, "levels": 250}, "over_images": 10 * 1024}}
    for shape, half in (("linear", 0.5), ("sinusoidal", math.sin(math.pi / 4))):
        noise["curriculum"]["shape"] = shape
        values = [curriculum.at(noise, k * 1024)["mu"] for k in (0, 5, 10, 99)]
        assert values == pytest.approx([0, -half, -1, -1])
        assert curriculum.at(noise, 5 * 1024)["levels"] == math.ceil(20 + 230 * half)
    noise["curriculum"]["shape"] = "high_noise"
    peak = max(range(11), key=lambda k: curriculum.at(noise, k * 1024)["levels"])
    assert peak == 6 and curriculum.at(noise, 0)["levels"] == 20 and curriculum.at(noise, 10 * 1024)["levels"] < 40


@given(st.integers(0, 2**40))
def test_a_block_shares_its_parameters(position):
    noise = {"mu": 0.0, "curriculum": {"to": {"mu": 3.0}, "shape": "linear", "over_images": 2**39}}
    start = position // curriculum.BLOCK * curriculum.BLOCK
    assert curriculum.at(noise, position) == curriculum.at(noise, start)
    assert curriculum.at(noise, position)["mu"] == pytest.approx(min(3.0, 3.0 * start / 2**39))


@pytest.mark.parametrize("moves", [[], MOVES], ids=["constant", "moving"])
def test_the_same_levels_on_any_ranks_and_after_a_change_of_batch(moves):
    noise, end = levels(*moves), 6 * 1536
    whole = noise.at(torch.arange(end))
    assert len(whole.unique()) == end
    for world, changes in ((1, [(0, 512)]), (2, [(0, 512), (3072, 1536)]), (3, [(0, 1536), (4608, 768)])):
        seen = torch.zeros(end, dtype=torch.float64)
        for (start, batch), (stop, _) in zip(changes, [*changes[1:], (end, 0)]):
            for clock in range(start, stop, batch):
                for rank in range(world):
                    for here, _ in micro_batches(clock, batch, batch // world // 4, rank, world):
                        seen[here] = noise.at(torch.from_numpy(here))
        assert torch.equal(seen, whole), world


def test_a_moving_density_is_followed():
    noise = levels(*MOVES)
    for position in (0, 4096, 8192, 100_000):
        where = torch.arange(position, position + 1024)
        logsnr = 2 * torch.log(0.5 / noise.at(where))
        gone = min(1, position / 8192)
        assert logsnr.median().item() == pytest.approx(-1.5 * gone, abs=0.01)
        assert (logsnr - logsnr.median()).abs().mean().item() == pytest.approx(0.5 + 0.25 * gone, rel=0.02)


def test_a_range_may_move():
    """More noise as training goes on: the highest level rises, and every draw lies within the range of its block."""
    noise = levels(
        *("noise=laplace", "noise.b=3", "noise.sigma_min=0.01", "noise.sigma_max=1"),
        *("noise.curriculum.to={sigma_max: 9, sigma_min: 0.05}", MOVES[2]),
    )
    for position, low, high in ((0, 0.01, 1.0), (4096, 0.03, 5.0), (8192, 0.05, 9.0), (100_000, 0.05, 9.0)):
        sigma = noise.at(torch.arange(position // 1024 * 1024, position // 1024 * 1024 + 1024))
        assert low <= sigma.min() < 1.2 * low and 0.9 * high < sigma.max() <= high


def test_every_aligned_block_has_one_level_in_each_stratum_and_the_marginal_is_the_density():
    noise = levels("noise=laplace")
    density = noise.density(0)
    for start, count in ((0, 4096), (640, 128), (1024, 256), (96, 32)):
        u = density.cdf(2 * torch.log(0.5 / noise.at(torch.arange(start, start + count))))
        assert sorted((u * count).floor().int().tolist()) == list(range(count))
