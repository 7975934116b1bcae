"""Magnitude-preserving primitives of EDM2 (Karras et al., arXiv 2312.02696, config G), each headed by its equation.

No learned layer here normalises its weight in the forward pass: the optimizer keeps every marked row at RMS 1 - EPS
(DESIGN, decision 2), and `use_weights_` does it once where a network is loaded for inference. What a maintainer must
not break: which parameters are rows to normalise is marked on the layer (`MPConv.normalized`), never guessed from
the number of dimensions or the name, because a gain treated as a row would become +-1.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import prepared, winograd

EPS = 1e-4  # added to the RMS, not to its square (Algorithm 1 of the paper; facts measured on the reference)
SILU_RMS = 0.596  # RMS of silu(x) for x ~ N(0, 1), rounded as in the paper (Eq. 81)

CHANNEL_MULTIPLE = 8
_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by number of dimensions of the weight


# ---------------------------------------------------------------------------------------------------------------------
# RMS(v) = sqrt(mean(v^2)), accumulated in fp32 whatever the type of v


def rms(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Return the fp32 root mean square of `x` over `dim`, with those dimensions kept at length 1."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    return norm * math.sqrt(norm.numel() / x.numel())


# ---------------------------------------------------------------------------------------------------------------------
# Normalisation (Eq. 47): x / (eps + RMS(x)); over the channels of every pixel it is the pixel norm


def normalize(x: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Scale `x` to unit RMS over `dim` (all but the first by default); zeros stay zeros."""
    dim = tuple(range(1, x.ndim)) if dim is None else dim
    return x / (rms(x, dim) + EPS).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Magnitude-preserving SiLU (Eq. 81): silu(x) / 0.596


def mp_silu(x: Tensor) -> Tensor:
    """Apply SiLU and undo its loss of magnitude."""
    return F.silu(x) / SILU_RMS


# ---------------------------------------------------------------------------------------------------------------------
# Magnitude-preserving sum (Eq. 88): ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)


def mp_sum_weights(t: float) -> tuple[float, float]:
    """Return the factors of a and b in the sum."""
    norm = math.hypot(1 - t, t)
    return (1 - t) / norm, t / norm


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Blend the main path `a` with `b`, `t` being the share of `b`."""
    weight_a, weight_b = mp_sum_weights(t)
    return torch.add(a * weight_a, b, alpha=weight_b)


# ---------------------------------------------------------------------------------------------------------------------
# Clipping (the paper's clip_act): clamp(x, -c, c)


class _Clip(torch.autograd.Function):
    """Clamp, with the gradient's mask made of the output, which later layers keep anyway; torch's keeps the input, or a mask."""

    @staticmethod
    def forward(ctx, x: Tensor, bound: float) -> Tensor:
        y = x.clamp(-bound, bound)
        ctx.save_for_backward(y)
        ctx.bound = bound
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        (y,) = ctx.saved_tensors
        return torch.where(y.abs() < ctx.bound, grad, 0), None


def clip(x: Tensor, bound: float) -> Tensor:
    """Clamp `x` to +-`bound`; what lies on the bound gets no gradient."""
    return _Clip.apply(x, bound)


# ---------------------------------------------------------------------------------------------------------------------
# Magnitude-preserving concatenation (Eq. 103): C [(1 - t)/sqrt(Na) a, t/sqrt(Nb) b], C = sqrt((Na + Nb)/((1 - t)^2 + t^2))


def mp_cat(a: Tensor, b: Tensor, t: float, bound: float = 0.0) -> Tensor:
    """Concatenate `a` and the skip `b` on the channels so that each contributes by its share whatever its width.

    With a `bound`, `a` is clipped to +- it on the way: what then lies on it, or within rounding below, gets no gradient.
    """
    num_a, num_b = a.shape[1], b.shape[1]
    weight_a, weight_b = mp_sum_weights(t)
    scale = math.sqrt(num_a + num_b)
    weight_a, weight_b = scale * weight_a / math.sqrt(num_a), scale * weight_b / math.sqrt(num_b)
    if bound:
        return _ClippedCat.apply(a, b, weight_a, weight_b, bound)
    return torch.cat([a * weight_a, b * weight_b], dim=1)


class _ClippedCat(torch.autograd.Function):
    """Clip and concatenate, with the gradient's mask made of the output, which the convolutions that follow keep anyway.

    A mask of its own would cost a compiled forward another pass over all that `a` was made of (docs/benchmarks.md).
    """

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, weight_a: float, weight_b: float, bound: float) -> Tensor:
        joined = torch.cat([a.clamp(-bound, bound) * weight_a, b * weight_b], dim=1)
        ctx.save_for_backward(joined)
        ctx.num_a, ctx.factors = a.shape[1], (weight_a, weight_b, bound)
        return joined

    @staticmethod
    def backward(ctx, grad: Tensor):
        (joined,), (weight_a, weight_b, bound) = ctx.saved_tensors, ctx.factors
        # bound, weight and product are rounded: what was clipped lies no further below than three halves of a unit
        inside = joined[:, : ctx.num_a].abs() < bound * weight_a * (1 - 1.5 * torch.finfo(joined.dtype).eps)
        grad_a = torch.where(inside, grad[:, : ctx.num_a] * weight_a, 0)
        return grad_a, grad[:, ctx.num_a :] * weight_b, None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# Magnitude-preserving Fourier features (Eq. 75): sqrt(2) cos(f c + phi), f = 2 pi N(0, 1), phi = 2 pi U(0, 1)


class MPFourier(nn.Module):
    """Embed a scalar per sample as `channels` random cosines of unit magnitude; the 2 pi is inside the buffers."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N] to [N, channels] in fp32: frequencies reach 20, and 16 bits would lose the phase."""
        angle = torch.outer(x.float(), self.freqs) + self.phases
        return (torch.cos(angle) * math.sqrt(2)).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Learned layer (Eq. 47): conv(x, w gain / sqrt(fan_in)) with rows of unit magnitude; no bias


