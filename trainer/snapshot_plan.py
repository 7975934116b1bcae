"""What a series of snapshots costs on disk and what it buys: computed from profiles, before a run and before anything is removed.

Numpy only. What must not break: nothing is called removable whose absence has not been priced by the error that results.
"""

from collections.abc import Sequence

import numpy as np

from trainer.ema_profiles import correlation, gamma_from_sigma_rel, predicted_error, rounding_error, solve_weights

GOOD_ERROR = 0.005  # what EDM2's own plan of 160 snapshots keeps for lengths in [0.015, 0.25]
LENGTHS = tuple(round(0.010 + 0.005 * i, 3) for i in range(55))  # 0.010 .. 0.280, where plans are priced
# what sharding makes cheap: a third length
ALTERNATIVES = ((0.015, 0.05, 0.10), (0.015, 0.05, 0.25))


def clocks_of(duration: int, every: int) -> list[int]:
    """Return the clocks at which a run takes snapshots: every `every` images, and at its end."""
    return [*range(every, duration, every), duration] if every else []


def series(clocks: Sequence[int], tracked: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return (clocks, gammas) of all snapshots of a plan."""
    return np.repeat(np.asarray(clocks, float), len(tracked)), np.tile(
        [gamma_from_sigma_rel(s) for s in tracked], len(clocks)
    )


def carried(clocks: np.ndarray, gammas: np.ndarray, dtype: str) -> tuple[list[float], float, float]:
    """Return ([shortest, longest] length with a predicted error up to GOOD_ERROR, the largest error and rounding between them).

    The range is the contiguous one around the best-carried length; [] where none is.
    """
    targets = [gamma_from_sigma_rel(s) for s in LENGTHS]
    coefficients = solve_weights(clocks, gammas, clocks.max(), targets)
    errors = predicted_error(clocks, gammas, clocks.max(), targets, coefficients)
    low = high = int(errors.argmin())
    if errors[low] > GOOD_ERROR:
        return [], float("nan"), float("nan")
    while low > 0 and errors[low - 1] <= GOOD_ERROR:
        low -= 1
    while high + 1 < len(LENGTHS) and errors[high + 1] <= GOOD_ERROR:
        high += 1
    inside = slice(low, high + 1)
    return (
        [LENGTHS[low], LENGTHS[high]],
        float(errors[inside].max()),
        float(rounding_error(coefficients, dtype)[inside].max()),
    )


def price(duration: int, every: int, tracked: Sequence[float], dtype: str, snapshot_bytes: int) -> list[str]:
    """Return lines that tell what the plan and its alternatives cost and carry."""
    clocks = clocks_of(duration, every)
    if not clocks:
        return ["no snapshots (snapshots.every_images=0): no other EMA length can be made after the run"]
    lines = []
    for lengths in (tuple(tracked), *(a for a in ALTERNATIVES if a != tuple(tracked))):
        span, error, rounding = carried(*series(clocks, lengths), dtype)
        total = len(clocks) * len(lengths) * snapshot_bytes
        cost = f"{len(clocks)} snapshots x {len(lengths)} x {_size(snapshot_bytes)} = {_size(total)}"
        worth = f"no sigma_rel to within {100 * GOOD_ERROR:g} %"
        if span:
            where = f"sigma_rel in [{span[0]:g}, {span[1]:g}]"
            worth = f"error at most {100 * error:.2g} % for {where}, {dtype} rounding {100 * rounding:.2g} %"
        name = ", ".join(f"{s:g}" for s in lengths)
        lines.append(f"{'' if not lines else 'instead, '}tracking {name}: {cost}; {worth}")
    return lines


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    raise AssertionError


def needed(
    clocks: Sequence[int],
    tracked: Sequence[float],
    wanted: Sequence[float],
    max_error: float,
    pinned: Sequence[int] = (),
) -> tuple[list[int], np.ndarray]:
    """Return (indices of snapshots that suffice, errors of `wanted` lengths at the newest clock with only these).

    Greedy: the newest clock and those that are `pinned`, then always what correlates best with the worst-carried profile's
    remainder; then whatever is not needed after all goes again. `tracked` is each snapshot's own length. Raises ValueError where
    all of them do not suffice.
    """
    t, g = np.asarray(clocks, float), np.array([gamma_from_sigma_rel(s) for s in tracked])
    targets, end = np.array([gamma_from_sigma_rel(s) for s in wanted]), t.max()

    def errors(kept):
        return predicted_error(t[kept], g[kept], end, targets)

    everything = errors(list(range(len(t))))
    if everything.max() > max_error:
        worst = int(everything.argmax())
        raise ValueError(
            f"all {len(t)} snapshots carry sigma_rel {wanted[worst]:g} to {100 * everything[worst]:.3g} %, not "
            f"{100 * max_error:g} %; raise --max-error or leave that length out"
        )
    kept = sorted({*np.flatnonzero(t == end).tolist(), *pinned})
    norms = correlation(t, g, t, g) ** 0.5
    while (now := errors(kept)).max() > max_error:
        worst = targets[now.argmax()]
        x = solve_weights(t[kept], g[kept], end, worst)[:, 0]
        rest = correlation(t, g, end, worst) - correlation(t[:, None], g[:, None], t[kept], g[kept]) @ x
        score = np.abs(rest) / norms
        score[kept] = -1
        kept.append(int(score.argmax()))
    for one in sorted(set(kept) - set(pinned), key=lambda i: t[i]):
        fewer = [i for i in kept if i != one]
        if t[one] < end and errors(fewer).max() <= max_error:
            kept = fewer
    return sorted(int(i) for i in kept), errors(sorted(kept))


def needed_until_end(
    clocks: Sequence[int],
    tracked: Sequence[float],
    wanted: Sequence[float],
    max_error: float,
    coming: Sequence[tuple[int, float]],
) -> tuple[list[int], np.ndarray]:
    """Return (indices, the larger of the errors now and at the end) of snapshots that suffice at both clocks.

    `coming` are (clock, length) of snapshots that the run has still to write; they will be there at the end.
    """
    now, errors = needed(clocks, tracked, wanted, max_error)
    if not coming:
        return now, errors
    count = len(clocks)
    later, later_errors = needed(
        [*clocks, *(c for c, _ in coming)],
        [*tracked, *(s for _, s in coming)],
        wanted,
        max_error,
        pinned=[*now, *range(count, count + len(coming))],
    )
    return [i for i in later if i < count], np.maximum(errors, later_errors)
