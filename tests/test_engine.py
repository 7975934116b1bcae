"""Sharded equals whole: any ZeRO stage on any number of ranks trains the same network as one process without ZeRO."""

import numpy as np
import pytest
import torch

from tests.gloo import on_ranks
from trainer.ema_profiles import beta, gamma_from_sigma_rel

# odd widths, so that partitions cut through rows
MODEL = {
    "family": "edm2",
    "resolution": 8,
    "channels": 2,
    "label_dim": 3,
    "model_channels": 12,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "channels_per_head": 12,
    "logvar_channels": 16,
}
BATCH, STEPS = 12, 6  # of which the first two warm up, and the last decays


def config_of(**changes):
    from trainer.config import from_dict

    plain = {
        "run": "unused",
        "duration_images": 1200,
        "global_batch": BATCH,
        "micro_batch": 2,
        "data": {"path": "unused"},
        "model": MODEL,
        "optimizer": {"eps": 1e-3},  # at 1e-8 Adam's first steps are sign-like: rounding would decide
        "lr": {"ref_lr": 0.02, "decay_images": 60, "rampup_images": 24},
        "ema": {"sigma_rel": [0.05, 0.10]},
    }
    for key, value in changes.items():
        group, _, name = key.partition("__")
        if name:
            plain.setdefault(group, {})[name] = value
        else:
            plain[group] = value
    return from_dict(plain)


def inputs(step: int):
    g = torch.Generator().manual_seed(step)
    x, noise = torch.randn(BATCH, 2, 8, 8, generator=g), torch.randn(BATCH, 2, 8, 8, generator=g)
    return x * 0.5, torch.randint(3, (BATCH,), generator=g), torch.rand(BATCH, generator=g) + 0.2, noise


def rate(step: int) -> float:
    from trainer.lr import learning_rate

    return learning_rate(step * BATCH, 0.02, 60, 24)


def losses_of(denoiser, step: int, part: slice):
    from trainer.loss import denoising_loss

    x, labels, sigma, noise = inputs(step)
    return denoising_loss(denoiser, x[part], labels[part], sigma[part], noise[part])[0].sum()


def build(config):
    from trainer.engine import build_denoiser

    module = build_denoiser(config)
    with torch.no_grad():  # gains are 0 at the start, which would hide most gradients
        for name, p in module.named_parameters():
            if p.shape == (1,):
                p.fill_(0.4 + len(name) / 100)
    return module


def whole_training():
    """One process, no DeepSpeed: (weights, averages) after STEPS steps."""
    from trainer.ema import ShardedEma
    from trainer.fragments import whole_fragments
    from trainer.optimizer import MagnitudeAdam

    config = config_of()
    module = build(config)
    fragments = whole_fragments(module)
    adam = torch.optim.Adam(module.parameters(), betas=(0.9, 0.99), eps=1e-3, fused=True)
    ema = ShardedEma(fragments, [0.05, 0.10])
    optimizer = MagnitudeAdam(adam, fragments, ema)
    for step in range(STEPS):
        adam.zero_grad()
        losses_of(module, step, slice(0, BATCH)).backward()
        optimizer.schedule(rate(step), 1 / BATCH, (step + 1) * BATCH, BATCH)
        adam.step()
    weights = {n: p.detach().clone() for n, p in module.named_parameters()}
    averages = [{f.name: t.view(f.shape) for f, t in zip(fragments, a, strict=True)} for a in ema.averages]
    return weights, averages


def weights_of(engine) -> dict:
    """The parameters as the forward sees them, whole, also where they are partitioned."""
    import deepspeed

    parameters = dict(engine.module.named_parameters())
    partitioned = [p for p in parameters.values() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned):
        return {n: p.detach().clone() for n, p in parameters.items()}


