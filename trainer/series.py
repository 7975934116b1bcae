"""Whether the snapshots of a folder are one series: of one trajectory, under one name or several, and what it lacks.

What must not break: two runs are never averaged into one network.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from trainer import ema_profiles
from trainer.groups import Model
from trainer.snapshots import Snapshot


def coarsest(snapshots: Sequence[Snapshot]) -> str:
    """Return the dtype that rounds most."""
    return max((s.header["dtype"] for s in snapshots), key=ema_profiles.ROUNDING.__getitem__)


def check_one_run(snapshots: Sequence[Snapshot]) -> None:
    first = snapshots[0]
    parents = {s.header.get("parent") for s in snapshots}  # a fork keeps its parent's snapshots: one trajectory
    names = {s.header.get("run") for s in snapshots}
    one = len(names - parents) == 1 or _was_renamed(snapshots)
    for s in snapshots[1:]:
        for key in ("run", "model", "data", "buffers"):
            if key == "run" and one:
                continue
            if _stated(s, key) != _stated(first, key):
                raise ValueError(
                    f"{s.path.name}: its {key} is not that of {first.path.name}; two runs share this folder, separate them"
                )


def _was_renamed(snapshots: Sequence[Snapshot]) -> bool:
    """Say whether each name but the first took over from the one before: later lives alone, begun from a checkpoint."""
    lives: dict[str, list[tuple[int, int]]] = {}
    for s in snapshots:
        lives.setdefault(s.header.get("run"), []).append((s.header.get("life", 0), s.header.get("life_start", 0)))
    series = sorted(lives.values(), key=min)
    return all(max(a)[0] < min(b)[0] and min(start for _, start in b) > 0 for a, b in itertools.pairwise(series))


def _stated(s: Snapshot, key: str):
    """Return a header's entry; a model key that an older version did not write has its default."""
    value = s.header.get(key)
    return {**dataclasses.asdict(Model()), **value} if key == "model" and value else value


def holes(snapshots: Sequence[Snapshot]) -> list[str]:
    """Name what is missing from a series: gaps wider than the usual spacing, and the lives that began inside them."""
    found = []
    lengths = sorted({s.sigma_rel for s in snapshots})
    began = {s.header["life"]: s.header["life_start"] for s in snapshots if s.header.get("life_start")}
    for sigma_rel in lengths:
        clocks = [0] + [s.clock for s in snapshots if s.sigma_rel == sigma_rel]
        gaps = np.diff(clocks)
        usual = np.median(gaps)
        for i in np.flatnonzero(gaps > 1.5 * usual):
            line = f"hole: no snapshot of sigma_rel {sigma_rel:.3f} between {clocks[i]} and {clocks[i + 1]} images"
            lives = [
                f"life {life} began at {start}" for life, start in began.items() if clocks[i] < start < clocks[i + 1]
            ]
            found.append(line + (f" ({', '.join(lives)})" if lives else ""))
    return found
