"""Codecs: images to what is stored, and raw latents back to pictures. Opened by name.

    pixels           nothing is encoded; uint8
    sd-vae-ft-mse    the Stability VAE through diffusers (posterior mean and std); needs a local folder of weights
    taesd            TAESD and other tiny autoencoders through diffusers; needs a local folder of weights
    tinyae4          the 1.4 M-parameter test autoencoder of this project, shaped and scaled like the VAE; needs its weights file

Weights are local files only: nothing is downloaded, nothing is unpickled.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from data_pipeline.manifest import Manifest


@dataclass
class Codec:
    """What every codec has: its name, its weights' hash, and what it stores for an image."""

    name: str
    hash: str = ""
    moments: str = "mean"
    factor: int = 1  # pixels per latent, along one side

    def encode(self, images: torch.Tensor) -> np.ndarray:
        """Turn uint8 [N, C, H, W] into stored samples [N, C', H', W']."""
        raise NotImplementedError

    def decode(self, raw: torch.Tensor) -> torch.Tensor:
        """Turn raw latents, fp32 [N, C, H, W], into uint8 pictures."""
        raise NotImplementedError


class Pixels(Codec):
    """Store the pixels themselves."""

    def encode(self, images):
        return images.numpy()

    def decode(self, raw):
        return (raw + 0.5).floor().clamp(0, 255).to(torch.uint8)


def _diffusers(who: str):
    try:
        import diffusers
    except ImportError:
        raise ValueError(f"{who} needs diffusers; install it with: pip install diffusers") from None
    return diffusers


def _from_diffusers(kind: str, weights, name: str, device: str):
    """Load a network of diffusers from a local folder; return it and its weights' hash."""
    diffusers = _diffusers(f"codec {name}")
    files = sorted(Path(weights).glob("*.safetensors")) if weights else []
    if len(files) != 1:
        raise ValueError(
            f"codec {name} needs --codec-weights FOLDER with config.json and one .safetensors file; got {weights or 'nothing'}"
        )
    network = getattr(diffusers, kind).from_pretrained(str(weights), local_files_only=True, use_safetensors=True)
    return network.eval().requires_grad_(False).to(device), hash_file(files[0])


class StabilityVae(Codec):
    """stabilityai/sd-vae-ft-mse as EDM2 uses it: pixels in [0, 1], latents unscaled, posterior mean and std stored.

    `decoding` is the type that it decodes in; it encodes in fp32. Tested with a small AutoencoderKL of random weights where
    diffusers is installed, not with the real ones.
    """

    def __init__(self, vae, digest: str, device: str, dtype: str, decoding: str = "fp32"):
        self.vae, self.decoding = vae, DECODING[decoding]
        super().__init__("sd-vae-ft-mse", digest, "mean_std", 2 ** (len(vae.config.block_out_channels) - 1))
        self.device, self.dtype = device, dtype
        for module in (vae.decoder, vae.post_quant_conv):
            module.to(self.decoding)

    @torch.no_grad()
    def encode(self, images):
        posterior = self.vae.encode(images.to(self.device).float() / 255).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).cpu().numpy().astype(self.dtype)

    @torch.no_grad()
    def decode(self, raw):
        parts = [self.vae.decode(part.to(self.device, self.decoding)).sample for part in raw.split(4)]
        pixels = torch.cat(parts).float()
        return (pixels.clamp(0, 1) * 255).to(torch.uint8).to(raw.device)  # truncated, as EDM2 does


