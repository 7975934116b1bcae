"""Measure snapshots, reconstructions or a run's newest snapshot.

    digits      share of drawn digits that a classifier of real ones reads as asked for (the demo)
    loss        loss per logSNR bin on given data: no sampling, the cheapest
    denoise     PSNR and SSIM of noisy data made clean, over noise levels: no sampling
    chain       ... by K steps of a reverse chain, the best K: the U-Node paper's protocol
    latent      Frechet distance, precision and recall of the whitened latents themselves: nothing to download
    fid         Frechet distance of Inception features; needs --weights fid=FILE
    fd_dinov2   ... of DINOv2 features; needs --weights fd_dinov2=FILE

Each metric is a function of (Subject, options) -> dict of plain values with "value", its one figure, and "better", high or low.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from data_pipeline.command import command_line
from data_pipeline.durable import write_atomically
from data_pipeline.progress import Progress
from models.noise import sigma_from_logsnr
from trainer import (
    digit_labels,
    evaluations,
    features,
    frechet,
    heldout,
    reverse_chain,
    robustness,
    trained_range,
)
from trainer.drawing import Drawing, positions_of
from trainer.drawing_options import add_drawing_options, find_snapshot, open_drawing, settings_of
from trainer.overlap import overlapped

DATA_IMAGES = 50_000  # as many as published Frechet distances draw
KEPT_FEATURES = 5000  # of each side, for precision and recall, which are quadratic in them


@dataclasses.dataclass
class Subject:
    """What is measured."""

    path: Path
    drawing: Drawing
    origin: dict


def digits(subject: Subject, options: argparse.Namespace) -> dict:
    """Draw `per_class` of every digit and have them read."""
    drawing = subject.drawing
    if drawing.shape != (1, 8, 8) or drawing.label_dim != 10 or drawing.data.codec != "pixels":
        raise ValueError(f"metric digits: {subject.path.name} draws no 8x8 digits in ten classes; use another --metric")
    read, accuracy = _reader()
    positions = positions_of(range(10), options.per_class, 10)
    parts = [pictures for _, pictures in drawing.decoded(positions, options.batch)]
    result = digit_labels.agreement(read, torch.cat(parts).numpy(), np.array(positions) % 10)
    return {"value": result["share"], "better": "high", "reader_accuracy": accuracy, **result}


def loss(subject: Subject, options: argparse.Namespace) -> dict:
    """Average the weighted loss over bins of logSNR."""
    data = _data(subject, options)
    ends = sigma_from_logsnr(
        torch.tensor([heldout.BIN_EDGES[0], heldout.BIN_EDGES[-1]]), subject.drawing.network.sigma_data
    )
    if line := trained_range.warning(subject.drawing.header, ends, "the loss per logSNR", only_range=True):
        print(line, file=sys.stderr, flush=True)
    result = heldout.summary(heldout.bin_losses(subject.drawing.network, data, options.batch, subject.drawing.device))
    return {"value": result["mean"], "better": "low", "data": data.name, **result}


def denoise(subject: Subject, options: argparse.Namespace) -> dict:
    """Average the PSNR of one evaluation over noise levels."""
    return _cleaned(robustness, subject, options)


def chain(subject: Subject, options: argparse.Namespace) -> dict:
    """Average the PSNR of each noise level's best number of reverse steps."""
    return _cleaned(reverse_chain, subject, options)


def _cleaned(way: ModuleType, subject: Subject, options: argparse.Namespace) -> dict:
    data, drawing = _data(subject, options), subject.drawing
    result = way.summary(way.measure(drawing.network, data, options.batch, drawing.device))
    return {"value": result["mean"], "better": "high", "data": data.name, **result}


def frechet_distance(kind: str, subject: Subject, options: argparse.Namespace) -> dict:
    """Draw images, stream their features, and compare with the reference's; precision and recall where that has features."""
    drawing = subject.drawing
    if kind == "latent":
        extract = features.latent(drawing.shape)
    else:
        extract = features.from_weights(kind, dict(options.weights).get(kind), drawing.device)
    mean, covariance, identity, real = _reference(kind, extract, subject, options)
    drawn, rows = _stream(extract, drawing, drawing.batches(range(options.images), options.batch))
    if drawn.total.shape != mean.shape:
        raise ValueError(
            f"{options.reference}: {len(mean)} features, {extract.name} has {len(drawn.total)}; give the right file"
        )
    value = frechet.distance(mean, covariance, *drawn.moments())
    result = {"value": value, "better": "low", "images": drawn.num, "features": extract.name, "reference": identity}
    if real is not None:
        few = min(len(rows), len(real))
        precision, recall = frechet.precision_recall(real[:few], rows[:few])
        result |= {"precision": precision, "recall": recall}
    return result | {"comparable": extract.comparable}


