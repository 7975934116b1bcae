"""Our fixed steps are torchdiffeq's to rounding, and adaptive steps come as near as they are told to."""

import pytest
import torch
import torchdiffeq

from models import ode

torch.manual_seed(0)
MATRIX = torch.randn(6, 6) / 2


def field(z):
    return torch.tanh(z @ MATRIX) - 0.1 * z


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("method", ode.TABLEAUS)
def test_fixed_steps_are_those_of_torchdiffeq(method, steps):
    z, calls = torch.randn(5, 6), []

    def counted(z):
        calls.append(1)
        return field(z)

    ours = ode.fixed(counted, z, method, steps)
    times, options = torch.tensor([0.0, 1.0]), {"step_size": 1 / steps}
    theirs = torchdiffeq.odeint(lambda t, z: field(z), z, times, method=method, options=options)[-1]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert len(calls) == steps * ode.stages(method)
    other, count = ode.by_torchdiffeq(field, z, method, steps)
    assert torch.equal(other, theirs) and count == len(calls)


@pytest.mark.parametrize("method", ode.ADAPTIVE)
def test_adaptive_methods_take_the_evaluations_that_the_tolerance_wants(method):
    z = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    exact = ode.fixed(field, z, "rk4", 64)
    coarse, few = ode.by_torchdiffeq(field, z, method, rtol=1e-2, atol=1e-2)
    fine, many = ode.by_torchdiffeq(field, z, method, rtol=1e-5, atol=1e-5)
    assert few < many and (fine - exact).abs().max() < 2e-3
    assert (fine - exact).abs().max() < (coarse - exact).abs().max() < 0.2
