"""EDM2 U-Net, config G (Karras et al., arXiv 2312.02696, Fig. 21 and Appendix B): magnitude-preserving, no bias, no
group norm, cosine attention.

Submodules carry the names of NVIDIA's state_dict. What a maintainer must not break: pixel norm is in encoder blocks
only, after conv_skip; activations are clipped last; q, k and v are contiguous thirds of attn_qkv's rows, [3, heads,
channels], where the published files interleave them (row 3 (head channels + c) + {q, k, v}): import_edm2 converts.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.magnitude import SILU_RMS, MPConv, clip, mp_cat, mp_sum, normalize
from models.network import Network, magnitude


def magnitude_bucket(name: str) -> tuple[str, int] | None:
    """Return ("Enc" | "Dec", resolution) of what lies inside a block, the curves of the paper's Fig. 3, else None.

    `name` is a key of the collected magnitudes or of the parameters: "unet.enc.64x64_block0.conv_res0".
    """
    parts = name.split(".")
    if len(parts) < 4 or parts[1] not in ("enc", "dec"):
        return None
    return parts[1].capitalize(), int(parts[2].split("x")[0])


class Resample(nn.Module):
    """Halve or double the image by a separable filter of even length; [1, 1] is a 2x2 mean or nearest neighbour."""

    def __init__(self, mode: str, taps: tuple[float, ...] = (1, 1)):
        super().__init__()
        if len(taps) % 2 or sum(taps) == 0:
            raise ValueError(f"resample_filter {list(taps)}: an even number of taps with a sum that is not 0 is needed")
        self.mode, self.box = mode, tuple(taps) == (1, 1)
        self.taps = [tap / sum(taps) for tap in taps]

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, C, H/2, W/2] ("down"), [N, C, 2H, 2W] ("up") or itself ("keep")."""
        if self.mode == "keep":
            return x
        if self.box:
            return F.avg_pool2d(x, 2) if self.mode == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")
        # Filled on the device: not a buffer, which snapshots would have to carry, nor a copy, which would wait for it.
        row = torch.stack([x.new_full((), tap) for tap in self.taps])
        kernel = torch.outer(row, row).expand(x.shape[1], 1, -1, -1)
        options = {"stride": 2, "padding": (len(self.taps) - 1) // 2, "groups": x.shape[1]}
        if self.mode == "down":
            return F.conv2d(x, kernel, **options)
        return F.conv_transpose2d(x, 4 * kernel, **options)


def modulate(y: Tensor, scale: Tensor) -> Tensor:
    """Return `y` [N, C, H, W] times `scale` [N or 1, C], in the type of `y`.

    The scale is spread along columns first, so that its gradient is summed along rows before it is summed over them: a compiler
    does the former in the pass that makes the gradient of `y`, where a sum over whole images is a pass of its own. Sums over rows
    are in fp32.
    """
    return y * scale[:, :, None, None].expand(-1, -1, y.shape[2], 1).to(y.dtype)


class Block(nn.Module):
    """Residual block, then cosine attention where it has heads (Fig. 21; Appendix B.8)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        encoder: bool,
        resample: str = "keep",
        attention: bool = False,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        residual_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float = 256.0,
        resample_filter: tuple[float, ...] = (1, 1),
        layer: int = 0,
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.encoder, self.layer, self.dropout, self.clip_act = encoder, layer, dropout, clip_act
        self.residual_balance, self.attn_balance = residual_balance, attn_balance
        # Integer division: narrow blocks silently go without attention, as in the reference.
        self.num_heads = out_channels // channels_per_head if attention else 0
        if self.num_heads and out_channels % self.num_heads:
            raise ValueError(
                f"a block of {out_channels} channels cannot be split into {self.num_heads} heads: "
                f"make channels_per_head ({channels_per_head}) a divisor of the block's channels"
            )
        self.resample = Resample(resample, resample_filter)
        self.emb_gain = nn.Parameter(torch.zeros(1))
        # The 1 / 0.596 of MP-SiLU is linear, so it goes into the gain of the convolution that follows.
        self.conv_res0 = MPConv(out_channels if encoder else in_channels, out_channels, (3, 3), gain=1 / SILU_RMS)
        self.emb_linear = MPConv(emb_channels, out_channels)
        self.conv_res1 = MPConv(out_channels, out_channels, (3, 3), gain=1 / SILU_RMS)
        self.clips = True  # else what comes next does it
        self.conv_skip = MPConv(in_channels, out_channels, (1, 1)) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, 3 * out_channels, (1, 1)) if self.num_heads else None
        self.attn_proj = MPConv(out_channels, out_channels, (1, 1)) if self.num_heads else None

    def forward(self, x: Tensor, emb: Tensor, dropout_mask=None, collect: bool = False) -> tuple[Tensor, dict]:
        """Return the block's output [N, out, H, W] and, when `collect`, the magnitudes of its layers' outputs."""
        seen: dict[str, Tensor] = {}

        def see(name: str, h: Tensor) -> Tensor:
            if collect:
                seen[name] = magnitude(h)
            return h

        x = self.resample(x)
        if self.conv_skip is not None and self.encoder:
            x = see("conv_skip", self.conv_skip(x))
        if self.encoder:
            x = normalize(x, dim=1)

        y = see("conv_res0", self.conv_res0(F.silu(x)))
        scale = see("emb_linear", self.emb_linear(emb, gain=self.emb_gain)) + 1
        y = F.silu(modulate(y, scale))
        y = self._drop(y, dropout_mask)
        y = see("conv_res1", self.conv_res1(y))

        if self.conv_skip is not None and not self.encoder:
            x = see("conv_skip", self.conv_skip(x))
        return self._finish(mp_sum(x, y, self.residual_balance), see, seen, collect)

    def _drop(self, y: Tensor, dropout_mask) -> Tensor:
        if not self.training or self.dropout == 0:
            return y
        if dropout_mask is None:
            raise ValueError(
                f"dropout {self.dropout} in training mode needs dropout_mask(layer, shape): masks are functions of "
                "the samples' positions; pass one, or call eval()"
            )
        return y * dropout_mask(self.layer, y.shape).to(y.dtype) * (1 / (1 - self.dropout))

    def _finish(self, x: Tensor, see, seen: dict, collect: bool) -> tuple[Tensor, dict]:
        """Attend where the block has heads, and clip."""
        if self.num_heads:
            y = self._attend(see("attn_qkv", self.attn_qkv(x)), seen if collect else None)
            x = mp_sum(x, see("attn_proj", self.attn_proj(y)), self.attn_balance)
        if self.clip_act:  # 0: off
            if collect:
                seen["clipped"] = (x.detach().abs() > self.clip_act).float().mean()
            x = clip(x, self.clip_act) if self.clips else x
        return x, seen

    def _attend(self, qkv: Tensor, seen: dict | None) -> Tensor:
        """Attend over pixels with unit-RMS q, k and v (cosine attention): |logit| <= sqrt(channels)."""
        height, width = qkv.shape[2:]
        # [N, 3C, H, W] -> three of [N, heads, HW, channels]; contiguous per pixel when memory is channels_last
        parts = qkv.flatten(2).transpose(1, 2).unflatten(2, (3, self.num_heads, -1))
        q, k, v = (h.transpose(1, 2) for h in normalize(parts, dim=4).unbind(2))
        if seen is not None:
            logits = q.detach().float() @ k.detach().float().transpose(2, 3)
            seen["attn_logit_max"] = logits.abs().amax() / math.sqrt(q.shape[-1])
        y = F.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, (height, width))


class UNet(Network):
    """The network F: image and noise level (and class) -> image, all of unit magnitude."""

    def __init__(
        self,
        resolution: int,
        channels: int,
        label_dim: int,
        *,
        model_channels: int = 192,
        channel_mult: tuple[int, ...] = (1, 2, 3, 4),
        channel_mult_noise: int = 0,
        channel_mult_emb: int = 0,
        num_blocks: int = 3,
        attn_resolutions: tuple[int, ...] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        activation_checkpointing: bool = False,
        clip_act: float = 256.0,
        **block,
    ):
        super().__init__()
        widths = [model_channels * mult for mult in channel_mult]
        noise_channels = model_channels * channel_mult_noise if channel_mult_noise else widths[0]
        emb_channels = model_channels * channel_mult_emb if channel_mult_emb else max(widths)
        self.num_levels, self.concat_balance, self.clip_act = len(widths), concat_balance, clip_act
        self.activation_checkpointing = activation_checkpointing
        self.out_gain = nn.Parameter(torch.zeros(1))
        self.make_embedding(noise_channels, emb_channels, label_dim, label_balance)
        num_built = 0

        def build(in_channels: int, out_channels: int, res: int, encoder: bool, attention: bool, resample="keep"):
            nonlocal num_built
            num_built += 1
            flags = {"encoder": encoder, "attention": attention, "resample": resample, "layer": num_built - 1}
            return Block(in_channels, out_channels, emb_channels, clip_act=clip_act, **flags, **block)

        self.enc, skips = nn.ModuleDict(), []
        width = channels + 1  # one channel of ones stands in for every bias
        for level, out in enumerate(widths):
            res = resolution >> level
            attention = res in attn_resolutions
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = MPConv(width, out, (3, 3))
                width = out
            else:
                self.enc[f"{res}x{res}_down"] = build(width, width, res, True, False, "down")
            skips.append(width)
            for index in range(num_blocks):
                self.enc[f"{res}x{res}_block{index}"] = build(width, out, res, True, attention)
                width = out
                skips.append(width)

        self.dec, self.takes_skip = nn.ModuleDict(), []
        for level, out in reversed(list(enumerate(widths))):
            res = resolution >> level
            if level == len(widths) - 1:
                self.dec[f"{res}x{res}_in0"] = build(width, width, res, False, True)
                self.dec[f"{res}x{res}_in1"] = build(width, width, res, False, False)
                self.takes_skip += [False, False]
            else:
                self.dec[f"{res}x{res}_up"] = build(width, width, res, False, False, "up")
                self.takes_skip += [False]
            for index in range(num_blocks + 1):
                attention = res in attn_resolutions
                self.dec[f"{res}x{res}_block{index}"] = build(width + skips.pop(), out, res, False, attention)
                self.takes_skip += [True]
                width = out
        for entry, next_takes_skip in zip(self.dec.values(), self.takes_skip[1:]):
            entry.clips = not next_takes_skip  # the concatenation does it in passing
        self.num_blocks = num_built
        self.out_conv = MPConv(width, channels, (3, 3))

    def wire(self, x: Tensor, see, run) -> Tensor:
        """Return what the last convolution sees of the input with its ones; `run(name, block, h)` runs a block on `h`."""
        skips = []
        for name, entry in self.enc.items():
            x = run(f"enc.{name}", entry, x) if isinstance(entry, Block) else see(f"enc.{name}", entry(x))
            skips.append(x)
        for (name, block), takes_skip in zip(self.dec.items(), self.takes_skip, strict=True):
            if takes_skip:
                x = mp_cat(x, skips.pop(), self.concat_balance, self.clip_act)
            x = run(f"dec.{name}", block, x)
        return x
