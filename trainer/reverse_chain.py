"""Denoising by the last K steps of a reverse diffusion, the protocol of the U-Node paper (arXiv 2310.20092; its authors' notebook).

The noisy image is taken for step K of the chain, whatever noise it holds, and stepped down by the means of the posterior
q(x_s | x_t, D(x_t)), no noise injected. Which K is best depends on the noise, and the paper picks it by the PSNR that it then
reports: `best` here does so too, per network and level, over all images (an oracle: nobody knows the clean image); `told` is the K
whose own level is nearest to the noise put in, and needs no clean image. What differs from theirs: strides of 20 of the 1000
levels, so that K steps cost K evaluations and not 20 K; no clipping of the noisy image, which would change its noise; the network
is asked at sigma, so that signal and noise of a step are scaled together.
"""

import numpy as np
import torch
from torch import Tensor

from data_pipeline.progress import Progress
from trainer import robustness
from trainer.heldout import Data

TIMESTEPS, STRIDE = 1000, 20
START, END = -3.0, 3.0  # of the sigmoid schedule of the library that the authors train with (Jabri et al. 2022)
STEPS = (1, 2, 3, 5, 8, 15)  # levels of 0.04 to 0.25 of the range


def ladder() -> Tensor:
    """Return the noise of steps 1, 2, ... relative to the data's range, float64 [49], rising."""
    t = torch.arange(STRIDE, TIMESTEPS, STRIDE, dtype=torch.float64) / TIMESTEPS
    ends = torch.tensor([START, END], dtype=torch.float64).sigmoid()
    signal = (ends[1] - torch.sigmoid(START + (END - START) * t)) / (ends[1] - ends[0])
    return ((1 - signal) / signal).sqrt() / 2  # their data are in [-1, 1]


def chain(denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    """Step x, taken to be at sigmas[0], down the falling `sigmas` by posterior means, and return the last step's D."""
    best = denoise(x, sigmas[0])
    for now, after in zip(sigmas, sigmas[1:]):
        x = best + (after / now) ** 2 * (x - best)
        best = denoise(x, after)
    return best


@torch.no_grad()
def measure(network, data: Data, batch: int, device: str = "cpu") -> np.ndarray:
    """Return float64 [N, levels, len(STEPS), 2]: `robustness.quality` after each number of steps."""
    found = np.empty((data.num, len(robustness.LEVELS), len(STEPS), 2))
    sigmas = (ladder()[: max(STEPS)].flip(0) * robustness.data_range(data)).float().to(device)
    with Progress("reverse chains", data.num * len(robustness.LEVELS), "images") as progress:
        for denoise, rows, i, _, y, x in robustness.noisy(network, data, batch, device):
            for k, steps in enumerate(STEPS):
                found[rows, i, k] = robustness.quality(chain(denoise, x, sigmas[-steps:]), y, data)
            progress.advance(len(y))
    return found


def summary(found: np.ndarray) -> dict:
    """Return the mean PSNR over levels at each level's best K, its SSIM, that at the K that was told, and all of it by level."""
    own, levels = ladder()[torch.tensor(STEPS) - 1].log().numpy(), []
    for level, (psnr, similar) in zip(robustness.LEVELS, found.mean(0).transpose(0, 2, 1), strict=True):
        best, told = int(psnr.argmax()), int(np.abs(own - np.log(level)).argmin())
        sweep = [
            {"steps": k, "psnr": p} | robustness.similarity(s)
            for k, p, s in zip(STEPS, psnr.tolist(), similar.tolist())
        ]
        levels.append(
            {"noise": level, "steps": STEPS[best], "best": float(psnr[best]), "told": float(psnr[told]), "sweep": sweep}
            | robustness.similarity(float(similar[best]))
        )
    means = {key: float(np.mean([v[key] for v in levels])) for key in ("best", "told", "SSIM") if key in levels[0]}
    return {"mean": means.pop("best"), "also": means, "images": len(found), "levels": levels}
