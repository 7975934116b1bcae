"""The learning rate is a pure function of the clock."""

import math
import subprocess
import sys

import pytest

from trainer.lr import learning_rate

PAPER = (0.0120, 70_000 * 2048, 10_000_000)  # EDM2-XS


@pytest.mark.parametrize(
    ("clock", "rate"),
    [
        (0, 0.0),
        (2048, 2.4576e-06),
        (5242880, 0.006291456),
        (10000384, 0.012),
        (143360000, 0.012),
        (143362048, 0.011999914286632642),
        (2147483648, 0.003100489817653817),
    ],
)
def test_published_schedule(clock, rate):
    assert math.isclose(learning_rate(clock, *PAPER), rate, rel_tol=1e-12)


def test_each_factor_can_be_left_out():
    assert learning_rate(0, 0.01, 0, 0) == 0.01
    assert learning_rate(10**12, 0.01, 0, 1000) == 0.01
    assert learning_rate(4000, 0.01, 1000, 0) == 0.005


def test_ramp_and_decay_multiply():
    assert math.isclose(learning_rate(500, 1.0, 125, 1000), 0.5 * 0.5)


def test_rises_then_falls():
    rates = [learning_rate(clock, *PAPER) for clock in range(0, 400_000_000, 2_000_000)]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top]) and rates[72:] == sorted(rates[72:], reverse=True)


def test_needs_no_torch():
    code = "import sys, trainer.lr; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
