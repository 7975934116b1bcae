"""A grid that asks for noise levels that training never saw is told so, with numbers."""

import math

import pytest
import torch

from models import sampler
from models.noise import density, sigma_from_uniform
from trainer.config import ROOT, load, to_dict
from trainer.trained_range import trained_range, warning

EDM_GRID = sampler.edm_grid(32)


def header(*overrides, clock=10**9):
    config = to_dict(load(ROOT / "configs/quickstart.yaml", overrides))
    return {"model": config["model"], "noise": config["noise"], "clock": clock}


def test_edm2s_own_practice_is_not_warned_of():
    assert warning(header(), EDM_GRID, "the grid edm") is None
    assert warning(header("noise=edm2_img64"), EDM_GRID, "the grid edm") is None


def test_laplace_with_edms_grid_is_and_a_floor_or_the_trained_range_mends_it():
    line = warning(header("noise=laplace"), EDM_GRID, "the grid edm")
    # Laplace(0, 1/2): mass 1e-9 lies beyond |logsnr| = ln(5e8) / 2 = 10.015
    low, high = 0.5 * math.exp(-math.log(5e8) / 4), 0.5 * math.exp(math.log(5e8) / 4)
    assert f"[{low:.4g}, {high:.4g}]" in line and "80" in line and "0.002" in line and "\n" not in line
    assert warning(header("noise=laplace_floor"), EDM_GRID, "the grid edm") is None
    ends = trained_range(header("noise=laplace"), 1e-4)
    assert ends == pytest.approx([0.5 * math.exp(-math.log(5e3) / 4), 0.5 * math.exp(math.log(5e3) / 4)])
    assert warning(header("noise=laplace"), sampler.edm_grid(32, *ends), "the grid edm") is None


def test_the_trained_range_leaves_out_its_share_of_the_draws():
    low, high = trained_range(header("noise=cosine"), 0.05)
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    sigma = sigma_from_uniform(density({"density": "cosine"}, 0.5), u, 0.5)
    assert (sigma < low).double().mean().item() == pytest.approx(0.05, abs=2e-4)
    assert (sigma > high).double().mean().item() == pytest.approx(0.05, abs=2e-4)


def test_a_curriculum_has_seen_where_it_has_been():
    moves = ["noise=laplace", "noise.curriculum.to={mu: -8}", "noise.curriculum.over_images=8Mi"]
    early, late = header(*moves, clock=1024), header(*moves, clock=8 * 2**20)
    assert trained_range(late, 1e-3)[1] > 20 * trained_range(early, 1e-3)[1]
    assert trained_range(late, 1e-3)[0] == pytest.approx(trained_range(early, 1e-3)[0])


def test_a_range_that_was_cut_is_trained_to_its_ends():
    cut = header("noise=cauchy", "noise.sigma_min=0.002", "noise.sigma_max=80")
    assert warning(cut, EDM_GRID, "the grid edm") is None
    assert warning(cut, sampler.edm_grid(32, 0.001, 80), "the grid edm") is not None


def test_discrete_levels_want_their_own_grid():
    found = header("noise=fastddpm_uniform")
    assert warning(found, sampler.fast_ddpm_grid("uniform"), "the grid") is None
    assert "32 of 32 levels" in warning(found, EDM_GRID, "the grid edm")
    assert warning(found, torch.tensor([1.0, 0.5]), "the loss", only_range=True) is None


def test_a_header_that_does_not_say_is_not_warned_of_and_has_no_range():
    old = {"model": {"sigma_data": 0.5}, "clock": 1}
    assert warning(old, EDM_GRID, "the grid edm") is None
    with pytest.raises(ValueError, match="give --sigma-min and --sigma-max"):
        trained_range(old, 1e-4)
