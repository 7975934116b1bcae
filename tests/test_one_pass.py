"""One pass over memory is the same step as the plain torch one: rows cut anywhere, masked, any number of averages, each device."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import native
from models.magnitude import EPS
from tests import test_engine
from tests.gloo import on_ranks
from trainer import one_pass
from trainer.ema import ShardedEma
from trainer.fragments import Fragment
from trainer.optimizer import MagnitudeAdam

# (rows, row length, first element, last element): whole tensors, and parts that begin and end inside of rows, or lie within one
TENSORS = [(5, 45, 0, 225), (4, 33, 17, 120), (3, 70, 75, 130), (3, 1700, 0, 5100), (1, 1, 0, 1), (6, 16, 16, 96),
           (5, 31, 2, 153)]  # fmt: skip
PLAIN = (4, 6)  # have no rows: a gain, and a weight that is not normalised
OTHERS = 5  # elements of other tensors behind each
CHUNK = 64  # elements at which such a weight is cut
CASES = [((0.05, 0.10), ()), ((), ()), ((0.05, 0.10, 0.2), (2, 3))]  # tracked lengths, steps with a non-finite gradient


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(one_pass, "CHUNK", CHUNK)


def trained(device: str, one_pass: bool, sigma_rel=(0.05, 0.10), poisoned=(), policy="skip", steps=5):
    """Return masters, both moments and averages after some steps on pieces of tensors."""
    generator = torch.Generator().manual_seed(0)
    flats, fragments = [], []
    for i, (rows, n, first, last) in enumerate(TENSORS):
        flat = torch.randn(last - first + 3 + OTHERS, generator=generator).to(device)
        parameter = torch.nn.Parameter(flat)
        flats.append(parameter)
        master = parameter.detach()[3:-OTHERS]  # not aligned
        fragments.append(Fragment(f"t{i}", (rows, n), first, master, 0 if i in PLAIN else n, parameter, 3))
    adam = torch.optim.Adam(flats, lr=0.0, betas=(0.9, 0.99), eps=1e-8, fused=True)
    ema = ShardedEma(fragments, sigma_rel) if sigma_rel else None
    optimizer = MagnitudeAdam(adam, fragments, ema, policy, one_pass=one_pass)
    assert len(optimizer.layout.cut_lengths) == 3 and len(optimizer.layout.whole) == 4
    beginning = [p.detach().clone() for p in flats]
    for step in range(1, steps + 1):
        for p in flats:
            p.grad = torch.randn(p.shape, generator=generator).to(device)
        if step in poisoned:
            flats[0].grad[11] = float("nan")
        optimizer.schedule(0.02 / step, 1 / 7, 64 * step, 64)
        adam.step()
    moments = [f.state(adam, key) for key in ("exp_avg", "exp_avg_sq") for f in fragments]
    averages = [t for average in ema.averages for t in average] if ema else []
    if one_pass:
        for flat, before in zip(flats, beginning, strict=True):
            changed = [
                t != 0 for t in (flat.detach() - before, *(adam.state[flat][key] for key in ("exp_avg", "exp_avg_sq")))
            ]
            assert not any(c[:3].any() or c[-OTHERS:].any() for c in changed), "what lies beside was written to"
    counts = [s["step"].cpu() for s in adam.state.values()]
    return [t.cpu() for t in [*(f.master for f in fragments), *moments, *averages]], counts, optimizer


def check_same(device: str) -> None:
    for sigma_rel, poisoned in CASES:
        (plain, plain_counts, _), (fused, counts, optimizer) = (
            trained(device, one_pass, sigma_rel, poisoned) for one_pass in (False, True)
        )
        assert counts == plain_counts and float(counts[0]) == 5 - len(poisoned)
        for mine, expected in zip(fused, plain, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
        for rows in optimizer.layout.whole:
            rms = rows.of(rows.fragment.master).square().mean(1).sqrt()
            assert float((rms - (1 - EPS)).abs().max()) < 1e-4 or poisoned


def test_on_a_cpu():
    check_same("cpu")


def test_segments_are_short_and_cover_every_element_once():
    _, _, optimizer = trained("cpu", False, steps=1)
    found = one_pass.segments(optimizer.layout, optimizer.fragments)
    covered = [torch.zeros(f.master.numel(), dtype=torch.int64) for f in optimizer.fragments]
    for fragment, begin, n, kind, _ in found.tolist():
        covered[fragment][begin : begin + n] += 1
        assert kind != one_pass.PLAIN or n <= CHUNK
    assert all(c.eq(1).all() for c in covered) and (found[:, 3] == one_pass.PLAIN).sum() == 1 + 3


def test_a_masked_step_moves_the_averages_alone():
    before, _, _ = trained("cpu", True, steps=2)
    after, _, _ = trained("cpu", True, steps=3, poisoned=(3,))
    still = 3 * len(TENSORS)
    assert all(torch.equal(a, b) for a, b in zip(before[:still], after[:still], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before[still:], after[still:], strict=True))


def test_it_repeats_bit_for_bit():
    one, other = (trained("cpu", True)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def sharded_training(stages: list[int]) -> list:
    """On one rank: for each ZeRO stage, the masters' pieces after training in one pass."""
    from trainer.engine import Engine, start_process_group
    from trainer.one_pass import OnePass

    _, world = start_process_group()
    results = []
    for stage in stages:
        config = test_engine.config_of(engine__zero_stage=stage, optimizer__one_pass="true")
        engine = Engine(config, test_engine.build(config))
        assert isinstance(engine.optimizer._one_pass, OnePass)
        for step in range(test_engine.STEPS):
            test_engine.one_step(engine, step)
        pieces = [(f.name, f.start, f.master.clone()) for f in engine.fragments]
        averages = [[t.clone() for t in a] for a in engine.ema.averages]
        results.append((pieces, averages, len(engine.optimizer.layout.cut_lengths), test_engine.weights_of(engine)))
        engine._deepspeed.destroy()
    return results


