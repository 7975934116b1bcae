"""Features of images for Frechet distances, by name: fid, fd_dinov2 (from a local weights file) and latent (nothing to download).

Weights are TorchScript files, given on the command line or in the environment: torch reads them without running Python. What must
not break: a distance made with other weights than the published port's says that it is not comparable.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.codecs import hash_file

MAX_LATENT_FEATURES = 1024
# SHA-256 of files whose distances are comparable with published ones. None has been verified yet, so every result says so.
COMPARABLE: dict[str, frozenset[str]] = {"fid": frozenset(), "fd_dinov2": frozenset()}
VARIABLES = {"fid": "EVENKEEL_INCEPTION", "fd_dinov2": "EVENKEEL_DINOV2"}
_HOW = {
    "fid": "the TorchScript Inception of the StyleGAN2-ADA metrics (inception-2015-12-05.pt)",
    "fd_dinov2": "DINOv2 ViT-L/14 traced to TorchScript, 224x224 normalised RGB -> [N, 1024]",
}
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Features:
    """A map from what is drawn to rows: `of(latents, decode)` -> [N, D]."""

    name: str  # with everything that decides the rows
    of: Callable[[Tensor, Callable], Tensor]
    comparable: bool


def latent(shape: tuple[int, int, int]) -> Features:
    """Return the whitened latents themselves, flattened; averaged over squares where there are more than MAX_LATENT_FEATURES."""
    square = 1
    while shape[0] * (shape[1] // square) * (shape[2] // square) > MAX_LATENT_FEATURES:
        square *= 2
    name = f"latent {shape[0]}x{shape[1] // square}x{shape[2] // square} of squares of {square}"
    return Features(name, lambda x, decode: F.avg_pool2d(x, square).flatten(1), comparable=False)


def from_weights(kind: str, weights: str | os.PathLike | None, device: str) -> Features:
    """Open the feature network of `fid` or `fd_dinov2`; one line says how to get it where it is absent."""
    weights = weights or os.environ.get(VARIABLES[kind])
    if not weights or not Path(weights).is_file():
        raise ValueError(
            f"metric {kind}: needs a weights file, {_HOW[kind]}; give it with --weights {kind}=FILE or {VARIABLES[kind]}"
        )
    digest = hash_file(weights)
    try:
        network = torch.jit.load(str(weights), map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(
            f"{weights}: no TorchScript file ({str(error).splitlines()[0][:80]}); it must be {_HOW[kind]}"
        ) from None

    def of(x: Tensor, decode: Callable) -> Tensor:
        images = decode(x).to(device)
        images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        with torch.no_grad():
            return network(images, True) if kind == "fid" else network(_for_dinov2(images))

    return Features(f"{kind} sha256:{digest[:16]}", of, digest in COMPARABLE[kind])


def _for_dinov2(images: Tensor) -> Tensor:
    """Resize uint8 to 224 and normalise, as dgm-eval does with torch's bicubic."""
    x = F.interpolate(images.float() / 255, size=(224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (_IMAGENET_MEAN, _IMAGENET_STD))
    return (x - mean) / std
