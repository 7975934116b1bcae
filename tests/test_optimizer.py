"""The magnitude-preserving step: projection is the backward of a normalisation, masking changes nothing, rows are cut anywhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.magnitude import EPS, MPConv, normalize
from trainer.ema import ShardedEma
from trainer.fragments import Fragment, RowLayout, whole_fragments
from trainer.optimizer import MagnitudeAdam
from trainer.pages import LARGE, PAGE, SLOT, empty_apart


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear, self.gain = (
            MPConv(3, 5, (3, 3)),
            MPConv(7, 4),
            torch.nn.Parameter(torch.full((1,), 0.7)),
        )


def optimizer_of(net, nonfinite="stop", sigma_rel=(0.1,), lr=0.0):
    fragments = whole_fragments(net)
    adam = torch.optim.Adam(net.parameters(), lr=lr, betas=(0.9, 0.99), eps=1e-8, fused=True)
    return adam, MagnitudeAdam(adam, fragments, ShardedEma(fragments, sigma_rel), nonfinite)


def test_projection_is_the_backward_of_one_normalisation():
    net = Net()
    grads = {n: torch.randn_like(p) for n, p in net.named_parameters()}
    expected = {}
    for name, p in net.named_parameters():
        w = p.detach().clone().requires_grad_()
        seen = w if name == "gain" else normalize(w)
        (seen * grads[name]).sum().backward()
        expected[name] = w.grad
    adam, optimizer = optimizer_of(net)
    for n, p in net.named_parameters():
        p.grad = grads[n].clone()
    optimizer.schedule(0.0, 0.25, 64, 64)
    adam.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, 0.25 * expected[name], rtol=2e-5, atol=2e-6)


def test_rows_end_at_the_fixed_point_and_gains_are_left_alone():
    net = Net()
    adam, optimizer = optimizer_of(net, lr=0.05)
    for step in range(30):
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        optimizer.schedule(0.05, 1.0, 64 * (step + 1), 64)
        adam.step()
    for layer in (net.conv, net.linear):
        rms = layer.weight.detach().flatten(1).square().mean(1).sqrt()
        assert float((rms - (1 - EPS)).abs().max()) <= 1e-5
    assert float(optimizer.row_rms_deviation()) <= 1e-5
    assert abs(net.gain.item() - 1) > 0.01 and net.gain.item() != 0.7, "a gain taken for a row would be +-1"


def test_the_average_sees_the_weights_before_they_are_renormalised():
    net = Net()
    adam, optimizer = optimizer_of(net)
    with torch.no_grad():
        net.conv.weight.mul_(3.0)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    before = net.conv.weight.detach().clone()
    optimizer.schedule(0.0, 1.0, 64, 64)  # the first update has beta 0
    adam.step()
    averages = {f.name: a for f, a in zip(optimizer.fragments, optimizer.ema.averages[0], strict=True)}
    assert torch.equal(averages["conv.weight"].view_as(before), before)
    assert not torch.equal(net.conv.weight, before)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_masked_step_leaves_weights_and_moments_bitwise(policy):
    net = Net()
    adam, optimizer = optimizer_of(net, policy)

    def step(number, poison):
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        if poison:
            net.linear.weight.grad[1, 2] = poison
        optimizer.schedule(0.01, 1.0, 64 * number, 64)
        adam.step()
        return {n: p.detach().clone() for n, p in net.named_parameters()}, [
            {k: v.clone() for k, v in s.items()} for s in adam.state.values()
        ]

    weights, moments = step(1, 0)
    for poison in (float("nan"), float("inf"), -float("inf")):
        masked_weights, masked_moments = step(2, poison)
        assert all(torch.equal(weights[n], w) for n, w in masked_weights.items())
        assert all(torch.equal(a[k], b[k]) for a, b in zip(moments, masked_moments, strict=True) for k in a)
    assert optimizer.bad_tensors() == ["linear.weight"]
    after, _ = step(3, 0)
    moved = any(not torch.equal(weights[n], w) for n, w in after.items())
    assert moved == (policy == "skip"), "with 'stop' the flag is sticky: the weights stay where the fault found them"


def test_zeroing_takes_out_the_bad_entries_alone():
    results = []
    for poison in (0.0, float("nan")):
        net = Net()
        adam, optimizer = optimizer_of(net, "zero")
        for i, p in enumerate(net.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        net.linear.weight.grad[1, 2] = poison
        optimizer.schedule(0.01, 1.0, 64, 64)
        adam.step()
        results.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@given(st.integers(1, 7), st.integers(1, 9), st.lists(st.integers(0, 63), max_size=6))
@settings(max_examples=200, deadline=None)
def test_any_cut_of_a_tensor_covers_each_row_once(num_rows, length, boundaries):
    """One process plays all ranks: whole rows and pieces of all fragments together are the tensor."""
    total = num_rows * length
    cuts = sorted({0, total, *(b for b in boundaries if b < total)})
    covered = torch.zeros(total, dtype=torch.int64)
    for start, end in zip(cuts[:-1], cuts[1:], strict=True):
        flat = torch.arange(start, end, dtype=torch.float32)
        layout = RowLayout.of([Fragment("w", (num_rows, length), start, flat, length, flat, 0)])
        for rows in layout.whole:
            window = rows.of(flat)
            assert window.shape[1] == length and bool((window[:, 0] % length == 0).all())
            covered[window.long().flatten()] += 1
        for piece in layout.pieces:
            elements = piece.of(flat).long()
            assert len(elements) < length and len({int(e) // length for e in elements}) == 1
            covered[elements] += 1
    assert bool((covered == 1).all())


@pytest.mark.parametrize("shape", [(7,), (300, 64), (3, 100, 128)])
@pytest.mark.parametrize("slot", [1, 5, 11])
def test_large_tensors_lie_apart_in_their_pages(shape, slot):
    tensor = torch.randn(shape)
    made = empty_apart(tensor, slot).copy_(tensor)
    assert torch.equal(made, tensor) and made.shape == tensor.shape and made.is_contiguous()
    if tensor.numel() > LARGE // 4:
        assert made.data_ptr() % PAGE == slot * SLOT % PAGE
