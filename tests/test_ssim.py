"""Structural similarity is scikit-image's, and of pictures smaller than its window the same formula over what fits."""

import numpy as np
import pytest
import torch

from trainer.ssim import ssim


def pair(shape):
    """Return a picture of waves and a noisy one, float64 [N, C, H, W] within 0..255, without a random generator."""
    place = torch.arange(int(np.prod(shape)), dtype=torch.float64).view(shape)
    clean = 127.5 + 100 * torch.sin(place * 0.13)
    return clean, clean + 40 * torch.sin(place**2 * 1.7)


# scikit-image 0.26: structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)
@pytest.mark.parametrize(
    ("shape", "known"),
    [((1, 1, 16, 20), [0.9190966589277835]), ((2, 3, 24, 24), [0.8598636429765357, 0.8723951250520691])],
)
def test_is_scikit_images(shape, known):
    assert ssim(*pair(shape), 255).tolist() == pytest.approx(known, abs=1e-12)


def test_is_that_of_the_scikit_image_here():
    metrics = pytest.importorskip("skimage.metrics")
    x, y = pair((2, 3, 24, 24))
    options = {"channel_axis": 0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    found = [metrics.structural_similarity(a.numpy(), b.numpy(), data_range=255, **options) for a, b in zip(x, y)]
    assert ssim(x, y, 255).tolist() == pytest.approx(found, abs=1e-12)


def test_of_a_small_picture_is_the_formula_over_a_window_of_seven():
    x, y = pair((1, 1, 8, 8))
    row = np.exp(-(np.arange(-3, 4) ** 2) / (2 * 1.5**2))
    weights = np.outer(row, row) / row.sum() ** 2
    found = []
    for i in range(2):
        for j in range(2):
            a, b = (z[0, 0, i : i + 7, j : j + 7].numpy() for z in (x, y))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            spread = (weights * (a - mean_a) ** 2).sum() + (weights * (b - mean_b) ** 2).sum()
            both = (weights * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = 2.55**2, 7.65**2
            found.append((2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (spread + c2)))
    assert ssim(x, y, 255).item() == pytest.approx(np.mean(found), abs=1e-12)
    assert ssim(x, x, 255).item() == 1
