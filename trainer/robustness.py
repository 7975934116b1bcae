"""How well a denoiser removes noise, in PSNR over noise levels: the denoising table of the U-Node paper (arXiv 2310.20092).

An image x plus `level` N(0, 1), both relative to the data's range, is cleaned in two ways: by one evaluation D(x; sigma), the best
guess in PSNR, and along the probability-flow ODE in a few Euler steps, the counterpart of the paper's reverse chain without
injected noise. Every image has the same noise for every network. What must not break: the level is told in the data's own units,
and each channel's noise in the network's units is the same, or D(x; sigma) would be asked at the wrong sigma.
"""

import numpy as np
import torch
from torch import Tensor

from data_pipeline.progress import Progress
from models import sampler
from trainer import draws
from trainer.heldout import Data

LEVELS = (0.03, 0.05, 0.10, 0.15, 0.20, 0.30)  # of the authors' notebook, relative to the range [0, 1]
PATH_STEPS, SIGMA_MIN = 5, 0.002
STREAM = "robustness"


def data_range(data: Data) -> float:
    """Return the range of the data in the network's units: of pixels 255, of latents four standard deviations."""
    std = np.array(data.header.std)
    if data.header.codec != "pixels":
        return 4 * 0.5
    if std.max() - std.min() > 0.2 * std.mean():
        raise ValueError(
            f"{data.name}: its channels' deviations {std.tolist()} differ, so one level of noise is several sigma; use other data"
        )
    return 255 / float(std.mean()) * 0.5


@torch.no_grad()
def psnr(network, data: Data, batch: int, device: str = "cpu") -> np.ndarray:
    """Return float64 [N, levels, 3]: PSNR in dB of the noisy image, of D(x; sigma) and of the end of the path."""
    reach = data_range(data)
    found = np.empty((data.num, len(LEVELS), 3))
    with Progress("denoising", found[..., 0].size, "images") as progress:
        for positions, y, labels in data.batches(batch):
            where, y = positions.to(device), y.to(device)
            labels = labels.to(device)

            def denoise(x: Tensor, sigma: Tensor, labels=labels) -> Tensor:
                return network(x, sigma.expand(len(x)), labels)

            for i, level in enumerate(LEVELS):
                sigma = torch.tensor(level * reach, device=device)
                noisy = y + sigma * draws.normal(data.seed, f"{STREAM} {i}", where, tuple(y.shape[1:]))
                grid = sampler.edm_grid(PATH_STEPS, SIGMA_MIN, sigma.item())
                ways = noisy, denoise(noisy, sigma), sampler.SOLVERS["euler"](denoise, noisy, grid)
                for k, x in enumerate(ways):
                    error = (x - y).double().square().mean((1, 2, 3)) / reach**2
                    found[positions.numpy(), i, k] = (-10 * error.log10()).cpu().numpy()
                progress.advance(len(y))
    return found


def summary(found: np.ndarray) -> dict:
    """Return the mean over levels and images of one evaluation's PSNR, and all three by level."""
    names = "noisy", "denoised", "path"
    levels = [
        {"noise": level} | {name: float(v) for name, v in zip(names, found[:, i].mean(0), strict=True)}
        for i, level in enumerate(LEVELS)
    ]
    return {"mean": float(found[..., 1].mean()), "images": len(found), "levels": levels}
