"""Densities that training makes: densities like the others, learned at deterministic clocks, continued bitwise."""

import json
import math
import signal

import pytest
import torch

from models.learned_densities import Histogram, MonotoneSchedule
from models.noise import density
from tests.test_resume import BATCH, assert_same, data, finish, start, wait_for_clock  # noqa: F401  (data is a fixture)
from trainer import noise_progress, noise_schedule
from trainer.bins import CENTRES, BinMeans
from trainer.config import ROOT, load
from trainer.loss import LossParts
from trainer.noise_levels import NoiseLevels


@pytest.mark.parametrize(
    "learned",
    [
        Histogram(torch.tensor([-3.0, -1.0, 0.0, 4.0]), torch.tensor([1.0, 0.0, 3.0])),
        MonotoneSchedule(torch.tensor([0.999, 0.7, 0.65, 0.1, 0.001])),
    ],
    ids=["histogram", "schedule"],
)
def test_learned_densities_are_densities(learned):
    x = torch.linspace(learned.low - 1, learned.high + 1, 400_001, dtype=torch.float64)
    assert abs(torch.trapezoid(learned.pdf(x), x).item() - 1) < 1e-4
    assert (learned.cdf(x) - torch.cumulative_trapezoid(learned.pdf(x), x, dim=0)[-1:] <= 1e-4).all()
    assert torch.allclose(learned.cdf(x) + learned.sf(x), torch.ones_like(x), atol=1e-12)
    u = torch.cat([10.0 ** -torch.arange(1, 12, dtype=torch.float64), torch.linspace(0.01, 0.99, 99).double()])
    assert torch.allclose(learned.cdf(learned.icdf(u)), u, rtol=1e-9, atol=1e-13)
    assert torch.allclose(learned.sf(learned.isf(u)), u, rtol=1e-9, atol=1e-13)


def test_a_schedule_is_gamma_of_t():
    gamma = torch.tensor([0.99, 0.6, 0.3, 0.01], dtype=torch.float64)
    schedule = MonotoneSchedule(gamma)
    t = torch.arange(4, dtype=torch.float64) / 3
    assert torch.allclose(torch.sigmoid(schedule.isf(t)), gamma)
    assert torch.sigmoid(schedule.isf(torch.tensor(0.5))).item() == pytest.approx(0.45)


def window(loss: dict[int, float], error: float = 0.0, count: int = 1000) -> BinMeans:
    """Return a window in which the bins of `loss` were seen."""
    seen = [loss.get(c, math.nan) for c in CENTRES]
    return BinMeans([count * (c in loss) for c in CENTRES], seen, [error] * len(CENTRES), seen)


def test_draws_follow_the_bins_whose_loss_falls():
    state = noise_progress.start()
    for step in range(6):  # the loss falls about logsnr 2 and stays elsewhere
        state = noise_progress.update(state, window({c: 0.8**step if c == 2 else 0.5 for c in range(-4, 5)}))
    learned = noise_progress.learned(state)
    assert learned.cdf(torch.tensor(2.5)).item() - learned.cdf(torch.tensor(1.5)).item() == pytest.approx(1)
    for _ in range(60):  # nothing falls any more: the score fades
        state = noise_progress.update(state, window(dict.fromkeys(range(-4, 5), 0.5)))
    assert max(state["score"]) < 1e-3


def test_noise_is_no_progress_and_what_was_not_seen_keeps_its_state():
    state = noise_progress.start()
    state = noise_progress.update(state, window({0: 0.50}, error=0.05))
    state = noise_progress.update(state, window({0: 0.48}, error=0.05))  # less than its standard error
    assert noise_progress.learned(state) is None
    assert noise_progress.update(state, window({})) == state


def test_the_schedule_goes_down_its_objective_and_stays_monotone_between_its_ends():
    base = density({"density": "cosine"}, 0.5)
    for rising in (1, -1):  # where the loss is low the schedule lingers
        seen = window({c: 1 / (1 + math.exp(rising * c)) for c in CENTRES})
        state = noise_schedule.start(base)
        centres = torch.tensor(CENTRES, dtype=torch.float64)
        values, before = [], state
        for _ in range(4):
            state = noise_schedule.update(state, seen, 2e-3)
            curve = noise_schedule.gamma(torch.tensor(state["falls"], dtype=torch.float64), state["ends"])
            loss = torch.tensor(seen.loss, dtype=torch.float64)
            values.append(noise_schedule.objective(curve, loss, centres, 2e-3).item())
            assert (curve.diff() < 0).all() and curve[[0, -1]].tolist() == pytest.approx(state["ends"])
        even = noise_schedule.gamma(torch.tensor(before["falls"], dtype=torch.float64), before["ends"])
        assert values[-1] < noise_schedule.objective(even, loss, centres, 2e-3)
    stiff = noise_schedule.update(noise_schedule.start(base), seen, 1e3)
    line = noise_schedule.gamma(torch.tensor(stiff["falls"], dtype=torch.float64), stiff["ends"])
    assert line.diff().std() < 0.01 * line.diff().abs().mean()  # a smooth enough one is a line


