"""3x3 convolutions on CPUs by Winograd's F(4x4, 3x3) (Lavin & Gray, arXiv 1509.09308): a quarter of the multiplications.

oneDNN's direct convolution runs at the peak of the core, so that only fewer multiplications make it faster. The price is a
rounding error of about 1e-5 of the largest output instead of 1e-6; it is therefore used where a network is compiled for a CPU,
never on a GPU, and eager mode stays exact. What a maintainer must not break: `conv3x3_backward` is the transpose of `conv3x3`.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor

from models import native

_SOURCE = Path(__file__).with_suffix(".cpp")
_LANES = 16  # of the kernel: channels come in multiples of it
# 36 transformed filters are written and read for every 3x3 filter: below this many tiles that costs more than it saves (measured)
_FEWEST_TILES = 16


def use_(module: torch.nn.Module) -> None:
    """Let every layer of `module` that can compute this way; builds the kernel on first use.

    Raise ValueError where there is no C++ compiler, which compilation for a CPU needs anyway.
    """
    _load()
    for layer in module.modules():
        if hasattr(layer, "winograd"):
            layer.winograd = True


def suits(x: Tensor, weight: Tensor) -> bool:
    """Say whether `conv3x3` can take this convolution and is faster: fp32, 3x3, on a CPU, whole 4x4 tiles and enough of them."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or weight.shape[0] % _LANES or weight.shape[1] % _LANES:
        return False
    height, width = x.shape[2:]
    return height % 4 == 0 and width % 4 == 0 and x.shape[0] * height * width // 16 >= _FEWEST_TILES


def conv3x3(x: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Return conv2d(x, scale weight, padding 1), channels_last; `x` is [N, in, H, W], `weight` [out, in, 3, 3], see `suits`."""
    return torch.ops.evenkeel.conv3x3(x, weight, scale)


@functools.cache
def _load() -> None:
    native.load(_SOURCE)

    @torch.library.register_fake("evenkeel::conv3x3")
    def _(x, weight, scale):
        shape = (x.shape[0], weight.shape[0], *x.shape[2:])
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    @torch.library.register_fake("evenkeel::conv3x3_backward")
    def _(grad, x, weight, scale):
        return torch.empty_like(x, memory_format=torch.channels_last), torch.empty_like(weight).contiguous()

    def keep(ctx, inputs, output):
        x, weight, ctx.scale = inputs
        ctx.save_for_backward(x, weight)

    def backward(ctx, grad):
        return *torch.ops.evenkeel.conv3x3_backward(grad, *ctx.saved_tensors, ctx.scale), None

    torch.library.register_autograd("evenkeel::conv3x3", backward, setup_context=keep)
