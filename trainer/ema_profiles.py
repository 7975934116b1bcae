"""Power-function averages as profiles over training time (Karras et al. 2024, "EDM2", Section 3 and Appendix C).

At clock T the average of exponent gamma weighs the weights of clock t, 0 < t <= T, by p(t) = (gamma + 1) t^gamma / T^(gamma + 1).
Clocks are images; only ratios matter. Everything here is float64 numpy: cluster/ plans with it on a login node without torch.
What must not break: `solve_weights` divides by the sum (the code of the paper does, its Algorithm 3 does not say so).
"""

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

import numpy as np

SIGMA_REL_LIMIT = 12**-0.5  # width of the flat profile, gamma = 0
# RMS of a rounding error relative to the RMS of what is rounded: half-way-to-even on a mantissa of `bits` stored bits gives
# 2^-bits / sqrt(12), times sqrt(3 / (8 ln 2)) for magnitudes spread evenly over an octave.
ROUNDING = {
    name: 2.0**-bits / 12**0.5 * (3 / (8 * np.log(2))) ** 0.5
    for name, bits in (("fp16", 10), ("bf16", 7), ("fp32", 23))
}


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """Return the exponent whose profile has relative standard deviation `sigma_rel` (Algorithm 2): the positive root of a cubic."""
    if not 0 < sigma_rel < SIGMA_REL_LIMIT:
        raise ValueError(f"sigma_rel={sigma_rel}: must lie between 0 and 0.2886 (12**-0.5); try 0.05 or 0.10")
    s = float(sigma_rel) ** -2.0
    return float(np.roots([1.0, 7.0, 16.0 - s, 12.0 - s]).real.max())


def sigma_rel_from_gamma(gamma: float) -> float:
    """Return the profile's standard deviation as a share of the training time (inverse of Algorithm 2)."""
    gamma = float(gamma)
    return (gamma + 1) ** 0.5 * (gamma + 2) ** -1.0 * (gamma + 3) ** -0.5


def beta(clock_after: float, delta: float, gamma: float) -> float:
    """Return what an update keeps of the average when the clock advances by `delta` images to `clock_after`.

    Exact for any sequence of deltas: the update adds the profile's mass between the two clocks. The first update (clock_after ==
    delta) keeps nothing.
    """
    if not 0 < delta <= clock_after:
        raise ValueError(f"delta={delta}: must be positive and at most the clock after the update, {clock_after}")
    return float((1 - delta / clock_after) ** (gamma + 1))


def correlation(t_a, gamma_a, t_b, gamma_b) -> np.ndarray:
    """Return the inner products of profiles, over clocks (Algorithm 3); arguments broadcast."""
    t_a, gamma_a, t_b, gamma_b = (np.asarray(v, np.float64) for v in (t_a, gamma_a, t_b, gamma_b))
    later_is_b = t_a <= t_b
    t_min, t_max = np.where(later_is_b, t_a, t_b), np.where(later_is_b, t_b, t_a)
    gamma_of_later = np.where(later_is_b, gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * (t_min / t_max) ** gamma_of_later / ((gamma_a + gamma_b + 1) * t_max)


def solve_weights(t_in, gamma_in, t_out, gamma_out) -> np.ndarray:
    """Return coefficients [inputs, outputs] of the nearest combination of profiles, each column normalised to sum 1.

    `t_in`, `gamma_in` are [inputs]; `t_out`, `gamma_out` broadcast to [outputs]. Least squares between profiles (Algorithm 3), with
    rows and columns scaled by the profiles' norms first. Raises ValueError for two equal inputs, or an input later than an output.
    """
    t_in, gamma_in, t_out, gamma_out = _columns(t_in, gamma_in, t_out, gamma_out)
    if len({(t, g) for t, g in zip(t_in, gamma_in)}) != len(t_in):
        raise ValueError("two snapshots have the same clock and the same EMA length; remove one of each pair")
    if t_in.min() <= 0 or t_in.max() > t_out.min():
        raise ValueError(
            f"snapshot clocks {t_in.min():.0f}..{t_in.max():.0f}: must be positive and not exceed the target {t_out.min():.0f}"
        )
    norm = correlation(t_in, gamma_in, t_in, gamma_in) ** 0.5
    gram = correlation(t_in[:, None], gamma_in[:, None], t_in, gamma_in) / (norm[:, None] * norm)
    right = correlation(t_in[:, None], gamma_in[:, None], t_out, gamma_out) / norm[:, None]
    coefficients = np.linalg.solve(gram, right) / norm[:, None]
    return coefficients / coefficients.sum(0)


def predicted_error(t_in, gamma_in, t_out, gamma_out, coefficients=None) -> np.ndarray:
    """Return the relative L2 distance ||p - p'|| / ||p|| between each wanted profile and its reconstruction, [outputs].

    Computed from inner products, so below about 1e-7 it is rounding noise.
    """
    if coefficients is None:
        coefficients = solve_weights(t_in, gamma_in, t_out, gamma_out)
    t_in, gamma_in, t_out, gamma_out = _columns(t_in, gamma_in, t_out, gamma_out)
    gram = correlation(t_in[:, None], gamma_in[:, None], t_in, gamma_in)
    cross = correlation(t_in[:, None], gamma_in[:, None], t_out, gamma_out)
    own = correlation(t_out, gamma_out, t_out, gamma_out)
    squared = np.einsum("io,ij,jo->o", coefficients, gram, coefficients) - 2 * (coefficients * cross).sum(0) + own
    return (squared.clip(0) / own) ** 0.5


def rounding_error(coefficients: np.ndarray, dtype: str) -> np.ndarray:
    """Return the relative error that snapshots rounded to `dtype` leave in each reconstruction, [outputs].

    Roundings of different snapshots are independent, so they add up with the norm of the coefficients (39 at sigma_rel 0.015).
    """
    return np.linalg.norm(coefficients, axis=0) * ROUNDING[dtype]


def parse_range(text: str) -> list[float]:
    """Read `0.13`, `0.05,0.1` or `0.02:0.20:0.01`; a range includes its end. Exact decimals: no 0.19000000000000003."""
    values: list[float] = []
    for part in text.split(","):
        try:
            numbers = [Decimal(p.strip()) for p in part.split(":")]
        except InvalidOperation:
            numbers = []
        if len(numbers) == 1 and numbers[0].is_finite():
            values.append(float(numbers[0]))
            continue
        if len(numbers) != 3 or not all(n.is_finite() for n in numbers) or numbers[2] <= 0 or numbers[1] < numbers[0]:
            raise ValueError(
                f"{text!r}: must be a number, a list 0.05,0.1 or a rising range start:end:step such as 0.02:0.20:0.01"
            )
        start, end, step = numbers
        values += [float(start + i * step) for i in range(int((end - start) / step) + 1)]
    if len(set(values)) != len(values):
        raise ValueError(f"{text!r}: names a value twice; write each once")
    return values


def _columns(t_in, gamma_in, t_out, gamma_out) -> tuple[np.ndarray, ...]:
    inputs: Sequence = np.broadcast_arrays(
        np.atleast_1d(np.asarray(t_in, np.float64)), np.asarray(gamma_in, np.float64)
    )
    outputs: Sequence = np.broadcast_arrays(
        np.atleast_1d(np.asarray(t_out, np.float64)), np.asarray(gamma_out, np.float64)
    )
    return (*inputs, *outputs)
