"""What the points of a hyper-parameter sweep have come to: a row each, SWEEP/sweep.csv, and the best so far."""

import csv
import io
import json
from pathlib import Path

from cluster import points, standing
from cluster.follow import Tail
from cluster.run_directory import clock, shown, write_atomically
from trainer.config import read_yaml

MEASURED = ("state", "images", "loss", "denoising_loss", "heldout_loss", "images_per_second", "error")


def rows(folder: Path) -> tuple[list[str], list[dict]]:
    """Return the columns and a row per point: its values, and how it stands.

    Losses are those last published; `heldout_loss` is the best over EMA lengths of the newest snapshot that was evaluated.
    """
    recorded = points.recorded(folder)
    keys = list(dict.fromkeys(key for one in recorded.values() for key in one["values"]))
    found = []
    for name, one in recorded.items():
        run = folder / name
        told = dict(zip(standing.COLUMNS, standing.row(run))) if (run / "config.yaml").is_file() else {}
        values = Tail(run / "metrics.jsonl").read()
        found.append(
            {
                **{key: one["values"].get(key, _value(run, key)) for key in keys},
                "point": name,
                "state": told.get("state", "not started"),
                "images": clock(run),
                "loss": values.get("evenkeel_loss"),
                "denoising_loss": values.get("evenkeel_denoising_loss"),
                "heldout_loss": heldout_loss(run),
                "images_per_second": values.get("evenkeel_images_per_second"),
                "error": told.get("last error", ""),
            }
        )
    return keys, found


def _value(run: Path, key: str) -> str:
    """Return a point's value of a key that another --sweep went over."""
    value = read_yaml(run / "config.yaml") if (run / "config.yaml").is_file() else {}
    for part in key.split("."):
        value = value.get(part, "") if isinstance(value, dict) else ""
    return "" if isinstance(value, dict) else str(value)


def heldout_loss(run: Path) -> float | None:
    """Return the lowest loss that `trainer.evaluate RUN --follow` measured at the newest clock, None without one."""
    newest: dict[int, float] = {}
    path = run / "evaluations.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            one = json.loads(line)
            images, mean = int(one["evenkeel_images_seen"]), float(one["mean"])
        except (ValueError, KeyError):
            continue  # cut off when its writer was killed
        newest[images] = min(mean, newest.get(images, mean))
    return newest[max(newest)] if newest else None


def write(folder: Path) -> tuple[list[str], list[dict]]:
    """Write SWEEP/sweep.csv; return its columns and rows."""
    keys, found = rows(folder)
    columns = [*keys, *MEASURED]
    text = io.StringIO()
    table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(found)
    write_atomically(folder / "sweep.csv", text.getvalue())
    return columns, found


def lines(folder: Path) -> list[str]:
    """Write the table and return it as tab-separated lines, for people and for `cut`."""
    columns, found = write(folder)
    return ["\t".join(columns), *("\t".join(cells(row, columns)) for row in found), *best(folder, found)]


def cells(row: dict, columns: list[str]) -> list[str]:
    """Return a row's texts."""
    return [f"{row[c]:.6g}" if isinstance(row[c], float) else "" if row[c] is None else str(row[c]) for c in columns]


def best(folder: Path, found: list[dict]) -> list[str]:
    """Return a line that names the best of the points that have come furthest, by what is held out where that was measured."""
    furthest = [row for row in found if row["images"] == max(r["images"] for r in found)]
    for column in ("heldout_loss", "denoising_loss", "loss"):
        known = [row for row in furthest if row[column] is not None and row[column] == row[column]]
        if known and len(known) == len(furthest):
            row = min(known, key=lambda r: r[column])
            return [
                f"lowest {column} at {row['images']} images: {row[column]:.6g}, {row['point']}; {shown(folder / 'sweep.csv')}"
            ]
    return [f"no losses to compare yet; {shown(folder / 'sweep.csv')}"]
