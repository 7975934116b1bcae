"""Prepared weights are the weights, cast: bit for bit, in values and gradients, after everything that changes weights."""

import pytest
import torch

from models import prepared
from models.denoiser import build
from models.magnitude import MPConv, normalize_rows_, use_weights_
from tests import test_engine as sharded
from tests.gloo import on_ranks
from trainer.loss import denoising_loss

MODEL = {"resolution": 8, "channels": 4, "label_dim": 3, "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1,
         "attn_resolutions": [8], "channels_per_head": 16, "logvar_channels": 8}  # fmt: skip
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def network(activations: str, checkpointing: bool = False, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    net = build(MODEL | changes, activations, checkpointing).train()
    normalize_rows_(net)
    with torch.no_grad():
        for p in net.parameters():
            if p.shape == (1,):
                p.fill_(0.3)
    return net


def gradients(net) -> list[torch.Tensor]:
    """Return losses and gradients of two micro-batches, accumulated."""
    g = torch.Generator().manual_seed(1)
    x, noise, sigma = (
        torch.randn(4, 4, 8, 8, generator=g),
        torch.randn(4, 4, 8, 8, generator=g),
        torch.rand(4, generator=g),
    )
    losses = [
        denoising_loss(net, 0.5 * x[i : i + 2], torch.tensor([i, -1]), sigma[i : i + 2] + 0.2, noise[i : i + 2])[0]
        for i in (0, 2)
    ]
    torch.cat(losses).sum().backward()
    return [*losses, *(p.grad for p in net.parameters())]


def stale(module) -> list[str]:
    """Return the layers whose prepared weight is not that of the present weight."""
    layers = {n: m for n, m in module.named_modules() if getattr(m, "prepared", None) is not None}
    assert layers
    return [
        n for n, m in layers.items() if not torch.equal(m.prepared, (m.weight.detach() * m.scale).to(m.prepared.dtype))
    ]


@pytest.mark.parametrize("activations", list(TYPES))
@pytest.mark.parametrize("family", ["edm2", "unode"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_values_and_gradients_are_those_of_the_cast(activations, family, checkpointing):
    plain, ahead = (network(activations, checkpointing, family=family) for _ in range(2))
    prepared.prepare_(ahead, TYPES[activations])
    found = gradients(ahead)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(plain), strict=True))
    assert all(g.is_contiguous() for g in found)  # else accumulation copies them


def test_an_adjoint_finds_the_weights_behind():
    """Near only: its states are not channels_last, so that the weight's layout chooses the convolution's."""
    options = {"family": "unode", "ode": {"solver": "rk4", "adjoint": True}}
    plain, ahead = network("bf16", **options), network("bf16", **options)
    prepared.prepare_(ahead, torch.bfloat16)
    for a, b in zip(gradients(ahead), gradients(plain), strict=True):
        assert float((a - b).detach().norm()) <= 0.02 * float(b.detach().norm())


def test_the_forward_neither_casts_nor_keeps_weights():
    """Counted: what the weights' casts move in a forward, and what the backward keeps of them."""
    net, seen = network("bf16"), []

    class Casts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and args[0].shape in shapes:
                seen.append(out.numel())
            return out

    # out_conv has a learned gain
    wanted = [m.weight for n, m in net.named_modules() if isinstance(m, MPConv) and m.padding and n != "unet.out_conv"]
    shapes = {w.shape for w in wanted}
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([0, 1])
    with Casts():
        net(x, torch.ones(2), labels)
    assert sum(seen) == sum(w.numel() for w in wanted)
    prepared.prepare_(net, torch.bfloat16)
    seen.clear()
    with Casts():
        net(x, torch.ones(2), labels)
    assert not seen
    convolutions = sum(m.weight.numel() for m in net.modules() if isinstance(m, MPConv) and m.padding)
    assert prepared.num_bytes(net) == 2 * convolutions


def test_other_types_go_their_own_way():
    net = network("bf16")
    prepared.prepare_(net, torch.float32)
    assert prepared.num_bytes(net) == 0
    layer, x = MPConv(4, 4, (3, 3), gain=2.0), torch.randn(2, 4, 5, 5)
    expected = layer(x)
    prepared.prepare_(layer, torch.bfloat16)
    assert torch.equal(layer(x), expected)
    gain = torch.full((1,), 3.0, requires_grad=True)
    layer(x.bfloat16(), gain).sum().backward()
    assert gain.grad is not None


def test_whatever_sets_weights_prepares_them_anew():
    net = network("bf16")
    names = list(net.state_dict())
    prepared.prepare_(net, torch.bfloat16)
    assert not stale(net) and list(net.state_dict()) == names
    other = {n: t + torch.randn_like(t) for n, t in net.state_dict().items()}
    net.load_state_dict(other)
    assert not stale(net)
    for change in (use_weights_, normalize_rows_):
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1.7)
        assert stale(net)
        change(net)
        assert not stale(net)
    assert not stale(net.to(torch.device("cpu")))


