"""Power-function averages of the weights, kept in fp32 on the shards of the masters (Karras et al. 2024, Section 3).

1/N of the memory and of the time per rank and no communication per step. An average is gathered only when a snapshot is written.
The averages see the weights after Adam and before they are renormalised, as the reference does.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.ema_profiles import beta, gamma_from_sigma_rel
from trainer.pages import empty_apart

if TYPE_CHECKING:
    from trainer.fragments import Fragment


class ShardedEma:
    """One fp32 tensor per fragment and tracked length."""

    def __init__(self, fragments: Sequence["Fragment"], sigma_rel: Sequence[float]):
        self.fragments = list(fragments)
        self.sigma_rel = list(sigma_rel)
        self.gammas = [float(gamma_from_sigma_rel(s)) for s in self.sigma_rel]
        # the first update has beta 0, so that these first values leave no trace
        self.averages: list[list[Tensor]] = [
            [empty_apart(f.master, 3 + i).copy_(f.master) for f in self.fragments] for i in range(len(self.sigma_rel))
        ]

    @torch.no_grad()
    def update(self, clock_after: int, batch: int) -> None:
        """Move every average towards the masters: ema <- lerp(master, ema, (1 - batch / clock_after)^(gamma + 1))."""
        masters = [f.master for f in self.fragments]
        for weight, average in zip(self.weights(clock_after, batch), self.averages, strict=True):
            torch._foreach_lerp_(average, masters, weight)

    def weights(self, clock_after: int, batch: int) -> list[float]:
        """Return how far each average moves towards the masters in this step, 1 - beta."""
        return [1.0 - float(beta(clock_after, batch, gamma)) for gamma in self.gammas]

    def num_bytes(self) -> int:
        """Return what the averages hold in this rank's memory."""
        return sum(t.numel() * t.element_size() for average in self.averages for t in average)
