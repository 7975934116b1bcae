"""Winograd's convolution is the convolution, its backward the exact transpose, and only a network compiled for a CPU uses it."""

import pytest
import torch
import torch.nn.functional as F

from models import native, winograd
from models.denoiser import build
from models.magnitude import MPConv, normalize_rows_
from trainer.compilation import compile_forward

# [N, in, H, W] and out: the corners of one tile row, an image that is not square, several blocks of 16 channels
SHAPES = [((4, 16, 8, 8), 16), ((1, 48, 16, 20), 32), ((3, 32, 4, 32), 64), ((16, 16, 4, 4), 16)]
# of the largest entry, in fp32; the direct convolution reaches 2e-6
BOUND = 2e-5


@pytest.fixture(autouse=True)
def built():
    torch.manual_seed(0)
    winograd.use_(torch.nn.Module())


def error(found, exact):
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize(("shape", "out"), SHAPES)
def test_it_is_the_convolution_and_its_gradients(shape, out):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(out, shape[1], 3, 3, requires_grad=True)
    assert winograd.suits(x, weight)
    y = winograd.conv3x3(x, weight, 0.7)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = F.conv2d(exact[0], 0.7 * exact[1], padding=1)
    assert error(y, expected) < BOUND
    grad = torch.randn_like(y)
    for mine, theirs in zip(
        torch.autograd.grad(y, (x, weight), grad), torch.autograd.grad(expected, exact, grad.double()), strict=True
    ):
        assert error(mine, theirs) < BOUND


def test_memory_formats_and_threads_change_nothing():
    x, weight, grad = torch.randn(4, 32, 16, 16), torch.randn(48, 32, 3, 3), torch.randn(4, 48, 16, 16)
    threads = torch.get_num_threads()
    results = []
    for number, layout in ((1, torch.contiguous_format), (1, torch.channels_last), (2, torch.channels_last)):
        torch.set_num_threads(number)
        there = [t.contiguous(memory_format=layout) for t in (grad, x, weight)]
        results.append((winograd.conv3x3(*there[1:], 1.0), *torch.ops.evenkeel.conv3x3_backward(*there, 1.0)))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(
            torch.allclose(a, b, rtol=0, atol=1e-5 * a.abs().max()) for a, b in zip(results[0], other, strict=True)
        )


def test_the_operator_keeps_its_promises_to_the_compiler():
    x, weight = torch.randn(1, 16, 16, 16).requires_grad_(), torch.randn(16, 16, 3, 3).requires_grad_()
    torch.library.opcheck(
        torch.ops.evenkeel.conv3x3.default, (x.contiguous(memory_format=torch.channels_last), weight, 0.5)
    )


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.zeros(4, 16, 8, 8, dtype=torch.bfloat16), torch.zeros(16, 16, 3, 3)),
        (torch.zeros(4, 16, 8, 8), torch.zeros(16, 16, 1, 1)),
        (torch.zeros(4, 16, 8, 8), torch.zeros(4, 16, 3, 3)),
        (torch.zeros(4, 16, 8, 6), torch.zeros(16, 16, 3, 3)),
        (torch.zeros(4, 16, 4, 4), torch.zeros(16, 16, 3, 3)),
        (torch.zeros(4, 16, 8, 8, device="meta"), torch.zeros(16, 16, 3, 3, device="meta")),
    ],
)
def test_other_convolutions_are_left_alone(x, weight):
    assert not winograd.suits(x, weight)


def test_only_marked_layers_compute_this_way():
    layer, x = MPConv(16, 16, (3, 3), gain=2.0), torch.randn(4, 16, 8, 8)
    direct = layer(x)
    assert torch.equal(direct, F.conv2d(x, layer.weight * (2.0 / 12), padding=1))
    winograd.use_(layer)
    assert not torch.equal(layer(x), direct) and error(layer(x), direct.double()) < BOUND
    gain = torch.full((1,), 2.0, requires_grad=True)  # a learned gain needs its own gradient: the direct convolution
    layer(x, gain=gain).sum().backward()
    assert gain.grad is not None


def test_a_missing_compiler_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="no-such-compiler is not there: install") as raised:
        native._build(winograd._SOURCE)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_a_compiled_denoiser_trains_as_the_eager_one():
    small = {
        "resolution": 16,
        "channels": 4,
        "label_dim": 3,
        "model_channels": 16,
        "channel_mult": [1, 2],
        "num_blocks": 1,
    }
    net = build(small | {"attn_resolutions": [8], "channels_per_head": 16, "logvar_channels": 8}).train()
    normalize_rows_(net)
    with torch.no_grad():
        for p in net.parameters():
            if p.shape == (1,):
                p.fill_(0.3)
    inputs = torch.randn(4, 4, 16, 16), torch.rand(4) + 0.2, torch.randint(3, (4,))
    gradients = []
    for compiled in (False, True):
        run = compile_forward(net) if compiled else net
        run(*inputs).square().sum().backward()
        gradients.append([p.grad for p in net.parameters() if p.grad is not None])
        net.zero_grad(set_to_none=True)
    assert any(layer.winograd for layer in net.modules() if isinstance(layer, MPConv))
    for eager, other in zip(*gradients, strict=True):
        assert torch.allclose(eager, other, rtol=0, atol=1e-4 * eager.abs().max())
