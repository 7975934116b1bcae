"""What the network's output means: F, epsilon, x0 or v, each an affine way to D(x; sigma) = c_skip x + c_out F.

EDM's is that of Karras et al. (arXiv 2206.00364, Table 1). The others are the targets of variance-preserving diffusion, where
x_t = c_in x = alpha x0 + s eps with alpha = sd c_in, s = sigma c_in, c_in = 1 / sqrt(sigma^2 + sd^2), and x0 = data / sd has
variance 1. What a maintainer must not break: D stays the only interface, so that samplers, losses and metrics never ask which.
"""

import torch
from torch import Tensor

# prediction -> (c_skip, c_out) of sigma, variance = sigma^2 + sd^2, c_in and sd
_COEFFICIENTS = {
    # unit variance of the target at every level
    "edm": lambda sigma, variance, c_in, sd: (sd**2 / variance, sigma * sd * c_in),
    # x = data + sigma eps
    "epsilon": lambda sigma, variance, c_in, sd: (torch.ones_like(sigma), -sigma),
    # the network draws the data itself, in units of its standard deviation
    "x0": lambda sigma, variance, c_in, sd: (torch.zeros_like(sigma), torch.full_like(sigma, sd)),
    # v = alpha eps - s x0 (Salimans & Ho 2022), so x0 = alpha x_t - s v: EDM's F is -v
    "v": lambda sigma, variance, c_in, sd: (sd**2 / variance, -sigma * sd * c_in),
}
PREDICTIONS = tuple(_COEFFICIENTS)


def coefficients(prediction: str, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (c_skip, c_out, c_in), each of the shape of `sigma`."""
    variance = sigma**2 + sigma_data**2
    c_in = variance.rsqrt()
    return *_COEFFICIENTS[prediction](sigma, variance, c_in, sigma_data), c_in
