"""Sampling grids, solvers of the probability-flow ODE and guidance.

Solvers are functions (denoise, x, sigmas, ...) -> x named after their algorithm: `denoise(x, sigma [N]) -> D`, `x` starts as
noise of standard deviation sigmas[0] (its dtype is the dtype of the state), `sigmas` falls and ends in 0. A grid is another object
than the density of noise levels in training (noise.py). What must not break: the state is only touched in its own dtype, and every
solver works on any stretch of a grid, so that a trajectory may be cut in pieces.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]

# ---------------------------------------------------------------------------------------------------------------------
# Grids: float64, falling, with the final 0.


def edm_grid(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Return the rho grid of EDM (Karras et al. 2022, Eq. 5), [num_steps + 1]."""
    _check_steps(num_steps)
    ramp = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return _ended((high + ramp * (low - high)) ** rho)


def cosine_grid(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5) -> Tensor:
    """Return even steps of the cosine clock, logsnr = 2 ln cot(pi t / 2), that is sigma = sigma_data tan(pi t / 2).

    It is also what Align Your Steps finds in closed form for Gaussian data of that standard deviation (Sabour et al. 2024).
    """
    _check_steps(num_steps)
    ramp = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    first, last = math.atan(sigma_max / sigma_data), math.atan(sigma_min / sigma_data)
    return _ended(sigma_data * torch.tan(first + ramp * (last - first)))


# Sabour et al. 2024 (Align Your Steps): the published 10-step schedules, 11 levels each.
ALIGN_YOUR_STEPS = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "deepfloyd": (160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def ays_grid(name: str, num_steps: int = 10) -> Tensor:
    """Return a published Align Your Steps schedule, [num_steps + 1], its lowest level replaced by 0 as its users do.

    Other lengths than 10 interpolate ln sigma linearly.
    """
    if name not in ALIGN_YOUR_STEPS:
        raise ValueError(f"grid ays-{name}: published ones are {', '.join('ays-' + n for n in ALIGN_YOUR_STEPS)}")
    return from_levels(ALIGN_YOUR_STEPS[name], num_steps)


def from_levels(levels: Sequence[float], num_steps: int) -> Tensor:
    """Return the grid of `num_steps` that falls through `levels`, its lowest replaced by 0; ln sigma is interpolated linearly."""
    _check_steps(num_steps)
    logs = torch.tensor(levels, dtype=torch.float64).log()
    if len(levels) < 2 or not torch.isfinite(logs).all() or not (logs.diff() < 0).all():
        raise ValueError(
            "a grid's levels must be positive and fall, two of them at least; compute one with trainer.align"
        )
    where = torch.linspace(0, len(logs) - 1, num_steps + 1, dtype=torch.float64)[:-1]
    low = where.floor().long().clamp(max=len(logs) - 2)
    return _ended(torch.lerp(logs[low], logs[low + 1], where - low).exp())


# Jiang et al. 2024 (Fast-DDPM): which 10 of 1000 timesteps; the non-uniform ones are hard-coded there, and its uniform code has an
# eleventh, 0, that is left out here.
FAST_DDPM = {
    "uniform": (99, 199, 299, 399, 499, 599, 699, 799, 899, 999),
    "nonuniform": (0, 199, 399, 599, 699, 799, 849, 899, 949, 999),
}


def fast_ddpm_grid(name: str) -> Tensor:
    """Return one of Fast-DDPM's 10-step grids, [11], through sigma^2 = (1 - abar) / abar of the linear betas 1e-4..0.02."""
    if name not in FAST_DDPM:
        raise ValueError(f"grid fastddpm-{name}: known are {', '.join('fastddpm-' + n for n in FAST_DDPM)}")
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)  # Ho et al. 2020
    kept = abar[torch.tensor(FAST_DDPM[name][::-1])]
    return _ended(((1 - kept) / kept).sqrt())


def grid(
    name: str, num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5
) -> Tensor:
    """Return the grid of that name; ValueError lists the names. Range and steps apply where the grid leaves them open."""
    family, _, which = name.partition("-")
    if name == "edm":
        return edm_grid(num_steps, sigma_min, sigma_max)
    if name == "cosine":
        return cosine_grid(num_steps, sigma_min, sigma_max, sigma_data)
    if family == "ays":
        return ays_grid(which, num_steps)
    if family == "fastddpm":
        return fast_ddpm_grid(which)
    raise ValueError(
        f"grid {name!r}: known are edm, cosine, ays-sd15, ays-sdxl, ays-deepfloyd, ays-svd, fastddpm-uniform, fastddpm-nonuniform"
    )


