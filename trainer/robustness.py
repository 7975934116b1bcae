"""How well a denoiser removes noise, in PSNR and SSIM over noise levels: denoising in the U-Node paper (arXiv 2310.20092).

An image x plus `level` N(0, 1), both relative to the data's range, is cleaned in two ways: by one evaluation D(x; sigma), the best
guess in PSNR, and along the probability-flow ODE in a few Euler steps. The paper's own protocol, a reverse chain of K steps, is in
reverse_chain.py. Every image has the same noise for every network. What must not break: the level is told in the data's own units,
and each channel's noise in the network's units is the same, or D(x; sigma) would be asked at the wrong sigma.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from data_pipeline.latents import unwhiten
from data_pipeline.progress import Progress
from models import sampler
from trainer import draws
from trainer.heldout import Data
from trainer.ssim import ssim

LEVELS = (0.03, 0.05, 0.10, 0.15, 0.20, 0.30)  # of the authors' notebook, relative to the range [0, 1]
PATH_STEPS, SIGMA_MIN = 5, 0.002
STREAM = "robustness"


def data_range(data: Data) -> float:
    """Return the range of the data in the network's units: of pixels 255, of latents four standard deviations."""
    std = np.array(data.header.std)
    if not pictures(data):
        return 4 * 0.5
    if std.max() - std.min() > 0.2 * std.mean():
        raise ValueError(
            f"{data.name}: its channels' deviations {std.tolist()} differ, so one level of noise is several sigma; use other data"
        )
    return 255 / float(std.mean()) * 0.5


def pictures(data: Data) -> bool:
    """Say whether the samples are pixels: latents have a PSNR, but no structural similarity that would mean anything."""
    return data.header.codec == "pixels"


def quality(x: Tensor, y: Tensor, data: Data) -> np.ndarray:
    """Return float64 [N, 2]: PSNR in dB and SSIM (NaN where the samples are no pictures) of x against y, in the network's units."""
    error = (x - y).double().square().mean((1, 2, 3)) / data_range(data) ** 2
    similar = torch.full_like(error, torch.nan)
    if pictures(data):
        similar = ssim(unwhiten(x, data.header), unwhiten(y, data.header), 255)
    return torch.stack([-10 * error.log10(), similar], 1).cpu().numpy()


def noisy(
    network, data: Data, batch: int, device: str
) -> Iterator[tuple[Callable, np.ndarray, int, Tensor, Tensor, Tensor]]:
    """Yield (denoise, rows, number of the level, its sigma, clean, noisy) for every batch and level."""
    for positions, y, labels in data.batches(batch):
        where, y, labels = positions.to(device), y.to(device), labels.to(device)

        def denoise(x: Tensor, sigma: Tensor, labels=labels) -> Tensor:
            return network(x, sigma.expand(len(x)), labels)

        for i, level in enumerate(LEVELS):
            sigma = torch.tensor(level * data_range(data), device=device)
            noise = draws.normal(data.seed, f"{STREAM} {i}", where, tuple(y.shape[1:]))
            yield denoise, positions.numpy(), i, sigma, y, y + sigma * noise


@torch.no_grad()
def measure(network, data: Data, batch: int, device: str = "cpu") -> np.ndarray:
    """Return float64 [N, levels, 3, 2]: `quality` of the noisy image, of D(x; sigma) and of the end of the path."""
    found = np.empty((data.num, len(LEVELS), 3, 2))
    with Progress("denoising", data.num * len(LEVELS), "images") as progress:
        for denoise, rows, i, sigma, y, x in noisy(network, data, batch, device):
            grid = sampler.edm_grid(PATH_STEPS, SIGMA_MIN, sigma.item())
            for k, cleaned in enumerate((x, denoise(x, sigma), sampler.SOLVERS["euler"](denoise, x, grid))):
                found[rows, i, k] = quality(cleaned, y, data)
            progress.advance(len(y))
    return found


def summary(found: np.ndarray) -> dict:
    """Return the mean over levels and images of one evaluation's PSNR, its SSIM, and PSNR of all three by level."""
    levels = []
    for level, (noise, one, path) in zip(LEVELS, found.mean(0).tolist(), strict=True):
        levels.append({"noise": level, "noisy": noise[0], "denoised": one[0], "path": path[0]} | similarity(one[1]))
    means = found[:, :, 1].mean((0, 1)).tolist()
    return {"mean": means[0], "also": similarity(means[1]), "images": len(found), "levels": levels}


def similarity(value: float) -> dict:
    """Return an SSIM as an entry, of what are no pictures none."""
    return {} if np.isnan(value) else {"SSIM": value}
