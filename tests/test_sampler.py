"""Solvers: the numbers of the EDM2 reference, and the order of convergence that their names promise."""

import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models import denoiser, import_edm2, magnitude, sampler

GOLDEN = load_file(Path(__file__).parent / "data" / "sampler.safetensors")
TOLERANCE = 5e-5  # of the maximum
SHARED = {"resolution": 16, "channels": 4, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8]}
MAIN = SHARED | {"label_dim": 10, "model_channels": 16, "channels_per_head": 16, "logvar_channels": 32}
GUIDE = SHARED | {"label_dim": 0, "model_channels": 8, "channels_per_head": 8, "logvar_channels": 16}


def by_rule(model, seed):
    """Build a network with the weights that the golden vectors were made with: a function of name and seed."""
    network = denoiser.build(model)
    state = network.state_dict()
    for name, tensor in state.items():
        rng = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
        if name.endswith("freqs"):
            value = 2 * np.pi * rng.standard_normal(tensor.shape)
        elif name.endswith("phases"):
            value = 2 * np.pi * rng.uniform(0, 1, tensor.shape)
        elif name.endswith("gain"):
            value = np.full(1, 0.5 + 0.25 * rng.standard_normal())
        else:
            value = rng.standard_normal(tensor.shape)
            value = value * np.exp(0.3 * rng.standard_normal([len(tensor)] + [1] * (tensor.ndim - 1)))
        state[name] = import_edm2.from_reference(name, torch.from_numpy(value).float())
    network.load_state_dict(state)
    magnitude.use_weights_(network)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def nets():
    main, guide = by_rule(MAIN, 1000), by_rule(GUIDE, 1005)
    labels = GOLDEN["class_labels"]

    def closed(network):
        return lambda x, sigma: network(x, sigma, labels)

    return closed(main), closed(guide)


GRID = sampler.edm_grid(8)
NOISE = GOLDEN["noise"] * GRID[0].float()


def same(got, name):
    wanted = GOLDEN[name]
    assert (got - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


def test_heun_is_the_references(nets):
    seen = []

    def denoise(x, sigma):
        seen.append(float(sigma[0]))
        return nets[0](x, sigma)

    same(sampler.heun(denoise, NOISE, GRID), "heun")
    assert seen == pytest.approx(GOLDEN["heun.t_eval"].tolist(), rel=1e-6)
    same(sampler.heun(lambda x, s: nets[0](x.float(), s), GOLDEN["noise"].double() * GRID[0], GRID), "heun_float64")


def test_churn_is_the_references(nets):
    draws = iter([GOLDEN[f"churn_draw{i}"] for i in range(4)])
    churn = {"churn": 4, "churn_min": 0.05, "churn_max": 20, "churn_noise": 1.003, "normal": lambda step: next(draws)}
    same(sampler.heun(nets[0], NOISE, GRID, **churn), "heun_churn")
    assert next(draws, None) is None


def test_guidance_is_the_references(nets):
    main, guide = nets
    same(sampler.heun(sampler.guidance(main, guide, 1.4), NOISE, GRID), "heun_guided")
    same(sampler.heun(sampler.guidance(main, guide, 0.6), NOISE, GRID), "heun_selfguided_below1")
    by_sigma = sampler.guidance(main, guide, 1.4, (0.19, 1.61))
    same(sampler.heun(by_sigma, NOISE, GRID), "heun_guidance_interval_sigma")


def test_guided_by_step_is_three_stretches_of_the_grid(nets):
    """The published code guides both evaluations of steps 3..5; solvers work on any stretch, so that is three calls."""
    main, guide = nets
    x = sampler.heun(main, NOISE, GRID[:4])
    x = sampler.heun(sampler.guidance(main, guide, 1.4), x, GRID[3:7])
    same(sampler.heun(main, x, GRID[6:]), "heun_guidance_interval_steps")


def test_weight_one_costs_nothing():
    def fail(x, sigma):
        raise AssertionError("evaluated the guide")

    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(sampler.guidance(gaussian, fail, 1.0)(x, torch.ones(2)), gaussian(x, torch.ones(2)))
    outside = sampler.guidance(gaussian, fail, 2.0, (0.2, 0.9))
    assert torch.equal(outside(x, torch.ones(2)), gaussian(x, torch.ones(2)))


SPREAD, MEAN = 0.5, 0.3


def gaussian(x, sigma):
    """Denoise exactly when data are N(MEAN, SPREAD^2)."""
    sigma = sigma.view(-1, 1, 1, 1)
    return MEAN + (x - MEAN) * SPREAD**2 / (SPREAD**2 + sigma**2)


def exact(x, start, end):
    return MEAN + (x - MEAN) * math.sqrt((SPREAD**2 + end**2) / (SPREAD**2 + start**2))


@pytest.mark.parametrize("solver", ["heun", "churned", "euler", "dpm-solver-2m"])
def test_an_interval_is_known_without_asking_the_device(solver):
    """Tensors of the meta device hold no values: whoever reads one raises. The evaluations are those that read the levels."""

    def sample(x):
        seen = []

        def of(name):
            def denoise(x, sigma):
                seen.append((name, float(sigma[0]) if x.device.type == "cpu" else None))
                return x * 0.5

            return denoise

        guided = sampler.guidance(of("main"), of("guide"), 2.0, (0.19, 1.61))
        more = {"churn": 4.0, "normal": lambda step: torch.zeros_like(x)} if solver == "churned" else {}
        sampler.SOLVERS["heun" if more else solver](guided, x, GRID, **more)
        return seen

    start = torch.ones(2, 1, 1, 1)
    told, silent = sample(start), sample(start.to("meta"))
    assert [name for name, _ in told] == [name for name, _ in silent]
    assert {level for name, level in told if name == "guide"} == {s for _, s in told if 0.19 < s <= 1.61}


@pytest.mark.parametrize(("solver", "order"), [("heun", 2), ("euler", 1), ("dpm-solver-2m", 2)])
def test_order_of_convergence(solver, order):
    x = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 10
    errors = []
    for steps in (64, 128, 256):
        levels = sampler.edm_grid(steps, 0.05, 10.0)[:-1]  # the last, short step to 0 is of first order in all
        errors.append(float((sampler.SOLVERS[solver](gaussian, x, levels) - exact(x, 10.0, 0.05)).abs().max()))
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert orders == pytest.approx([order] * 2, abs=0.15)


@pytest.mark.parametrize("solver", sampler.SOLVERS)
def test_every_solver_ends_at_the_data(solver):
    x = torch.randn(5000, 1, 1, 1, generator=torch.Generator().manual_seed(1)) * 80
    drawn = sampler.SOLVERS[solver](gaussian, x, sampler.edm_grid(64))
    assert drawn.mean() == pytest.approx(MEAN, abs=0.03) and drawn.std() == pytest.approx(SPREAD, rel=0.05)


def test_churned_samples_keep_the_distribution():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5000, 1, 1, 1, generator=generator) * 80
    draw = lambda step: torch.randn(x.shape, generator=generator)  # noqa: E731
    drawn = sampler.heun(gaussian, x, sampler.edm_grid(64), churn=20, normal=draw)
    assert drawn.mean() == pytest.approx(MEAN, abs=0.03) and drawn.std() == pytest.approx(SPREAD, rel=0.05)


