"""Follow a run and look at every snapshot: held-out loss per logSNR bin and a grid of samples, off the training path.

RUN/evaluations.jsonl gets a line per snapshot and RUN/samples/ a picture, while the run trains or afterwards. The newest snapshot
goes first, so that a slow follower stays current. What must not break: a line is only written when its snapshot has been looked
at whole, so that a follower that was killed goes on where it was; readers pass over a last line that was cut off.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch

from data_pipeline import durable
from trainer import generate, heldout, state
from trainer.drawing import Drawing, positions_of
from trainer.drawing_options import open_drawing, settings_of
from trainer.run_log import read_evaluations as read
from trainer.snapshots import Snapshot, abandoned, list_snapshots

FILE = "evaluations.jsonl"
POLL_SECONDS = 2.0
ROWS, COLUMNS = 10, 8  # of a grid: classes, spread evenly over all of them, and images of each
DATA_IMAGES = 2000  # enough for a standard error of about 1 % of the loss per bin


def pending(run: Path) -> list[Snapshot]:
    """Return the snapshots that have not been looked at, newest clock first."""
    seen = {(e["snapshot"], e["life"]) for e in read(run)}
    series = list_snapshots(run)
    lost = {s.path for s in abandoned(series)}
    left = [s for s in series if s.path not in lost and s.clock > 0]
    left = [s for s in left if (s.path.name, s.header.get("life", 0)) not in seen]
    return sorted(left, key=lambda s: (-s.clock, s.sigma_rel))


def follow(run: Path, options: argparse.Namespace) -> int:
    """Evaluate what is there and what comes; return how many when the run has finished, or gave no sign for --patience seconds.

    Raises ValueError for a folder that is no run, and where another process follows it.
    """
    if not (run / "config.yaml").is_file() and not (run / "snapshots").is_dir():
        raise ValueError(f"{run}: no run directory; --follow needs one, with its config.yaml or snapshots/")
    count, opened = 0, {}
    with open(run / FILE, "a+b") as log:
        try:
            durable.lock(log)
        except BlockingIOError:
            raise ValueError(f"{run}: another process follows this run; let it, or stop it first") from None
        if log.tell() and not _ends_a_line(log):
            log.write(b"\n")
        while True:
            finished = (
                state.read(run).get("status") == "finished"
            )  # read before looking: the last snapshot came earlier
            left = pending(run)
            if left:
                made = evaluate(run, left[0], options, opened)
                log.write(json.dumps(made).encode() + b"\n")
                log.flush()
                os.fsync(log.fileno())
                count += 1
                print(say(made) + f" ({len(left) - 1} to do)", flush=True)
            elif finished or _silence_seconds(run) > options.patience:
                return count
            else:
                time.sleep(POLL_SECONDS)


def evaluate(run: Path, snapshot: Snapshot, options: argparse.Namespace, opened: dict) -> dict:
    """Return one snapshot's line; `opened` keeps the data between calls."""
    settings = settings_of(options)
    drawing, origin = open_drawing(snapshot.path, options, settings)
    key = json.dumps(vars(drawing.data), sort_keys=True)
    if key not in opened:
        opened[key] = heldout.open_of_run(run, options.data, vars(drawing.data), options.data_images or DATA_IMAGES)
    data, pictures = opened[key], not options.no_pictures
    if pictures:
        try:
            _ = drawing.codec
        except ValueError as error:  # the loss needs no codec: it goes on without pictures, and says so once
            pictures = False
            if opened.setdefault("codec", error) is error:
                print(f"no pictures: {error}", flush=True)
    result = heldout.summary(heldout.bin_losses(drawing.network, data, options.batch, drawing.device))
    return {
        "time": round(time.time(), 3),
        "evenkeel_images_seen": snapshot.clock,
        "sigma_rel": snapshot.sigma_rel,
        "life": snapshot.header.get("life", 0),
        "snapshot": snapshot.path.name,
        "grid": str(_draw(run, snapshot, drawing, options.batch).relative_to(run)) if pictures else None,
        "data": data.name,
        "activations": origin.get("activations", "fp32"),
        **result,
    }


def _draw(run: Path, snapshot: Snapshot, drawing: Drawing, batch: int) -> Path:
    """Draw a row per class, up to ROWS classes; image i of class c starts from the same noise in every grid."""
    count = min(ROWS, drawing.label_dim) or 1
    classes = [i * drawing.label_dim // count for i in range(count)]
    positions = positions_of(classes, COLUMNS, drawing.label_dim)
    images = torch.cat([pictures for _, pictures in drawing.decoded(positions, batch)])
    path = run / "samples" / f"grid-{snapshot.clock:010d}-{snapshot.sigma_rel:.3f}.png"
    path.parent.mkdir(exist_ok=True)
    durable.write_atomically(
        path, generate.png_bytes(generate.grid_image(images, COLUMNS), {"snapshot": snapshot.path.name})
    )
    return path


def say(made: dict) -> str:
    """Return an evaluation as one line."""
    where = f"{made['evenkeel_images_seen']:>13,} images  sigma_rel {made['sigma_rel']:.3f}"
    return f"{where}  loss {made['mean']:.5f} +- {made['error']:.5f}" + (f"  {made['grid']}" if made["grid"] else "")


def _ends_a_line(file) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _silence_seconds(run: Path) -> float:
    """Return for how long the run has given no sign: neither its state nor its snapshots changed."""
    signs = [run / "state.json", run / "snapshots", run / "config.yaml"]
    return time.time() - max((p.stat().st_mtime for p in signs if p.exists()), default=0.0)
