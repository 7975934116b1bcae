"""Densities over logSNR in float64: pdf, cdf, sf (mass above), icdf and isf (the level below, above which a mass lies).

Here are the families that are symmetric about a centre, cut to a range and renormalised, the polynomial one of consistency
training, discrete levels, and the broad floor that is mixed into any of them. What a maintainer must not break: tails are exact,
because each side is computed from its own mass, never as 1 minus the other.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def float64(x) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64)


class Density:
    """What every density has: `low` and `high`, the ends of its support in logSNR, and the quantiles of a subclass's `quantile`."""

    low, high = -math.inf, math.inf
    levels: Tensor | None = None  # of a discrete one, rising in logSNR; its pdf is then the mass of a level

    def quantile(self, below: Tensor, above: Tensor) -> Tensor:
        """Return the logSNR with mass `below` under it and `above` over it; the two sum to 1, the smaller one is exact."""
        raise NotImplementedError

    def icdf(self, probability: Tensor) -> Tensor:
        """Return the logSNR below which lies `probability`; nan outside [0, 1]."""
        probability = float64(probability)
        return _nan_outside(probability, self.quantile(probability, 1 - probability))

    def isf(self, probability: Tensor) -> Tensor:
        """Return the logSNR above which lies `probability`; nan outside [0, 1]."""
        probability = float64(probability)
        return _nan_outside(probability, self.quantile(1 - probability, probability))


def _nan_outside(probability: Tensor, quantile: Tensor) -> Tensor:
    return torch.where((probability >= 0) & (probability <= 1), quantile, math.nan)


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
CAUCHY = Shape(  # 1 / (pi (1 + z^2)); atan2 keeps the lower tail exact
    pdf=lambda z: 1 / (math.pi * (1 + z**2)),
    cdf=lambda z: torch.atan2(torch.ones_like(z), -z) / math.pi,
    icdf=lambda p: -1 / torch.tan(math.pi * p),
)
LOGISTIC = Shape(  # sech^2(z/2) / 4
    pdf=lambda z: torch.exp(-z.abs()) / (1 + torch.exp(-z.abs())) ** 2,
    cdf=torch.sigmoid,
    icdf=lambda p: torch.log(p) - torch.log1p(-p),
)