class MPConv(nn.Module):
    """Convolve, or multiply where `kernel` is empty, by a weight [out, in, *kernel] whose rows have unit RMS.

    The weight is multiplied by gain / sqrt(fan_in) in fp32 and cast to the type of the input, here or ahead (models/prepared.py).
    Padding keeps the size.
    """

    normalized = ("weight",)  # the parameters whose rows (index 0) the optimizer keeps at RMS 1 - EPS
    winograd = False  # models.winograd.use_ says otherwise where the network is compiled for a CPU

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, ...] = (), gain: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))
        self.register_buffer("prepared", None, persistent=False)
        self.scale = gain * (1 / math.sqrt(in_channels * math.prod(kernel)))  # gain / sqrt(fan_in)
        if any(size % 2 == 0 for size in kernel):
            raise ValueError(f"kernel {list(kernel)}: sizes must be odd, so that padding keeps the image's size")
        self.padding = tuple(size // 2 for size in kernel)

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        """Apply the layer to [N, in, *space] (or [N, in]); `gain` is another factor, learned, of shape [1]."""
        if gain is None and self.prepared is not None and self.prepared.dtype == x.dtype:
            return self._convolve(x, prepared.hand_out(self.weight, self.prepared, self.scale))
        scale = self.scale if gain is None else gain * self.scale
        if self.winograd and gain is None and winograd.suits(x, self.weight):
            return winograd.conv3x3(
                x, self.weight, scale
            )  # the scale goes into the transformed filters: no copy of the weight
        on_gpu = x.device.type == "cuda"
        if x.dtype == self.weight.dtype and (on_gpu or x.numel() < self.weight.numel()):
            # where the weight is the larger operand (low resolutions), scale the input: the weight is then used as it is,
            # which saves a copy of it in the forward, another one kept for the backward, and a pass over its gradient; on GPUs
            # always, where the compiler lets whatever made the input do it
            x = x * scale
            if x.device.type == "cpu":
                # oneDNN transposes a large weight and its gradient for channels_last: up to 3.5 times the time of the layer
                x = x.contiguous()
            return self._convolve(x, self.weight)
        return self._convolve(x, (self.weight * scale).to(x.dtype))

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        if not any(self.padding):  # a matrix product; a view, without a copy, where memory is channels_last
            return F.linear(x.movedim(1, -1), weight.flatten(1)).movedim(-1, 1)
        if x.device.type == "cuda" and weight.ndim == 4:
            return padded_conv2d(x, weight, self.padding)
        return _CONVOLUTIONS[weight.ndim](x, weight, padding=self.padding)


def padded_conv2d(x: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    """Convolve with both channel counts rounded up to eights by zeros, and cut off what that adds to the output.

    Tensor cores want 16-byte pixels (cuDNN's guide: multiples of 8 in 16 bits); the network's ends have 5 and 4 channels.
    """
    outs, ins = weight.shape[:2]
    more_outs, more_ins = -outs % CHANNEL_MULTIPLE, -ins % CHANNEL_MULTIPLE
    if more_outs or more_ins:
        x, weight = F.pad(x, (0, 0, 0, 0, 0, more_ins)), F.pad(weight, (0, 0, 0, 0, 0, more_ins, 0, more_outs))
    return F.conv2d(x, weight, padding=padding)[:, :outs]


# ---------------------------------------------------------------------------------------------------------------------
# Forced weight normalisation (Eq. 66): w <- w / (eps + RMS(w)) per row; repeated, its fixed point is RMS(w) = 1 - eps


def normalized_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that their layers mark as row-normalised, by name (weights of MPConv; never gains)."""
    found = {}
    for prefix, layer in module.named_modules():
        for name in getattr(layer, "normalized", ()):
            found[f"{prefix}.{name}" if prefix else name] = getattr(layer, name)
    return found


@torch.no_grad()
def normalize_rows_(module: nn.Module) -> None:
    """Rescale every marked row to the fixed point RMS = 1 - EPS, in place; at the start and after loading for training.

    One division by (RMS + EPS) would leave rows off by up to 1e-4 where the RMS was far from 1 (measured on the golden
    trajectory: loss 2.35745 instead of 2.35763 in the first step). Zero rows stay zero.
    """
    for weight in normalized_parameters(module).values():
        size = rms(weight, tuple(range(1, weight.ndim)))
        weight.mul_((1 - EPS) / size.clamp_min(torch.finfo(torch.float32).tiny))
    prepared.refresh_(module)


@torch.no_grad()
def use_weights_(module: nn.Module) -> None:
    """Replace every marked row w by w / (RMS + EPS), in place, once, where a network is loaded for inference.

    The rows of averaged weights are shorter than those of trained ones. Twice would not be the same: RMS 1 - EPS
    becomes 1 - EPS again, but a short row would then be scaled by another 1 + EPS.
    """
    for weight in normalized_parameters(module).values():
        weight.copy_(normalize(weight.float()))
    prepared.refresh_(module)