def trained(stage: int, folder: str) -> list:
    """On a rank: train with and without, a non-finite step among the others, save, load elsewhere; weights after each step."""
    from pathlib import Path
    from types import SimpleNamespace

    import torch.distributed as dist

    from trainer import checkpoint
    from trainer.checkpoint_writer import CheckpointWriter
    from trainer.engine import Engine, start_process_group

    rank, world = start_process_group()
    config = {
        "engine__zero_stage": stage,
        "engine__activations": "bf16",
        "optimizer__nonfinite": "skip",
        "micro_batch": 3,
    }
    results = []
    for prepare in (True, False):
        make = sharded.config_of(**config, engine__prepare_weights=prepare)
        engine, seen = Engine(make, sharded.build(make)), []
        assert (prepared.num_bytes(engine.module) > 0) is prepare and engine.micro_steps == 2
        assert not prepare or engine.held_bytes()["weights"] > 4 * engine.num_parameters()
        for step in range(4):
            for start in range(rank * 6, rank * 6 + 6, 3):
                loss = sharded.losses_of(engine.denoiser, step, slice(start, start + 3))
                if step == 1 and rank == 1:
                    loss = loss + engine.module.unet.out_gain.sum() * float("nan")
                engine.backward(loss)
            engine.step(sharded.rate(step) + 0.001, (step + 1) * sharded.BATCH)
            seen.append({n: p.detach().clone() for n, p in engine.module.named_parameters()})
            assert not prepare or not stale(engine.module), (step, stale(engine.module))
        if prepare:
            run = Path(folder)
            nothing_pending = SimpleNamespace(wait_durable=lambda: None)
            writer = CheckpointWriter(run, engine, dist.new_group(backend="gloo"), nothing_pending, keep_last=1)
            writer.save(48, 1, {})
            writer.wait()
            fresh = sharded.config_of(**config, seed=1)
            other = Engine(fresh, sharded.build(fresh))
            before = other.module.unet.out_conv.weight.detach().clone()
            checkpoint.restore(checkpoint.choose(run, print), other)
            assert not stale(other.module) and not torch.equal(before, other.module.unet.out_conv.weight)
            other._deepspeed.destroy()
        results.append(seen)
        engine._deepspeed.destroy()
    return results


@pytest.mark.parametrize("stage", [2, pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow)])
def test_training_is_the_same_bit_for_bit_and_never_stale(stage, tmp_path):
    for ahead, plain in on_ranks(2, trained, stage, str(tmp_path)):
        for step, (a, b) in enumerate(zip(ahead, plain, strict=True)):
            assert all(torch.equal(a[n], b[n]) for n in a), step
        moved = [any(not torch.equal(x[n], y[n]) for n in x) for x, y in zip(ahead, ahead[1:])]
        assert moved == [False, True, True]  # the second step was skipped
