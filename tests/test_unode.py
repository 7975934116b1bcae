"""The magnitude-preserving U-Node: its step keeps every pixel's magnitude whatever the force, and its limit is the equation's
solution as torchdiffeq finds it."""

import math

import pytest
import torch
import torch.nn.functional as F

from models import ode
from models.denoiser import build
from models.magnitude import MPConv, normalize_rows_, use_weights_
from models.unode import OdeBlock, field, kick, rotate, split_steps
from tests.test_magnitude import SMALL
from trainer.loss import denoising_loss

UNODE = {**SMALL, "family": "unode"}
OMEGA = math.pi / 2


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def batch():
    generator = torch.Generator().manual_seed(1)
    x, sigma = torch.randn(4, 2, 8, 8, generator=generator), torch.rand(4, generator=generator) + 0.1
    return x, sigma, torch.tensor([0, 1, 2, -1])


def trained_like(change=None, **options):
    """A network whose gains are not zero, so that every part of it matters."""
    torch.manual_seed(0)
    net = build({**UNODE, **(change or {})}, **options)
    normalize_rows_(net)
    for name, p in net.named_parameters():
        if "gain" in name:
            torch.nn.init.constant_(p, 0.5)
    return net.eval()


def pixels(z):
    return z.double().square().sum(1)


