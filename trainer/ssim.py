"""Structural similarity of pictures (Wang, Bovik, Sheikh and Simoncelli 2004), over a batch, in torch.

What must not break: the window lies inside of the picture everywhere, nothing is padded, and it is their Gaussian of 11 pixels and
deviation 1.5, so that figures are those of scikit-image with gaussian_weights and use_sample_covariance=False. Pictures smaller
than the window take the widest odd one that fits: theirs compare with each other alone.
"""

import torch
from torch import Tensor
from torch.nn.functional import conv2d

WINDOW, DEVIATION = 11, 1.5  # Wang et al. 2004, section III-B
K1, K2 = 0.01, 0.03  # the same


def ssim(x: Tensor, y: Tensor, data_range: float) -> Tensor:
    """Return float64 [N], 1 for equal pictures: the mean over channels and places of x, y [N, C, H, W]."""
    images = len(x)
    x, y = x.double().flatten(0, 1).unsqueeze(1), y.double().flatten(0, 1).unsqueeze(1)
    size = min(WINDOW, *((side - 1) // 2 * 2 + 1 for side in x.shape[2:]))
    place = torch.arange(size, dtype=x.dtype, device=x.device) - size // 2
    weights = torch.exp(-place.square() / (2 * DEVIATION**2))
    weights = weights / weights.sum()

    def local(z: Tensor) -> Tensor:
        return conv2d(conv2d(z, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))

    mean_x, mean_y = local(x), local(y)
    var_x, var_y = local(x * x) - mean_x.square(), local(y * y) - mean_y.square()
    covariance = local(x * y) - mean_x * mean_y
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    likeness = likeness / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))
    return likeness.view(images, -1).mean(1)
