"""Magnitude-preserving primitives preserve magnitude, and weights are normalised where that is said, never in a forward."""

import math

import pytest
import torch

from models import magnitude
from models.denoiser import build
from models.magnitude import EPS, MPConv, MPFourier, mp_cat, mp_silu, mp_sum, normalize

SMALL = {"resolution": 8, "channels": 2, "label_dim": 3, "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1}
SMALL |= {"attn_resolutions": [4], "channels_per_head": 8, "logvar_channels": 8}


def size(x):
    return x.double().square().mean().sqrt().item()


def row_sizes(weight):
    return weight.detach().double().flatten(1).square().mean(1).sqrt()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_normalize_divides_by_rms_plus_epsilon():
    x = torch.randn(5, 7, 3) * torch.tensor([1e-4, 1e-2, 1.0, 10.0, 1e3])[:, None, None]
    r = row_sizes(x)
    assert torch.allclose(row_sizes(normalize(x)), r / (r + EPS), rtol=1e-6)
    assert torch.equal(normalize(torch.zeros(2, 4)), torch.zeros(2, 4))


def test_pixel_norm_is_over_channels():
    y = normalize(torch.randn(2, 6, 3, 3) * 5, dim=1)
    assert torch.allclose(y.square().mean(1).sqrt(), torch.ones(2, 3, 3), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rms_is_accumulated_in_fp32(dtype):
    x = torch.full((1, 2**17), 300.0, dtype=dtype)  # its norm is beyond fp16
    y = normalize(x)
    assert y.dtype == dtype and torch.allclose(y.float(), torch.ones(1, 2**17), atol=0.01)


def test_gradient_at_zero_is_finite():
    x = torch.zeros(2, 4, requires_grad=True)
    normalize(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_silu_keeps_magnitude():
    assert abs(size(mp_silu(torch.randn(10**6))) - 1) < 3e-3  # 0.596 is rounded


@pytest.mark.parametrize("t", [0.0, 0.2, 0.3, 0.5, 1.0])
def test_sum_and_cat_keep_magnitude(t):
    a, b = torch.randn(64, 30, 32), torch.randn(64, 10, 32)
    assert abs(size(mp_sum(a, torch.randn_like(a), t)) - 1) < 0.02
    joined = mp_cat(a, b, t)
    assert joined.shape[1] == 40 and abs(size(joined) - 1) < 0.02
    if 0 < t < 1:  # the shares of energy are as the balance says, whatever the widths
        shares = joined[:, :30].square().sum() / joined[:, 30:].square().sum()
        assert abs(shares.item() / ((1 - t) / t) ** 2 - 1) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_clipping_in_passing_is_clamping_before(dtype):
    """Values, and gradients made of the output alone; also where the bound times the weight is no number of 16 bits."""
    for t, bound in ((0.5, 2.0), (0.3, 1.7), (0.9, 0.37), (0.2, 256.0)):
        bound = float(torch.tensor(bound, dtype=dtype))
        plain = [(0.8 * bound * torch.randn(6, c, 5, 5)).to(dtype) for c in (7, 4)]
        near = (plain[0].abs() - bound).abs() < 3 * torch.finfo(
            dtype
        ).eps * bound  # no gradient from just below the bound on
        plain[0][near] = 0.5 * bound
        ours, theirs = ([x.clone().requires_grad_() for x in plain] for _ in range(2))
        found, expected = mp_cat(*ours, t, bound), mp_cat(theirs[0].clamp(-bound, bound), theirs[1], t)
        way = torch.randn_like(expected)
        found.backward(way)
        expected.backward(way)
        assert torch.equal(found, expected)
        assert all(torch.equal(x.grad, y.grad) for x, y in zip(ours, theirs, strict=True))
        assert 0.1 < float((ours[0].grad == 0).float().mean()) < 0.4, "some is clipped, not all"
        alone = [plain[0].clone().requires_grad_() for _ in range(2)]
        y, expected = magnitude.clip(alone[0], bound), alone[1].clamp(-bound, bound)
        y.square().sum().backward()
        expected.square().sum().backward()
        assert torch.equal(y, expected) and torch.equal(alone[0].grad, alone[1].grad)


def test_fourier_features_have_unit_magnitude():
    features = MPFourier(4096)
    assert features(torch.randn(16)).shape == (16, 4096)
    assert abs(size(features(torch.randn(16))) - 1) < 0.02


@pytest.mark.parametrize("kernel", [(), (1,), (3,), (1, 1), (3, 3), (5, 3), (3, 3, 3)])
def test_layer_keeps_magnitude_in_any_dimension(kernel):
    layer = MPConv(12, 200, kernel)
    magnitude.normalize_rows_(layer)
    x = torch.randn(8, 12, *([10] * len(kernel)))
    y = layer(x)
    assert y.shape == (8, 200, *([10] * len(kernel)))
    inside = y[(..., *([slice(2, -2)] * len(kernel)))]  # the border sees padding
    assert abs(size(inside) - 1) < 0.05


def test_even_kernel_is_refused():
    with pytest.raises(ValueError, match="odd"):
        MPConv(3, 3, (2, 2))


def test_pointwise_product_equals_convolution():
    layer = MPConv(5, 7, (1, 1))
    x = torch.randn(2, 5, 4, 6)
    want = torch.nn.functional.conv2d(x, layer.weight / math.sqrt(5))
    for memory in (torch.contiguous_format, torch.channels_last):
        assert torch.allclose(layer(x.to(memory_format=memory)), want, atol=1e-5)


def test_gain_scales_the_layer_and_learns():
    layer, gain = MPConv(4, 4, (3, 3)), torch.full((1,), 0.37, requires_grad=True)
    x = torch.randn(2, 4, 5, 5)
    assert torch.allclose(layer(x, gain), 0.37 * layer(x), atol=1e-6)
    layer(x, gain).sum().backward()
    assert torch.allclose(gain.grad, layer(x).sum().reshape(1), rtol=1e-4)


def test_forward_normalises_nothing():
    layer = MPConv(6, 6, (3, 3)).train()
    before, x = layer.weight.detach().clone(), torch.randn(2, 6, 5, 5)
    y = layer(x)
    assert torch.equal(layer.weight, before)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.allclose(layer(x), 2 * y)


def saved_bytes(function):
    total = 0

    def count(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        function()
    return total


def test_forward_saves_less_than_with_normalisation_inside():
    layer, x = MPConv(32, 32, (3, 3)), torch.randn(1, 32, 4, 4)

    def normalising():
        weight = normalize(layer.weight) * layer.scale
        return torch.nn.functional.conv2d(x, weight, padding=1)

    ours, theirs = saved_bytes(lambda: layer(x)), saved_bytes(normalising)
    weight = layer.weight.numel() * 4
    assert ours <= theirs - weight


def test_only_weights_of_layers_are_marked():
    denoiser = build(SMALL)
    marked = magnitude.normalized_parameters(denoiser)
    rest = {name: p for name, p in denoiser.named_parameters() if name not in marked}
    assert all(p.shape == (1,) for p in rest.values()) and all(p.ndim > 1 for p in marked.values())
    assert set(rest) == {"unet.out_gain"} | {name for name in rest if name.endswith(".emb_gain")}
    assert all(dict(denoiser.named_parameters())[name] is p for name, p in marked.items())
    layer = MPConv(3, 3)
    assert list(magnitude.normalized_parameters(layer)) == ["weight"]


def test_marks_are_the_layers_own():
    class Gate(torch.nn.Module):
        normalized = ("matrix",)

        def __init__(self):
            super().__init__()
            self.matrix, self.weight = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))

    assert list(magnitude.normalized_parameters(torch.nn.Sequential(Gate()))) == ["0.matrix"]


def test_rows_go_to_the_fixed_point_and_stay():
    layer = MPConv(4, 5, (3, 3))
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([1e-3, 0.1, 1.0, 7.0, 0.0])[:, None, None, None])
    magnitude.normalize_rows_(layer)
    assert torch.allclose(row_sizes(layer.weight)[:4], torch.full((4,), 1 - EPS).double(), atol=2e-7, rtol=0)
    assert not layer.weight[4].any()
    before = layer.weight.detach().clone()
    magnitude.use_weights_(layer)  # forcing once more changes nothing: it is the fixed point
    assert torch.allclose(layer.weight, before, atol=1e-6, rtol=0)


def test_use_normalises_rows_once():
    layer = MPConv(4, 3)
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([0.5, 0.9, 1.0])[:, None])
    r = row_sizes(layer.weight)
    magnitude.use_weights_(layer)
    assert torch.allclose(row_sizes(layer.weight), r / (r + EPS), atol=1e-7, rtol=0)
