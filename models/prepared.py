"""Weights kept between optimizer steps as convolutions of 16-bit activations want them: scaled, cast, in the image's layout.

Otherwise every forward scales and casts every fp32 weight again: with each micro-batch of a step, with each evaluation of an ODE,
with each step of a sampler. What a maintainer must not break: whatever changes weights calls `refresh_` before the next forward;
values and gradients are those of `(weight * scale).to(dtype)`, bit for bit.
"""

import torch
from torch import Tensor, nn


class _HandOut(torch.autograd.Function):
    """Give the prepared weight for (weight * scale).to(dtype): no arithmetic forward, that expression's gradient backward."""

    @staticmethod
    def forward(ctx, weight: Tensor, prepared: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return prepared.view_as(prepared)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # contiguous, as the weight is: gradients of another layout would be copied before they are accumulated
        return grad.to(torch.float32, memory_format=torch.contiguous_format) * ctx.scale, None, None


hand_out = _HandOut.apply


@torch.no_grad()
def prepare_(module: nn.Module, dtype: torch.dtype) -> None:
    """Let every convolution of `module` keep its prepared weight in `dtype`, 2 bytes for each; nothing where that is fp32.

    Products of the embedding are left out: they run in fp32. The buffers are in no state_dict.
    """
    if dtype == torch.float32:
        return
    for layer in module.modules():
        if hasattr(layer, "prepared") and layer.weight.ndim > 2:
            kernel = layer.weight.ndim == 4 and any(layer.padding)  # 1x1 is a matrix product
            layout = torch.channels_last if kernel else torch.contiguous_format
            layer.prepared = torch.empty_like(layer.weight, dtype=dtype, memory_format=layout)
    module.register_load_state_dict_post_hook(lambda loaded, _: refresh_(loaded))
    refresh_(module)


@torch.no_grad()
def refresh_(module: nn.Module) -> None:
    """Make every prepared weight that of the present weights, in place; nothing where none is prepared."""
    for layer in module.modules():
        if getattr(layer, "prepared", None) is not None:
            # multiplied in fp32 and rounded once; on a GPU one kernel that reads 4 bytes an element and writes 2
            torch.mul(layer.weight, layer.scale, out=layer.prepared)


def num_bytes(module: nn.Module) -> int:
    """Return what the prepared weights take."""
    found = (getattr(layer, "prepared", None) for layer in module.modules())
    return sum(t.numel() * t.element_size() for t in found if t is not None)
