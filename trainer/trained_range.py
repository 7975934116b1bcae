"""Which noise levels a snapshot's training saw, by the entry `noise` of its header, and what to say when others are asked for.

A header without the entry (older versions, imported networks) says nothing, and nothing is warned of.
"""

import torch
from torch import Tensor

from models.densities import Density
from models.noise import density, logsnr_from_sigma, sigma_from_logsnr
from trainer import curriculum

# EDM2's own grid leaves 9e-7 of its density above and 3e-9 below it, and works: below this share a level counts as never seen
UNTRAINED_SHARE = 1e-9


def densities(header: dict) -> list[Density]:
    """Return the configured densities at the start, in the middle and at the header's clock; [] where it does not say.

    What is learned is mixed into the configured one, so that its range is no smaller.
    """
    noise, clock = header.get("noise"), header.get("clock", 0)
    if not noise:
        return []
    sigma_data = header["model"].get("sigma_data", 0.5)
    moves = bool((noise.get("curriculum") or {}).get("to"))
    return [density(curriculum.at(noise, at), sigma_data) for at in ((0, clock // 2, clock) if moves else (0,))]


def trained_range(header: dict, share: float) -> tuple[float, float]:
    """Return (sigma_min, sigma_max) beyond each of which lies `share` of the training's levels.

    Raise ValueError for a header that does not state its density.
    """
    found = densities(header)
    if not found:
        raise ValueError(
            "--trained-range: the snapshot does not state its noise density; give --sigma-min and --sigma-max"
        )
    mass = torch.tensor(share, dtype=torch.float64)
    ends = torch.stack([max(d.isf(mass) for d in found), min(d.icdf(mass) for d in found)])
    low, high = sigma_from_logsnr(ends, header["model"].get("sigma_data", 0.5)).tolist()
    return low, high


def warning(header: dict, sigmas: Tensor, what: str, only_range: bool = False) -> str | None:
    """Return a line where `sigmas` (0 is left out) go to levels that training never saw, else None."""
    found, sigmas = densities(header), sigmas[sigmas > 0].double()
    if not found:
        return None
    asked = logsnr_from_sigma(sigmas, header["model"].get("sigma_data", 0.5))
    if found[0].levels is not None and not only_range:
        levels = torch.cat([d.levels for d in found])
        strange = int(((asked[:, None] - levels).abs().amin(1) > 1e-3).sum())
        if strange:
            return (
                f"warning: {what} has {strange} of {len(sigmas)} levels that training, on {len(levels)} discrete ones, never saw; "
                f"take the grid of that name (--grid)"
            )
        return None
    # more noise is less logSNR; the ends of a cut range are trained, hence the slack of a hundredth
    above = max(d.cdf(asked.min() + 0.01).item() for d in found)
    below = max(d.sf(asked.max() - 0.01).item() for d in found)
    if min(above, below) >= UNTRAINED_SHARE:
        return None
    low, high = trained_range(header, UNTRAINED_SHARE)
    return (
        f"warning: {what} goes from sigma {sigmas.max():.4g} to {sigmas.min():.4g}; all but {UNTRAINED_SHARE:g} of the levels in "
        f"training lay in [{low:.4g}, {high:.4g}]; take --trained-range, or train with noise.floor=0.05"
    )
