"""Integrate z' = f(z) over [0, 1]: explicit Runge-Kutta of fixed steps here, everything else by torchdiffeq.

torchdiffeq's own fixed-step loop compares times that are tensors, so it does not compile as one graph; ours is plain Python
and is tested against it. What a maintainer must not break: a fixed-step solver evaluates f the same number of times on every
rank; an adaptive one does not, and what it does depends on the whole batch.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# method: (stages as weights of the slopes before, weights of the step); torchdiffeq's rk4 is Kutta's 3/8 rule
TABLEAUS = {
    "euler": ((), (1.0,)),
    "midpoint": (((1 / 2,),), (0.0, 1.0)),
    "rk4": (((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}
ADAPTIVE = ("dopri5", "bosh3", "adaptive_heun")


def stages(method: str) -> int:
    """Return how often one step of a fixed-step method evaluates f."""
    return len(TABLEAUS[method][1])


def fixed(field: Callable[[Tensor], Tensor], z: Tensor, method: str, steps: int) -> Tensor:
    """Return z(1) after `steps` equal steps of the method, z(0) = `z`."""
    inner, weights = TABLEAUS[method]
    for _ in range(steps):
        slopes = [field(z)]
        for row in inner:
            slopes.append(field(_moved(z, slopes, row, 1 / steps)))
        z = _moved(z, slopes, weights, 1 / steps)
    return z


def _moved(z: Tensor, slopes: list[Tensor], weights: Sequence[float], step: float) -> Tensor:
    for slope, weight in zip(slopes, weights, strict=True):
        if weight:
            z = torch.add(z, slope, alpha=step * weight)
    return z


def by_torchdiffeq(
    field: Callable[[Tensor], Tensor],
    z: Tensor,
    method: str,
    steps: int = 1,
    *,
    adjoint: bool = False,
    rtol: float = 1e-3,
    atol: float = 1e-3,
    parameters: Sequence[Tensor] = (),
) -> tuple[Tensor, int]:
    """Return z(1) and how often f was evaluated for it; `steps` for fixed-step methods, tolerances for adaptive ones.

    With `adjoint` the gradient is that of the adjoint equation: memory does not grow with the steps, and `parameters` must
    name every tensor that f depends on and that wants a gradient. The state is integrated in fp32 at least.
    """
    import torchdiffeq  # only here: networks of fixed steps need no solver library

    count, wide = 0, torch.promote_types(z.dtype, torch.float32)

    def counted(t: Tensor, state: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return field(state.to(z.dtype)).to(wide)

    options = {} if method in ADAPTIVE else {"options": {"step_size": 1 / steps}}
    times = torch.tensor([0.0, 1.0], device=z.device)
    common = {"method": method, "rtol": rtol, "atol": atol, **options}
    if adjoint:
        path = torchdiffeq.odeint_adjoint(counted, z.to(wide), times, adjoint_params=tuple(parameters), **common)
    else:
        path = torchdiffeq.odeint(counted, z.to(wide), times, **common)
    return path[-1].to(z.dtype), count
