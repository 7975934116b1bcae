"""What a checkpoint holds and what a non-finite gradient does, for every engine there is: ranks, ZeRO stages, weights of 16 bits.

The laws are those of test_checkpoint.py and test_engine.py, whose runs are of fp32 weights and of one micro-batch a step.
"""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.gloo import on_ranks
from tests.test_engine import BATCH, assembled, build, config_of, losses_of, one_step, rate, weights_of
from tests.test_resume import state_of

ENGINES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16"), (3, "bf16")]


def engine_of(stage: int, weights: str, **changes):
    from trainer.engine import Engine

    config = config_of(engine__zero_stage=stage, engine__weights=weights, micro_batch=2, **changes)
    return Engine(config, build(config))


def held(engine) -> list:
    from trainer import checkpoint

    return [(kind, name, start, t.clone()) for kind, name, start, t in checkpoint.state(engine, engine.owned())]


def saved(folder: str, engines: list) -> list:
    """On one rank, for each engine: two steps, a checkpoint, a third step; return the state after it."""
    from trainer.checkpoint_writer import CheckpointWriter
    from trainer.engine import start_process_group

    _, world = start_process_group()
    group = torch.distributed.new_group(backend="gloo") if world > 1 else None
    results = []
    for i, one in enumerate(engines):
        engine = engine_of(*one)
        for step in range(2):
            one_step(engine, step)
        nothing_pending = SimpleNamespace(wait_durable=lambda: None)
        writer = CheckpointWriter(Path(folder) / str(i), engine, group, nothing_pending, keep_last=1)
        writer.save(2 * BATCH, 1, {})
        writer.wait()
        one_step(engine, 2)
        results.append(held(engine))
        engine._deepspeed.destroy()
    return results


def loaded(folder: str, runs: int, engines: list) -> list:
    """On one rank, for each checkpoint and engine: the state as loaded, the forward's weights, and the state a step later."""
    from trainer import checkpoint
    from trainer.engine import start_process_group

    start_process_group()
    results = []
    for i, one in itertools.product(range(runs), engines):
        engine = engine_of(*one, seed=1)
        run = Path(folder) / str(i)
        assert checkpoint.restore(checkpoint.choose(run, print), engine)[0] == 2 * BATCH
        found = [held(engine), weights_of(engine)]
        one_step(engine, 2)
        results.append([*found, held(engine)])
        engine._deepspeed.destroy()
    return results


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_state_of_any_engine_is_read_by_any_other_bit_for_bit(tmp_path, world):
    wrote, engines = [(3, "fp32"), (2, "bf16"), (3, "bf16")], [(0, "fp32"), *ENGINES[3:]]
    went_on = on_ranks(2, saved, str(tmp_path), wrote)
    ranks = on_ranks(world, loaded, str(tmp_path), len(wrote), engines)
    for k, ((i, by), to) in enumerate(itertools.product(enumerate(wrote), engines)):
        stored = {
            name: t for name, t in state_of(tmp_path / str(i), 2 * BATCH).items() if not name.startswith("buffer/")
        }
        here = {f"{kind}/{name}": t for (kind, name), t in assembled([rank[k][0] for rank in ranks]).items()}
        assert here.keys() == stored.keys() and len(stored) > 5 * 30
        assert all(torch.equal(here[key], stored[key]) for key in stored), (by, to)
        for name, copy in ranks[0][k][
            1
        ].items():  # the forward's weights are the masters, rounded where they are of 16 bits
            assert torch.equal(copy.flatten(), stored[f"master/{name}"].to(copy.dtype)), (by, to, name)
        if (world, by) == (2, to):
            then, after = (
                assembled(parts) for parts in ([rank[i] for rank in went_on], [rank[k][2] for rank in ranks])
            )
            assert all(torch.equal(then[key], after[key]) for key in then), (by, "goes on bitwise")


def poisoned(cases: list) -> list:
    """On one rank, for each case: four steps of three micro-batches, a NaN on rank 1 in one of those of the second step."""
    from trainer.engine import start_process_group

    rank, _ = start_process_group()
    results = []
    for (stage, weights), policy, when, one_pass in cases:
        engine = engine_of(stage, weights, optimizer__nonfinite=policy, optimizer__one_pass=one_pass)
        masters, known = [], []
        for step, k in itertools.product(range(4), range(3)):
            loss = losses_of(engine.denoiser, step, slice(rank * 6 + 2 * k, rank * 6 + 2 * k + 2))
            if (rank, step, k) == (1, 1, when):
                loss = loss + engine.module.unet.out_gain.sum() * float("nan")
            engine.backward(loss)
            if k == 2:
                engine.step(rate(step) + 0.001, (step + 1) * BATCH)
                known.append(engine.optimizer.nonfinite_steps())
                masters.append(torch.cat([f.master for f in engine.fragments]))
        results.append((masters, known, engine.optimizer.bad_tensors(), float(engine.optimizer.row_rms_deviation())))
        engine._deepspeed.destroy()
    return results


@pytest.mark.slow
def test_a_nonfinite_gradient_of_any_micro_batch_is_known_in_every_engine():
    ways = itertools.cycle(
        [(0, "false"), (2, "true"), (2, "false"), (0, "true"), (1, "false")]
    )  # which micro-batch; one pass
    cases = [(*one, *next(ways)) for one in itertools.product(ENGINES, ("stop", "skip", "zero"))]
    ranks = on_ranks(2, poisoned, cases)
    for i, case in enumerate(cases):
        found, policy = [rank[i] for rank in ranks], case[1]
        assert all(known == [0, 0, 1, 1] for _, known, _, _ in found), case
        assert {name for *_, bad, _ in found for name in bad} == {"unet.out_gain"}, case
        assert all(deviation <= 1e-5 for *_, deviation in found), case
        moved = [any(not torch.equal(m[k + 1], m[k]) for m, *_ in found) for k in range(3)]
        assert moved == [policy == "zero", policy != "stop", policy != "stop"], case
        assert all(torch.isfinite(m[-1]).all() for m, *_ in found), case
