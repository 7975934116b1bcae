"""Batches as stored, and the way between them and what a denoiser sees.

A source delivers bytes as they lie on disk; sampling the posterior and whitening happen here, on the device of the tensor, from
normals keyed by position that the caller passes in. x = (latent - mean) / std * sigma_data per channel, sigma_data = 0.5 (Karras et
al. 2022), with the manifest's constants.
"""

from dataclasses import dataclass

import torch

from data_pipeline import codecs
from data_pipeline.manifest import Manifest

SIGMA_DATA = 0.5  # Karras et al. 2022, Table 1


@dataclass(frozen=True)
class LatentBatch:
    """Samples at global positions: `position` int64 [N], `stored` [N, C, H, W] as on disk, `labels` int64 [N] (-1: none)."""

    position: torch.Tensor
    stored: torch.Tensor
    labels: torch.Tensor


def constants_of(manifest: Manifest, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation per channel, [1, C, 1, 1]."""
    mean = torch.tensor(manifest.mean, dtype=torch.float32, device=device).view(1, -1, 1, 1)
    std = torch.tensor(manifest.std, dtype=torch.float32, device=device).view(1, -1, 1, 1)
    return mean, std


def whiten(
    stored: torch.Tensor, manifest: Manifest, posterior_normal: torch.Tensor | None = None, constants=None
) -> torch.Tensor:
    """Turn stored samples [N, C or 2C, H, W] into training data [N, C, H, W]: fp32, mean 0, standard deviation 0.5.

    Where the dataset stores posterior moments, the latent is mean + posterior_normal * std; None takes the posterior's
    mean, for looking. `constants` are those of `constants_of`, where they are used often.
    """
    if stored.shape[1:] != tuple(manifest.shape):
        raise ValueError(
            f"samples {list(stored.shape[1:])} are not {list(manifest.shape)} as in the manifest; open the right one"
        )
    latents = stored.to(torch.float32)
    if manifest.moments == "mean_std":
        latents, deviations = latents.chunk(2, dim=1)
        if posterior_normal is not None:
            latents = latents + posterior_normal.to(torch.float32) * deviations
    mean, std = constants or constants_of(manifest, stored.device)
    return (latents - mean) * (SIGMA_DATA / std)


def unwhiten(latents: torch.Tensor, manifest: Manifest) -> torch.Tensor:
    """Invert `whiten` up to the posterior's draw: training scale [N, C, H, W] to raw latents, fp32."""
    mean, std = constants_of(manifest, latents.device)
    return latents.to(torch.float32) * (std / SIGMA_DATA) + mean


def decode(latents: torch.Tensor, manifest: Manifest, codec: "codecs.Codec | None" = None) -> torch.Tensor:
    """Turn samples at training scale [N, C, H, W] into pictures: uint8 [N, 1 or 3, H', W'].

    `codec` comes from `codecs.open_codec`; without it, it is opened by the manifest's name, which suffices where it has no weights.
    """
    codec = codec or codecs.open_codec(manifest.codec)
    codecs.check_is(codec, manifest)
    return codec.decode(unwhiten(latents, manifest))
