"""PSNR of denoising: the noise put in is the noise told, and the best guess for Gaussian data is as good as theory says."""

import numpy as np
import pytest

from data_pipeline import encode, manifest
from trainer import heldout, robustness


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
    found = robustness.psnr(shrink, digits, 128)
    reach = 255 / digits.header.std[0] * 0.5
    # mean of -10 log10 of a chi-squared over 64 pixels lies 10 / ln 10 / 64 above that of the mean
    for i, level in enumerate(robustness.LEVELS):
        assert found[:, i, 0].mean() == pytest.approx(-20 * np.log10(level) + 4.34 / 64, abs=0.15)
        variance = 0.25 * (s := (level * reach) ** 2) / (0.25 + s)
        assert found[:, i, 1].mean() == pytest.approx(-10 * np.log10(variance / reach**2), abs=0.35)
    assert (found[..., 1].mean(0) > found[..., 0].mean(0)).all()
    assert robustness.summary(found)["mean"] == pytest.approx(found[..., 1].mean())


def test_the_batch_changes_nothing(digits):
    few = heldout.Data(digits.name.split(" ")[0], vars(digits.header), 20)
    np.testing.assert_allclose(robustness.psnr(shrink, few, 20), robustness.psnr(shrink, few, 7), rtol=1e-6)
