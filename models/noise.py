"""Densities over logSNR from which training draws its noise levels, and the way from logSNR to sigma.

logsnr = 2 ln(sigma_data / sigma): at logsnr 0 noise and data have the same standard deviation. A density is not a
sampling grid (those are in sampler.py). Everything is float64. What a maintainer must not break: tails are exact,
because quantiles beyond the median are taken from the survival function, never from 1 - cdf.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """A density that is symmetric about 0, in its standard form: pdf, cdf, and icdf, which is asked for p <= 1/2 only."""

    pdf: Callable[[Tensor], Tensor]
    cdf: Callable[[Tensor], Tensor]
    icdf: Callable[[Tensor], Tensor]


NORMAL = Shape(
    pdf=lambda z: torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi),
    cdf=lambda z: torch.special.erfc(z / -math.sqrt(2)) / 2,  # torch's ndtr is 0 below -8.3
    icdf=torch.special.ndtri,
)
LAPLACE = Shape(  # exp(-|z|) / 2
    pdf=lambda z: torch.exp(-z.abs()) / 2,
    cdf=lambda z: torch.where(z < 0, torch.exp(-z.abs()) / 2, 1 - torch.exp(-z.abs()) / 2),
    icdf=lambda p: torch.log(2 * p),
)
COSINE = Shape(  # sech(z/2) / (2 pi); written with exp(-|z|/2) so that nothing overflows
    pdf=lambda z: torch.exp(-z.abs() / 2) / (math.pi * (1 + torch.exp(-z.abs()))),
    cdf=lambda z: torch.atan(torch.exp(z / 2)) * (2 / math.pi),
    icdf=lambda p: 2 * torch.log(torch.tan(p * (math.pi / 2))),
)


class Density:
    """A symmetric density over logSNR moved to `location`, stretched by `scale`, cut to [low, high] and renormalised."""

    def __init__(
        self,
        shape: Shape,
        location: float,
        scale: float,
        sigma_data: float,
        low: float = -math.inf,
        high: float = math.inf,
    ):
        if not scale > 0:
            raise ValueError(f"noise density of scale {scale}: a scale above 0 is needed; correct the noise group")
        self.shape, self.location, self.scale, self.sigma_data = shape, location, scale, sigma_data
        self.low, self.high = low, high
        ends = torch.tensor([low, high], dtype=torch.float64)
        below, above = shape.cdf(self._standard(ends)), shape.cdf(-self._standard(ends))
        self.below, self.above = below.tolist(), above.tolist()  # mass below and above each end
        # The difference is taken on the side of the smaller masses, where it is exact.
        self.mass = (above[0] - above[1] if below[0] > 0.5 else below[1] - below[0]).item()
        if not self.mass > 0:
            raise ValueError(
                f"noise density has no mass for logSNR in [{low:.4g}, {high:.4g}]: widen sigma_min and sigma_max"
            )

    def _standard(self, logsnr: Tensor) -> Tensor:
        return (torch.as_tensor(logsnr, dtype=torch.float64) - self.location) / self.scale

    def pdf(self, logsnr: Tensor) -> Tensor:
        """Return the density at `logsnr`, 0 outside the range."""
        logsnr = torch.as_tensor(logsnr, dtype=torch.float64)
        inside = (logsnr >= self.low) & (logsnr <= self.high)
        return torch.where(inside, self.shape.pdf(self._standard(logsnr)) / (self.scale * self.mass), 0.0)

    def cdf(self, logsnr: Tensor) -> Tensor:
        """Return the probability of a logSNR of at most `logsnr`."""
        z = self._standard(torch.as_tensor(logsnr, dtype=torch.float64).clamp(self.low, self.high))
        from_below = (self.shape.cdf(z) - self.below[0]) / self.mass
        from_above = 1 - (self.shape.cdf(-z) - self.above[1]) / self.mass
        return torch.where(z < 0, from_below, from_above)

    def icdf(self, probability: Tensor) -> Tensor:
        """Return the logSNR below which lies `probability`, in [0, 1]."""
        probability = torch.as_tensor(probability, dtype=torch.float64)
        p = self.below[0] + probability * self.mass
        q = self.above[1] + (1 - probability) * self.mass
        quantile = torch.where(p <= q, self.shape.icdf(p.clamp(max=0.5)), -self.shape.icdf(q.clamp(max=0.5)))
        return (self.location + self.scale * quantile).clamp(self.low, self.high)

    def sigma_from_uniform(self, uniform: Tensor) -> Tensor:
        """Return float64 noise levels [N] for uniforms [N] in [0, 1]; the level falls as the uniform grows.

        The ends are kept a step of 2^-54 away, so that an unbounded density never yields 0 or infinity.
        """
        tiny = 2.0**-54
        return sigma_from_logsnr(self.icdf(uniform.double().clamp(tiny, 1 - 2 * tiny)), self.sigma_data)


def logsnr_from_sigma(sigma: Tensor, sigma_data: float) -> Tensor:
    """Return 2 ln(sigma_data / sigma) in float64."""
    return 2 * torch.log(sigma_data / torch.as_tensor(sigma, dtype=torch.float64))


def sigma_from_logsnr(logsnr: Tensor, sigma_data: float) -> Tensor:
    """Return sigma_data exp(-logsnr / 2) in float64."""
    return sigma_data * torch.exp(-torch.as_tensor(logsnr, dtype=torch.float64) / 2)


def _lognormal(noise: dict, sigma_data: float) -> tuple[Shape, float, float]:
    # ln sigma ~ N(P_mean, P_std^2) (arXiv 2206.00364, Table 1)
    return NORMAL, 2 * (math.log(sigma_data) - noise["P_mean"]), 2 * noise["P_std"]


def _laplace(noise: dict, sigma_data: float) -> tuple[Shape, float, float]:
    # arXiv 2407.03297: mu = 0, b = 0.5 (256^2) or 0.75 (512^2), on logSNR
    return LAPLACE, noise.get("mu", 0.0), noise.get("b", 0.5)


def _cosine(noise: dict, sigma_data: float) -> tuple[Shape, float, float]:
    # arXiv 2407.03297, Table 1: shift moves it, a stretch s > 1 concentrates it
    return COSINE, noise.get("mu", 0.0), 1 / noise.get("s", 1.0)


DENSITIES = {"lognormal": _lognormal, "laplace": _laplace, "cosine": _cosine}


def density(noise: dict, sigma_data: float) -> Density:
    """Return the density that the config group `noise` describes, truncated where sigma_min or sigma_max is above 0.

    Raise ValueError for an unknown density, a missing parameter or an empty range.
    """
    name = noise.get("density", "lognormal")
    if name not in DENSITIES:
        raise ValueError(f"noise.density {name!r}: choose one of {', '.join(DENSITIES)}")
    try:
        shape, location, scale = DENSITIES[name](noise, sigma_data)
    except KeyError as missing:
        raise ValueError(f"noise.{missing.args[0]} is missing: the density {name} needs it") from None
    sigma_min, sigma_max = noise.get("sigma_min") or 0, noise.get("sigma_max") or 0
    low = 2 * math.log(sigma_data / sigma_max) if sigma_max > 0 else -math.inf
    high = 2 * math.log(sigma_data / sigma_min) if sigma_min > 0 else math.inf
    if low >= high:
        raise ValueError(
            f"noise.sigma_min {sigma_min} is not below noise.sigma_max {sigma_max}: exchange or widen them"
        )
    return Density(shape, location, scale, sigma_data, low, high)
