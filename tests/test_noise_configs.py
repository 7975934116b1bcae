"""Every file of configs/noise/ draws the levels that its paper states; weightings of a config reach the loss of the trainer."""

import json
import math

import pytest
import torch

from data_pipeline import encode
from models.noise import density
from tests.gloo import Ranks
from trainer import draws
from trainer.config import CONFIGS, ROOT, load
from trainer.noise_levels import NoiseLevels

SHIFT = 2 * math.log(0.5)  # between logsnr at sigma_data 0.5 and -2 ln sigma


def normal(mean, std):
    return [mean + std * z for z in (-1.2815515655, 0.0, 0.6744897502, 1.2815515655)]


def cosine(mu, s):
    return [mu + 2 / s * math.log(math.tan(math.pi / 2 * p)) for p in (0.1, 0.5, 0.75, 0.9)]


def laplace(mu, b):
    return [mu + b * math.log(0.2), mu, mu - b * math.log(0.5), mu - b * math.log(0.2)]


def polynomial(curve):
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    return [SHIFT - 14 * math.log(low + u**curve * (high - low)) for u in (0.9, 0.5, 0.25, 0.1)]


# logsnr at 0.1, 0.5, 0.75 and 0.9 of the draws, by the closed forms of the papers that the files cite, data of deviation 0.5
QUANTILES = {
    "adaptive": normal(SHIFT + 0.8, 2.0),  # before it has learned anything
    "cauchy": [0.5 * math.tan(math.atan(15 / 0.5) * (2 * p - 1)) for p in (0.1, 0.5, 0.75, 0.9)],  # cut at 15
    "cosine": cosine(0.0, 1.0),
    "cosine_scaled": cosine(0.0, 1.3),
    "cosine_shifted": cosine(2 * math.log(64 / 128), 1.0),
    "edm2_img512": normal(SHIFT + 0.8, 2.0),
    "edm2_img64": normal(SHIFT + 1.6, 3.2),
    "edm_karras": normal(1.0137, 2.4),
    "edm_unit": normal(2.4, 2.4),
    "flow": [-4.3944, 0.0, 2.1972, 4.3944],
    "laplace": laplace(0.0, 0.5),
    "laplace512": laplace(0.0, 0.75),
    "learned": normal(SHIFT + 0.8, 2.0),
    "logit_normal": normal(0.0, 2.0),
    "more_noise_later": laplace(0.0, 0.5),
    "polynomial": polynomial(4.0),
}
# levels and how often, of those that are discrete or a mixture
OTHERS = {"fastddpm_uniform", "fastddpm_nonuniform", "laplace_floor", "polynomial_curriculum"}


def levels(name: str, *more: str) -> NoiseLevels:
    return NoiseLevels(load(CONFIGS / "quickstart.yaml", [f"noise={name}", *more]))


def test_every_file_is_tested_here():
    assert {p.stem for p in (CONFIGS / "noise").glob("*.yaml")} == set(QUANTILES) | OTHERS


@pytest.mark.parametrize("name", QUANTILES)
def test_a_file_draws_the_levels_that_its_paper_states(name):
    noise = levels(name)
    p = torch.tensor([0.1, 0.5, 0.75, 0.9], dtype=torch.float64)
    assert noise.density(0).icdf(p).tolist() == pytest.approx(QUANTILES[name], abs=2e-4)
    if name != "learned":  # its even schedule is mixed in from the start
        drawn = 2 * torch.log(0.5 / noise.at(torch.arange(1024)))
        shares = [(drawn <= q).double().mean().item() for q in QUANTILES[name]]
        assert shares == pytest.approx(p.tolist(), abs=0.01)


def test_cauchy_is_cut_at_fifteen():
    found = levels("cauchy").density(0)
    assert (found.low, found.high) == pytest.approx((-15, 15), abs=1e-3)
    uncut = density({"density": "cauchy", "gamma": 0.5}, 0.5)
    inside = uncut.cdf(15.0) - uncut.cdf(-15.0)
    assert 1 - inside.item() == pytest.approx(2 / math.pi * math.atan(0.5 / 15), rel=1e-9)
    assert torch.allclose(found.pdf([0.0, 3.0]), uncut.pdf([0.0, 3.0]) / inside, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("fastddpm_uniform", range(99, 1000, 100)),
        ("fastddpm_nonuniform", (0, 199, 399, 599, 699, 799, 849, 899, 949, 999)),
    ],
)
def test_fast_ddpm_files_draw_their_ten_timesteps_evenly(name, steps):
    kept, abar = [], 1.0
    for step in range(1000):  # Ho et al. 2020: betas from 1e-4 to 0.02
        abar *= 1 - (1e-4 + (0.02 - 1e-4) * step / 999)
        if step in steps:
            kept.append(math.sqrt((1 - abar) / abar))
    sigma, counts = levels(name).at(torch.arange(1024)).unique(return_counts=True)
    assert sigma.tolist() == pytest.approx(kept, rel=1e-9) and counts.min() >= 102 and counts.max() <= 103


def test_a_twentieth_of_the_floor_file_is_uniform_over_edms_range():
    found, bare = levels("laplace_floor").density(0), levels("laplace").density(0)
    x = torch.tensor([-9.0, 0.0, 9.0], dtype=torch.float64)
    assert torch.allclose(found.pdf(x), 0.95 * bare.pdf(x) + 0.05 / (2 * math.log(80 / 0.002)), rtol=1e-9)


@pytest.mark.parametrize(("progress", "angle"), [(0.0, 0.0), (0.25, 0.3), (0.63, 1.5), (0.9, 2.6), (1.0, 3.1)])
def test_levels_of_the_polynomial_curriculum_file_go_as_in_the_papers_code(progress, angle):
    """20 + 230 sin a, a = floor(10 pi progress^1.5) / 10."""
    noise = levels("polynomial_curriculum", "noise.curriculum.over_images=1024000")
    assert len(noise.density(round(progress * 1000) * 1024).levels) == math.ceil(20 + 230 * math.sin(angle))


@pytest.mark.slow
def test_weights_of_the_config_reach_the_loss_of_the_trainer(tmp_path):
    """A fresh network predicts F = 0, an error of EDM's weight of 1 at every level; P2's is that times the ratio of the weights."""
    data, run = tmp_path / "digits", tmp_path / "run"
    assert encode.main(["sklearn:digits", str(data)]) == 0
    overrides = ["noise=edm_unit", "loss.uncertainty=false", "loss.weighting=p2", "loss.gamma=0.5", "loss.p2_k=3"]
    overrides += ["global_batch=256", "duration_images=256", "metrics.every_images=256", "cluster.ranks_per_node=1"]
    overrides += [f"run={run}", f"data.path={data}", "model.prediction=v", "engine.zero_stage=0"]
    ranks = Ranks(1, run / "logs", str(ROOT / "configs/quickstart.yaml"), *overrides)
    assert ranks.wait(120) == [0], ranks.output()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    z = torch.special.ndtri(draws.sigma_uniform(0, torch.arange(256)))
    snr = (2.4 + 2.4 * z).exp()
    # each level's error is that of its own few samples: 256 x 64 elements are within 3 % together
    assert last["evenkeel_loss"] == pytest.approx((snr / (3 + snr) ** 0.5 / (1 + snr)).mean().item(), rel=0.03)
