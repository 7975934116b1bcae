"""Which noise level a position gets: its stratified uniform through the configured density, moved or mixed with what is learned.

Computed on the CPU in float64, so that every device gets the same levels. What a maintainer must not break: a level is a
function of (seed, position, learned state), for any batch and any number of ranks; the learned state changes at multiples of
`every_images` only and lies in the checkpoint.
"""

import functools

import torch
from torch import Tensor

from models.densities import Density, Mixture
from models.noise import density, sigma_from_uniform
from trainer import curriculum, draws, noise_progress, noise_schedule
from trainer.bins import Bins, means
from trainer.config import Config, to_dict
from trainer.loss import LossParts


class NoiseLevels:
    """The noise levels of a run."""

    def __init__(self, config: Config, device: torch.device | str = "cpu"):
        self.seed, self.sigma_data, self.noise = config.seed, config.model.sigma_data, to_dict(config)["noise"]
        self.moves = bool(config.noise.curriculum.to)
        self._of_block = functools.lru_cache(maxsize=64)(self._build)
        base = self.density(0)  # a wrong density is told at the start
        self.rule = "adaptive" if config.noise.adaptive.strength else "learned" if config.noise.learned.strength else ""
        self.global_batch = config.global_batch
        self.window = Bins(device, self.sigma_data)
        self.state = {"adaptive": noise_progress.start, "learned": lambda: noise_schedule.start(base), "": dict}[
            self.rule
        ]()

    def _build(self, block: int) -> Density:
        return density(curriculum.at(self.noise, block * curriculum.BLOCK), self.sigma_data)

    def density(self, position: int) -> Density:
        """Return the configured density of the sample at `position`, without what is learned."""
        return self._of_block(position // curriculum.BLOCK if self.moves else 0)

    def drawn(self) -> Density:
        """Return the density that is drawn from where no curriculum moves it: the configured one, mixed with what is learned."""
        base = self.density(0)
        if not self.rule:
            return base
        found = (noise_progress if self.rule == "adaptive" else noise_schedule).learned(self.state)
        return base if found is None else Mixture(base, found, self.noise[self.rule]["strength"])

    def at(self, positions: Tensor) -> Tensor:
        """Return float64 sigma [N] on the CPU for int64 positions [N] there."""
        uniform = draws.sigma_uniform(self.seed, positions)
        if not self.moves:
            return sigma_from_uniform(self.drawn(), uniform, self.sigma_data)
        sigma = torch.empty_like(uniform)
        for block in torch.unique(positions // curriculum.BLOCK).tolist():
            here = positions // curriculum.BLOCK == block
            sigma[here] = sigma_from_uniform(self._of_block(block), uniform[here], self.sigma_data)
        return sigma

    # -----------------------------------------------------------------------------------------------------------------
    # What is learned.

    def observe(self, parts: LossParts) -> None:
        """Take note of a micro-batch's losses."""
        if self.rule:
            self.window.add(parts.sigma, parts.weighted, parts.logvar)

    def step(self, clock: int) -> None:
        """Learn from the window where the last step brought the clock to or past a multiple of `every_images`; collective."""
        if not self.rule:
            return
        every = self.noise[self.rule]["every_images"]
        if clock // every == (clock - self.global_batch) // every:
            return
        seen = means(self.window.total())
        self.window.clear()
        if self.rule == "adaptive":
            self.state = noise_progress.update(self.state, seen)
        else:
            self.state = noise_schedule.update(self.state, seen, self.noise["learned"]["smoothness"])

    def extras(self) -> dict | None:
        """Return what a checkpoint must keep, the same on every rank, or None; collective."""
        if not self.rule:
            return None
        return {"version": 1, "rule": self.rule, "window": self.window.total().tolist(), "state": self.state}

    def restore(self, extras: dict | None, rank: int) -> None:
        """Continue from a checkpoint's `extras`; a run that begins to learn now, or with another rule, starts afresh."""
        if not self.rule or not extras or extras["rule"] != self.rule:
            return
        if extras["version"] > 1:
            raise ValueError(
                f"the checkpoint's noise state has version {extras['version']}, newer than 1; update the program"
            )
        self.state = extras["state"]
        if rank == 0:  # sums are whole numbers: it does not matter which rank holds them
            self.window.sums.copy_(torch.tensor(extras["window"]))