def _stream(extract: features.Features, drawing: Drawing, batches) -> tuple[frechet.Statistics, np.ndarray]:
    """Return statistics of all latents in `batches` of (positions, latents), and the features of the first KEPT_FEATURES."""

    def of(_, x: torch.Tensor) -> np.ndarray:
        return extract.of(x, drawing.pictures).double().cpu().numpy()

    statistics, kept, count = None, [], 0
    for rows in overlapped(of, batches):
        statistics = statistics or frechet.Statistics(extract.name, rows.shape[1])
        statistics.add(rows)
        if count < KEPT_FEATURES:
            kept.append(rows[: KEPT_FEATURES - count])
            count += len(kept[-1])
    return statistics, np.concatenate(kept)


def _reference(kind: str, extract: features.Features, subject: Subject, options: argparse.Namespace):
    """Return (mean, covariance, identity, features or None) of --reference, or of the data; those are kept in the cache folder."""
    if options.reference:
        return frechet.load(options.reference, kind)
    drawing, data = subject.drawing, _data(subject, options)
    identity = {"features": extract.name, "data": data.digest, "images": data.num}
    identity |= {"whitening": [drawing.data.mean, drawing.data.std], "kept": KEPT_FEATURES}
    cache = options.cache / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]}.npz"
    if not cache.is_file():
        with Progress("reference", data.num, "images") as progress:
            statistics, rows = _stream(extract, drawing, _counted(data.batches(options.batch), progress))
        frechet.save(cache, *statistics.moments(), identity, rows)
    return frechet.load(cache, kind)


def _counted(batches, progress: Progress):
    for positions, x, _ in batches:
        yield positions, x
        progress.advance(len(x))


_reader = functools.cache(digit_labels.train_reader)


def _data(subject: Subject, options: argparse.Namespace) -> heldout.Data:
    """Open --data, or the run's own training data, for which the run directory must be around the snapshot."""
    run = next((p for p in subject.path.resolve().parents if (p / "config.yaml").is_file()), None)
    return heldout.open_of_run(run, options.data, vars(subject.drawing.data), options.data_images or DATA_IMAGES)


# ---------------------------------------------------------------------------------------------------------------------
# The command.

METRICS = {
    "digits": digits,
    "loss": loss,
    "denoise": denoise,
    "chain": chain,
    **{kind: functools.partial(frechet_distance, kind) for kind in ("latent", "fid", "fd_dinov2")},
}


def say(name: str, result: dict) -> str:
    """Return a metric's result as one line."""
    if name == "digits":
        worst = min(result["per_digit"], key=result["per_digit"].get)
        return (
            f"digits: {result['share']:.1%} of {result['images']} carry the digit asked for; worst is {worst} with "
            f"{result['per_digit'][worst]:.1%}; the reader knows {result['reader_accuracy']:.1%} of held-out real digits"
        )
    if name == "loss":
        bins = "  ".join(f"[{b['logsnr'][0]:g},{b['logsnr'][1]:g}] {b['loss']:.4f}" for b in result["bins"])
        return f"loss: {result['mean']:.5f} +- {result['error']:.5f} over {result['images']} images of {result['data']}; {bins}"
    if name == "denoise":
        levels = "  ".join(
            f"{v['noise']:g}: {v['denoised']:.2f} (noisy {v['noisy']:.2f}, path {v['path']:.2f})"
            for v in result["levels"]
        )
        return f"denoise: {result['mean']:.2f} dB over {result['images']} images of {result['data']}; {levels}"
    if name == "chain":
        levels = "  ".join(
            f"{v['noise']:g}: {v['best']:.2f} (K {v['steps']}, as told {v['told']:.2f})" for v in result["levels"]
        )
        return (
            f"chain: {result['mean']:.2f} dB at the best K over {result['images']} images of {result['data']}; {levels}"
        )
    more = f", precision {result['precision']:.3f}, recall {result['recall']:.3f}" if "precision" in result else ""
    remark = "" if result["comparable"] else "; not comparable with published figures"
    return f"{name}: {result['value']:.4f}{more} ({result['images']} images, {result['features']}{remark})"


