"""RUN/metrics.jsonl as it is read back: lines of all starts of a run, those that were repeated told apart, and what they cost.

A line that was cut off by a kill is passed over; so is a value that an earlier version did not write. Torch-free, and so is
RUN/evaluations.jsonl's reader, which is here too.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple


def read(run: Path) -> list[dict]:
    """Return the lines of RUN/metrics.jsonl in the order of writing, [] where there is none."""
    found = _objects(Path(run) / "metrics.jsonl")
    return [{"attempt": 1} | one for one in found if isinstance(one.get("evenkeel_images_seen"), int | float)]


def read_evaluations(run: Path) -> list[dict]:
    """Return the lines of RUN/evaluations.jsonl by clock and EMA length; of a snapshot written again, the last."""
    found = {one["snapshot"]: one for one in _objects(Path(run) / "evaluations.jsonl") if "snapshot" in one}
    return sorted(found.values(), key=lambda e: (e["evenkeel_images_seen"], e["sigma_rel"]))


def _objects(path: Path) -> list[dict]:
    found: list[dict] = []
    try:
        with open(path, errors="replace") as lines:
            for line in lines:
                try:
                    one = json.loads(line)
                except ValueError:  # cut off when its writer was killed
                    continue
                if isinstance(one, dict):
                    found.append(one)
    except FileNotFoundError:
        pass
    return found


def lineage(lines: list[dict]) -> list[dict]:
    """Return the lines that lead to where the run is now: of what was repeated after a restart, the last repetition."""
    kept: list[dict] = []
    for line in lines:
        while kept and kept[-1]["evenkeel_images_seen"] >= line["evenkeel_images_seen"]:
            kept.pop()
        kept.append(line)
    return kept


def restarts(lines: list[dict]) -> list[tuple[int, float]]:
    """Return (attempt, clock of its first line) of every start after the first that has logged something."""
    found: dict[int, float] = {}
    for line in lines:
        found.setdefault(line["attempt"], line["evenkeel_images_seen"])
    return list(found.items())[1:]


def labels(key: str) -> dict[str, str]:
    """Return the labels of a series, from "side=Enc,resolution=8"."""
    return dict(part.split("=", 1) for part in key.split(",") if "=" in part)


def number(value) -> float:
    """Return a logged value; nan where it was none, which JSON cannot say."""
    return float(value) if isinstance(value, int | float) else math.nan


def series(lines: list[dict], name: str) -> dict[str, tuple[list[float], list[float]]]:
    """Return {labels: (clocks, values)} of a metric; the key is "" where it has no labels."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for line in lines:
        if name not in line:
            continue
        value, clock = line[name], line["evenkeel_images_seen"]
        for key, one in value.items() if isinstance(value, dict) else [("", value)]:
            clocks, values = found.setdefault(key, ([], []))
            clocks.append(clock)
            values.append(number(one))
    return found


class Cost(NamedTuple):
    """What a run has cost so far, repetitions included; start-up, and what followed a start's last line, is not seen."""

    seconds: float  # of the wall clock, while steps were taken
    rank_seconds: float
    images: float  # trained on
    repeated: float  # of these, images that a restart trained on once more
    flops: float  # of the model, forward and backward


def cost(lines: list[dict]) -> Cost:
    """Add up all starts of a run."""
    seconds = rank_seconds = images = flops = 0.0
    before: dict = {}
    for line in lines:
        clock = line["evenkeel_images_seen"]
        follows = before and before["attempt"] == line["attempt"]
        # a start begins where the newest checkpoint was; its first line says nothing else of it
        begun = (
            before["evenkeel_images_seen"]
            if follows
            else min(clock, number(line.get("evenkeel_checkpoint_clock_images", 0)))
        )
        window, rate = clock - begun, number(line.get("evenkeel_images_per_second"))
        took = (
            line["time"] - before["time"]
            if follows and "time" in line and "time" in before
            else window / rate
            if rate
            else 0.0
        )
        took = took if math.isfinite(took) else 0.0
        seconds, images = seconds + took, images + window
        rank_seconds += took * world(line)
        flops += window * max(0.0, number(line.get("evenkeel_model_flops_per_image", 0)))
        before = line
    reached = lines[-1]["evenkeel_images_seen"] if lines else 0
    return Cost(seconds, rank_seconds, images, max(0.0, images - reached), flops)


def info(line: dict) -> dict[str, str]:
    """Return commit, config and world that a line names, {} where it names none."""
    value = line.get("evenkeel_run_info", {})
    return labels(next(iter(value), "")) if isinstance(value, dict) else {}


def world(line: dict) -> int:
    """Return on how many ranks the line's start ran; 1 where it does not say."""
    text = info(line).get("world", "1")
    return int(text) if text.isdigit() else 1
