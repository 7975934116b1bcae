"""A monotone schedule gamma(t) learned with the network, after Conditional Variational Diffusion Models (arXiv 2312.02246).

Of that paper's four terms two remain: with one curve, falling by construction between fixed ends, L_beta (two heads agree) and
L_prior (the end is noise) are constant. What is left is E_t |eps' - eps|^2, whose dependence on gamma is read from the loss per
bin of logSNR (|eps' - eps|^2 = gamma times the EDM-weighted loss) instead of being differentiated through the network, and the
smoothness (d^2 gamma / dt^2)^2, which has to hold the curve alone: at the weight of its code a third of it collapsed
(docs/LOG.md). The schedule depends neither on the pixel nor on a condition, as it does there. Its ends are the 1e-3 quantiles
of the configured density (the clip of its code, 1e-6 and 0.99999, reaches far beyond what is useful to draw).
What a maintainer must not break: pure functions of plain numbers, as in noise_progress.py.
"""

import torch
from torch import Tensor

from models.densities import Density
from models.learned_densities import MonotoneSchedule
from trainer.bins import CENTRES, BinMeans

SEGMENTS = 32
STEPS, RATE = 100, 0.02  # of Adam on the logits of the segments' falls, begun afresh in each update
END_MASS = 1e-3
KEEP = 0.5  # of the loss of the windows before


def start(base: Density) -> dict:
    """Return the state before anything was seen: gamma falls evenly."""
    mass = torch.tensor(END_MASS, dtype=torch.float64)
    ends = torch.sigmoid(torch.stack([base.isf(mass), base.icdf(mass)]))
    return {"ends": ends.tolist(), "falls": [0.0] * SEGMENTS, "loss": [None] * len(CENTRES)}


def gamma(falls: Tensor, ends: list[float]) -> Tensor:
    """Return gamma [SEGMENTS + 1] at evenly spaced t: the falls are a softmax, so that it is monotone."""
    fallen = torch.cat([falls.new_zeros(1), torch.softmax(falls, 0).cumsum(0)])
    return ends[0] + (ends[1] - ends[0]) * fallen.clamp(max=1)


def objective(curve: Tensor, loss: Tensor, centres: Tensor, smoothness: float) -> Tensor:
    """Return E_t |eps' - eps|^2 + smoothness * mean (gamma'')^2 of a curve, given the weighted loss at `centres` of logSNR."""
    middle = (curve[1:] + curve[:-1]) / 2
    logsnr = torch.logit(middle).clamp(centres[0], centres[-1])
    right = torch.searchsorted(centres, logsnr.detach().contiguous()).clamp(1, len(centres) - 1)
    share = (logsnr - centres[right - 1]) / (centres[right] - centres[right - 1])
    weighted = torch.lerp(loss[right - 1], loss[right], share)
    bend = curve.diff().diff() * (len(curve) - 1) ** 2
    return (middle * weighted).mean() + smoothness * bend.square().mean()


def update(state: dict, seen: BinMeans, smoothness: float) -> dict:
    """Return the state after a window: the loss per bin averaged on, the curve moved down the objective."""
    loss = list(state["loss"])
    for i, (n, mean) in enumerate(zip(seen.count, seen.loss, strict=True)):
        if n:
            loss[i] = mean if loss[i] is None else KEEP * loss[i] + (1 - KEEP) * mean
    known = [i for i, value in enumerate(loss) if value is not None]
    if len(known) < 2:
        return state | {"loss": loss}
    centres = torch.tensor([CENTRES[i] for i in known], dtype=torch.float64)
    values = torch.tensor([loss[i] for i in known], dtype=torch.float64)
    falls = torch.tensor(state["falls"], dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([falls], lr=RATE)
    for _ in range(STEPS):
        adam.zero_grad()
        objective(gamma(falls, state["ends"]), values, centres, smoothness).backward()
        adam.step()
    return state | {"loss": loss, "falls": falls.tolist()}


def learned(state: dict) -> MonotoneSchedule:
    """Return the schedule as a density."""
    return MonotoneSchedule(gamma(torch.tensor(state["falls"], dtype=torch.float64), state["ends"]))
