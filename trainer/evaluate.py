"""Measure a snapshot, a reconstruction or a run's newest one.

    digits   share of drawn digits that a classifier of real ones reads as asked for (the demo)

Each metric is a function of (Subject, options) -> dict of plain values, in METRICS; heavy imports happen inside it.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from trainer import digit_labels, generate


@dataclass
class Subject:
    """What is measured."""

    path: Path
    drawing: generate.Drawing
    origin: dict


def digits(subject: Subject, options: argparse.Namespace) -> dict:
    """Draw `per_class` of every digit and have them read."""
    drawing = subject.drawing
    if drawing.shape != (1, 8, 8) or drawing.label_dim != 10 or drawing.data.codec != "pixels":
        raise ValueError(f"metric digits: {subject.path.name} draws no 8x8 digits in ten classes; use another --metric")
    read, accuracy = digit_labels.train_reader()
    positions = generate.positions_of(range(10), options.per_class, 10)
    parts = [drawing.decode(x) for _, x in drawing.batches(positions, options.batch)]
    result = digit_labels.agreement(read, torch.cat(parts).numpy(), np.array(positions) % 10)
    return result | {"reader_accuracy": accuracy}


def say_digits(result: dict) -> list[str]:
    worst = min(result["per_digit"], key=result["per_digit"].get)
    return [
        f"digits: {result['share']:.1%} of {result['images']} carry the digit asked for; worst is {worst} with "
        f"{result['per_digit'][worst]:.1%}; the reader knows {result['reader_accuracy']:.1%} of held-out real digits"
    ]


METRICS = {"digits": (digits, say_digits)}


def default_metric(drawing: generate.Drawing) -> str:
    """Return what fits the network."""
    return "digits"


def main(argv=None) -> int:
    """Measure a snapshot or a run's newest one."""
    parser = argparse.ArgumentParser(prog="python -m trainer.evaluate", description=main.__doc__)
    parser.add_argument("snapshot", type=Path, help="snapshot, reconstruction or run directory")
    parser.add_argument("--metric", help=f"one or more of {','.join(METRICS)} (default: what fits the network)")
    parser.add_argument("--per-class", type=int, default=50, help="images per class (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    generate.add_drawing_options(parser)
    options = parser.parse_args(argv)
    try:
        if options.per_class < 1:
            raise ValueError(f"--per-class {options.per_class}: must be at least 1")
        settings, path = generate.settings_of(options), generate.find(options.snapshot, options.sigma_rel)
        subject = Subject(path, *generate.open_drawing(path, options, settings))
        names = (options.metric or default_metric(subject.drawing)).split(",")
        unknown = [n for n in names if n not in METRICS]
        if unknown:
            raise ValueError(f"--metric {unknown[0]}: known are {', '.join(METRICS)}")
        results = {name: METRICS[name][0](subject, options) for name in names}
        if options.json:
            print(json.dumps({"origin": subject.origin, "metrics": results}))
        else:
            print(f"{path.name}, {subject.origin['clock']} images, sigma_rel {subject.origin['sigma_rel']:g}")
            print("\n".join(line for name in names for line in METRICS[name][1](results[name])))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