# config.json of stabilityai/sd-vae-ft-mse
SD_VAE = {
    **{"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4},
    **{"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "sample_size": 256},
}


def untrained_vae(device: str = "cpu", decoding: str = "fp32") -> StabilityVae:
    """Return the SD-VAE with random weights, for timing: as large as the real one, and as fast."""
    diffusers = _diffusers("the SD-VAE")
    vae = diffusers.AutoencoderKL(**SD_VAE).eval().requires_grad_(False).to(device)
    return StabilityVae(vae, "", device, "float16", decoding)


class Taesd(Codec):
    """TAESD (github.com/madebyollin/taesd) and its relatives through diffusers: 8x down, deterministic, on its own scale.

    diffusers takes and gives pixels in [-1, 1]. Tested with random weights where diffusers is installed.
    """

    def __init__(self, weights, device: str, dtype: str):
        self.network, digest = _from_diffusers("AutoencoderTiny", weights, "taesd", device)
        super().__init__("taesd", digest, "mean", 2 ** (len(self.network.config.encoder_block_out_channels) - 1))
        self.device, self.dtype = device, dtype

    @torch.no_grad()
    def encode(self, images):
        return self.network.encode(images.to(self.device).float() / 127.5 - 1).latents.cpu().numpy().astype(self.dtype)

    @torch.no_grad()
    def decode(self, raw):
        pixels = self.network.decode(raw.to(self.device).float()).sample
        return ((pixels.clamp(-1, 1) + 1) * 127.5 + 0.5).floor().clamp(0, 255).to(torch.uint8).to(raw.device)


class TinyAutoencoder(Codec):
    """The test autoencoder: 8x down, 4 channels, deterministic; its raw latents have the SD-VAE's per-channel statistics.

    `latent.*` in the weights file maps the network's own scale u to raw: raw = (u - u_mean) / u_std * raw_std + raw_mean.
    """

    def __init__(self, weights, device: str, dtype: str):
        from safetensors.torch import load_file

        if not weights or not Path(weights).is_file():
            raise ValueError(f"codec tinyae4 needs --codec-weights FILE.safetensors; got {weights or 'nothing'}")
        super().__init__("tinyae4", hash_file(weights), "mean", 8)
        self.weights = {name: tensor.float().to(device) for name, tensor in load_file(weights).items()}
        self.device, self.dtype = device, dtype

    def _conv(self, x, name):
        weight = self.weights[f"{name}.weight"]
        return F.conv2d(x, weight, self.weights.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def _blocks(self, x, prefix, count):
        for i in range(count):
            y = self._conv(F.relu(x), f"{prefix}.blocks.{i}.a")
            x = x + self._conv(F.relu(y), f"{prefix}.blocks.{i}.b")
        return x

    def _affine(self, x, source, target):
        def constant(name):
            return self.weights[f"latent.{name}"].view(1, -1, 1, 1)

        scaled = (x - constant(f"{source}_mean")) / constant(f"{source}_std")
        return scaled * constant(f"{target}_std") + constant(f"{target}_mean")

    @torch.no_grad()
    def encode(self, images):
        patches = F.pixel_unshuffle(images.to(self.device).float() / 127.5 - 1, 8)
        hidden = self._blocks(self._conv(patches, "encoder.inp"), "encoder", 3)
        u = self._conv(patches, "encoder.skip") + self._conv(F.relu(hidden), "encoder.out")
        return self._affine(u, "u", "raw").cpu().numpy().astype(self.dtype)

    @torch.no_grad()
    def decode(self, raw):
        u = self._affine(raw.to(self.device).float(), "raw", "u")
        hidden = self._blocks(self._conv(u, "decoder.inp"), "decoder", 4)
        patches = self._conv(u, "decoder.skip") + self._conv(F.relu(hidden), "decoder.out")
        pixels = F.pixel_shuffle(patches, 8).clamp(-1, 1)
        return ((pixels + 1) * 127.5 + 0.5).floor().clamp(0, 255).to(torch.uint8).to(raw.device)


DECODING = {"fp32": torch.float32, "fp16": torch.float16}  # bf16 would move pixels by many steps of 255
NAMES = ("pixels", "sd-vae-ft-mse", "taesd", "tinyae4")


def open_codec(name: str, weights=None, device: str = "cpu", dtype: str = "float16", decoding: str = "fp32") -> Codec:
    """Open a codec by name; `weights` is a local file or folder where it needs one, `dtype` what its encoder stores.

    `decoding` is the type that the SD-VAE decodes in: fp16 is for GPUs, and may move a pixel by a few steps of 255.
    """
    if decoding != "fp32" and name != "sd-vae-ft-mse":
        raise ValueError(f"codec {name} decodes in fp32 alone, not in {decoding}; leave that out")
    if name == "pixels":
        return Pixels("pixels")
    if name == "sd-vae-ft-mse":
        return StabilityVae(*_from_diffusers("AutoencoderKL", weights, name, device), device, dtype, decoding)
    if name == "taesd":
        return Taesd(weights, device, dtype)
    if name == "tinyae4":
        return TinyAutoencoder(weights, device, dtype)
    raise ValueError(f"codec {name!r} is none of {', '.join(NAMES)}")


def check_is(codec: Codec, manifest: Manifest):
    """Refuse to decode one codec's latents with another's weights."""
    if codec.name != manifest.codec:
        raise ValueError(f"the dataset was made with codec {manifest.codec}, not {codec.name}; open that one")
    if manifest.codec_hash and codec.hash != manifest.codec_hash:
        raise ValueError(
            f"codec {codec.name}: the weights' hash {codec.hash[:12]} is not {manifest.codec_hash[:12]} as in the manifest; "
            "use the weights that made the dataset"
        )


def hash_file(path) -> str:
    """Return the SHA-256 (hex) of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