def force_of(channels, correlated=False):
    """A smooth force with memory of where it is: at neighbouring states nearly the same, or the very same everywhere."""
    weight = torch.randn(channels // 2, channels, 1, 1) / math.sqrt(channels)
    constant = torch.randn(1, channels // 2, 1, 1)
    return lambda z: constant.expand(len(z), -1, *z.shape[2:]) if correlated else F.conv2d(torch.tanh(z), weight) * 1.6


# ---------------------------------------------------------------------------------------------------------------------
# The step


@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize("strength", [0.3, 3.0])
def test_the_step_keeps_the_magnitude_of_every_pixel_whatever_the_force(strength, steps, correlated):
    z = torch.randn(3, 16, 4, 4)
    after = split_steps(force_of(16, correlated), z, steps, OMEGA, strength)
    assert (pixels(after) / pixels(z) - 1).abs().max() < 3e-3  # EPS in the quotient of a small |v|
    assert not torch.allclose(after, z, atol=0.1)


def test_runge_kutta_on_the_bare_force_does_not():
    """Why there is a step of our own: slopes of one force are correlated, and their weighted sum makes the state grow."""
    z, force = torch.randn(64, 16, 4, 4), force_of(16, correlated=True)

    def bare(z):
        x, v = z.chunk(2, dim=1)
        return torch.cat([OMEGA * v, 3 * force(z) - OMEGA * x], dim=1)

    grown = pixels(ode.fixed(bare, z, "rk4", 4)).mean() / pixels(z).mean()
    assert grown > 1.5


def test_without_a_force_the_block_is_a_rotation_that_exchanges_position_and_velocity():
    z = torch.randn(2, 6, 3, 3)
    x, v = z.chunk(2, dim=1)
    for steps in (1, 3):
        after = split_steps(lambda z: torch.zeros_like(z[:, ::2]), z, steps, OMEGA, 1.0)
        torch.testing.assert_close(after, torch.cat([v, -x], dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rotate(rotate(z, 0.4), -0.4), z)


def test_a_kick_turns_the_velocity_and_no_velocity_stays_none():
    v = torch.randn(2, 4, 3, 3)
    turned = kick(v, torch.randn_like(v))
    torch.testing.assert_close(pixels(turned), pixels(v), rtol=1e-3, atol=1e-4)
    assert torch.equal(kick(v, torch.zeros_like(v)), v)
    assert torch.equal(kick(torch.zeros_like(v), torch.zeros_like(v)), torch.zeros_like(v))


def test_more_steps_come_to_the_solution_that_torchdiffeq_finds():
    z, force = torch.randn(2, 16, 4, 4), force_of(16)
    exact, _ = ode.by_torchdiffeq(field(force, OMEGA, 1.0), z, "dopri5", rtol=1e-6, atol=1e-6)
    errors = [(split_steps(force, z, n, OMEGA, 1.0) - exact).abs().max().item() for n in (4, 8, 16, 32)]
    assert errors[-1] < 0.04 and all(1.6 < a / b < 2.6 for a, b in zip(errors, errors[1:])), errors  # first order
    assert (pixels(exact) / pixels(z) - 1).abs().max() < 1e-4, "the equation itself keeps the magnitude"


# ---------------------------------------------------------------------------------------------------------------------
# The network


@torch.no_grad()
@pytest.mark.parametrize("change", [{}, {"num_blocks": 2}, {"channel_mult": [1, 2, 2]}, {"ode": {"steps": 1}}], ids=str)
def test_states_of_fresh_networks_have_unit_magnitude(change):
    """At widths where sums of products have their expected size, every block's state is near 1 at every level."""
    model = {**UNODE, "model_channels": 64, "channels_per_head": 64, "resolution": 16, **change}
    net = build(model)
    normalize_rows_(net)
    sigma = torch.tensor([0.05, 0.5, 5.0, 20.0])
    x = (0.25 + sigma**2).sqrt()[:, None, None, None] * torch.randn(4, 2, 16, 16)
    _, _, seen = net(x, sigma, torch.tensor([0, 1, 2, -1]), collect=True)
    states = {name: float(value) for name, value in seen.items() if name.endswith(".state")}
    assert len(states) == (2 * len(model["channel_mult"]) - 1) * model.get("num_blocks", 1)
    assert all(0.8 < value < 1.25 for value in states.values()), states


@torch.no_grad()
def test_evaluations_are_counted_and_are_what_the_config_says():
    for options, wanted in (
        ({"steps": 3}, 3),
        ({"solver": "rk4", "steps": 1}, 4),
        ({"solver": "midpoint", "steps": 2}, 4),
        ({"solver": "dopri5"}, None),
    ):
        net, calls = trained_like({"ode": options}), []
        first = next(m for m in net.modules() if isinstance(m, OdeBlock))
        first.conv_res0.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        net(*batch())
        counted = net.function_evaluations()
        assert len(counted) == 3 and counted["unet.enc.8x8_block0"] == len(calls)
        assert wanted is None or set(counted.values()) == {wanted}
    assert build(SMALL).function_evaluations() == {}


@torch.no_grad()
def test_it_is_a_denoiser_like_the_others():
    x, sigma, labels = batch()
    net = trained_like()
    d, logvar, seen = net(x, sigma, labels, collect=True)
    assert d.shape == x.shape and logvar.shape == (4, 1, 1, 1) and "unet.dec.8x8_block0.conv_res1" in seen
    assert not torch.allclose(d, net(x, 2 * sigma, labels)) and not torch.allclose(d[0], net(x, sigma)[0], atol=1e-3)
    for i in range(4):
        assert torch.allclose(d[i : i + 1], net(x[i : i + 1], sigma[i : i + 1], labels[i : i + 1]), atol=1e-5)
    torch.manual_seed(0)
    fresh = build(UNODE)
    c_skip = 0.25 / (sigma**2 + 0.25)
    assert torch.allclose(fresh(x, sigma, labels), c_skip[:, None, None, None] * x), "begins as EDM2 does: F = 0"


@torch.no_grad()
@pytest.mark.parametrize(("activations", "bound"), [("fp16", 1e-2), ("bf16", 6e-2)])
def test_sixteen_bits_are_near(activations, bound):
    d, want = trained_like(activations=activations)(*batch()), trained_like()(*batch())
    assert d.dtype == torch.float32 and 0 < (d - want).abs().max() < bound * want.abs().max()


def gradients(change=None, **options):
    x, sigma, labels = batch()
    net = trained_like(change, **options).train()
    keep = torch.rand(1, 1, 1, 1) < 2  # every element
    losses, _ = denoising_loss(net, x, labels, sigma, torch.ones_like(x), dropout_mask=lambda layer, shape: keep)
    losses.sum().backward()
    return {name: p.grad for name, p in net.named_parameters()}


def test_every_parameter_gets_a_gradient_and_checkpointing_changes_none():
    plain, checkpointed = gradients(), gradients(activation_checkpointing=True)
    assert all(g is not None and g.abs().sum() > 0 for g in plain.values())
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_the_adjoint_has_the_gradient_of_the_steps():
    through = gradients({"ode": {"solver": "rk4", "steps": 16}})
    adjoint = gradients({"ode": {"solver": "rk4", "steps": 16, "adjoint": True}})
    for name in through:
        scale = through[name].abs().max()
        assert (through[name] - adjoint[name]).abs().max() < 0.02 * scale + 1e-6, name


@torch.no_grad()
def test_dropout_of_a_block_is_one_mask_for_its_whole_solve():
    net, asked = trained_like({"dropout": 0.5}).train(), []

    def mask(layer, shape):
        asked.append((layer, tuple(shape)))
        return torch.ones(shape, dtype=torch.bool)

    net(*batch(), dropout_mask=mask)
    assert {layer for layer, _ in asked} == {0, 1, 2} and len(asked) == 6 and len(set(asked)) == 3


@torch.no_grad()
def test_shorter_rows_are_normalised_once_at_load():
    net, averaged = trained_like(), trained_like()
    for layer in averaged.modules():
        if isinstance(layer, MPConv):
            layer.weight.mul_(0.6)
    use_weights_(averaged)
    assert torch.allclose(averaged(*batch()), net(*batch()), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_as_one_graph(checkpointing):
    assert_compiles(lambda: trained_like(activation_checkpointing=checkpointing).train(), batch())


def assert_compiles(make, inputs):
    """Check that outputs and gradients of the network compiled as one graph are those of the eager one."""
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        net = make()
        # on a CPU the trainer turns the layout optimization off too: with it, torch 2.13 returns wrong gradients (docs/LOG.md)
        options = {"layout_optimization": False}
        run = torch.compile(net, fullgraph=True, options=options) if compiled else net
        d, logvar, seen = run(*inputs, return_logvar=True, collect=True)
        (d.square().sum() + logvar.sum()).backward()
        results.append((d, seen, {name: p.grad for name, p in net.named_parameters()}))
    (d, seen, grads), (compiled_d, compiled_seen, compiled_grads) = results
    assert torch.allclose(d, compiled_d, rtol=1e-4, atol=1e-4) and seen.keys() == compiled_seen.keys()
    for name, g in grads.items():
        other = compiled_grads[name]
        assert torch.allclose(g, other, rtol=1e-3, atol=1e-3 * g.abs().max() + 1e-6), name
