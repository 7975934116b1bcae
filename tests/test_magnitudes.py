"""Weights are measured on shards, and it comes to the same on any number of ranks and at any ZeRO stage."""

import math

import pytest
import torch

from tests.gloo import on_ranks
from tests.test_engine import BATCH, build, config_of, inputs, losses_of, rate
from trainer import magnitudes


def trained(stage: int):
    """Train two steps; return what was measured, and on one rank the first fragment's weights before and after a step."""
    from trainer.engine import Engine, start_process_group

    rank, world = start_process_group()
    config = config_of(engine__zero_stage=stage, micro_batch=BATCH // world)
    engine = Engine(config, build(config))
    part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    measured = []
    for step in range(2):
        before = {f.name: f.master.clone() for f in engine.fragments}
        engine.backward(losses_of(engine.denoiser, step, part))
        engine.step(rate(step + 1), (step + 1) * BATCH)
        measured.append(magnitudes.measure_weights(engine))
    pairs = [
        (
            before[f.name].view(f.shape),
            f.master.view(f.shape),
            magnitudes._last_update(f, engine.optimizer.adam).view(f.shape),
        )
        for f in engine.fragments
        if world == 1 and f.row_length
    ]
    result = (
        {n: (w.rms, math.sqrt(w.update_squares), w.total, w.elements) for n, w in measured[-1].items()},
        magnitudes.layer_rms(measured[-1]),
        magnitudes.gains(measured[-1]),
        magnitudes.update_ratios(measured[-1]),
        pairs,
    )
    engine.close()
    return result


@pytest.fixture(scope="module")
def whole():
    return on_ranks(1, trained, 0)[0]


@pytest.mark.parametrize(
    "world, stage", [(2, 3), *(pytest.param(2, stage, marks=pytest.mark.slow) for stage in (0, 1, 2))]
)
def test_any_layout_measures_the_same(whole, world, stage):
    for result in on_ranks(world, trained, stage):
        assert result[0].keys() == whole[0].keys()
        for name, values in whole[0].items():
            assert result[0][name] == pytest.approx(values, rel=2e-3, abs=1e-5), name
            assert result[0][name][3] == values[3], f"{name}: elements are counted once"
        assert result[3] == pytest.approx(whole[3], rel=2e-3)


def test_every_learned_layer_has_rms_1_and_gains_are_told_apart(whole):
    _, layers, gains, ratios, _ = whole
    assert all(value == pytest.approx(1 - 1e-4, abs=2e-6) for value in layers.values()) and len(layers) > 20
    assert "unet.out_gain" in gains and "unet.enc.8x8_block0.emb_gain" in gains
    assert all(0.2 < value < 0.7 for value in gains.values()), gains
    assert set(ratios) == {("Enc", 8), ("Enc", 4), ("Dec", 4), ("Dec", 8)}
    assert all(1e-4 < value < 0.1 for value in ratios.values())


def test_the_update_is_what_adam_subtracted(whole):
    for before, after, update in whole[4]:
        moved = (before - update).flatten(1)
        moved = moved / (moved.square().mean(1, keepdim=True).sqrt() + 1e-4)
        assert torch.allclose(moved, after.flatten(1), atol=1e-6)
        assert float(update.abs().max()) > 1e-5


def test_what_is_collected_goes_into_the_papers_buckets():
    values = {
        "unet.enc.64x64_block0.conv_res0": 1.0,
        "unet.enc.64x64_block1.conv_res0": 3.0,
        "unet.enc.64x64_block0.clipped": 0.5,
        "unet.dec.8x8_in0.attn_logit_max": 7.0,
        "unet.out_conv": 9.0,
    }
    assert magnitudes.by_bucket(values) == {("Enc", 64): [1.0, 3.0]}
    assert magnitudes.by_bucket(values, "clipped") == {("Enc", 64): [0.5]}
    assert magnitudes.by_bucket(values, "attn_logit_max") == {("Dec", 8): [7.0]}


def collected(stage: int, compiled: bool) -> tuple[dict, int]:
    """Return the activation magnitudes of a training step in which they are collected, and the gradient's norm."""
    import functools

    import torch

    from trainer.engine import Engine, start_process_group
    from trainer.loss import denoising_loss

    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # the same graphs, without the C++ compiler
    rank, world = start_process_group()
    config = config_of(engine__zero_stage=stage, engine__compile=str(compiled).lower(), micro_batch=BATCH // world)
    engine = Engine(config, build(config))
    part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    x, labels, sigma, noise = (t[part] for t in inputs(0))
    losses, parts = denoising_loss(engine.denoiser, x, labels, sigma, noise, collect=True)
    engine.backward(losses.sum())
    engine.step(rate(1), BATCH)
    found = magnitudes.reduce_collected(parts.magnitudes, world), float(engine.optimizer.gradient_norm)
    engine.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage, compiled", [(1, True), (3, True)])
def test_activations_are_the_same_compiled_and_partitioned(stage, compiled):
    plain, plain_norm = on_ranks(2, collected, 0, False)[0]
    assert len(plain) > 10 and {b[0] for b in magnitudes.by_bucket(plain)} == {"Enc", "Dec"}
    for found, norm in on_ranks(2, collected, stage, compiled, timeout_seconds=540):
        assert found == pytest.approx(plain, rel=1e-4) and norm == pytest.approx(plain_norm, rel=1e-3)