class Symmetric(Density):
    """A symmetric shape moved to `location`, stretched by `scale`, cut to [low, high] and renormalised."""

    def __init__(self, shape: Shape, location: float, scale: float, low: float = -math.inf, high: float = math.inf):
        if not scale > 0:
            raise ValueError(f"noise density of scale {scale}: a scale above 0 is needed; correct the noise group")
        self.shape, self.location, self.scale, self.low, self.high = shape, location, scale, low, high
        ends = self._standard(float64([low, high]))
        below, above = shape.cdf(ends), shape.cdf(-ends)
        self.below, self.above = below.tolist(), above.tolist()  # mass below and above each end
        # The difference is taken on the side of the smaller masses, where it is exact.
        self.mass = (above[0] - above[1] if below[0] > 0.5 else below[1] - below[0]).item()
        if not self.mass > 0:
            raise ValueError(
                f"noise density has no mass for logSNR in [{low:.4g}, {high:.4g}]: widen sigma_min and sigma_max"
            )

    def _standard(self, logsnr: Tensor) -> Tensor:
        return (float64(logsnr) - self.location) / self.scale

    def pdf(self, logsnr: Tensor) -> Tensor:
        """Return the density at `logsnr`, 0 outside the range."""
        logsnr = float64(logsnr)
        inside = (logsnr >= self.low) & (logsnr <= self.high)
        return torch.where(inside, self.shape.pdf(self._standard(logsnr)) / (self.scale * self.mass), 0.0)

    def cdf(self, logsnr: Tensor) -> Tensor:
        """Return the probability of a logSNR of at most `logsnr`."""
        z, from_below, from_above = self._sides(logsnr)
        return torch.where(z < 0, from_below, 1 - from_above)

    def sf(self, logsnr: Tensor) -> Tensor:
        """Return the probability of a logSNR above `logsnr`."""
        z, from_below, from_above = self._sides(logsnr)
        return torch.where(z < 0, 1 - from_below, from_above)

    def _sides(self, logsnr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self._standard(float64(logsnr).clamp(self.low, self.high))
        return (
            z,
            (self.shape.cdf(z) - self.below[0]) / self.mass,
            (self.shape.cdf(-z) - self.above[1]) / self.mass,
        )

    def quantile(self, below: Tensor, above: Tensor) -> Tensor:
        p = self.below[0] + below * self.mass
        q = self.above[1] + above * self.mass
        quantile = torch.where(p <= q, self.shape.icdf(p.clamp(max=0.5)), -self.shape.icdf(q.clamp(max=0.5)))
        return (self.location + self.scale * quantile).clamp(self.low, self.high)


class Polynomial(Density):
    """Noise levels sigma(u^curve), u uniform, on the ramp sigma(v) = (min^(1/rho) + v (max^(1/rho) - min^(1/rho)))^rho.

    The draw of "High Noise Scheduling is a Must" (arXiv 2404.06353) with the batch's even u replaced by the run's own; a larger
    curve gives lower levels. `unit` is that of logSNR.
    """

    def __init__(self, curve: float, rho: float, sigma_min: float, sigma_max: float, unit: float):
        self.curve, self.rho, self.unit = curve, rho, unit
        self.start, self.end = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
        self.span = self.end - self.start
        self.low, self.high = 2 * math.log(unit / sigma_max), 2 * math.log(unit / sigma_min)

    def _root(self, logsnr: Tensor) -> Tensor:
        logsnr = float64(logsnr)
        root = (self.unit * torch.exp(-logsnr.clamp(self.low, self.high) / 2)) ** (1 / self.rho)
        # the ends are the ends, whatever rounding says
        return torch.where(logsnr <= self.low, self.end, torch.where(logsnr >= self.high, self.start, root))

    def pdf(self, logsnr: Tensor) -> Tensor:
        """Return the density at `logsnr`: (1/c) v^(1/c - 1) |dv / dlogsnr|, dv / dlogsnr = -sigma^(1/rho) / (2 rho span)."""
        logsnr = float64(logsnr)
        root = self._root(logsnr)
        v = ((root - self.start) / self.span).clamp(0, 1)
        density = v ** (1 / self.curve - 1) / self.curve * root / (2 * self.rho * self.span)
        return torch.where((logsnr >= self.low) & (logsnr <= self.high), density, 0.0)

    def sf(self, logsnr: Tensor) -> Tensor:
        """Return the probability of a logSNR above `logsnr`, that is of a lower noise level: u = v^(1/c)."""
        return ((self._root(logsnr) - self.start) / self.span).clamp(0, 1) ** (1 / self.curve)

    def cdf(self, logsnr: Tensor) -> Tensor:
        """Return the probability of a logSNR of at most `logsnr`, 1 - v^(1/c), exact where v is near 1."""
        rest = (self.end - self._root(logsnr)) / self.span
        return -torch.expm1(torch.log1p(-rest.clamp(0, 1)) / self.curve)

    def quantile(self, below: Tensor, above: Tensor) -> Tensor:
        sigma = (self.start + above**self.curve * self.span) ** self.rho
        return (2 * torch.log(self.unit / sigma)).clamp(self.low, self.high)

    def discrete(self, levels: int, shift: bool = False) -> "Discrete":
        """Return the same draw rounded to `levels` points of the ramp, as the paper does: index round(u^c (levels - 1) + n).

        n is 0 or, with `shift`, the paper's small random shift (`shifted_masses`).
        """
        edges = ((torch.arange(levels + 1, dtype=torch.float64) - 0.5) / (levels - 1)).clamp(0, 1) ** (1 / self.curve)
        ramp = torch.arange(levels, dtype=torch.float64) / (levels - 1)
        logsnr = 2 * torch.log(self.unit / (self.start + ramp * self.span) ** self.rho)
        return Discrete(logsnr, shifted_masses(self.curve, levels) if shift else edges.diff())


@functools.lru_cache(maxsize=256)
def shifted_masses(curve: float, levels: int) -> Tensor:
    """Return the masses [levels] of the index round(u^curve (levels - 1) + n), n ~ N(levels^(1/5), 1), u even in [0, 1].

    An index beyond the ends falls back to the one without n (arXiv 2404.06353, its code). By 4,096 values of u.
    """
    place = ((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096) ** curve * (levels - 1)
    index = torch.arange(levels + 1, dtype=torch.float64) - 0.5
    inside = NORMAL.cdf(index - place[:, None] - levels**0.2).diff(dim=1)
    back = torch.zeros(levels, dtype=torch.float64).index_add(0, place.round().long(), 1 - inside.sum(1))
    return (inside.sum(0) + back) / 4096


class Discrete(Density):
    """Finitely many levels with their masses; `pdf` is the mass of a level and 0 between them."""

    def __init__(self, logsnr: Sequence[float] | Tensor, mass: Sequence[float] | Tensor):
        self.levels, order = float64(logsnr).sort()
        mass = float64(mass)[order]
        self.mass = mass / mass.sum()
        self.low, self.high = self.levels[0].item(), self.levels[-1].item()
        self._up_to = self.mass.cumsum(0).clamp(max=1)
        self._up_to[-1] = 1
        self._from = self.mass.flip(0).cumsum(0).flip(0).clamp(max=1)
        self._from[0] = 1

    def pdf(self, logsnr: Tensor) -> Tensor:
        """Return the mass of the level `logsnr` (to 1e-9), else 0."""
        near = (float64(logsnr).unsqueeze(-1) - self.levels).abs() < 1e-9
        return (near * self.mass).sum(-1)

    def cdf(self, logsnr: Tensor) -> Tensor:
        """Return the probability of a level of at most `logsnr`."""
        count = torch.searchsorted(self.levels, float64(logsnr).contiguous(), right=True)
        return torch.cat([self._up_to.new_zeros(1), self._up_to])[count]

    def sf(self, logsnr: Tensor) -> Tensor:
        """Return the probability of a level above `logsnr`."""
        count = torch.searchsorted(self.levels, float64(logsnr).contiguous(), right=True)
        return torch.cat([self._from, self._from.new_zeros(1)])[count]

    def quantile(self, below: Tensor, above: Tensor) -> Tensor:
        return self.levels[torch.searchsorted(self._up_to, below.contiguous()).clamp(max=len(self.levels) - 1)]


class Uniform(Density):
    """Uniform in logSNR over [low, high]."""

    def __init__(self, low: float, high: float):
        self.low, self.high = low, high

    def pdf(self, logsnr: Tensor) -> Tensor:
        """Return the density at `logsnr`."""
        logsnr = float64(logsnr)
        return torch.where((logsnr >= self.low) & (logsnr <= self.high), 1 / (self.high - self.low), 0.0)

    def cdf(self, logsnr: Tensor) -> Tensor:
        """Return the probability of a logSNR of at most `logsnr`."""
        return ((float64(logsnr) - self.low) / (self.high - self.low)).clamp(0, 1)

    def sf(self, logsnr: Tensor) -> Tensor:
        """Return the probability of a logSNR above `logsnr`."""
        return ((self.high - float64(logsnr)) / (self.high - self.low)).clamp(0, 1)

    def quantile(self, below: Tensor, above: Tensor) -> Tensor:
        return torch.where(
            below <= above, self.low + below * (self.high - self.low), self.high - above * (self.high - self.low)
        )


class Mixture(Density):
    """`share` of the draws from `second`, the rest from `first`, both continuous; quantiles by bisection."""

    def __init__(self, first: Density, second: Density, share: float):
        self.first, self.second, self.share = first, second, share
        self.low, self.high = min(first.low, second.low), max(first.high, second.high)

    def _mix(self, a: Tensor, b: Tensor) -> Tensor:
        return (1 - self.share) * a + self.share * b

    def pdf(self, logsnr: Tensor) -> Tensor:
        """Return the density at `logsnr`."""
        return self._mix(self.first.pdf(logsnr), self.second.pdf(logsnr))

    def cdf(self, logsnr: Tensor) -> Tensor:
        """Return the probability of a logSNR of at most `logsnr`."""
        return self._mix(self.first.cdf(logsnr), self.second.cdf(logsnr))

    def sf(self, logsnr: Tensor) -> Tensor:
        """Return the probability of a logSNR above `logsnr`."""
        return self._mix(self.first.sf(logsnr), self.second.sf(logsnr))

    def quantile(self, below: Tensor, above: Tensor) -> Tensor:
        # a quantile of the mixture lies between those of its parts; 64 halvings exhaust float64
        ends = torch.stack([part.quantile(below, above) for part in (self.first, self.second)])
        low, high = ends.amin(0), ends.amax(0)
        lower = below <= above
        for _ in range(64):
            middle = low + (high - low) / 2
            beyond = torch.where(lower, self.cdf(middle) >= below, self.sf(middle) <= above)
            low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
        return torch.where(below <= 0, self.low, torch.where(above <= 0, self.high, high))
