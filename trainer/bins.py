"""The loss per noise level: sums over samples in bins of logSNR, kept on the device.

Sums are whole numbers of 2^-20, so that they do not depend on the order of addition: micro-batches, ranks and a checkpoint in
between change nothing. What a maintainer must not break: no float is ever added here.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# centres of bins one wide; the outermost take all that lies beyond. At sigma_data 0.5: sigma 74 to 0.003
CENTRES = tuple(range(-10, 11))
_ONE = 2**20
_LARGEST = 2.0**10  # of a loss; a network that knows nothing has 1. Squares of 2^22 such samples fit into int64
_COLUMNS = 4  # samples, loss, its square, logvar


class BinMeans(NamedTuple):
    """Per bin, in the order of CENTRES: samples, mean weighted loss, its standard error, mean logvar; nan where there is none."""

    count: list[int]
    loss: list[float]
    error: list[float]
    logvar: list[float]


class Bins:
    """Sums over the samples that were seen since the last `clear`."""

    def __init__(self, device: torch.device | str, sigma_data: float):
        self.sums, self.sigma_data = torch.zeros(len(CENTRES), _COLUMNS, dtype=torch.int64, device=device), sigma_data

    def add(self, sigma: Tensor, weighted: Tensor, logvar: Tensor) -> None:
        """Take note of samples [N]; one whose loss is not finite is left out."""
        logsnr = 2 * torch.log(self.sigma_data / sigma.double())
        index = (logsnr.round().clamp(CENTRES[0], CENTRES[-1]) - CENTRES[0]).long()
        good = torch.isfinite(weighted) & torch.isfinite(logvar)
        loss = weighted.double().nan_to_num().clamp(0, _LARGEST)
        columns = [loss, loss.square(), logvar.double().nan_to_num().clamp(-_LARGEST, _LARGEST)]
        whole = torch.stack([torch.ones_like(index), *((c * _ONE).round().long() for c in columns)], dim=1)
        self.sums.index_add_(0, index, whole * good[:, None])

    def total(self) -> Tensor:
        """Return the sums of all ranks; collective."""
        sums = self.sums.clone()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        return sums

    def clear(self) -> None:
        self.sums.zero_()


def means(total: Tensor) -> BinMeans:
    """Return what the sums of `Bins.total` say."""
    rows = [(n, loss / _ONE, square / _ONE, logvar / _ONE) for n, loss, square, logvar in total.tolist()]
    count, loss, error, logvar = [], [], [], []
    for n, of_loss, of_square, of_logvar in rows:
        mean = of_loss / n if n else math.nan
        variance = max(0.0, of_square / n - mean**2) * n / (n - 1) if n > 1 else math.nan
        count.append(n)
        loss.append(mean)
        error.append(math.sqrt(variance / n) if n > 1 else math.nan)
        logvar.append(of_logvar / n if n else math.nan)
    return BinMeans(count, loss, error, logvar)