def _ended(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"steps={num_steps}: a grid has at least one; try 32")


# ---------------------------------------------------------------------------------------------------------------------
# Solvers.


def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_noise: float = 1.0,
    normal: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Integrate by Heun's method: EDM Algorithm 1, and with churn > 0 the stochastic Algorithm 2 (Karras et al. 2022).

    2 num_steps - 1 evaluations; the step to 0 is Euler's. `churn`, `churn_min`, `churn_max`, `churn_noise` are the paper's S_churn,
    S_tmin, S_tmax, S_noise; `normal(step)` gives the standard normal draws of a step and is asked for churned steps only.
    """
    gamma_limit = min(churn / (len(sigmas) - 1), math.sqrt(2) - 1)
    for step, (now, after) in enumerate(_steps(sigmas, x)):
        if gamma_limit > 0 and churn_min <= now <= churn_max:
            raised = now * (1 + gamma_limit)
            x = x + (raised**2 - now**2).sqrt() * churn_noise * normal(step)
            now = raised
        slope = (x - _at(denoise, x, now)) / now
        guess = x + (after - now) * slope
        if after == 0:
            return guess
        x = x + (after - now) * (0.5 * slope + 0.5 * (guess - _at(denoise, guess, after)) / after)
    return x


def euler(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    """Integrate by Euler's method: deterministic DDIM (Song et al. 2021, Eq. 12 at eta = 0) in EDM's variables."""
    for now, after in _steps(sigmas, x):
        x = x + (after - now) * (x - _at(denoise, x, now)) / now
    return x


def dpm_solver_2m(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    """Integrate by DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2): second order, one evaluation per step.

    First and last step are of first order, as there.
    """
    earlier, h_earlier = None, None
    for now, after in _steps(sigmas, x):
        denoised = _at(denoise, x, now)
        if after == 0:
            return denoised
        h = (now / after).log()  # step of lambda = -ln sigma
        extrapolated = denoised if earlier is None else denoised + (denoised - earlier) * (h / (2 * h_earlier))
        x = (after / now) * x - torch.expm1(-h) * extrapolated
        earlier, h_earlier = denoised, h
    return x


def _steps(sigmas: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the pairs of a step as 0-d CPU tensors in the state's dtype: scalars to every device, no synchronisation."""
    if x.dtype.itemsize < 4:
        raise ValueError(
            f"state in {x.dtype}: the solvers need fp32 or float64; cast x, the network may run in 16 bits"
        )
    levels = sigmas.to("cpu", x.dtype)
    yield from zip(levels[:-1], levels[1:])


def _at(denoise: Denoise, x: Tensor, sigma: Tensor) -> Tensor:
    level = sigma.item()
    if hasattr(denoise, "at_level"):  # what guidance does there is decided here, where the level is known
        denoise = denoise.at_level(level)
    # filled on the device: a copy of the level would wait for all that is under way there
    return denoise(x, x.new_full((len(x),), level)).to(x.dtype)


SOLVERS = {"heun": heun, "euler": euler, "dpm-solver-2m": dpm_solver_2m}


# ---------------------------------------------------------------------------------------------------------------------
# Guidance.


def guidance(
    main: Denoise,
    guide: Denoise,
    weight: float,
    interval: Sequence[float] = (0.0, math.inf),
    both: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Denoise:
    """Return D = D_guide + weight (D_main - D_guide) as a denoiser.

    Classifier-free guidance where `guide` ignores the labels (Ho & Salimans 2022), autoguidance where it is a weaker version of
    `main` (Karras et al. 2024b). Only evaluations with interval[0] < sigma <= interval[1] are guided (Kynkaanniemi et al. 2024);
    the others, and all at weight 1, cost one evaluation. All samples of a batch must share sigma. `both(x, sigma)` returns
    (D_main, D_guide) where one call can compute the two. The solvers, which know each level on the host, ask `at_level(sigma)` of
    the result for what to evaluate; called by itself it reads the level from the device.
    """
    low, high = interval
    if not low < high:
        raise ValueError(
            f"guidance interval ({low}, {high}]: the lower sigma must be below the upper one; try 0.28 2.90"
        )

    def lerped(x: Tensor, sigma: Tensor) -> Tensor:
        denoised, guiding = both(x, sigma) if both else (main(x, sigma), guide(x, sigma))
        return torch.lerp(guiding, denoised, weight)

    def at_level(level: float) -> Denoise:
        return lerped if weight != 1 and low < level <= high else main

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        return at_level(float(sigma[0]))(x, sigma)

    guided.at_level = at_level
    return guided
