"""Which noise level a position gets: its stratified uniform through the configured density as its curriculum has moved it.

Computed on the CPU in float64, so that every device gets the same levels. What a maintainer must not break: a level is a function
of (seed, position), for any batch and any number of ranks.
"""

import functools

import torch
from torch import Tensor

from models.densities import Density
from models.noise import density, sigma_from_uniform
from trainer import curriculum, draws
from trainer.config import Config, to_dict


class NoiseLevels:
    """The noise levels of a run."""

    def __init__(self, config: Config):
        self.seed, self.sigma_data, self.noise = config.seed, config.model.sigma_data, to_dict(config)["noise"]
        self.moves = bool(config.noise.curriculum.to)
        self._of_block = functools.lru_cache(maxsize=64)(self._build)
        self.density(0)  # a wrong density is told at the start

    def _build(self, block: int) -> Density:
        return density(curriculum.at(self.noise, block * curriculum.BLOCK), self.sigma_data)

    def density(self, position: int) -> Density:
        """Return the density that the sample at `position` is drawn from."""
        return self._of_block(position // curriculum.BLOCK if self.moves else 0)

    def at(self, positions: Tensor) -> Tensor:
        """Return float64 sigma [N] on the CPU for int64 positions [N] there."""
        uniform = draws.sigma_uniform(self.seed, positions)
        if not self.moves:
            return sigma_from_uniform(self.density(0), uniform, self.sigma_data)
        sigma = torch.empty_like(uniform)
        for block in torch.unique(positions // curriculum.BLOCK).tolist():
            here = positions // curriculum.BLOCK == block
            sigma[here] = sigma_from_uniform(self._of_block(block), uniform[here], self.sigma_data)
        return sigma
