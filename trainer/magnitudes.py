"""How large weights, updates and activations are, in the buckets of Karras et al. 2024, Figures 3 and 15: {Enc, Dec} x resolution.

Weights are measured on the fp32 masters' fragments, never on the module's parameters, which under ZeRO-3 are not there. One
all-reduce of a few sums per tensor completes them. What must not break: everything here is collective and waits for the device, so
it runs at publications only.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from models.edm2 import magnitude_bucket
from trainer.engine import Engine

Bucket = tuple[str, int]  # ("Enc" | "Dec", resolution)


@dataclass(frozen=True)
class Weight:
    """Sums over all elements of one parameter."""

    normalized: bool
    elements: float
    total: float
    squares: float
    update_squares: float  # of Adam's last update

    @property
    def rms(self) -> float:
        return math.sqrt(self.squares / self.elements)


@torch.no_grad()
def measure_weights(engine: Engine) -> dict[str, Weight]:
    """Return every parameter's sums by name; collective. Adam's last update is computed again from its moments."""
    slot = {name: i for i, name in enumerate(engine.shapes)}
    device = engine.fragments[0].master.device if engine.fragments else engine.device
    sums = torch.zeros(4, len(slot), device=device, dtype=torch.float64)  # counts beyond 2^24 too
    for f in engine.fragments:
        squares, update = f.master.square().sum(), _last_update(f, engine.optimizer.adam)
        row = torch.stack([torch.full_like(squares, f.master.numel()), f.master.sum(), squares, update.square().sum()])
        sums[:, slot[f.name]] += row
    sums = sums.to(engine.device)
    if engine.world > 1:
        dist.all_reduce(sums)  # without ZeRO every rank holds all: each sum is then too large by the same factor
    columns = sums.t().tolist()
    replicas = engine.optimizer.replicas
    return {n: Weight(engine.rows[n] > 0, *(v / replicas for v in c)) for n, c in zip(slot, columns, strict=True)}


def _last_update(fragment, adam: torch.optim.Adam) -> Tensor:
    """Return what Adam took from this fragment in its last step: lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)."""
    group = adam.param_groups[0]  # the only one
    steps, (beta1, beta2) = float(adam.state[fragment.flat]["step"]), group["betas"]
    if not steps:
        return torch.zeros_like(fragment.master)
    denominator = (fragment.state(adam, "exp_avg_sq") / (1 - beta2**steps)).sqrt_().add_(group["eps"])
    return fragment.state(adam, "exp_avg").div(denominator).mul_(group["lr"] / (1 - beta1**steps))


def layer_rms(weights: dict[str, Weight]) -> dict[str, float]:
    """Return the RMS of every learned layer's weight, by layer."""
    return {n.removesuffix(".weight"): w.rms for n, w in weights.items() if w.normalized}


def gains(weights: dict[str, Weight]) -> dict[str, float]:
    """Return the learned gains, by name."""
    return {n: w.total for n, w in weights.items() if not w.normalized and w.elements == 1}


def update_ratios(weights: dict[str, Weight]) -> dict[Bucket, float]:
    """Return |update| / |weights| of each bucket's learned layers."""
    sums = defaultdict(lambda: [0.0, 0.0])
    for name, w in weights.items():
        if w.normalized and (bucket := magnitude_bucket(name)):
            sums[bucket][0] += w.update_squares
            sums[bucket][1] += w.squares
    return {bucket: math.sqrt(update / squares) for bucket, (update, squares) in sums.items()}


def reduce_collected(collected: dict[str, Tensor], world: int) -> dict[str, float]:
    """Return what the network collected, averaged over ranks (logits: their maximum); collective, waits for the device."""
    names = sorted(collected)
    if not names:
        return {}
    values = torch.stack([collected[name].detach().float() for name in names])
    if world > 1:
        largest = values.clone()
        dist.all_reduce(values)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        logits = torch.tensor([name.endswith(".attn_logit_max") for name in names], device=values.device)
        values = torch.where(logits, largest, values / world)
    return dict(zip(names, values.tolist(), strict=True))


def by_bucket(values: dict[str, float], kind: str = "") -> dict[Bucket, list[float]]:
    """Return the values of each bucket: those whose name ends in .`kind` ("clipped", "attn_logit_max"), else the plain layers'."""
    buckets: dict[Bucket, list[float]] = defaultdict(list)
    for name, value in values.items():
        last = name.rpartition(".")[2]
        if (last == kind if kind else last not in ("clipped", "attn_logit_max")) and (bucket := magnitude_bucket(name)):
            buckets[bucket].append(value)
    return buckets
