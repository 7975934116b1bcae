"""Compares a step that was done again with what the run left of it: the line it logged, the checkpoint it wrote.

Bit by bit where a repetition must give the same bits (as many ranks, the same ZeRO stage, a CPU or engine.deterministic), else
within `TOLERANCE`. What must not break: a difference is named by tensor or by metric, in the network's order, and none is dropped.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from trainer import checkpoint, run_log
from trainer.engine import Engine

# what a line says of training itself, not of the machine
SINCE_PUBLICATION = (
    "evenkeel_loss",
    "evenkeel_denoising_loss",
    "evenkeel_loss_by_logsnr",
    "evenkeel_uncertainty_by_logsnr",
    "evenkeel_samples_by_logsnr_ratio",
)
# of each rank's first micro-batch: other samples on another number of ranks
OF_A_MICRO_BATCH = ("evenkeel_activation_magnitude", "evenkeel_attention_logit_max", "evenkeel_clipped_ratio")
OF_THE_STEP = (
    "evenkeel_learning_rate",
    "evenkeel_gradient_norm",
    "evenkeel_nonfinite_steps_total",
    "evenkeel_ema_beta",
    "evenkeel_update_ratio",
    "evenkeel_weight_magnitude",
    "evenkeel_layer_weight_rms",
    "evenkeel_gain",
)
# Of a tensor: |difference| / |tensor|, of a value: relative. Another number of ranks adds in another order, and what rounding does
# to later steps is not bounded by any theory: some hundred times what was measured (docs/benchmarks.md).
TOLERANCE = 1e-3
SMALLEST = 0.05  # values below are compared with the tolerance of this one: gains begin at 0


class Difference(NamedTuple):
    """A tensor that is not what it was."""

    kind: str  # master, exp_avg, exp_avg_sq, ema_0.100, buffer
    name: str
    elements: int  # that differ
    total: int
    first: int  # element, in the flattened whole tensor
    there: float  # the checkpoint's value of that element
    here: float  # the replay's
    relative: float  # |difference| / |tensor|


def values(logged: dict, here: dict, names: tuple[str, ...], exact: bool) -> tuple[list[str], int]:
    """Return (what differs between two lines, in words; how many values were compared)."""
    different, count = [], 0
    for name in names:
        if name not in logged:  # an older version's line
            continue
        series, mine = ({"": v} if not isinstance(v, dict) else v for v in (logged[name], here.get(name, {})))
        if name.endswith("_by_logsnr"):  # in lines of earlier versions a bin without a sample shows an older value
            shares = logged.get("evenkeel_samples_by_logsnr_ratio", {})
            series = {key: value for key, value in series.items() if shares.get(key)}
            mine = {key: value for key, value in mine.items() if shares.get(key)}
        for key in series | mine:
            count += 1
            a, b = (run_log.number(v.get(key)) for v in (series, mine))
            if not _alike(a, b, exact):
                different.append(
                    f"{name}{{{key}}}: {a!r} logged, {b!r} here" if key else f"{name}: {a!r} logged, {b!r} here"
                )
    return different, count


def _alike(a: float, b: float, exact: bool) -> bool:
    if exact or not (math.isfinite(a) and math.isfinite(b)):
        return a == b or (math.isnan(a) and math.isnan(b))
    return abs(a - b) <= TOLERANCE * max(abs(a), abs(b), SMALLEST)


@torch.no_grad()
def tensors(path: Path, manifest: dict, engine: Engine, exact: bool) -> tuple[list[Difference], int, float]:
    """Return (tensors that differ from a checkpoint's, how many there are, the largest `relative` of all); collective."""
    stored, mine, squares = checkpoint.Stored(path, manifest), [], {}
    for kind, name, start, tensor in checkpoint.state(engine, engine.owned()):
        there = stored.read(kind, name, start, tensor.numel())
        mine.append(_differing(kind, name, start, tensor.detach().cpu().float(), there))
    if engine.rank == 0:
        for name, buffer in engine.buffers().items():
            mine.append(_differing("buffer", name, 0, buffer.detach().cpu().flatten(), stored.buffer(name).flatten()))
    everyone = [None] * engine.world
    dist.all_gather_object(everyone, mine)
    found: dict[tuple[str, str], Difference] = {}
    for piece, of_difference, of_tensor in (entry for part in everyone for entry in part):
        key = (piece.kind, piece.name)
        sums = squares.setdefault(key, [0.0, 0.0])
        sums[0] += of_difference
        sums[1] += of_tensor
        found[key] = piece if key not in found else _joined(found[key], piece)
    place = {name: i for i, name in enumerate(engine.shapes)}
    different, worst = [], 0.0
    for key, d in found.items():
        off, size = squares[key]
        relative = math.sqrt(off / size) if size else math.inf if off else 0.0
        worst = max(worst, relative) if relative == relative else math.inf
        wrong = d.elements > 0 and (exact or not relative <= TOLERANCE)
        if wrong:
            different.append(d._replace(relative=relative))
    return sorted(different, key=lambda d: (place.get(d.name, -1), d.kind != "master", d.kind)), len(found), worst


def _differing(kind: str, name: str, start: int, here: Tensor, there: Tensor) -> tuple[Difference, float, float]:
    # as integers: NaN equals itself then, and -0 is not 0
    where = (
        (here.view(torch.int32) != there.view(torch.int32)).nonzero().flatten() if here.numel() else here.new_empty(0)
    )
    first = int(where[0]) if where.numel() else 0
    values_ = (float(there[first]), float(here[first])) if where.numel() else (0.0, 0.0)
    squares = (float((here.double() - there.double()).square().sum()), float(there.double().square().sum()))
    return Difference(kind, name, where.numel(), here.numel(), start + first, *values_, 0.0), *squares


def _joined(a: Difference, b: Difference) -> Difference:
    shown = min((d for d in (a, b) if d.elements), key=lambda d: d.first, default=a)
    return shown._replace(elements=a.elements + b.elements, total=a.total + b.total)


def say(d: Difference) -> str:
    """Return a difference in words."""
    return (
        f"{d.name} ({d.kind}): {d.elements} of {d.total} elements differ, the first is element {d.first}: {d.there!r} in the "
        f"checkpoint, {d.here!r} here; |difference| / |tensor| = {d.relative:.2g}"
    )


def digest(engine: Engine) -> str:
    """Return a hash of everything that training has changed, of all ranks; collective. Equal on equal numbers of ranks only."""
    mine = xxhash.xxh3_64()
    for _, _, _, tensor in checkpoint.state(engine, engine.owned()):
        mine.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    everyone = [None] * engine.world
    dist.all_gather_object(everyone, mine.hexdigest())
    return xxhash.xxh3_64_hexdigest("".join(everyone).encode())
