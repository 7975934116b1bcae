"""Every fused path is its plain twin on the CPU, on fresh inputs: compiled, recomputed, dropped out, captured, drawn, padded.

What is marked gpu runs there (`pytest -m gpu`); the same laws on a CPU's own compiled paths are slow. Errors are relative, in norm.
"""

import os
import time

import pytest
import torch
import torch.nn.functional as F

from models import magnitude, prepared
from models.denoiser import build
from models.magnitude import normalize_rows_, padded_conv2d
from trainer import compilation, draws
from trainer.loss import denoising_loss

MODEL = {"resolution": 16, "channels": 4, "label_dim": 3, "model_channels": 32, "channel_mult": [1], "num_blocks": 1,
         "attn_resolutions": [16], "channels_per_head": 32, "logvar_channels": 8}  # fmt: skip
BOUNDS = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}
WINOGRAD = 5e-5  # a network compiled for a CPU convolves by it: 1e-5 of the largest output for each layer
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])
CPU = pytest.param("cpu", marks=pytest.mark.slow)
CPU_COMPILED = pytest.param("cpu", True, marks=pytest.mark.slow)
ON_GPU = [pytest.param("cuda", fused, marks=[pytest.mark.gpu, NO_GPU]) for fused in (False, True)]


@pytest.fixture(autouse=True)
def exact_convolutions():
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the error of each gradient; those of gains together, for one alone is a sum that may cancel to anything."""
    gains = [n for n, g in expected.items() if g.numel() == 1]
    result = {n: error(found[n], g) for n, g in expected.items() if g.numel() > 1}
    return result | {"gains": error(*(torch.cat([of[n].cpu() for n in gains]) for of in (found, expected)))}


def network(device: str, activations="fp32", dropout=0.0, checkpointing=False):
    torch.manual_seed(0)
    net = build(MODEL | {"dropout": dropout}, activations, checkpointing).train()
    normalize_rows_(net)
    with torch.no_grad():
        for p in net.parameters():
            if p.shape == (1,):
                p.fill_(0.3)
    return net.to(device)


def step(net, forward, device: str, seed: int, dropout=0.0):
    """Return losses and gradients of a fresh batch, the same on every device."""
    positions = torch.arange(4) + 1000 * seed
    shape = (4, 16, 16)
    x, noise = (draws.normal(seed, name, positions, shape) for name in ("data", "noise"))
    sigma, labels = draws.uniform(seed, "sigma", positions) + 0.2, torch.tensor([0, 1, 2, -1])

    def mask(layer, of):
        # a run has one seed; a number that changed would become a symbol, for which Inductor writes wrong C++ (torch 2.13)
        return draws.at_least(dropout, 5, f"dropout {layer}", positions.to(device), tuple(of[1:]))

    x, noise, sigma, labels = (t.to(device) for t in (0.5 * x, noise, sigma, labels))
    for p in net.parameters():
        p.grad = None
    losses, _ = denoising_loss(forward, x, labels, sigma, noise, dropout_mask=mask if dropout else None)
    losses.sum().backward()
    return losses, {n: p.grad for n, p in net.named_parameters()}


WAYS = [(kind, *way) for kind in BOUNDS for way in ((0.0, False), (0.2, True))]
MARKED = [pytest.param("cuda", *way, marks=[pytest.mark.gpu, NO_GPU]) for way in WAYS]


@pytest.mark.parametrize(
    ("device", "activations", "dropout", "checkpointing"),
    [pytest.param("cpu", "fp32", 0.2, True, marks=pytest.mark.slow), *MARKED],  # a minute of compiling: one way on CPUs
)
def test_a_compiled_network_is_the_eager_one(device, activations, dropout, checkpointing):
    fresh = time.time_ns() % 100_000  # told where it fails
    plain, fused = network("cpu", activations, dropout), network(device, activations, dropout, checkpointing)
    bound = max(BOUNDS[activations], WINOGRAD if device == "cpu" else 0)
    compiled = compilation.compile_forward(fused)
    for seed in (fresh, fresh + 1):
        losses, gradients = step(plain, plain, "cpu", seed, dropout)
        found, its_gradients = step(fused, compiled, device, seed, dropout)
        assert error(found, losses) < bound, seed
        for name, of_gradient in errors(its_gradients, gradients).items():
            # eager bf16 against fp32, on a CPU, over seeds: 3e-4 of the losses, 1.1e-2 of the worst gradient (fp16: 9e-5, 2.8e-3;
            # fp32: 7e-7 between two algorithms); two roundings, of two devices, are root two times that
            assert of_gradient < (bound if activations == "fp32" else 3 * bound), (seed, name)


@pytest.mark.parametrize("activations", ["fp32", "bf16"])
def test_images_stay_channels_last(activations):
    """Into and out of every convolution: tensor cores and oneDNN would transpose others."""
    seen, net = [], network("cpu", activations)

    def look(layer, given, found):
        seen.extend(
            t.is_contiguous(memory_format=torch.channels_last) for t in (*given, found) if t is not None and t.ndim == 4
        )

    for layer in net.modules():
        if isinstance(layer, magnitude.MPConv):
            layer.register_forward_hook(look)
    step(net, net, "cpu", 1)
    assert len(seen) > 20 and all(seen)


@pytest.mark.parametrize(("device", "fused"), [CPU_COMPILED, *ON_GPU])
def test_prepared_weights_are_the_cast_ones(device, fused):
    """While they are refreshed between batches, as an optimizer would; on CPUs eager mode is bitwise (test_prepared.py)."""
    fresh = time.time_ns() % 100_000  # told where it fails
    plain, ahead = network("cpu", "bf16"), network(device, "bf16")
    prepared.prepare_(ahead, torch.bfloat16)
    forward = compilation.compile_forward(ahead) if fused else ahead
    for seed in (fresh, fresh + 1):
        (losses, expected), (found, gradients) = step(plain, plain, "cpu", seed), step(ahead, forward, device, seed)
        assert error(found, losses) < BOUNDS["bf16"], seed
        whole = [torch.cat([g.detach().cpu().flatten() for g in all_.values()]) for all_ in (gradients, expected)]
        assert error(*whole) < BOUNDS["bf16"] and all(g.is_contiguous() for g in gradients.values()), seed
        for net in (plain, ahead):
            with torch.no_grad():
                for i, p in enumerate(net.parameters()):
                    p.mul_(1.5 if i % 2 else 0.8)
            prepared.refresh_(net)


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_compiled_clip_is_clamping(device, kind):
    """In passing of a concatenation and alone, where much is clipped: values, and gradients by masks made of the output."""
    bound = 1.5

    def chain(a, b, clipped, joined):
        return F.silu(joined(a, b)) + clipped(b).mean(1, keepdim=True)

    def ours(a, b):
        return chain(a, b, lambda x: magnitude.clip(x, bound), lambda a, b: magnitude.mp_cat(a, b, 0.5, bound))

    def plain(a, b):
        def clamped(x):
            return x.clamp(-bound, bound)

        return chain(a, b, clamped, lambda a, b: magnitude.mp_cat(clamped(a), b, 0.5))

    inputs = [torch.randn(2, c, 8, 8) * 1.5 for c in (16, 8)]
    # what lies on the bound, or within rounding of it, has no gradient here
    leaves = [torch.where((x.abs() - bound).abs() < 0.05, 0.5, x).to(kind).requires_grad_() for x in inputs]
    others = [x.detach().to(device).requires_grad_() for x in leaves]
    found, expected = torch.compile(ours, fullgraph=True)(*others), plain(*leaves)
    way = torch.randn_like(expected)
    limit = BOUNDS["fp32" if kind == torch.float32 else "bf16"]
    assert error(found, expected) < limit
    wanted = torch.autograd.grad(expected, leaves, way)
    for mine, gradient in zip(torch.autograd.grad(found, others, way.to(device)), wanted, strict=True):
        assert error(mine, gradient) < limit


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize(("ins", "outs"), [(5, 16), (16, 4), (5, 3), (8, 8)])
def test_padded_channels_change_nothing(device, ins, outs):
    for dtype in ("fp32", "bf16"):
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        leaves = [torch.randn(s, dtype=kind, requires_grad=True) for s in ((2, ins, 8, 8), (outs, ins, 3, 3))]
        others = [t.detach().to(device).requires_grad_() for t in leaves]
        expected, found = F.conv2d(*leaves, padding=1), padded_conv2d(*others, (1, 1))
        assert found.shape == expected.shape and error(found, expected) < BOUNDS[dtype]
        way = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, leaves, way)
        for mine, gradient in zip(torch.autograd.grad(found, others, way.to(device)), wanted, strict=True):
            assert error(mine, gradient) < BOUNDS[dtype]


def examples(folder, device: str):
    from trainer.examples import Examples
    from trainer.preset_config import compose
    from trainer.timed_loop import write_samples

    if not (folder / "data").exists():
        write_samples(folder / "data", 32, (8, 16, 16))
    config = compose("xxs", [f"data.path={folder}/data", "model.resolution=16"], 4, device == "cuda")
    return Examples(config, torch.device(device))


@pytest.mark.parametrize("device", [CPU, GPU])
def test_one_compiled_draw_is_the_plain_one(device, tmp_path):
    plain, fused = examples(tmp_path, "cpu"), examples(tmp_path, device)
    fused.compile_draw()
    for first in (time.time_ns() % 10**12, 3):
        where = torch.arange(first, first + 4)
        stored = torch.randn(4, 8, 16, 16).half()
        for mine, expected in zip(
            fused.draw(stored.to(device), where.to(device)), plain._draw(stored, where), strict=True
        ):
            assert float((mine.cpu() - expected).abs().max()) < 1e-5
    for e in (plain, fused):
        e.source.close()


@pytest.mark.parametrize("device", [GPU])
def test_examples_copied_on_their_own_stream_are_the_same(device, tmp_path):
    """While the device is busy, so that a copy that nobody waits for would be seen."""
    import numpy as np

    plain, other = examples(tmp_path, "cpu"), examples(tmp_path, device)
    work = torch.randn(2048, 2048, device=device)
    for first in range(0, 80, 4):
        where = np.arange(first, first + 4)
        work = (work @ work).clamp(-1, 1)
        mine, expected = other.at(where, where + 4), plain.at(where, where + 4)
        for name in ("latents", "noise", "sigma", "labels"):
            assert error(getattr(mine, name), getattr(expected, name)) < 1e-5, (first, name)


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_captured_graphs_leave_nothing_to_be_overwritten(device, checkpointing):
    """Gradients of several micro-batches, accumulated, and outputs that are looked at later."""
    plain, captured = network("cpu"), network(device, checkpointing=checkpointing)
    forward = compilation.compile_forward(captured, cuda_graphs=True)
    for seed in range(6):  # recorded first, then replayed
        (losses, expected), (found, gradients) = step(plain, plain, "cpu", seed), step(captured, forward, device, seed)
        kept, kept_gradients = found.clone(), {n: g.clone() for n, g in gradients.items()}
        later, _ = step(captured, forward, device, seed + 100)
        assert torch.equal(found, kept) and all(torch.equal(gradients[n], g) for n, g in kept_gradients.items())
        assert error(kept, losses) < BOUNDS["fp32"] and not torch.equal(later, kept)
        assert max(errors(kept_gradients, expected).values()) < BOUNDS["fp32"]


def test_the_compile_cache_lies_in_the_run_directory(tmp_path, monkeypatch):
    for key in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_FX_GRAPH_CACHE"):
        monkeypatch.delenv(key, raising=False)
    compilation.keep_cache(tmp_path, 3)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compile_cache" / "rank00003" / "inductor")
    compilation.keep_cache(tmp_path / "other", 4)
    assert os.environ["TRITON_CACHE_DIR"].startswith(str(tmp_path / "compile_cache")), "what is set stays"
    for key in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_FX_GRAPH_CACHE"):
        monkeypatch.delenv(key)
