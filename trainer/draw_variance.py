"""Measure what stratified noise levels are worth against i.i.d. ones: variance of a batch's loss, size of its gradient.

Both kinds of batch have the same samples and the same noise; only the uniform behind sigma differs. With the squared norm of the
gradient, E |g|^2, falls Adam's second moment, which is its average element by element.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from data_pipeline.command import command_line
from data_pipeline.progress import Progress
from models.noise import sigma_from_uniform
from trainer import config, draws
from trainer.drawing_options import find_snapshot
from trainer.examples import Example, Examples
from trainer.loss import denoising_loss
from trainer.snapshots import load_denoiser

KINDS = ("stratified", "iid")


def sigma_of(kind: str, examples: Examples, e: Example, seed: int) -> torch.Tensor:
    """Return fp32 sigma [N]: the run's own, or from independent uniforms through the same density."""
    if kind == "stratified":
        return e.sigma
    levels = examples.noise_levels
    uniform = draws.uniform(seed, "iid sigma", e.positions.cpu()).double()
    return sigma_from_uniform(levels.drawn(), uniform, levels.sigma_data).float().to(e.sigma.device)


def measure(network, examples: Examples, seed: int, batch: int, repeats: int, uncertainty: bool, progress) -> dict:
    """Return by kind the losses of the batches, the squared norms of their gradients, and that of the mean gradient."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    found = {}
    for kind in KINDS:
        losses, squares, mean = [], [], [torch.zeros_like(p) for p in parameters]
        single = []
        for r in range(repeats):
            e = examples.at(np.arange(r * batch, (r + 1) * batch))
            sigma = sigma_of(kind, examples, e, seed)
            per_sample, _ = denoising_loss(
                network, e.latents, e.labels, sigma, e.noise, sigma_data=network.sigma_data, uncertainty=uncertainty
            )
            loss = per_sample.mean() / e.latents[0].numel()
            single.append(np.stack([sigma.cpu().numpy(), per_sample.detach().cpu().numpy()]))
            gradient = torch.autograd.grad(loss, parameters)
            losses.append(loss.item())
            squares.append(sum(float(g.double().square().sum()) for g in gradient))
            for m, g in zip(mean, gradient, strict=True):
                m += g / repeats
            progress.advance(batch)
        of_mean = sum(float(m.double().square().sum()) for m in mean)
        found[kind] = {"losses": losses, "squares": squares, "mean": of_mean, "single": np.concatenate(single, 1)}
    return found


def limit(single: np.ndarray) -> float:
    """Return the share of a single loss's variance that sigma does not explain: what perfect strata leave of it.

    `single` are sigma and loss [2, N]; neighbours in sigma differ by everything but sigma (von Neumann's ratio).
    """
    loss = single[1][np.argsort(single[0])].astype(np.float64)
    return float(np.square(np.diff(loss)).mean() / 2 / loss.var(ddof=1))


def ratios(found: dict) -> dict:
    """Return stratified over i.i.d.: the loss's variance, E |g|^2 and the gradient's variance, with their standard errors.

    The errors are those of a jackknife over ten groups of batches.
    """

    def of(keep: np.ndarray) -> np.ndarray:
        rows = []
        for kind in KINDS:
            losses, squares = (np.array(found[kind][key])[keep] for key in ("losses", "squares"))
            rows.append([losses.var(ddof=1), squares.mean(), squares.mean() - found[kind]["mean"]])
        return np.divide(*rows)

    repeats = len(found["iid"]["losses"])
    groups = np.arange(repeats) % 10
    left_out = np.array([of(groups != g) for g in range(10)])
    errors = np.sqrt(9 / 10 * ((left_out - left_out.mean(0)) ** 2).sum(0))
    names = ("loss_variance", "second_moment", "gradient_variance")
    values = of(np.ones(repeats, bool))
    return {n: {"ratio": float(v), "error": float(e)} for n, v, e in zip(names, values, errors, strict=True)}


@command_line()
def main(argv=None) -> int:
    """Print the ratios stratified / i.i.d. for a run's newest snapshot on its own data."""
    parser = argparse.ArgumentParser(prog="python -m trainer.draw_variance", description=main.__doc__)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=100, help="batches of each kind (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    if options.repeats < 20 or options.batch < 1:
        raise ValueError(f"--repeats {options.repeats}, --batch {options.batch}: must be at least 20 and 1")
    run = config.load(options.run)
    network, header = load_denoiser(find_snapshot(options.run), device=options.device)
    network.requires_grad_(True)
    examples = Examples(run, torch.device(options.device))
    result = {"run": header["run"], "clock": header["clock"], "batch": options.batch, "repeats": options.repeats}
    with Progress("measuring", 4 * options.repeats * options.batch, "images") as progress:
        for name, uncertainty in (("with uncertainty", True), ("without", False)):
            found = measure(network, examples, run.seed, options.batch, options.repeats, uncertainty, progress)
            result[name] = ratios(found) | {"loss_variance_limit": limit(found["iid"]["single"])}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
