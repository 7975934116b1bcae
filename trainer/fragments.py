"""This rank's shards, as what they are pieces of: fragments of named tensors, and the rows that partition boundaries cut.

The only way to the fp32 masters for optimizer, averages, snapshots and checkpoints; trainer/zero.py makes them from partitions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from models.magnitude import normalized_parameters


@dataclass
class Fragment:
    """This rank's piece of one parameter's fp32 master; the only way to it for optimizer, averages, snapshots and checkpoints."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int  # first element, in the flattened whole tensor
    master: Tensor  # 1-D fp32 view
    row_length: int  # elements of one output row if the weight is marked normalised, else 0
    flat: Tensor  # the optimizer's parameter that holds it
    offset: int  # where in `flat`

    @property
    def grad(self) -> Tensor:
        """Return the 1-D view of the gradient that belongs to `master`."""
        return self.flat.grad.view(-1).narrow(0, self.offset, self.master.numel())

    def state(self, adam: torch.optim.Adam, key: str) -> Tensor:
        """Return the 1-D view of one of Adam's moments that belongs to `master`."""
        return adam.state[self.flat][key].view(-1)[self.offset : self.offset + self.master.numel()]


def row_length(module: torch.nn.Module) -> dict[str, int]:
    """Map every parameter's name to the length of its rows, 0 where it is not marked normalised."""
    marked = normalized_parameters(module)
    return {name: p.numel() // p.shape[0] if name in marked else 0 for name, p in module.named_parameters()}


def whole_fragments(module: torch.nn.Module) -> list[Fragment]:
    """Return one fragment per parameter, whole: a single process without ZeRO."""
    rows = row_length(module)
    return [
        Fragment(name, tuple(p.shape), 0, p.detach().view(-1), rows[name], p, 0)
        for name, p in module.named_parameters()
    ]


@dataclass
class _Piece:
    """Part of a row that a partition boundary cuts; `slot` is the row's place in the shared vector."""

    fragment: Fragment
    begin: int
    end: int
    slot: int

    def of(self, tensor: Tensor) -> Tensor:
        return tensor[self.begin : self.end]


@dataclass
class _Rows:
    """The complete rows of one fragment as a [rows, row_length] window."""

    fragment: Fragment
    begin: int
    end: int

    def of(self, tensor: Tensor) -> Tensor:
        return tensor[self.begin : self.end].view(-1, self.fragment.row_length)


@dataclass
class RowLayout:
    """Which rows are complete on this rank, and which are shared with a neighbour."""

    whole: list[_Rows] = field(default_factory=list)
    pieces: list[_Piece] = field(default_factory=list)
    plain: list[Fragment] = field(default_factory=list)  # gains: no rows
    cut_lengths: list[int] = field(default_factory=list)  # by slot, the same on every rank

    @classmethod
    def of(cls, fragments: Sequence[Fragment]) -> "RowLayout":
        """Split fragments at row boundaries; collective where a process group exists, since ranks agree on the slots."""
        layout, cuts = cls(), []
        for f in fragments:
            if not f.row_length:
                layout.plain.append(f)
                continue
            end = f.start + f.master.numel()
            first, last = math.ceil(f.start / f.row_length) * f.row_length, end // f.row_length * f.row_length
            if first < last:
                layout.whole.append(_Rows(f, first - f.start, last - f.start))
            spans = [(f.start, first), (last, end)] if first <= last else [(f.start, end)]
            cuts += [(f, a, b) for a, b in spans if a < b]
        layout._agree_on_slots(cuts)
        return layout

    def _agree_on_slots(self, cuts: list[tuple[Fragment, int, int]]) -> None:
        mine = [(f.name, a // f.row_length, f.row_length) for f, a, _ in cuts]
        rows = [mine]
        if dist.is_initialized() and dist.get_world_size() > 1:
            rows = [None] * dist.get_world_size()
            dist.all_gather_object(rows, mine)
        order = {key: slot for slot, key in enumerate(sorted({key for part in rows for key in part}))}
        self.cut_lengths = [length for _, _, length in order]
        self.pieces = [
            _Piece(f, a - f.start, b - f.start, order[key]) for (f, a, b), key in zip(cuts, mine, strict=True)
        ]
