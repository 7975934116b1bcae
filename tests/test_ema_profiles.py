"""Laws of power-function profiles, and the numbers of the EDM2 reference."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from trainer import ema_profiles as ep
from trainer.ema import ShardedEma

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "posthoc_ema.json").read_text())
TABLE = 1e-12  # relative, float64 tables
COEFFICIENT = 1e-9  # absolute; the worst system has a condition number of 2e6


def gammas(lengths):
    return [ep.gamma_from_sigma_rel(s) for s in lengths]


def test_exponents_are_the_references():
    for row in GOLDEN["std_to_exp"]:
        assert ep.gamma_from_sigma_rel(row["std"]) == pytest.approx(row["exp"], rel=TABLE)
        assert ep.sigma_rel_from_gamma(row["exp"]) == pytest.approx(row["std_back"], rel=TABLE)
    for row in GOLDEN["exp_to_std"]:
        assert ep.sigma_rel_from_gamma(row["exp"]) == pytest.approx(row["std"], rel=TABLE)


def test_betas_are_the_references():
    for row in GOLDEN["betas"]:
        got = ep.beta(row["t_next"], row["t_delta"], ep.gamma_from_sigma_rel(row["std"]))
        assert got == pytest.approx(row["beta"], rel=TABLE, abs=0)


def test_correlations_are_the_references():
    for row in GOLDEN["correlations"]:
        gamma_a, gamma_b = gammas((row["a_std"], row["b_std"]))
        assert ep.correlation(row["a_ofs"], gamma_a, row["b_ofs"], gamma_b) == pytest.approx(row["value"], rel=TABLE)


@pytest.mark.parametrize("case", GOLDEN["solutions"], ids=lambda c: c["name"])
def test_coefficients_are_the_references(case):
    got = ep.solve_weights(case["in_nimg"], gammas(case["in_std"]), case["out_nimg"], gammas(case["out_std"]))
    assert np.abs(got - np.array(case["coefs"])).max() <= COEFFICIENT
    assert got.sum(0) == pytest.approx(1)


def test_a_recorded_trajectory_is_reconstructed():
    toy, stored = GOLDEN["toy"], load_file(DATA / "posthoc_ema.safetensors")
    coefficients = ep.solve_weights(
        toy["snapshot_nimg"], gammas(toy["snapshot_std"]), toy["target_nimg"], gammas(toy["target_stds"])
    )
    assert np.abs(coefficients - stored["toy.coefs"]).max() <= COEFFICIENT
    rebuilt = coefficients.T @ stored["toy.snapshots"].astype(np.float64)
    assert np.abs(rebuilt - stored["toy.reconstructed"]).max() <= 1e-6


def one_hot_profile(clocks, sigma_rel):
    """Feed the averages of a run one-hot weights, the k-th at update k: what they hold at the end is their profile."""
    weights = torch.zeros(len(clocks))
    ema = ShardedEma([SimpleNamespace(master=weights)], [sigma_rel])
    for k, clock in enumerate(clocks):
        weights.zero_()[k] = 1
        ema.update(int(clock), int(clock - (clocks[k - 1] if k else 0)))
    return ema.averages[0][0].double().numpy()


def measured_sigma_rel(clocks, profile):
    starts = np.concatenate([[0], clocks[:-1]])
    middle = (starts + clocks) / 2
    mean = (profile * middle).sum()
    spread = (
        profile * ((middle - mean) ** 2 + (clocks - starts) ** 2 / 12)
    ).sum()  # each update stands for its interval
    return spread**0.5 / clocks[-1]


@pytest.mark.parametrize("interval", [1, 10, 100])
@pytest.mark.parametrize("sigma_rel", [0.05, 0.10, 0.25])
def test_the_profile_has_the_width_asked_for(interval, sigma_rel):
    clocks = np.arange(interval, 10_001, interval) * 64.0
    profile = one_hot_profile(clocks, sigma_rel)
    assert profile.sum() == pytest.approx(1, abs=1e-5)  # fp32
    assert measured_sigma_rel(clocks, profile) == pytest.approx(sigma_rel, rel=2e-3)


def test_skipped_updates_and_another_batch_keep_the_width():
    rng = np.random.default_rng(0)
    clocks = np.cumsum(np.concatenate([np.full(3000, 64.0), np.full(1000, 256.0)]))
    clocks = clocks[np.sort(rng.choice(len(clocks), 2500, replace=False))]
    profile = one_hot_profile(clocks, 0.10)
    assert measured_sigma_rel(clocks, profile) == pytest.approx(0.10, rel=2e-3)


def test_predicted_error_is_the_distance_of_the_profiles():
    clocks, lengths = np.repeat([1.0, 2.0, 3.0, 4.0], 2), np.tile([0.05, 0.10], 4)
    target = ep.gamma_from_sigma_rel(0.15)
    coefficients = ep.solve_weights(clocks, gammas(lengths), 4.0, target)[:, 0]
    t = (np.arange(400_000) + 0.5) / 100_000  # midpoints

    def profile(clock, gamma):
        return np.where(t <= clock, (gamma + 1) * t**gamma / clock ** (gamma + 1), 0)

    rebuilt = sum(x * profile(c, g) for x, c, g in zip(coefficients, clocks, gammas(lengths)))
    wanted = profile(4.0, target)
    distance = np.linalg.norm(rebuilt - wanted) / np.linalg.norm(wanted)
    assert ep.predicted_error(clocks, gammas(lengths), 4.0, target)[0] == pytest.approx(distance, rel=1e-4)


def test_published_plan_carries_its_range():
    """160 snapshots of two lengths: 3.9e-3 at 0.015, 5.4e-5 at 0.13, 4.8e-3 at 0.25, and coefficients of norm 39 at 0.015."""
    clocks, inputs = np.repeat(np.arange(1, 161) * 8 * 2**20, 2), np.tile(gammas((0.05, 0.10)), 160)
    outputs = gammas((0.015, 0.13, 0.25))
    assert ep.predicted_error(clocks, inputs, clocks[-1], outputs) == pytest.approx([3.9e-3, 5.4e-5, 4.8e-3], rel=0.01)
    assert np.linalg.norm(ep.solve_weights(clocks, inputs, clocks[-1], outputs)[:, 0]) == pytest.approx(38.8, abs=0.05)


def test_a_tracked_length_costs_nothing():
    clocks, inputs = np.repeat([1.0, 2.0], 2), np.tile(gammas((0.05, 0.10)), 2)
    assert ep.solve_weights(clocks, inputs, 2.0, inputs[3])[:, 0] == pytest.approx([0, 0, 0, 1])
    assert ep.predicted_error(clocks, inputs, 2.0, inputs[3])[0] < 1e-6


def test_rounding_is_that_of_the_dtype():
    weights = np.random.default_rng(0).standard_normal(100_000)
    measured = np.linalg.norm(weights.astype(np.float16) - weights) / np.linalg.norm(weights)
    assert ep.rounding_error(np.array([[3.0], [4.0]]), "fp16")[0] == pytest.approx(5 * measured, rel=0.02)


def test_ranges_include_their_end():
    lengths = ep.parse_range("0.02:0.20:0.01")
    assert len(lengths) == 19 and lengths[-1] == 0.2 and lengths[17] == 0.19
    assert ep.parse_range("0.13") == [0.13] and ep.parse_range("0.05, 0.1") == [0.05, 0.1]
    assert ep.parse_range("1.0:2.0:0.4") == [1.0, 1.4, 1.8]


@pytest.mark.parametrize("text", ["", "a", "0.1:0.2", "0.2:0.1:0.01", "0.1:0.2:0", "0.1,0.1", "nan", "0.1:inf:0.1"])
def test_bad_ranges_are_one_line(text):
    with pytest.raises(ValueError) as error:
        ep.parse_range(text)
    assert "\n" not in str(error.value)


def test_what_cannot_be_is_refused():
    for bad in (0, -0.1, 0.29, float("nan")):
        with pytest.raises(ValueError):
            ep.gamma_from_sigma_rel(bad)
    with pytest.raises(ValueError, match="same clock"):
        ep.solve_weights([1, 1], [2.0, 2.0], 1, 3.0)
    with pytest.raises(ValueError, match="exceed"):
        ep.solve_weights([1, 2], [2.0, 2.0], 1, 3.0)


def test_needs_no_torch():
    code = "import sys, trainer.ema_profiles; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0
