"""The discrete U-Net that the U-Node paper (arXiv 2310.20092) compares with: DDPM's (Ho et al., arXiv 2006.11239) with two
residual blocks a level, linear attention, and full attention where `attn_resolutions` says.

Width 64 and multiples 1, 2, 4, 8 on 3x64x64 have the 35,710,339 parameters of the paper's baseline. Nothing here preserves
magnitude: no row is marked normalised, and Adam sees plain weights. What a maintainer must not break: layers cast their fp32
weights to the type of their input, because DeepSpeed keeps the parameters in fp32.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.network import label_rows, magnitude

HEADS, HEAD_CHANNELS, GROUPS = 4, 32, 8  # of the baseline (facts of the authors' repository)


class Conv(nn.Conv2d):
    """Convolve in the type of the input."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in, H, W] to [N, out, H', W']."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.conv2d(x, self.weight.to(x.dtype), bias, self.stride, self.padding)


class GroupNorm(nn.GroupNorm):
    """Normalise groups of channels over the image, with learned gain and bias, in the type of the input."""

    def __init__(self, channels: int, affine: bool = True):
        if channels % GROUPS:
            raise ValueError(
                f"{channels} channels: group norm needs a multiple of {GROUPS}; change model.model_channels"
            )
        super().__init__(GROUPS, channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to itself."""
        weight, bias = (self.weight.to(x.dtype), self.bias.to(x.dtype)) if self.affine else (None, None)
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """Scale every pixel's channels to unit RMS, times a learned gain."""

    def __init__(self, channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to itself."""
        return F.normalize(x, dim=1) * (self.gain * math.sqrt(x.shape[1])).to(x.dtype)[:, None, None]


class Attention(nn.Module):
    """Attend over pixels: softmax(q k^T / sqrt(32)) v, or `linear` in their number (Shen et al., arXiv 1812.01243)."""

    def __init__(self, channels: int, linear: bool = False):
        super().__init__()
        self.channels, self.linear = channels, linear
        self.norm = RMSNorm(channels)
        self.qkv = Conv(channels, 3 * HEADS * HEAD_CHANNELS, 1, bias=False)
        self.out = Conv(HEADS * HEAD_CHANNELS, channels, 1)
        self.out_norm = RMSNorm(channels) if linear else None

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to itself; the residual is the caller's."""
        # [N, 3, heads, channels, HW]
        q, k, v = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, HEADS, HEAD_CHANNELS)).unbind(1)
        if self.linear:
            q, k = q.softmax(dim=-2) * HEAD_CHANNELS**-0.5, k.softmax(dim=-1)
            y = (v @ k.transpose(-1, -2)) @ q
        else:
            y = F.scaled_dot_product_attention(*(h.transpose(-1, -2) for h in (q, k, v))).transpose(-1, -2)
        y = self.out(y.flatten(1, 2).unflatten(-1, x.shape[2:]))
        return self.out_norm(y) if self.linear else y


