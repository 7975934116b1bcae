"""Densities over logSNR that training itself makes: a histogram, and a monotone schedule gamma(t) read as a density.

gamma = sigmoid(logsnr) is the share of the signal, the alpha^2 of variance-preserving diffusion. What a maintainer must not
break: as in densities.py, both tails come from their own masses.
"""

import torch
from torch import Tensor

from models.densities import Density, float64


class Histogram(Density):
    """Masses over bins in between rising `edges` [B + 1] of logSNR, even within each."""

    def __init__(self, edges: Tensor, mass: Tensor):
        self.edges = self._coordinate(float64(edges))
        mass = float64(mass)
        self.mass = mass / mass.sum()
        zero = self.mass.new_zeros(1)
        self.below = torch.cat([zero, self.mass.cumsum(0)])
        self.above = torch.cat([self.mass.flip(0).cumsum(0).flip(0), zero])
        self.low, self.high = float(edges[0]), float(edges[-1])

    # evenness is in this coordinate; a subclass has another
    def _coordinate(self, logsnr: Tensor) -> Tensor:
        return logsnr

    def _logsnr(self, coordinate: Tensor) -> Tensor:
        return coordinate

    def _slope(self, coordinate: Tensor) -> Tensor:
        return torch.ones_like(coordinate)

    def _place(self, logsnr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logsnr, first, last = float64(logsnr), self.edges[0], self.edges[-1]
        x = self._coordinate(logsnr.clamp(self.low, self.high)).clamp(first, last)
        x = torch.where(logsnr <= self.low, first, torch.where(logsnr >= self.high, last, x))  # whatever rounding says
        bin_ = (torch.searchsorted(self.edges, x.contiguous(), right=True) - 1).clamp(0, len(self.mass) - 1)
        return x, bin_, self.mass[bin_] / (self.edges[bin_ + 1] - self.edges[bin_])

    def pdf(self, logsnr: Tensor) -> Tensor:
        """Return the density at `logsnr`."""
        logsnr = float64(logsnr)
        x, _, height = self._place(logsnr)
        return torch.where((logsnr >= self.low) & (logsnr <= self.high), height * self._slope(x), 0.0)

    def cdf(self, logsnr: Tensor) -> Tensor:
        """Return the probability of a logSNR of at most `logsnr`."""
        x, bin_, height = self._place(logsnr)
        return self.below[bin_] + height * (x - self.edges[bin_])

    def sf(self, logsnr: Tensor) -> Tensor:
        """Return the probability of a logSNR above `logsnr`."""
        x, bin_, height = self._place(logsnr)
        return self.above[bin_ + 1] + height * (self.edges[bin_ + 1] - x)

    def quantile(self, below: Tensor, above: Tensor) -> Tensor:
        """Return the logSNR with these masses under and over it."""
        bin_ = (torch.searchsorted(self.below, below.contiguous(), right=True) - 1).clamp(0, len(self.mass) - 1)
        width = self.edges[bin_ + 1] - self.edges[bin_]
        share = torch.where(
            below <= above,
            (below - self.below[bin_]) / self.mass[bin_],
            1 - (above - self.above[bin_ + 1]) / self.mass[bin_],
        )
        x = self.edges[bin_] + share.nan_to_num().clamp(0, 1) * width
        return self._logsnr(x).clamp(self.low, self.high)


class MonotoneSchedule(Histogram):
    """gamma(t), falling in t, linear between knots that are evenly spaced in t, for t uniform in [0, 1]."""

    def __init__(self, gamma: Tensor):
        """Take `gamma` [K + 1] at t = 0, 1/K, ..., 1, strictly falling within (0, 1)."""
        gamma = float64(gamma).flip(0)
        super().__init__(torch.logit(gamma), torch.full((len(gamma) - 1,), 1.0 / (len(gamma) - 1)))
        self.edges = gamma

    def _coordinate(self, logsnr: Tensor) -> Tensor:
        return torch.sigmoid(logsnr)

    def _logsnr(self, coordinate: Tensor) -> Tensor:
        return torch.logit(coordinate)

    def _slope(self, coordinate: Tensor) -> Tensor:
        return coordinate * (1 - coordinate)
