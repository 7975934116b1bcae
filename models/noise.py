"""From the config group `noise` to a density over logSNR, and from logSNR to sigma.

logsnr = 2 ln(sigma_data / sigma): at logsnr 0 noise and data have the same standard deviation. Papers that assume data of
variance 1 speak of -2 ln sigma; `noise.sigma_unit` says what the configured density measures sigma in, `sigma_data` or `one`,
which differ by a shift of 2 ln sigma_data. A density is not a sampling grid (those are in sampler.py). What a maintainer must not
break: everything is float64, and a level is a function of (density, uniform) alone.
"""

import math

import torch
from torch import Tensor

from models import sampler
from models.densities import (
    CAUCHY,
    COSINE,
    LAPLACE,
    LOGISTIC,
    NORMAL,
    Density,
    Discrete,
    Mixture,
    Polynomial,
    Symmetric,
)
from models.densities import Uniform as Uniform

# Karras et al. 2022, Table 1: the ramp that polynomial draws are made on where no range is given
RAMP = (0.002, 80.0)


def logsnr_from_sigma(sigma: Tensor, sigma_data: float) -> Tensor:
    """Return 2 ln(sigma_data / sigma) in float64."""
    return 2 * torch.log(sigma_data / torch.as_tensor(sigma, dtype=torch.float64))


def sigma_from_logsnr(logsnr: Tensor, sigma_data: float) -> Tensor:
    """Return sigma_data exp(-logsnr / 2) in float64."""
    return sigma_data * torch.exp(-torch.as_tensor(logsnr, dtype=torch.float64) / 2)


def sigma_from_uniform(density: Density, uniform: Tensor, sigma_data: float) -> Tensor:
    """Return float64 noise levels for uniforms in [0, 1] of any shape; the level falls as the uniform grows.

    The ends are kept a step of 2^-54 away, so that an unbounded density never yields 0 or infinity.
    """
    tiny = 2.0**-54
    return sigma_from_logsnr(
        density.icdf(torch.as_tensor(uniform, dtype=torch.float64).clamp(tiny, 1 - 2 * tiny)), sigma_data
    )


# ---------------------------------------------------------------------------------------------------------------------
# Families: the shape, its centre and its scale in 2 ln(unit / sigma).

_SYMMETRIC = {
    # ln sigma ~ N(P_mean, P_std^2) (arXiv 2206.00364, Table 1)
    "lognormal": lambda n: (NORMAL, 2 * (0 - n["P_mean"]), 2 * n["P_std"]),
    # arXiv 2407.03297: mu = 0, b = 0.5 (256^2) or 0.75 (512^2)
    "laplace": lambda n: (LAPLACE, n.get("mu", 0.0), n.get("b", 0.5)),
    # arXiv 2407.03297, Table 1: mu moves it, s > 1 concentrates it
    "cosine": lambda n: (COSINE, n.get("mu", 0.0), 1 / n.get("s", 1.0)),
    "cauchy": lambda n: (CAUCHY, n.get("mu", 0.0), n.get("gamma", 0.5)),
    # sigma = t / (1 - t) with t uniform: logsnr is logistic, sech^2(logsnr / 4) / 8
    "flow": lambda n: (LOGISTIC, n.get("mu", 0.0), 2.0),
    # ... with logit t ~ N(m, s^2) (arXiv 2403.03206)
    "logit_normal": lambda n: (NORMAL, -2 * n.get("logit_mean", 0.0), 2 * n.get("logit_std", 1.0)),
}
DENSITIES = (*_SYMMETRIC, "polynomial", "fastddpm-uniform", "fastddpm-nonuniform")
_ABSOLUTE = ("lognormal", "polynomial", "fastddpm-uniform", "fastddpm-nonuniform")  # speak of sigma itself


def density(noise: dict, sigma_data: float) -> Density:
    """Return the density that the config group `noise` describes: cut where sigma_min or sigma_max is above 0, with its floor.

    Raise ValueError for an unknown density, a missing parameter or an empty range. What moves with the clock is not in it
    (trainer/curriculum.py), nor what is learned (trainer/noise_levels.py).
    """
    name = noise.get("density", "lognormal")
    if name not in DENSITIES:
        raise ValueError(f"noise.density {name!r}: choose one of {', '.join(DENSITIES)}")
    sigma_unit = noise.get("sigma_unit", "auto")
    unit = 1.0 if sigma_unit == "one" or sigma_unit == "auto" and name in _ABSOLUTE else sigma_data
    try:
        found = _family(name, noise, sigma_data, unit)
    except KeyError as missing:
        raise ValueError(f"noise.{missing.args[0]} is missing: the density {name} needs it") from None
    if share := noise.get("floor", 0.0):
        ends = [2 * math.log(sigma_data / noise[f"floor_sigma_{end}"]) for end in ("max", "min")]
        found = Mixture(found, Uniform(*ends), share)
    return found


def _family(name: str, noise: dict, sigma_data: float, unit: float) -> Density:
    sigma_min, sigma_max = noise.get("sigma_min") or 0, noise.get("sigma_max") or 0
    if 0 < sigma_max <= sigma_min:
        raise ValueError(
            f"noise.sigma_min {sigma_min} is not below noise.sigma_max {sigma_max}: exchange or widen them"
        )
    if name.startswith("fastddpm-"):
        sigma = sampler.fast_ddpm_grid(name.removeprefix("fastddpm-"))[:-1] * unit
        return Discrete(logsnr_from_sigma(sigma, sigma_data), torch.ones(len(sigma)))
    if name == "polynomial":
        ends = (sigma_min or RAMP[0], sigma_max or RAMP[1])
        ramp = Polynomial(noise.get("curve", 4.0), noise.get("rho", 7.0), *ends, sigma_data)
        return ramp.discrete(noise["levels"], noise.get("shift", False)) if noise.get("levels") else ramp
    shape, location, scale = _SYMMETRIC[name](noise)
    low = 2 * math.log(sigma_data / sigma_max) if sigma_max > 0 else -math.inf
    high = 2 * math.log(sigma_data / sigma_min) if sigma_min > 0 else math.inf
    return Symmetric(shape, location + 2 * math.log(sigma_data / unit), scale, low, high)
