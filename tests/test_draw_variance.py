"""Stratified levels are the same density drawn more evenly: same mean, less variance."""

import numpy as np
import pytest
import torch
from torch import nn

from data_pipeline import encode
from models.preconditioning import coefficients
from trainer import draw_variance
from trainer.config import ROOT, load
from trainer.examples import Examples


class OneGain(nn.Module):
    """Output F = g ln sigma, so that loss and gradient are functions of sigma above all."""

    sigma_data = 0.5

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x, sigma, labels, return_logvar, collect, dropout_mask):
        sigma = sigma.view(-1, 1, 1, 1)
        c_skip, c_out, _ = coefficients("edm", sigma, self.sigma_data)
        return c_skip * x + c_out * self.gain * sigma.log(), torch.zeros(len(x), 1, 1, 1)


class Silent:
    def advance(self, count):
        pass


def test_stratified_levels_lower_the_variance_and_not_the_mean(tmp_path):
    assert encode.main(["sklearn:digits", str(tmp_path / "digits"), "--codec", "pixels"]) == 0
    config = load(ROOT / "configs/quickstart.yaml", [f"data.path={tmp_path / 'digits'}"])
    examples = Examples(config, torch.device("cpu"))
    found = draw_variance.measure(OneGain(), examples, 0, 64, 40, False, Silent())
    ratios = draw_variance.ratios(found)
    assert ratios["loss_variance"]["ratio"] < 0.2 and ratios["gradient_variance"]["ratio"] < 0.5
    means = {kind: np.mean(found[kind]["losses"]) for kind in draw_variance.KINDS}
    spread = np.std(found["iid"]["losses"]) / 40**0.5
    assert means["stratified"] == pytest.approx(means["iid"], abs=5 * spread)


def test_the_limit_is_the_share_of_variance_within_strata():
    rng = np.random.default_rng(0)
    sigma = rng.random(20_000)
    loss = 3 * sigma + rng.normal(size=20_000)  # variances 9 / 12 and 1
    assert draw_variance.limit(np.stack([sigma, loss])) == pytest.approx(1 / (1 + 9 / 12), rel=0.05)


def test_the_same_batches_give_ratio_one():
    rng = np.random.default_rng(0)
    same = {"losses": list(rng.normal(size=40)), "squares": list(1 + rng.random(40)), "mean": 0.5}
    for row in draw_variance.ratios({"stratified": same, "iid": same}).values():
        assert row == {"ratio": 1.0, "error": 0.0}
