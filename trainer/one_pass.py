"""The magnitude-preserving step in one pass over memory: a row is read once, and leaves projected, stepped, averaged, renormalised.

On a GPU a Triton kernel (one_pass_triton.py), on a CPU C++ (one_pass.cpp), both from the same table of segments. The twin in plain
torch is MagnitudeAdam itself without this pass. What must not break: rows that a partition boundary cuts get their sums from all
ranks, and are renormalised by MagnitudeAdam after the pass.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models import native

if TYPE_CHECKING:
    from trainer.optimizer import MagnitudeAdam

PLAIN, ROW = -2, -1  # kinds of segments; others are slots of cut rows
CHUNK = (
    2**14
)  # elements of a tensor without rows that are one segment: a whole one would keep one program busy after all others


class OnePass:
    """The pass over the fragments of one MagnitudeAdam."""

    def __init__(self, optimizer: "MagnitudeAdam"):
        self.optimizer = optimizer
        self.on_gpu = optimizer.device.type == "cuda"
        self.segments = segments(optimizer.layout, optimizer.fragments).to(optimizer.device)
        group = optimizer.adam.param_groups[0]
        self.betas, self.eps = group["betas"], group["eps"]
        if self.on_gpu:
            from trainer.one_pass_triton import Kernel

            self.kernel = Kernel(self.segments)
        else:
            native.load(Path(__file__).with_suffix(".cpp"))

    @functools.cached_property
    def state(self) -> tuple[list[Tensor], ...]:
        """Return masters, both moments and all averages: tensors that live as long as the run."""
        o = self.optimizer
        moments = [[f.state(o.adam, key) for f in o.fragments] for key in ("exp_avg", "exp_avg_sq")]
        averages = [t for average in (o.ema.averages if o.ema is not None else []) for t in average]
        return [f.master for f in o.fragments], *moments, averages

    def norms(self, grads: list[Tensor]) -> Tensor:
        """Return the norm of each tensor, finite where all its entries are, [number]."""
        return torch.stack(torch._foreach_norm(grads)) if self.on_gpu else torch.ops.evenkeel.norms(grads)

    def __call__(
        self, grads: list[Tensor], cut: Tensor, learning_rate: float, gradient_scale: float, weights: list[float]
    ) -> None:
        """Step; `cut` [2, slots] holds <w, w> and <w, g> of cut rows, `weights` how far each average moves."""
        o = self.optimizer
        masters, first, second, averages = self.state
        step = next(iter(o.adam.state.values()))["step"]  # all tensors have taken the same steps
        corrections = torch.stack([1 - torch.pow(beta, step.double()) for beta in self.betas])
        numbers = (gradient_scale, learning_rate, *self.betas, self.eps)
        tensors = (masters, grads, first, second, averages)
        if self.on_gpu:
            self.kernel(*tensors, cut, corrections, o.masked, numbers, weights)
        else:
            torch.ops.evenkeel.one_pass(*tensors, self.segments, cut, corrections, o.masked, *numbers, weights)


def segments(layout, fragments) -> Tensor:
    """Return the work as int64 [number, 5]: fragment, begin, length, kind, length of the row; long ones first."""
    index = {f.name: i for i, f in enumerate(fragments)}
    rows = []
    for whole in layout.whole:
        f, n = index[whole.fragment.name], whole.fragment.row_length
        rows += [(f, begin, n, ROW, n) for begin in range(whole.begin, whole.end, n)]
    rows += [(index[p.fragment.name], p.begin, p.end - p.begin, p.slot, p.fragment.row_length) for p in layout.pieces]
    for f in layout.plain:
        n = f.master.numel()
        rows += [(index[f.name], begin, min(CHUNK, n - begin), PLAIN, 1) for begin in range(0, n, CHUNK)]
    return torch.tensor(sorted(rows, key=lambda row: -row[2]), dtype=torch.int64).view(-1, 5)