def test_sharded_equals_whole():
    weights, averages = test_engine.whole_training()
    stages = [0, 1, 2, 3]
    for results in on_ranks(2, sharded_training, stages):
        for stage, (pieces, mine, cut_rows, seen) in zip(stages, results, strict=True):
            assert cut_rows or not stage, "no row was cut"
            assert all(test_engine.difference(p, weights[name]) < 5e-6 for name, p in seen.items()), stage
            for j, (name, start, piece) in enumerate(pieces):
                for average, expected in zip(mine, averages, strict=True):
                    part = expected[name].reshape(-1)[start : start + len(piece)]
                    assert float((average[j] - part).abs().max()) < 5e-6 * float(expected[name].abs().max()), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    check_same("cuda")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton (pip install '.[test-extras]')")
@pytest.mark.extras
def test_the_triton_kernel_in_its_interpreter():
    """The kernel of GPUs on CPU tensors: Triton decides when it is imported, hence a process of its own."""
    command = [sys.executable, "-c", "from tests.test_one_pass import interpreted; interpreted()"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def interpreted() -> None:
    """Compare the kernel with the plain step where Triton interprets."""
    from trainer import one_pass_triton

    class Interpreted(one_pass.OnePass):
        def __init__(self, optimizer):
            super().__init__(optimizer)
            self.on_gpu, self.kernel = True, one_pass_triton.Kernel(self.segments)

    import trainer.optimizer

    trainer.optimizer.OnePass = Interpreted
    one_pass.CHUNK = CHUNK
    # several blocks to a row here too, and rows of both lengths
    one_pass_triton.SHORT, one_pass_triton.LONG, one_pass_triton.LONG_FROM = (64, 8), (128, 32), 60
    check_same("cpu")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton (pip install '.[test-extras]')")
@pytest.mark.extras
def test_the_triton_kernel_compiles_for_hopper(tmp_path):
    """Without a GPU: to the machine code of one."""
    import triton
    import triton.backends.nvidia as nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from trainer.one_pass_triton import LONG, SHORT, _step

    kinds = ["*i64", "*i64", "*fp32", "*fp64", "*fp32", "*fp32", "i32", "i32", "fp32", "fp32", "fp32", "fp32", "fp32"]
    signature = dict(zip(_step.arg_names, kinds, strict=False)) | {"AVERAGES": "constexpr", "BLOCK": "constexpr"}
    for block, warps in (SHORT, LONG):
        constants = {(_step.arg_names.index("AVERAGES"),): 2, (_step.arg_names.index("BLOCK"),): block}
        source = ASTSource(_step, signature, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        assert "cubin" in compiled.asm
        # how a multiprocessor's 64 Ki registers limit what is in flight: no more than 64 a thread, none spilt
        program = tmp_path / "one_pass.ptx"
        program.write_text(compiled.asm["ptx"])
        assembler = next((Path(nvidia.__file__).parent / "bin").glob("ptxas*"))
        command = [assembler, "-v", "-arch=sm_90a", program, "-o", tmp_path / "one_pass.cubin"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        assert int(re.search(r"Used (\d+) registers", told)[1]) <= 64 and " 0 bytes spill stores" in told, told
        assert "L2::evict_last" in compiled.asm["ptx"] and "L2::evict_first" in compiled.asm["ptx"]


@pytest.mark.parametrize("length", [1, 15, 16, 127, 128, 129, 1000, 4099])
def test_norms_on_a_cpu_miss_no_entry(length):
    native.load(Path(one_pass.__file__).with_suffix(".cpp"))
    tensor = torch.randn(length)
    torch.testing.assert_close(torch.ops.evenkeel.norms([tensor])[0], torch.linalg.vector_norm(tensor))
    for at in {0, length // 2, length - 1}:
        for bad in (float("nan"), float("inf")):
            spoilt = tensor.clone()
            spoilt[at] = bad
            assert not torch.ops.evenkeel.norms([tensor, spoilt])[1].isfinite()
