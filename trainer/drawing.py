"""Drawing: a network, perhaps with a guide and a sampler, that yields image i for any position i.

What must not break: image i is a function of (network, seed, i, sampler) alone. Its noise is drawn by position, and position
i = n label_dim + c is the n-th image of class c whatever classes, batches, ranks or order are asked for.
"""

import copy
import dataclasses
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from data_pipeline import codecs, latents
from data_pipeline.progress import Progress
from models import sampler
from trainer import draws, trained_range
from trainer.compilation import compile_forward
from trainer.host_copies import copy_to_host
from trainer.overlap import overlapped

STREAM = "generate"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How images are drawn; all of it decides what they look like."""

    seed: int = 0
    solver: str = "heun"
    grid: str = "edm"
    levels: tuple[float, ...] = ()  # of a grid from a file, falling
    steps: int = 32
    sigma_min: float = 0.002  # Karras et al. 2022, Table 1
    sigma_max: float = 80.0
    trained_range: float = 0.0  # share of the levels in training beyond each end; 0: the two above are the ends
    churn: float = 0.0
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, math.inf)


class Drawing:
    """A network, perhaps with a guide, ready to draw at any positions."""

    def __init__(
        self,
        network,
        header: dict,
        settings: Settings,
        guide=None,
        device: str = "cpu",
        codec_weights=None,
        decoding="fp32",
    ):
        self.network, self.guide, self.settings, self.device = network, guide, settings, device
        self.data = SimpleNamespace(**header["data"])  # what decoding reads of a manifest
        self.codec_weights, self.decoding = codec_weights, decoding
        self.shape = (header["model"]["channels"], header["model"]["resolution"], header["model"]["resolution"])
        self.label_dim = header["model"]["label_dim"]
        self.header, self.warned, self.compiled = header, False, False
        self.one_batch = (
            True  # of what guides itself, with its labels and without; False is for comparing (docs/benchmarks.md)
        )
        if settings.levels:
            self.sigmas = sampler.from_levels(settings.levels, settings.steps)
        else:
            ends = settings.sigma_min, settings.sigma_max
            if settings.trained_range:
                ends = trained_range.trained_range(header, settings.trained_range)
            self.sigmas = sampler.grid(settings.grid, settings.steps, *ends, network.sigma_data)
        self.start = self.sigmas[0].float().item()
        if settings.trained_range:  # data still show through there: N(0, sigma_max^2 + sigma_data^2)
            self.start = math.hypot(self.start, network.sigma_data)
        if settings.solver not in sampler.SOLVERS:
            raise ValueError(f"solver {settings.solver!r}: known are {', '.join(sampler.SOLVERS)}")
        if settings.churn and settings.solver != "heun":
            raise ValueError(f"churn={settings.churn}: only heun has a stochastic form; use --solver heun")

    def with_grid(self, sigmas: Tensor, settings: Settings | None = None) -> "Drawing":
        """Return the same on another grid, and perhaps by another solver."""
        other = copy.copy(self)
        other.sigmas, other.settings = sigmas, settings or self.settings
        return other

    def compile(self) -> None:
        """Compile network and guide: pays for hundreds of images. Batches are then of one size, filled up by repetition."""
        for network in (self.network, self.guide):
            if network is not None and "forward" not in vars(network):
                network.forward = compile_forward(network, dynamic=False)
        self.compiled = True

    @functools.cached_property
    def codec(self):
        """Open the codec when pictures are wanted: losses and distances of latents do without its weights."""
        codec = codecs.open_codec(self.data.codec, self.codec_weights, self.device, decoding=self.decoding)
        codecs.check_is(codec, self.data)
        return codec

    @torch.no_grad()
    def latents(self, positions: Tensor) -> Tensor:
        """Return samples at training scale, fp32 [N, C, H, W]; of a network without labels position is all there is."""
        s, where = self.settings, positions.to(self.device)
        labels = where % self.label_dim if self.label_dim else None

        denoise = self._denoise(labels)
        x = draws.normal(s.seed, STREAM, where, self.shape) * self.start
        if s.churn:
            churn = {
                "churn": s.churn,
                "normal": lambda step: draws.normal(s.seed, f"{STREAM} churn {step}", where, self.shape),
            }
            return sampler.heun(denoise, x, self.sigmas, **churn)
        return sampler.SOLVERS[s.solver](denoise, x, self.sigmas)

    def _denoise(self, labels: Tensor | None) -> sampler.Denoise:
        """Return D(x, sigma) for samples of these classes, guided as the settings say."""

        def of(network, network_labels):
            return lambda x, sigma: network(x, sigma, network_labels)

        s, main, both = self.settings, of(self.network, labels), None
        if s.guidance == 1:
            return main
        if self.guide is not None:
            guide = of(self.guide, labels)
        else:  # the same network stands for the unconditional one where it was trained with label dropout
            guide = of(self.network, None)
            if self.one_batch and labels is not None:
                twice = torch.cat([labels, torch.full_like(labels, -1)])

                def both(x, sigma):
                    return self.network(torch.cat([x, x]), torch.cat([sigma, sigma]), twice).chunk(2)

        return sampler.guidance(main, guide, s.guidance, s.interval, both)

    def pictures(self, x: Tensor) -> Tensor:
        """Turn samples at training scale into pictures where they are, uint8 [N, 1 or 3, H, W]."""
        return latents.decode(x, self.data, self.codec)

    def decode(self, x: Tensor) -> Tensor:
        """Turn samples at training scale into pictures on the CPU."""
        return copy_to_host([self.pictures(x)])[0]

    def decoded(self, positions: Sequence[int], batch: int) -> Iterator[tuple[list[int], Tensor]]:
        """Yield (positions, pictures on the CPU) in batches, each decoded while the next is drawn."""
        return overlapped(lambda part, x: (part, self.decode(x)), self.batches(positions, batch))

    def batches(self, positions: Sequence[int], batch: int) -> Iterator[tuple[list[int], Tensor]]:
        """Yield (positions, latents) in batches, with progress; warn once of levels that training never saw."""
        line = (
            None if self.warned else trained_range.warning(self.header, self.sigmas, f"the grid {self.settings.grid}")
        )
        self.warned = True
        if line:
            print(line, file=sys.stderr, flush=True)
        with Progress("drawing", len(positions), "images") as progress:
            for start in range(0, len(positions), batch):
                part = list(positions[start : start + batch])
                filled = part + part[-1:] * (batch - len(part)) if self.compiled else part
                yield part, self.latents(torch.tensor(filled))[: len(part)]
                progress.advance(len(part))


def positions_of(classes: Sequence[int], per_class: int, label_dim: int) -> list[int]:
    """Return positions row by row: `per_class` images of each class; without labels there is one row."""
    if not label_dim:
        return list(range(per_class))
    return [n * label_dim + c for c in classes for n in range(per_class)]
