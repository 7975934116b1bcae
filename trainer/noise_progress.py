"""An adaptive density: draws go where the loss still falls.

With the learned uncertainty the objective is the sum over noise levels of ln loss, so what a bin of logSNR still pays is the
fall of the log of its loss. Each update compares the window's loss with a slow average of the windows before; what exceeds the
standard error counts as progress. The rule is ours. What a maintainer must not break: pure functions of plain numbers, so that
the state goes through JSON and continues bitwise.
"""

import math

import torch

from models.learned_densities import Histogram
from trainer.bins import CENTRES, BinMeans

SLOW = 0.25  # how much of a window goes into the slow average
SMOOTH = 0.5  # how much of a window's progress goes into the score


def start() -> dict:
    """Return the state before anything was seen."""
    return {"slow": [None] * len(CENTRES), "score": [0.0] * len(CENTRES)}


def update(state: dict, seen: BinMeans) -> dict:
    """Return the state after a window; a bin with fewer than two samples keeps its own."""
    slow, score = list(state["slow"]), list(state["score"])
    for i, (n, loss, error) in enumerate(zip(seen.count, seen.loss, seen.error, strict=True)):
        if n < 2 or not loss > 0:
            continue
        if slow[i] is None:
            slow[i] = math.log(loss)
            continue
        progress = max(0.0, slow[i] - math.log(loss) - error / loss)
        score[i] += SMOOTH * (progress - score[i])
        slow[i] += SLOW * (math.log(loss) - slow[i])
    return {"slow": slow, "score": score}


def learned(state: dict) -> Histogram | None:
    """Return the density of the progress, or None while there is none."""
    if not sum(state["score"]) > 0:
        return None
    edges = torch.arange(CENTRES[0], CENTRES[-1] + 2, dtype=torch.float64) - 0.5
    return Histogram(edges, torch.tensor(state["score"], dtype=torch.float64))
