"""Copies of tensors in host memory, for those who write them beside the loop.

On a GPU all copies are under way together, into page-locked memory, and the loop waits once. That memory is torch's to keep: what a
writer has let go of serves the next copy, so that only the first of its kind waits for pages to be locked. What must not break: a
copy holds what was there at the call, whatever training does next.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def copy_to_host(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return copies in host memory, cast where the tensors are (None: as they are), so that half the bytes travel.

    From a GPU they take up to twice their bytes: torch rounds each page-locked block up to a power of two, and keeps as much as was
    ever in use at once.
    """
    copies = [_begin(t.detach(), dtype or t.dtype) for t in tensors]
    for device in {t.device for t in tensors if t.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return copies


def _begin(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_cuda:
        return tensor.to("cpu", dtype, copy=True)
    there = tensor.to(dtype)
    return torch.empty(there.shape, dtype=dtype, pin_memory=True).copy_(there, non_blocking=True)