@pytest.mark.parametrize("name", ["edm", "cosine", "ays-sd15", "ays-svd", "fastddpm-uniform", "fastddpm-nonuniform"])
def test_grids_fall_to_zero(name):
    levels = sampler.grid(name, 10)
    assert len(levels) == 11 and levels[-1] == 0 and (levels.diff() < 0).all()


def test_grids_are_the_published_ones():
    t = sampler.edm_grid(32)  # step indices and levels as the guidance-interval paper pairs them
    assert t[[17, 22, 23]].tolist() == pytest.approx([1.6086, 0.2830, 0.1886], abs=5e-5)
    closed_form = [0.002, 0.0807, 0.1635, 0.2553, 0.3632, 0.4989, 0.6851, 0.9737, 1.5171, 3.0535, 80.0]
    assert sampler.cosine_grid(11)[:-1].flip(0).tolist() == pytest.approx(closed_form, abs=6e-5)
    assert sampler.ays_grid("sd15")[:-1].tolist() == pytest.approx(sampler.ALIGN_YOUR_STEPS["sd15"][:-1])
    finer = sampler.ays_grid("sd15", 20)
    assert finer[::2][:-1].tolist() == pytest.approx(sampler.ALIGN_YOUR_STEPS["sd15"][:-1])
    assert sampler.fast_ddpm_grid("uniform")[0] == pytest.approx(157.4, abs=0.1)  # sqrt((1 - abar) / abar) at t = 999


@pytest.mark.parametrize("bad", ["karras", "ays-x", "fastddpm-", "ays"])
def test_unknown_grids_are_one_line(bad):
    with pytest.raises(ValueError, match="known|published"):
        sampler.grid(bad, 10)
    with pytest.raises(ValueError, match="at least one"):
        sampler.edm_grid(0)
    with pytest.raises(ValueError, match="fp32 or float64"):
        sampler.heun(gaussian, torch.zeros(1, 1, 1, 1, dtype=torch.float16), sampler.edm_grid(2))


def test_a_sample_does_not_depend_on_its_batch(nets):
    alone = sampler.heun(lambda x, s: by_label(nets, x, s, 1), NOISE[1:2], GRID)
    assert (alone - GOLDEN["heun"][1:2]).abs().max() <= TOLERANCE * GOLDEN["heun"].abs().max()


def by_label(nets, x, sigma, row):
    full = NOISE.clone()
    full[row] = x[0]
    return nets[0](full, sigma[:1].expand(len(full)))[row : row + 1]
