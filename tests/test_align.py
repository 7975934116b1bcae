"""Align Your Steps: the bound of Gaussian data is the closed form, the path found is the best, its sampler gains."""

import json
import math

import pytest
import torch
from PIL import Image

from data_pipeline import encode, manifest
from models import align_steps, sampler
from tests.test_generate import DATA, write_network
from trainer import align, generate

SPREAD, LOW, HIGH, STEPS = 0.5, 0.02, 20.0, 10
LEVELS = align_steps.ladder(96, LOW, HIGH)


def gaussian(x, sigma):
    return x * SPREAD**2 / (SPREAD**2 + sigma.view(-1, 1) ** 2)


def mixture(x, sigma):
    """Denoise exactly when data are -1 or 1 with spread 0.1."""
    sigma = sigma.view(-1, 1)
    variance = 0.1**2 + sigma**2
    side = torch.tanh(x / variance)  # E[sign]
    return (0.1**2 * x + sigma**2 * side) / variance


def table(denoise, x0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return align_steps.gaps(denoise, x0, LEVELS, lambda k: torch.randn(x0.shape, generator=generator, dtype=x0.dtype))


@pytest.fixture(scope="module")
def cost():
    """Return costs of Gaussian data from the closed form (facts of the paper: a martingale's differences)."""
    rising = SPREAD**4 / (LEVELS**2 + SPREAD**2)
    return align_steps.costs((rising[:, None] - rising).abs(), LEVELS)


def test_the_table_of_gaussian_data_is_the_closed_form():
    x0 = SPREAD * torch.randn(20_000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = table(gaussian, x0)
    rising = SPREAD**4 / (LEVELS**2 + SPREAD**2)
    wanted = (rising[:, None] - rising).abs()
    assert (found - wanted).abs().max() <= 0.05 * wanted.max()
    assert found[40, 50] == pytest.approx(float(wanted[40, 50]), rel=0.05)


def test_costs_are_the_integral():
    def gap(t, top):
        return SPREAD**4 * (1 / (t**2 + SPREAD**2) - 1 / (top**2 + SPREAD**2))

    rising = SPREAD**4 / (LEVELS**2 + SPREAD**2)
    made = align_steps.costs((rising[:, None] - rising).abs(), LEVELS)
    t = torch.linspace(float(LEVELS[20]), float(LEVELS[60]), 200_001, dtype=torch.float64)
    wanted = torch.trapezoid(gap(t, t[-1]) / t**3, t)
    assert made[20, 60] == pytest.approx(float(wanted), rel=0.01)
    assert made[60, 20] == made[20, 20] == math.inf


def test_no_other_grid_has_a_lower_bound(cost):
    best = align_steps.align(cost, STEPS)
    assert len(best) == STEPS + 1 and best[0] == 0 and best[-1] == len(LEVELS) - 1 and best == sorted(set(best))
    bound = align_steps.klub(cost, best)
    for name in ("edm", "cosine"):
        other = align_steps.nearest(LEVELS, sampler.grid(name, STEPS, LOW, HIGH, SPREAD))
        assert bound < align_steps.klub(cost, other)
    for i in range(1, STEPS):
        for step in (-1, 1):
            moved = best[:i] + [best[i] + step] + best[i + 1 :]
            if moved == sorted(set(moved)):
                assert bound <= align_steps.klub(cost, moved)
    bounds = [align_steps.klub(cost, align_steps.align(cost, n)) for n in (1, 5, 10, 20, 95)]
    assert bounds == sorted(bounds, reverse=True)


def divergence(sigmas):
    """Return KL(samples || N(0, SPREAD^2 + LOW^2)) of the stochastic sampler that holds D over each step, exactly."""
    variance = SPREAD**2 + HIGH**2
    for high, low in zip(sigmas, sigmas[1:]):
        share, rest = SPREAD**2 / (SPREAD**2 + high**2), (low / high) ** 2
        variance = (share + rest * (1 - share)) ** 2 * variance + low**2 * (1 - rest)
    ratio = variance / (SPREAD**2 + LOW**2)
    return 0.5 * (ratio - 1 - math.log(ratio))


def test_the_sampler_that_the_bound_is_of_gains_by_it(cost):
    aligned = [float(LEVELS[k]) for k in reversed(align_steps.align(cost, STEPS))]
    edm = sampler.edm_grid(STEPS + 1, LOW, HIGH)[:-1].tolist()  # as many steps between the same ends
    assert divergence(aligned) < 0.95 * divergence(
        edm
    )  # the path's divergence, which is bounded, falls four times as much


def test_a_mixture_gets_its_steps_where_the_modes_part():
    x0 = torch.randn(4000, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x0 = x0.sign() + 0.1 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    made = align_steps.costs(table(mixture, x0), LEVELS)
    best = align_steps.align(made, STEPS)
    edm = align_steps.nearest(LEVELS, sampler.edm_grid(STEPS + 1, LOW, HIGH))
    assert align_steps.klub(made, best) < align_steps.klub(made, edm)


def test_bad_step_counts_are_one_line(cost):
    for bad in (0, 96):
        with pytest.raises(ValueError, match="ask for fewer or more"):
            align_steps.align(cost, bad)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    folder = tmp_path_factory.mktemp("align")
    assert encode.main(["sklearn:digits", str(folder / "data")]) == 0
    m = manifest.load(folder / "data")
    data = DATA | {k: list(getattr(m, k)) for k in ("mean", "std", "shape")} | {"digest": m.digest}
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(f"data: {{path: {folder / 'data'}}}")
    return write_network(folder / "run", data=data)


QUICK = ["--levels", "12", "--data-images", "4", "--compare", "2"]


def test_a_grid_file_is_drawn_with_and_says_how_it_compares(snapshot, tmp_path, capsys):
    out = tmp_path / "grid.json"
    assert align.main([str(snapshot), "--steps", "4", "--out", str(out), *QUICK]) == 0
    said = capsys.readouterr().out
    assert "bound with 4 steps: aligned" in said and ("is nearer" in said)
    made = json.loads(out.read_text())
    assert len(made["sigmas"]) == 5 and made["bound"]["aligned"] <= made["bound"]["edm"] and made["distance"]["edm"] > 0
    picture = tmp_path / "p.png"
    arguments = [str(snapshot), "--classes", "1", "--per-class", "2", "--out", str(picture), "--grid"]
    assert generate.main([*arguments, str(out)]) == 0
    origin = json.loads(Image.open(picture).text["evenkeel"])
    assert origin["steps"] == 4 and origin["levels"] == made["sigmas"]  # the file's own count
    assert generate.main([*arguments, str(out), "--steps", "8"]) == 0
    out.write_text('{"version": 1, "sigmas": [1, 2]}')
    for file, expected in ((out, "must be positive and fall"), (tmp_path / "none.json", "no such file")):
        assert generate.main([*arguments, str(file)]) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1
    for bad in (["--out", str(tmp_path / "x.png")], ["--out", str(out), "--steps", "12"]):
        assert align.main([str(snapshot), *QUICK, *bad]) == 2
        assert capsys.readouterr().err.count("error: ") == 1
