"""Compute the sampling grid that fits a trained denoiser (Align Your Steps, Sabour et al. 2024), from data.

The bound is models/align_steps.py's; the result is a JSON file for `generate --grid FILE`. What must not break: the command says
how the grid compares with EDM's at equal steps, by the bound that it minimises and by how far samples end from those of a fine
grid, also when it does not win.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch

from data_pipeline.command import command_line
from data_pipeline.durable import write_atomically
from data_pipeline.progress import Progress
from models import align_steps, sampler
from trainer import draws, heldout
from trainer.drawing import Drawing
from trainer.drawing_options import add_drawing_options, find_snapshot, open_drawing, settings_of

STREAM = "align"
FINE_STEPS = 128  # of Heun: what the samples of both grids are compared with


def table(drawing: Drawing, data: heldout.Data, levels: torch.Tensor, batch: int) -> torch.Tensor:
    """Return mean squared gaps between the denoiser's answers at all levels, over the images of `data`."""
    total, device = torch.zeros(len(levels), len(levels), dtype=torch.float64), drawing.device
    with Progress("aligning", data.num, "images") as progress:
        for positions, x0, labels in data.batches(batch):
            where, x0, labels = positions.to(device), x0.to(device), labels.to(device)

            def normal(k, where=where, shape=tuple(x0.shape[1:])):
                return draws.normal(data.seed, f"{STREAM} {k}", where, shape)

            def denoise(x, sigma, labels=labels):
                return drawing.network(x, sigma, labels)

            total += len(x0) / data.num * align_steps.gaps(denoise, x0, levels, normal).cpu()
            progress.advance(len(x0))
    if not torch.isfinite(total).all():
        raise ValueError("the network's answers are not finite; its weights are broken")
    return total


@command_line("nothing was written")
def main(argv=None) -> int:
    """Compute the sampling grid that fits a trained denoiser, from data."""
    parser = argparse.ArgumentParser(prog="python -m trainer.align", description=main.__doc__)
    parser.add_argument("snapshot", type=Path, help="snapshot, reconstruction or run directory")
    parser.add_argument("--out", type=Path, required=True, help="FILE.json for generate --grid")
    parser.add_argument("--data", type=Path, help="dataset (default: the run's own)")
    parser.add_argument("--data-images", type=int, default=256)
    parser.add_argument("--levels", type=int, default=128, help="of the ladder that the grid is chosen from")
    parser.add_argument("--compare", type=int, default=64, help="images drawn to compare with EDM's grid; 0: none")
    add_drawing_options(parser)
    # it sums squared differences of answers at neighbouring levels: those of 16 bits would be their rounding
    parser.set_defaults(activations="fp32")
    options = parser.parse_args(argv)
    print("\n".join(run(options)))
    return 0


def run(options: argparse.Namespace) -> list[str]:
    """Compute, compare, write; return lines that tell."""
    steps = options.steps or 10
    if options.data_images < 1 or options.compare < 0:
        raise ValueError("--data-images must be at least 1 and --compare at least 0")
    if options.out.suffix != ".json" or options.out.is_dir():
        raise ValueError(f"--out {options.out}: must be a .json file, which generate --grid reads")
    path = find_snapshot(options.snapshot, options.sigma_rel)
    options.steps, options.grid = steps, "edm"
    drawing, _ = open_drawing(path, options, settings_of(options))
    folder = next((p for p in path.resolve().parents if (p / "config.yaml").is_file()), None)
    data = heldout.open_of_run(folder, options.data, vars(drawing.data), options.data_images)
    levels = align_steps.ladder(options.levels, options.sigma_min, options.sigma_max)
    cost = align_steps.costs(table(drawing, data, levels, options.batch), levels)
    chosen = align_steps.align(cost, steps)
    bounds = {"aligned": align_steps.klub(cost, chosen)}
    bounds["edm"] = align_steps.klub(cost, align_steps.nearest(levels, drawing.sigmas))
    made = {"version": 1, "sigmas": [float(levels[k]) for k in reversed(chosen)], "bound": bounds}
    made |= {"snapshot": path.name, "data": data.name, "images": data.num}
    lines = [f"bound with {steps} steps: aligned {bounds['aligned']:.4g}, edm {bounds['edm']:.4g}"]
    if options.compare:
        positions = torch.arange(options.compare)
        reference = dataclasses.replace(drawing.settings, solver="heun", churn=0.0)
        fine = sampler.edm_grid(FINE_STEPS, options.sigma_min, options.sigma_max)
        fine = drawing.with_grid(fine, reference).latents(positions)
        far = {
            name: float((drawing.with_grid(sigmas).latents(positions) - fine).square().mean().sqrt())
            for name, sigmas in (("aligned", sampler.from_levels(made["sigmas"], steps)), ("edm", drawing.sigmas))
        }
        made["distance"] = far | {"solver": drawing.settings.solver, "from": f"heun, {FINE_STEPS} steps"}
        verdict = (
            "the aligned grid is nearer"
            if far["aligned"] < far["edm"]
            else "EDM's grid is nearer: the aligned one does NOT win"
        )
        lines.append(
            f"{options.compare} samples by {drawing.settings.solver}, RMS distance from {FINE_STEPS} steps of Heun: aligned "
            f"{far['aligned']:.4g}, edm {far['edm']:.4g}; {verdict}"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, json.dumps(made).encode())
    return [*lines, f"wrote {options.out}: " + " ".join(f"{s:.4g}" for s in made["sigmas"])]


if __name__ == "__main__":
    sys.exit(main())
