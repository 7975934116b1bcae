"""What the network sees at a position: latents, label, noise level, noise. A pure function of (seed, position).

A position is a sample's place in the endless global order; the step at clock c covers positions c ... c + global_batch - 1,
and rank r takes the r-th contiguous part. So a run that goes on with another number of ranks or another micro-batch sees the
same samples with the same noise, bitwise.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipeline.latents import constants_of, whiten
from data_pipeline.manifest import check_fits
from data_pipeline.stock import open_stock
from data_pipeline.wds import open_source
from trainer import compilation, draws
from trainer.config import Config
from trainer.groups import Data
from trainer.noise_levels import NoiseLevels


@dataclass
class Example:
    """One micro-batch on the device; latents are whitened to standard deviation sigma_data."""

    positions: Tensor  # int64 [N]
    latents: Tensor  # fp32 [N, C, H, W]
    labels: Tensor  # int64 [N]
    sigma: Tensor  # fp32 [N]
    noise: Tensor  # fp32 [N, C, H, W], unit variance
    label_uniform: Tensor | None  # fp32 [N], for label dropout


def micro_batches(
    clock: int, global_batch: int, micro_batch: int, rank: int, world: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (positions, positions of the one after), int64 [micro_batch], for this rank's part of the step at `clock`."""
    part = global_batch // world
    starts = [clock + rank * part + start for start in range(0, part, micro_batch)]
    for start, after in zip(starts, [*starts[1:], starts[0] + global_batch], strict=True):
        yield (
            np.arange(start, start + micro_batch, dtype=np.int64),
            np.arange(after, after + micro_batch, dtype=np.int64),
        )


class Examples:
    """The training set at any position."""

    def __init__(self, config: Config, device: torch.device):
        m = config.model
        self.seed, self.device = config.seed, device
        self.label_dropout, self.dropout = config.loss.label_dropout, m.dropout
        self.source = _open(config.data, config.seed, pin=device.type == "cuda")
        self.manifest = self.source.manifest
        check_fits(self.manifest, config.data.codec, m.channels, m.resolution, m.label_dim)
        self.noise_levels = NoiseLevels(config, device)
        self.constants = constants_of(self.manifest, device)
        self.draw = self._draw
        if device.type == "cuda" and compilation.wanted(config, True):
            self.compile_draw()
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def at(self, positions: np.ndarray, upcoming: np.ndarray | None = None) -> Example:
        """Return the micro-batch at these positions; `upcoming` are read ahead in the background."""
        batch = self.source.batch(positions)
        if upcoming is not None:
            self.source.prefetch(upcoming)
        sigma = self.noise_levels.at(batch.position).float()
        where, stored, labels, sigma = self._to_device(batch.position, batch.stored, batch.labels, sigma)
        latents, noise = self.draw(stored, where)
        return Example(
            positions=where,
            latents=latents,
            labels=labels,
            sigma=sigma,
            noise=noise,
            label_uniform=draws.uniform(self.seed, "label dropout", where) if self.label_dropout else None,
        )

    def compile_draw(self) -> None:
        """Turn some 300 small kernels of integers into a few; on a CPU that gains nothing."""
        self.draw = compilation.compile_function(self._draw)

    def _to_device(self, *tensors: Tensor) -> list[Tensor]:
        """Copy to the device: on a stream of its own, beside the computation of the micro-batch before."""
        if self.copies is None:
            return [t.to(self.device) for t in tensors]
        with torch.cuda.stream(self.copies):
            copied = [t.to(self.device, non_blocking=True) for t in tensors]
        current = torch.cuda.current_stream()
        current.wait_stream(self.copies)
        for t in copied:
            t.record_stream(
                current
            )  # its memory belongs to the other stream: not to be used again before this one is done
        return copied

    def _draw(self, stored: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Return latents, sampled from their posterior and whitened, and unit noise."""
        posterior, shape = None, tuple(stored.shape[1:])
        if self.manifest.moments == "mean_std":
            shape = (shape[0] // 2, *shape[1:])
            posterior = draws.normal(self.seed, "posterior", where, shape)
        latents = whiten(stored, self.manifest, posterior, self.constants)
        return latents, draws.normal(self.seed, "noise", where, shape)

    def dropout_mask(self, positions: Tensor):
        """Return mask(layer, shape) -> keep mask as a function of (seed, layer, position); None where nothing is dropped."""
        if not self.dropout:
            return None

        def mask(layer: int, shape: tuple[int, ...]) -> Tensor:
            return draws.at_least(self.dropout, self.seed, f"dropout {layer}", positions, tuple(shape[1:]))

        return mask


def _open(data: Data, seed: int, pin: bool):
    if data.reader == "stock":
        return open_stock(data.path, seed, data.window)
    return open_source(
        data.path,
        seed,
        data.window,
        codec=data.codec,
        cache={"folder": data.cache_folder, "max_bytes": data.cache_bytes},
        stage=data.stage,
        on_bad=data.on_bad,
        max_bad=data.max_bad or None,
        checked=data.verify,
        threads=data.threads,
        access=data.access,
        heldout=data.heldout,
        pin=pin,
    )