def sharded_training(cases: list[tuple[int, int]]) -> list:
    """On one rank: for each (stage, micro batch) this rank's view of weights and pieces of the averages."""
    from trainer.engine import Engine, start_process_group

    rank, world = start_process_group()
    results = []
    for stage, micro in cases:
        engine = Engine(config_of(engine__zero_stage=stage, micro_batch=micro), build(config_of()))
        part = BATCH // world
        for step in range(STEPS):
            for start in range(rank * part, (rank + 1) * part, micro):
                engine.backward(losses_of(engine.denoiser, step, slice(start, start + micro)))
            engine.step(rate(step), (step + 1) * BATCH)
        results.append(
            {
                "weights": weights_of(engine),
                "pieces": [(f.name, f.start, f.master.clone()) for f in engine.fragments],
                "averages": [[t.clone() for t in a] for a in engine.ema.averages],
                "cut_rows": len(engine.optimizer.layout.cut_lengths),
                "deviation": float(engine.optimizer.row_rms_deviation()),
                "held": engine.held_bytes(),
                "clip": engine._deepspeed.gradient_clipping(),
            }
        )
        engine._deepspeed.destroy()
    return results


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(scope="module")
def whole():
    torch.set_num_threads(1)
    return whole_training()


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_sharded_equals_whole(world, whole):
    weights, averages = whole
    cases = [(0, 2), (1, 2), (2, 1), (1, BATCH // world), (3, 2)]
    ranks = on_ranks(world, sharded_training, cases)
    for i, case in enumerate(cases):
        covered = {name: np.zeros(p.numel(), int) for name, p in weights.items()}
        for rank in ranks:
            result = rank[i]
            for name, p in result["weights"].items():
                assert difference(p, weights[name]) < 5e-6, (case, name)
            for j, (name, start, piece) in enumerate(result["pieces"]):
                if case[0] or rank is ranks[0]:
                    covered[name][start : start + len(piece)] += 1
                for mine, reference in zip(result["averages"], averages, strict=True):
                    scale = reference[name].abs().max()
                    expected = reference[name].reshape(-1)[start : start + len(piece)]
                    assert float((mine[j] - expected).abs().max() / scale) < 5e-6, (case, name)
            assert result["deviation"] <= 1e-5, case
            assert result["clip"] == 0.0, "DeepSpeed clips at 1.0 unless told"
            assert not case[0] or world == 1 or result["cut_rows"] > 0, "no row was cut: widen the test"
        assert all((c == 1).all() for c in covered.values()), case
        parts = 1 if case[0] == 0 else world
        total = 4 * sum(p.numel() for p in weights.values())
        expected = {"weights": total / (parts if case[0] == 3 else 1), "masters": total / parts if case[0] else 0}
        expected |= {"moments": 2 * total / parts, "averages": 2 * total / parts}
        for kind, size in expected.items():  # with padding, and at stage 3 the small ones on every rank
            assert 0.97 * size <= max(rank[i]["held"][kind] for rank in ranks) <= 1.02 * size, (case, kind)


def waits_for_the_device(stages: list[int]) -> list[int]:
    """On one rank: how often DeepSpeed waits for its whole device in two steps of two micro-batches, after three others."""
    from deepspeed.accelerator import get_accelerator

    from trainer.engine import Engine, start_process_group

    start_process_group()
    counts, calls, accelerator = [], [], get_accelerator()
    accelerator.synchronize = lambda *_: calls.append(1)
    for stage in stages:
        engine = Engine(config_of(engine__zero_stage=stage, micro_batch=6), build(config_of()))
        for step in range(5):
            if step == 3:  # DeepSpeed's own clock begins at the third
                calls.clear()
            for start in (0, 6):
                engine.backward(losses_of(engine.denoiser, step, slice(start, start + 6)))
            engine.step(rate(step), (step + 1) * BATCH)
        counts.append(len(calls))
        engine._deepspeed.destroy()
    return counts


@pytest.mark.parametrize("stages", [[1], pytest.param([0, 2, 3], marks=pytest.mark.slow)])
def test_no_step_waits_for_the_device(stages):
    assert on_ranks(1, waits_for_the_device, stages) == [[0] * len(stages)]


def overlapped_training(cases: list[tuple[int, int]]) -> list:
    """As on GPUs, where each rank reduces while its backward goes on: the order of things, without their streams."""
    from trainer import zero

    alone, zero.BUCKET_ELEMENTS = zero.settings, 2000  # many messages in one backward
    zero.settings = lambda config, parameters, micro_steps, _: alone(config, parameters, micro_steps, True)
    return sharded_training(cases)


def test_overlapping_the_reduction_changes_nothing(whole):
    cases = [(2, 2), (3, 2)]
    for results in on_ranks(2, overlapped_training, cases):
        for case, result in zip(cases, results, strict=True):
            assert all(difference(p, whole[0][name]) < 5e-6 for name, p in result["weights"].items()), case


def nonfinite_steps(cases: list[tuple[int, str]]) -> list[dict]:
    """Two ranks, a NaN in one tensor's gradient on rank 1 in the second of four steps."""
    from trainer.engine import Engine, start_process_group

    rank, world = start_process_group()
    results = []
    for stage, policy in cases:
        config = config_of(engine__zero_stage=stage, micro_batch=6, optimizer__nonfinite=policy)
        engine = Engine(config, build(config_of()))
        seen, known, averages = [], [], []
        for step in range(4):
            part = slice(rank * 6, rank * 6 + 6)
            loss = losses_of(engine.denoiser, step, part)
            if step == 1 and rank == 1:
                loss = loss + engine.module.unet.out_gain.sum() * float("nan")
            engine.backward(loss)
            engine.step(rate(step) + 0.001, (step + 1) * BATCH)
            known.append(engine.optimizer.nonfinite_steps())
            seen.append(weights_of(engine))
            averages.append([(f.master.clone(), t.clone()) for f, t in zip(engine.fragments, engine.ema.averages[0])])
        bad = engine.optimizer.bad_tensors()
        results.append({"weights": seen, "known": known, "bad": bad, "averages": averages})
        engine._deepspeed.destroy()
    return results


def test_nonfinite_gradient_never_reaches_the_weights():
    cases = [(0, "stop"), (1, "stop"), (1, "zero"), (2, "skip"), (3, "stop"), (3, "skip"), (3, "zero")]
    ranks = on_ranks(2, nonfinite_steps, cases)
    for i, (stage, policy) in enumerate(cases):
        for r in (rank[i] for rank in ranks):
            before, at, after = r["weights"][0], r["weights"][1], r["weights"][2]
            assert all(torch.isfinite(p).all() for p in r["weights"][-1].values())
            assert r["known"] == [0, 0, 1, 1], "every rank knows it one step later"
            moved = [not torch.equal(at[n], before[n]) for n in at]
            goes_on = [not torch.equal(after[n], at[n]) for n in at]
            assert any(moved) == (policy == "zero") and any(goes_on) == (policy != "stop"), (stage, policy)
            if policy == "skip":  # the clock and, with it, the averages go on
                weight = 1 - float(beta(2 * BATCH, BATCH, gamma_from_sigma_rel(0.05)))
                for (_, was), (master, now) in zip(r["averages"][0], r["averages"][1], strict=True):
                    assert torch.allclose(now, was + weight * (master - was), rtol=0, atol=1e-6)
                assert any(not torch.equal(a[1], b[1]) for a, b in zip(r["averages"][0], r["averages"][1]))
        assert {n for rank in ranks for n in rank[i]["bad"]} == {"unet.out_gain"}, (stage, policy)


def one_step(engine, step: int) -> None:
    part = BATCH // engine.world
    for start in range(engine.rank * part, (engine.rank + 1) * part, engine.config.micro_batch):
        engine.backward(losses_of(engine.denoiser, step, slice(start, start + engine.config.micro_batch)))
    engine.step(rate(step), (step + 1) * BATCH)


def moved_between_stages(folder: str, cases: list[tuple[int, int]]) -> list:
    """Save at one stage, load at another: the pieces of all state on this rank at both, and after one more step."""
    from pathlib import Path
    from types import SimpleNamespace

    import torch.distributed as dist

    from trainer import checkpoint
    from trainer.checkpoint_writer import CheckpointWriter
    from trainer.engine import Engine, start_process_group

    rank, world = start_process_group()
    group = dist.new_group(backend="gloo")
    nothing_pending = SimpleNamespace(wait_durable=lambda: None)

    def pieces(engine):
        return [(kind, name, start, t.clone()) for kind, name, start, t in checkpoint.state(engine, engine.owned())]

    results = []
    for saved, loaded in cases:
        run = Path(folder) / f"{saved}{loaded}"
        engine = Engine(config_of(engine__zero_stage=saved), build(config_of()))
        for step in range(2):
            one_step(engine, step)
        writer = CheckpointWriter(run, engine, group, nothing_pending, keep_last=1)
        writer.save(2 * BATCH, 1, {})
        writer.wait()
        here = [pieces(engine)]
        one_step(engine, 2)
        here.append(pieces(engine))
        engine._deepspeed.destroy()
        engine = Engine(config_of(engine__zero_stage=loaded, seed=1), build(config_of(seed=1)))
        assert checkpoint.restore(checkpoint.choose(run, print), engine)[0] == 2 * BATCH
        here.append(pieces(engine))
        one_step(engine, 2)
        here.append(pieces(engine))
        results.append(here)
        engine._deepspeed.destroy()
    return results


def assembled(parts: list) -> dict:
    found: dict = {}
    for kind, name, start, tensor in (piece for part in parts for piece in part):
        found.setdefault((kind, name), []).append((start, tensor))
    return {key: torch.cat([t for _, t in sorted(p, key=lambda x: x[0])]) for key, p in found.items()}


@pytest.mark.parametrize(
    "cases", [[(3, 3), (1, 3)], pytest.param([(3, 1), (2, 3), (3, 0), (0, 2), (1, 1)], marks=pytest.mark.slow)]
)
def test_state_moves_between_stages_bit_for_bit(cases, tmp_path):
    ranks = on_ranks(2, moved_between_stages, str(tmp_path), cases)
    for i, (saved, loaded) in enumerate(cases):
        before, went_on, after, resumed = (assembled([rank[i][moment] for rank in ranks]) for moment in range(4))
        assert before.keys() == after.keys() and len(before) > 5 * 30
        assert all(torch.equal(before[key], after[key]) for key in before), (saved, loaded)
        for key in went_on:
            if saved == loaded:
                assert torch.equal(went_on[key], resumed[key]), key
            assert float((went_on[key] - resumed[key]).abs().max()) <= 5e-6 * float(went_on[key].abs().max()), key