@pytest.mark.parametrize(("smoothness", "collapses"), [(None, False), (2e-3, True)])
def test_the_configured_smoothness_keeps_the_schedule_from_collapsing_into_one_level(smoothness, collapses):
    """By the loss per level of a real run on digits; at the smoothness of the paper's code a third of it is nearly one level."""
    loss = (0.66, 0.35, 0.38, 0.36, 0.34, 0.33, 0.32, 0.37, 0.44, 0.55, 0.71, 0.85, 0.97, 0.94, 0.99, 0.93)
    config = load(ROOT / "configs/quickstart.yaml", ["noise=learned"])
    weight = smoothness or config.noise.learned.smoothness
    state = noise_schedule.start(density({"P_mean": -0.4, "P_std": 1.0}, 0.5))
    for _ in range(8):
        state = noise_schedule.update(state, window(dict(zip(range(-8, 8), loss, strict=True))), weight)
    logsnr = noise_schedule.learned(state).icdf(torch.tensor([0.05, 0.3], dtype=torch.float64))
    assert (logsnr.diff().item() < 0.2) == collapses and math.isfinite(logsnr.sum())


def parts(sigma, loss) -> LossParts:
    return LossParts(loss, loss, loss.log(), {}, sigma)


@pytest.mark.parametrize("rule", ["adaptive", "learned"])
def test_learning_is_at_its_clocks_only_and_continues_from_a_checkpoint_in_mid_window(rule):
    overrides = [f"noise.{rule}.strength=0.5", f"noise.{rule}.every_images=1024", "global_batch=256"]
    config = load(ROOT / "configs/quickstart.yaml", overrides)
    straight, other = NoiseLevels(config), NoiseLevels(config)
    where, seen = torch.arange(256), []
    for step in range(1, 13):
        sigma = straight.at(where + 256 * (step - 1))
        assert torch.equal(sigma, other.at(where + 256 * (step - 1)))
        loss = (0.9**step / (1 + sigma)).float()
        straight.observe(parts(sigma.float(), loss))
        for half in (slice(128), slice(128, 256)):
            other.observe(parts(sigma[half].float(), loss[half]))
        before = straight.drawn()
        straight.step(256 * step)
        other.step(256 * step)
        if step % 4:
            u = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
            assert torch.equal(straight.drawn().icdf(u), before.icdf(u))
        if step == 6:  # through JSON, as a checkpoint's manifest does
            kept = json.loads(json.dumps(other.extras()))
            other = NoiseLevels(config)
            other.restore(kept, rank=0)
        seen.append(straight.drawn().icdf(torch.tensor(0.3)).item())
    assert len(set(seen)) > 2 and seen[0] == seen[2]
    assert straight.extras() == other.extras()
    base = straight.density(0)
    x = torch.linspace(-8, 8, 99, dtype=torch.float64)
    assert (straight.drawn().pdf(x) >= 0.5 * base.pdf(x) * (1 - 1e-12)).all()  # no level is abandoned


def test_nothing_is_kept_where_nothing_is_learned():
    assert NoiseLevels(load(ROOT / "configs/quickstart.yaml")).extras() is None


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["adaptive", "learned"])
def test_a_run_that_learns_its_noise_continues_bitwise(rule, data, tmp_path):  # noqa: F811
    more = [f"noise.{rule}.strength=0.5", f"noise.{rule}.every_images={3 * BATCH}"]
    straight, run = tmp_path / "straight", tmp_path / "run"
    finish(straight, data, *more)
    ranks = start(run, data, *more)
    wait_for_clock(run, 4 * BATCH, ranks)
    ranks.processes[1].send_signal(signal.SIGTERM)
    assert ranks.wait() == [75, 75], ranks.output()
    finish(run, data, *more)
    assert_same(run, straight)
    kept = [json.loads(max((r / "checkpoints").glob("[0-9]*/manifest.json")).read_text()) for r in (straight, run)]
    assert kept[0]["extras"]["noise"] == kept[1]["extras"]["noise"] != {}
