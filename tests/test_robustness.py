"""Denoising: the noise put in is the noise told, what Gaussian theory says comes out, and a chain goes down K steps, no more."""

import numpy as np
import pytest
import torch

from data_pipeline import encode, manifest
from trainer import draws, heldout, reverse_chain, robustness


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    assert encode.main(["sklearn:digits", str(folder)]) == 0
    m = manifest.load(folder)
    fields = ("codec", "codec_hash", "moments", "mean", "std", "shape", "label_dim", "digest")
    return heldout.Data(folder, {f: getattr(m, f) for f in fields}, 400)


def shrink(x, sigma, labels):
    """Be the best linear denoiser of single pixels of variance 0.25."""
    return x * (0.25 / (0.25 + sigma**2)).view(-1, 1, 1, 1)


def test_noise_and_its_linear_removal_are_as_loud_as_they_must_be(digits):
    found = robustness.measure(shrink, digits, 128)
    reach = 255 / digits.header.std[0] * 0.5
    # mean of -10 log10 of a chi-squared over 64 pixels lies 10 / ln 10 / 64 above that of the mean
    for i, level in enumerate(robustness.LEVELS):
        assert found[:, i, 0, 0].mean() == pytest.approx(-20 * np.log10(level) + 4.34 / 64, abs=0.15)
        variance = 0.25 * (s := (level * reach) ** 2) / (0.25 + s)
        assert found[:, i, 1, 0].mean() == pytest.approx(-10 * np.log10(variance / reach**2), abs=0.35)
    assert (found[:, :, 1, 0].mean(0) > found[:, :, 0, 0].mean(0)).all()
    assert robustness.summary(found)["mean"] == pytest.approx(found[:, :, 1, 0].mean())
    assert robustness.summary(found)["also"]["SSIM"] == pytest.approx(found[:, :, 1, 1].mean())


def test_the_batch_changes_nothing(digits):
    few = heldout.Data(digits.name.split(" ")[0], vars(digits.header), 20)
    np.testing.assert_allclose(robustness.measure(shrink, few, 20), robustness.measure(shrink, few, 7), rtol=1e-6)


def test_a_chain_shrinks_as_its_posterior_means_do(digits):
    few = heldout.Data(digits.name.split(" ")[0], vars(digits.header), 20)
    found = reverse_chain.measure(shrink, few, 20)
    positions, y, _ = next(few.batches(20))
    reach = 255 / few.header.std[0] * 0.5
    u = np.arange(20, 1000, 20) / 1000  # the library's sigmoid schedule: v(u) = sigmoid(-3 + 6 u)
    v0, v1, v = (1 / (1 + np.exp(-z)) for z in (-3.0, 3.0, -3 + 6 * u))
    abar = (v1 - v) / (v1 - v0)
    own = np.sqrt((1 - abar) / abar) / 2
    assert own[[0, 4]] == pytest.approx([0.040, 0.101], abs=5e-4), "theirs: 20 and 100 steps of 1000"
    wiener = 0.25 / (0.25 + (own * reach) ** 2)
    for k, steps in enumerate(reverse_chain.STEPS):
        factor = 1.0
        for j in reversed(range(1, steps)):
            share = (own[j - 1] / own[j]) ** 2
            factor *= wiener[j] + share * (1 - wiener[j])
        for i, level in enumerate(robustness.LEVELS):
            noise = draws.normal(few.seed, f"{robustness.STREAM} {i}", positions, tuple(y.shape[1:]))
            cleaned = factor * wiener[0] * (y + level * reach * noise)
            np.testing.assert_allclose(found[:, i, k], robustness.quality(cleaned.float(), y, few), atol=1e-4)


def test_the_best_number_of_steps_is_the_oracles_and_the_told_one_is_the_noises():
    found = np.zeros((2, len(robustness.LEVELS), len(reverse_chain.STEPS), 2))
    found[:, 2, 1] = 30, 0.9  # noise 0.1: K = 2 is best, and K = 5 (0.101) is told
    found[:, 2, 3] = 20, 0.8
    made = reverse_chain.summary(found)
    assert (made["levels"][2]["steps"], made["levels"][2]["best"]) == (2, 30.0)
    assert (made["levels"][2]["SSIM"], made["levels"][2]["told"]) == (0.9, 20.0)
    assert made["mean"] == 5 and made["also"] == {"told": pytest.approx(20 / 6), "SSIM": pytest.approx(0.15)}


def test_latents_have_no_structural_similarity(digits):
    header = {**vars(digits.header), "codec": "sd-vae-ft-mse"}
    data = heldout.Data.__new__(heldout.Data)
    data.header = type(digits.header)(**header)
    x, y = torch.zeros(3, 4, 8, 8), torch.ones(3, 4, 8, 8)
    assert np.isnan(robustness.quality(x, y, data)[:, 1]).all() and robustness.similarity(np.nan) == {}