def measure(path: Path, names: list[str], options: argparse.Namespace) -> dict:
    """Return {"origin": ..., "metrics": {name: result}} of one snapshot."""
    subject = Subject(path, *open_drawing(path, options, settings_of(options)))
    return {"origin": subject.origin, "metrics": {name: METRICS[name](subject, options) for name in names}}


def _weights(text: str) -> tuple[str, str]:
    kind, _, path = text.partition("=")
    if kind not in features.VARIABLES or not path:
        raise argparse.ArgumentTypeError(f"{text}: must be fid=FILE or fd_dinov2=FILE")
    return kind, path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.evaluate", description=main.__doc__)
    parser.add_argument("snapshots", type=Path, nargs="+", help="snapshots, reconstructions or run directories")
    parser.add_argument("--metric", default="digits", help=f"one or more of {','.join(METRICS)} (default %(default)s)")
    parser.add_argument("--per-class", type=int, default=50, help="digits: images per class (default %(default)s)")
    parser.add_argument("--images", type=int, default=5000, help="distances: images to draw (default %(default)s)")
    parser.add_argument(
        "--data", type=Path, help="loss and distances: dataset to compare with (default: the run's own)"
    )
    parser.add_argument(
        "--data-images", type=int, help=f"at most so many (default {DATA_IMAGES}; --follow: {evaluations.DATA_IMAGES})"
    )
    parser.add_argument(
        "--reference", type=Path, help="distances: statistics as .npz or a dataset-refs pickle, instead of data"
    )
    parser.add_argument(
        "--weights", type=_weights, action="append", default=[], help="fid=FILE or fd_dinov2=FILE, TorchScript"
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evenkeel"
    parser.add_argument("--cache", type=Path, default=cache, help="for statistics of data (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per snapshot")
    parser.add_argument(
        "--results", type=Path, help="folder for one JSON file per snapshot; those that are there are kept"
    )
    parser.add_argument(
        "--follow", action="store_true", help="loss and a grid of each snapshot of a RUN, now and as they come"
    )
    parser.add_argument("--no-pictures", action="store_true", help="--follow: the loss only")
    parser.add_argument(
        "--patience",
        type=float,
        default=3600.0,
        help="--follow: end after so many silent seconds (default %(default)s)",
    )
    add_drawing_options(parser)
    return parser


def _check(options: argparse.Namespace) -> list[str]:
    """Return the metrics asked for; raise ValueError for options that cannot be."""
    names = options.metric.split(",")
    unknown = [n for n in names if n not in METRICS]
    if unknown:
        raise ValueError(f"--metric {unknown[0]}: known are {', '.join(METRICS)}")
    for key in ("per_class", "images", "data_images"):
        if getattr(options, key) is not None and getattr(options, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(options, key)}: must be at least 1")
    if options.follow and len(options.snapshots) != 1:
        raise ValueError(f"--follow: follows one run, {len(options.snapshots)} were named")
    return names


@command_line("the same command goes on from here")
def main(argv=None) -> int:
    """Measure snapshots, or a run's newest one."""
    options = _parser().parse_args(argv)
    names = _check(options)
    if options.follow:
        count = evaluations.follow(options.snapshots[0], options)
        print(f"{count} snapshots evaluated: {options.snapshots[0] / evaluations.FILE}")
        return 0
    for path in [find_snapshot(p, options.sigma_rel) for p in options.snapshots]:
        kept = options.results / f"{path.stem}.json" if options.results else None
        if kept and kept.is_file():
            continue
        made = measure(path, names, options)
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, json.dumps(made).encode())
        if options.json:
            print(json.dumps(made), flush=True)
        else:
            kind = made["origin"].get("activations", "fp32")
            print(
                f"{path.name}, {made['origin']['clock']} images, sigma_rel {made['origin']['sigma_rel']:g}, {kind} activations"
            )
            print("\n".join(say(name, result) for name, result in made["metrics"].items()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
