"""Every combination of the engine's options either trains on two ranks or is refused when the config is checked."""

import itertools

import pytest
import torch

from tests.gloo import on_ranks
from tests.test_engine import BATCH, build, config_of, losses_of, rate, weights_of

STAGES, WEIGHTS, ACTIVATIONS = (0, 1, 2, 3), ("fp32", "bf16"), ("fp32", "bf16", "fp16")
KEYS = ("zero_stage", "weights", "activations", "micro_batch", "compile", "activation_checkpointing")
GRID = list(itertools.product(STAGES, WEIGHTS, ACTIVATIONS, (6, 3), ("false", "true"), (False, True)))
# 16-bit weights and activations, accumulation, recomputation, gathered weights: each meets the others once
SAMPLE = [
    (1, "fp32", "fp16", 3, "false", True),
    (2, "bf16", "bf16", 3, "false", False),
    (3, "bf16", "fp16", 3, "false", True),
    (3, "fp32", "fp32", 6, "false", True),
]


def configured(case, **changes):
    plain = dict(zip(KEYS, case, strict=True))
    micro = plain.pop("micro_batch")
    engine = {f"engine__{key}": value for key, value in plain.items()}
    return config_of(micro_batch=micro, optimizer__nonfinite="zero", **engine, **changes)


def is_refused(case) -> bool:
    try:
        configured(case)
    except ValueError as error:
        assert "\n" not in str(error) and "; use " in str(error), "one line with what works"
        return True
    return False


def two_steps(cases: list) -> list:
    """On one rank: the losses, weights and row deviation after two steps of each case."""
    import functools

    from trainer.engine import Engine, start_process_group

    # one graph or an error, as always; without generating code, which takes minutes for each
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    rank, world = start_process_group()
    results = []
    for case in cases:
        torch._dynamo.reset()
        config = configured(case)
        engine = Engine(config, build(config))
        part, losses = BATCH // world, []
        for step in range(2):
            for start in range(rank * part, (rank + 1) * part, config.micro_batch):
                loss = losses_of(engine.denoiser, step, slice(start, start + config.micro_batch))
                losses.append(float(loss.detach()))
                engine.backward(loss)
            engine.step(rate(step) + 0.002, (step + 1) * BATCH)
        weights = {n: w.clone() for n, w in engine.weights().items()}
        seen = weights_of(engine)
        stale = [n for n in weights if not torch.equal(weights[n].to(seen[n].dtype), seen[n])]
        deviation = float(engine.optimizer.row_rms_deviation())
        bits = {str(p.dtype) for p in seen.values()}
        results.append((sum(losses), weights, deviation, stale, bits))
        engine._deepspeed.destroy()
    return results


def whole_two_steps() -> tuple[float, dict]:
    """One process, fp32, one micro-batch."""
    from trainer.fragments import whole_fragments
    from trainer.optimizer import MagnitudeAdam

    module = build(config_of())
    adam = torch.optim.Adam(module.parameters(), betas=(0.9, 0.99), eps=1e-3, fused=True)
    optimizer, total = MagnitudeAdam(adam, whole_fragments(module), None), 0.0
    for step in range(2):
        adam.zero_grad()
        loss = losses_of(module, step, slice(0, BATCH))
        total += float(loss.detach())
        loss.backward()
        optimizer.schedule(rate(step) + 0.002, 1 / BATCH, (step + 1) * BATCH, BATCH)
        adam.step()
    return total, {n: p.detach().clone() for n, p in module.named_parameters()}


def check_cases(cases):
    torch.set_num_threads(1)
    loss, weights = whole_two_steps()
    runs = [case for case in cases if not is_refused(case)]
    for case, *ranks in zip(runs, *on_ranks(2, two_steps, runs, timeout_seconds=1500), strict=True):
        exact = case[1] == case[2] == "fp32"
        assert sum(r[0] for r in ranks) == pytest.approx(loss, rel=1e-6 if exact else 2e-2), case
        for _, found, deviation, stale, bits in ranks:
            assert deviation <= 1e-5 and not stale, case
            assert bits == {"torch.bfloat16" if case[1] == "bf16" else "torch.float32"}, case
            for name, w in found.items():
                tolerance = 5e-6 if exact else 2e-2
                assert float((w - weights[name]).abs().max()) <= tolerance * float(weights[name].abs().max()), (
                    case,
                    name,
                )


def test_a_sample_of_the_grid_trains_like_one_process():
    check_cases(SAMPLE)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_whole_grid_runs_or_is_refused(stage, compiled):
    check_cases([case for case in GRID if (case[0], case[4]) == (stage, compiled)])


def test_what_is_refused_names_what_works():
    refused = [case for case in GRID if is_refused(case)]
    assert {(case[0], case[1]) for case in refused} == {(0, "bf16"), (1, "bf16")}
