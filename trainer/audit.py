"""A record of what was trained on: with `data.audit` a folder, every position and its loss, one file per start and rank.

Each line is flushed before the step that uses it, so that no kill loses the record of a step that a checkpoint holds. The committed
lineage of a run is each start's lines with a clock before the one at which a later start resumed.
"""

import json
from pathlib import Path

from torch import Tensor


class Audit:
    """One per rank and start; does nothing where no folder is named."""

    def __init__(self, folder: str, attempt: int, rank: int, resumed_at: int):
        self._file = None
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._file = open(Path(folder) / f"{attempt:04d}_rank{rank}.jsonl", "a")
            self._write({"resumed_at": resumed_at})

    def record(self, clock: int, positions: Tensor, losses: Tensor) -> None:
        """Note one micro-batch of the step that begins at `clock`: positions [N] and their losses [N]; waits for the device."""
        if self._file is not None:
            self._write({"clock": clock, "positions": positions.tolist(), "losses": losses.detach().tolist()})

    def _write(self, line: dict) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def committed(folder: Path) -> tuple[dict[int, list[float]], int]:
    """Return ({position: [its losses, one per time it was trained on]} of the committed lineage, samples trained in vain)."""
    lives: dict[int, list[dict]] = {}
    for path in sorted(Path(folder).glob("*_rank*.jsonl")):
        lines = path.read_text().split("\n")[
            :-1
        ]  # what follows the last newline was cut off by a kill, before its step
        lives.setdefault(int(path.name.split("_")[0]), []).extend(map(json.loads, lines))
    seen: dict[int, list[float]] = {}
    in_vain, end = 0, float("inf")
    for attempt in sorted(lives, reverse=True):
        for line in lives[attempt]:
            if "positions" not in line:
                continue
            if line["clock"] >= end:
                in_vain += len(line["positions"])
                continue
            for position, loss in zip(line["positions"], line["losses"], strict=True):
                seen.setdefault(position, []).append(loss)
        end = min([end, *(line["resumed_at"] for line in lives[attempt] if "resumed_at" in line)])
    return seen, in_vain