class NoiseEmbedding(nn.Module):
    """Embed the noise level as DDPM does its time, sinusoids and two layers, and add a learned row per class."""

    def __init__(self, width: int, channels: int, label_dim: int, sigma_data: float):
        super().__init__()
        self.label_dim, self.sigma_data, self.width = label_dim, sigma_data, width
        self.linear0 = nn.Linear(width, channels)
        self.linear1 = nn.Linear(channels, channels)
        self.label = nn.Linear(label_dim, channels, bias=False) if label_dim else None

    def forward(self, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        """Map c_noise = ln(sigma) / 4 [N] and labels to fp32 [N, channels]."""
        # the time of the cosine schedule, of 1000: tan(pi/2 t/1000) = sigma / sigma_data (Nichol & Dhariwal 2021, s = 0)
        time = 1000 * 2 / math.pi * torch.atan((4 * c_noise).exp() / self.sigma_data)
        half = torch.arange(self.width // 2, device=time.device, dtype=torch.float32)
        angle = torch.outer(time, torch.exp(-math.log(10000) / max(self.width // 2 - 1, 1) * half))
        emb = self.linear1(F.gelu(self.linear0(torch.cat([angle.sin(), angle.cos()], dim=1))))
        if self.label is None:
            return emb
        return emb + self.label(label_rows(labels, self.label_dim, c_noise))


class ResidualBlock(nn.Module):
    """Two of convolution, group norm and SiLU, the first scaled and shifted by the embedding; attention where asked for."""

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, attention: Attention | None = None):
        super().__init__()
        self.emb_linear = nn.Linear(emb_channels, 2 * out_channels)
        self.conv0, self.norm0 = Conv(in_channels, out_channels, 3, padding=1), GroupNorm(out_channels)
        self.conv1, self.norm1 = Conv(out_channels, out_channels, 3, padding=1), GroupNorm(out_channels)
        self.conv_skip = Conv(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.attention = attention

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map [N, in, H, W] and [N, emb] to [N, out, H, W]."""
        scale, shift = self.emb_linear(F.silu(emb)).to(x.dtype)[:, :, None, None].chunk(2, dim=1)
        y = F.silu(self.norm0(self.conv0(x)) * (scale + 1) + shift)
        y = F.silu(self.norm1(self.conv1(y)))
        x = y + (x if self.conv_skip is None else self.conv_skip(x))
        return x if self.attention is None else x + self.attention(x)


class DDPMUNet(nn.Module):
    """The network: image and noise level (and class) -> image."""

    def __init__(
        self,
        resolution: int,
        channels: int,
        label_dim: int,
        *,
        model_channels: int = 64,
        channel_mult: tuple[int, ...] = (1, 2, 4, 8),
        attn_resolutions: tuple[int, ...] = (8,),
        sigma_data: float = 0.5,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        widths = [model_channels * mult for mult in channel_mult]
        ins, last = [model_channels, *widths[:-1]], len(widths) - 1
        emb = 4 * model_channels
        self.activation_checkpointing = activation_checkpointing
        self.embedding = NoiseEmbedding(model_channels, emb, label_dim, sigma_data)
        self.in_conv = Conv(channels, model_channels, 7, padding=3)

        def attention(width: int, level: int) -> Attention:
            return Attention(width, linear=resolution >> level not in attn_resolutions)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        for level, (narrow, wide) in enumerate(zip(ins, widths, strict=True)):
            at = f"{resolution >> level}x{resolution >> level}"
            self.enc[f"{at}_block0"] = ResidualBlock(narrow, narrow, emb)
            self.enc[f"{at}_block1"] = ResidualBlock(narrow, narrow, emb, attention(narrow, level))
            # pixels of a 2x2 square become channels; the last level only changes the width
            self.enc[f"{at}_down"] = Conv(narrow, wide, 3, padding=1) if level == last else Conv(4 * narrow, wide, 1)
        self.dec[f"{at}_in0"] = ResidualBlock(widths[-1], widths[-1], emb, Attention(widths[-1]))
        self.dec[f"{at}_in1"] = ResidualBlock(widths[-1], widths[-1], emb)
        for level, (narrow, wide) in reversed(list(enumerate(zip(ins, widths, strict=True)))):
            at = f"{resolution >> level}x{resolution >> level}"
            self.dec[f"{at}_block0"] = ResidualBlock(wide + narrow, wide, emb)
            self.dec[f"{at}_block1"] = ResidualBlock(wide + narrow, wide, emb, attention(wide, level))
            self.dec[f"{at}_up"] = Conv(wide, narrow, 3, padding=1)
        self.out_block = ResidualBlock(2 * model_channels, model_channels, emb)
        self.out_conv = Conv(model_channels, channels, 1)

    def forward(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None, dropout_mask=None, collect: bool = False
    ) -> tuple[Tensor, dict]:
        """Return F [N, C, H, W] in the type of `x`, and the magnitude of every block's output when `collect`."""
        emb = self.embedding(c_noise, labels)
        seen: dict[str, Tensor] = {}

        def run(name: str, block: nn.Module, h: Tensor) -> Tensor:
            if isinstance(block, Conv):
                h = block(h)
            elif self.activation_checkpointing and self.training:
                h = checkpoint(block, h, emb, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(h, emb)
            if collect:
                seen[f"{name}.out"] = magnitude(h)
            return h

        first = x = self.in_conv(x)
        skips = []
        for name, block in self.enc.items():
            if name.endswith("_down") and block.kernel_size == (1, 1):
                x = F.pixel_unshuffle(x, 2)
            x = run(f"enc.{name}", block, x)
            if isinstance(block, ResidualBlock):
                skips.append(x)
        finest = next(iter(self.enc)).split("_")[0]
        for name, block in self.dec.items():
            if "_block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            elif name.endswith("_up") and not name.startswith(f"{finest}_"):
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = run(f"dec.{name}", block, x)
        x = run("out_block", self.out_block, torch.cat([x, first], dim=1))
        return self.out_conv(x), seen
