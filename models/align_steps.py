"""The sampling grid that fits a denoiser: Align Your Steps (Sabour et al. 2024), solved exactly on a fine ladder of levels.

With x_t = x_0 + t n along one path, KLUB(t_0 .. t_n) = sum_i of the integral from t_(i-1) to t_i of
t^-3 E|D(x_t, t) - D(x_(t_i), t_i)|^2 dt bounds the divergence of the n-step stochastic sampler that holds the denoiser over each
step. All expectations between levels of the ladder are one table, so that any grid costs a sum and the best one is a shortest path;
the paper descends coordinate by coordinate instead.
What must not break: the levels of a path share their noise, x_up = x_t + sqrt(up^2 - t^2) n', or the table is not the bound's.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def ladder(num_levels: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Return rising levels, float64 [num_levels], even in ln sigma."""
    return torch.linspace(math.log(sigma_min), math.log(sigma_max), num_levels, dtype=torch.float64).exp()


@torch.no_grad()
def gaps(denoise: Callable, x0: Tensor, levels: Tensor, normal: Callable[[int], Tensor]) -> Tensor:
    """Return the mean over images and elements of |D_j - D_k|^2 between all levels of paths from `x0`, float64 [levels, levels].

    `denoise(x, sigma [N]) -> D`; `normal(k)` gives the standard normal increment into level k, like `x0`. One evaluation per level.
    """
    x, before, seen = x0, 0.0, []
    for k, level in enumerate(levels.tolist()):
        x = x + math.sqrt(level**2 - before**2) * normal(k)
        seen.append(denoise(x, torch.full((len(x),), level, dtype=x0.dtype, device=x0.device)).flatten())
        before = level
    rows = torch.stack(seen).double()
    rows = rows - rows[-1]  # distances are between neighbours: less to cancel
    squares = rows.square().sum(1)
    return (squares[:, None] + squares - 2 * rows @ rows.T).clamp(min=0) / rows.shape[1]


def costs(gap: Tensor, levels: Tensor) -> Tensor:
    """Return what a step from level k down to level j adds to the bound, [j, k]; infinite where j >= k."""
    per_log = gap.cpu() / levels[:, None] ** 2  # t^-3 dt = t^-2 d ln t
    slices = 0.5 * (per_log[:-1] + per_log[1:]) * levels.log().diff()[:, None]
    count = len(levels)
    below = torch.arange(count - 1)[:, None] < torch.arange(count)
    slices = torch.where(below, slices, 0.0)
    summed = torch.cat([slices.flip(0).cumsum(0).flip(0), torch.zeros(1, count, dtype=slices.dtype)])
    return summed.masked_fill(torch.ones(count, count).tril().bool(), math.inf)


def klub(cost: Tensor, chosen: list[int]) -> float:
    """Return the bound of a grid, given by rising indices of the ladder."""
    return float(sum(cost[j, k] for j, k in zip(chosen, chosen[1:])))


def align(cost: Tensor, num_steps: int) -> list[int]:
    """Return the rising indices, [num_steps + 1], of the grid with the lowest bound between the two ends of the ladder."""
    count = len(cost)
    if not 1 <= num_steps < count:
        raise ValueError(
            f"steps={num_steps}: a ladder of {count} levels has 1 to {count - 1} steps; ask for fewer or more levels"
        )
    best, came_from = cost[0], []
    for _ in range(num_steps - 1):
        best, previous = (best[:, None] + cost).min(0)
        came_from.append(previous)
    path = [count - 1]
    for previous in reversed(came_from):
        path.append(int(previous[path[-1]]))
    return [0, *reversed(path)]


def nearest(levels: Tensor, sigmas: Tensor) -> list[int]:
    """Return the rising indices of a grid's levels on the ladder; its final 0 becomes the lowest level, and doubles become one."""
    logs = sigmas[sigmas > 0].double().log()
    found = (levels.log()[:, None] - logs).abs().argmin(0).tolist()
    return sorted({0, *found, len(levels) - 1})
