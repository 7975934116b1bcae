"""Where tensors that a step reads together lie within pages of memory.

Large allocations all begin at the same place of a page, so that the same elements of weights, moments and averages fall into the
same sets of the first cache, which holds eight lines of each; apart from each other they are stepped faster (docs/benchmarks.md).
"""

import torch
from torch import Tensor

PAGE = 4096  # bytes; caches of x86 and Arm servers choose the set by the place in a page of this size
SLOT = 512
LARGE = 1 << 16  # bytes: below it a page more would be much


def empty_apart(like: Tensor, slot: int) -> Tensor:
    """Return memory for a tensor like `like`, `slot` times 512 bytes into a page; anywhere on GPUs and for what is small."""
    size = like.element_size()
    if like.device.type != "cpu" or like.numel() * size < LARGE:
        return torch.empty_like(like)
    memory = torch.empty(like.numel() + PAGE // size, dtype=like.dtype)
    begin = (slot * SLOT - memory.data_ptr()) % PAGE // size
    return memory[begin : begin + like.numel()].view(like.shape)
