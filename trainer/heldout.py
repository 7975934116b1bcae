"""The loss per noise level on given data: the cheap metric that needs no sampling, for any EMA length.

Every image is seen once in every bin of logSNR, with noise that is a function of (seed, image, bin) alone: two networks see the
same, so that their difference is known much better than their losses. What must not break: the whitening is the network's own (its
header), not that of the data looked at.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from data_pipeline.latents import whiten
from data_pipeline.progress import Progress
from data_pipeline.wds import open_source
from models.noise import sigma_from_logsnr
from trainer import config, draws

# sigma from 27 to 0.009 at sigma_data 0.5: beyond, the loss is that of the data's own mean or of its rounding
BIN_EDGES = tuple(range(-8, 9, 2))
SEED, STREAM, WINDOW = 0, "heldout", 16


class Data:
    """The first `num_images` of a dataset (all of it, if it has fewer), whitened as a network's header entry `data` says.

    Of the training data, only the part that was held out, where the header says that one was (`heldout`, data.heldout of the run).
    Raises ValueError where the dataset has another codec or shape.
    """

    def __init__(self, path: str | Path, data: dict, num_images: int, seed: int = SEED):
        self.header, self.seed = SimpleNamespace(**data), seed
        self.opened = open_source(str(path), seed, WINDOW)
        manifest = self.opened.manifest
        trained_on, self.digest = manifest.digest == data["digest"], manifest.digest
        if trained_on and data.get("heldout"):
            self.opened.close()
            self.opened = open_source(str(path), seed, WINDOW, heldout=data["heldout"], part="heldout")
            trained_on, self.digest = False, f"{self.digest} held out {data['heldout']}"
        for key in ("codec", "codec_hash", "moments", "label_dim"):
            if getattr(manifest, key) != data[key]:
                raise ValueError(
                    f"{path}: its {key} is {getattr(manifest, key)!r}, the network's {data[key]!r}; give data like it"
                )
        if list(manifest.shape) != list(data["shape"]):
            raise ValueError(
                f"{path}: its samples are {list(manifest.shape)}, the network's {data['shape']}; give data like it"
            )
        self.num = min(num_images, self.opened.num_samples)
        self.name = f"{path} ({'the training data' if trained_on else 'held out'})"

    def batches(self, batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (positions int64 [N], latents fp32 [N, C, H, W], labels int64 [N]); each image once."""
        for start in range(0, self.num, batch):
            positions = torch.arange(start, min(start + batch, self.num))
            found = self.opened.batch(positions.numpy())
            posterior = None
            if self.header.moments == "mean_std":
                shape = (found.stored.shape[1] // 2, *found.stored.shape[2:])
                posterior = draws.normal(self.seed, f"{STREAM} posterior", positions, shape)
            yield positions, whiten(found.stored, self.header, posterior), found.labels


def open_of_run(run: Path | None, path: Path | None, header: dict, num_images: int) -> Data:
    """Open the dataset at `path`, or else the run's own. Raise ValueError where neither says which."""
    if path is None:
        if run is None or not (run / "config.yaml").is_file():
            raise ValueError("no run directory around the snapshot names its data; give --data FOLDER")
        path = config.read_yaml(run / "config.yaml")["data"]["path"]
    return Data(path, header, num_images)


@torch.no_grad()
def bin_losses(network, data: Data, batch: int, device: str = "cpu") -> np.ndarray:
    """Return float64 [N, bins]: the weighted loss (s^2 + sd^2) / (s sd)^2 |D - y|^2 per element, without the uncertainty.

    1 is what a network scores that predicts nothing (F = 0), at every level; levels are uniform in logSNR within each bin.
    """
    losses = np.empty((data.num, len(BIN_EDGES) - 1))
    sigma_data = network.sigma_data
    with Progress("loss per logSNR", losses.size, "evaluations") as progress:
        for positions, y, labels in data.batches(batch):
            where, y, labels = positions.to(device), y.to(device), labels.to(device)
            for b, (low, high) in enumerate(zip(BIN_EDGES, BIN_EDGES[1:])):
                u = draws.uniform(data.seed, f"{STREAM} level {b}", where).double()
                sigma = sigma_from_logsnr(low + (high - low) * u, sigma_data).float()
                noise = draws.normal(data.seed, f"{STREAM} noise {b}", where, tuple(y.shape[1:]))
                error = network(y + noise * sigma.view(-1, 1, 1, 1), sigma, labels) - y
                weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
                losses[positions.numpy(), b] = (weight * error.double().square().mean((1, 2, 3))).cpu().numpy()
                progress.advance(len(y))
    if not np.isfinite(losses).all():
        raise ValueError("the network's loss is not finite; its weights are broken")
    return losses


def summary(losses: np.ndarray) -> dict:
    """Return the mean over bins with its standard error over images, and the same per bin."""
    per_image = losses.mean(1)
    bins = [
        {
            "logsnr": [low, high],
            "loss": float(column.mean()),
            "error": float(column.std(ddof=1) / math.sqrt(len(column))),
        }
        for low, high, column in zip(BIN_EDGES, BIN_EDGES[1:], losses.T)
    ]
    error = float(per_image.std(ddof=1) / math.sqrt(len(per_image)))
    return {"mean": float(per_image.mean()), "error": error, "images": len(losses), "bins": bins}
