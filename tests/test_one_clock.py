"""The layout of ranks and micro-batches leaves no trace: bitwise the same inputs and masks, the same losses.

Activation checkpointing recomputes the same masks: with it, the losses after an update are the same too.
"""

import zlib

import pytest
import torch

from data_pipeline import encode
from tests.gloo import ROOT, on_ranks

BATCH, STEPS = 16, 2
OVERRIDES = [
    f"duration_images={STEPS * BATCH}",
    f"global_batch={BATCH}",
    "model.model_channels=12",
    "model.channels_per_head=12",
    "loss.label_dropout=0.2",
    "lr.rampup_images=0",
    "optimizer.eps=1e-3",
]


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("digits")
    assert encode.main(["sklearn:digits", str(folder), "--codec", "pixels"]) == 0
    return str(folder)


def seen_and_lost(data: str, cases: list[tuple]) -> list[dict]:
    """On one rank, for (micro batch, dropout, stage, checkpointing): fingerprint of the inputs, and loss, by (step, position)."""
    from trainer.config import load
    from trainer.engine import Engine, build_denoiser, device, start_process_group
    from trainer.examples import Examples, micro_batches
    from trainer.loss import denoising_loss
    from trainer.lr import learning_rate

    rank, world = start_process_group()
    results = []
    for micro, dropout, stage, checkpointing in cases:
        more = [f"micro_batch={micro}", f"model.dropout={dropout}", f"engine.zero_stage={stage}", f"data.path={data}"]
        more += [f"engine.activation_checkpointing={str(checkpointing).lower()}", f"cluster.ranks_per_node={world}"]
        config = load(ROOT / "configs/quickstart.yaml", ["run=unused", *OVERRIDES, *more])
        examples, module = Examples(config, device()), build_denoiser(config)
        with torch.no_grad():
            for p in module.parameters():
                if p.shape == (1,):
                    p.fill_(0.4)  # at 0 the blocks, and so their dropout, would not show
        engine = Engine(config, module)
        found = {}
        for step in range(STEPS):
            for here, upcoming in micro_batches(step * BATCH, BATCH, micro, rank, world):
                e = examples.at(here, upcoming)
                mask = examples.dropout_mask(e.positions)
                options = {"label_dropout": config.loss.label_dropout, "label_uniform": e.label_uniform}
                losses, _ = denoising_loss(
                    engine.denoiser, e.latents, e.labels, e.sigma, e.noise, dropout_mask=mask, **options
                )
                engine.backward(losses.sum())
                drawn = [e.latents, e.labels, e.sigma, e.noise, e.label_uniform]
                drawn += [mask(3, (micro, 12, 4, 4))] if mask else []
                for i, position in enumerate(here.tolist()):
                    bits = zlib.crc32(b"".join(t[i].contiguous().numpy().tobytes() for t in drawn))
                    found[step, position] = (bits, float(losses[i].detach()))
            rate = learning_rate(step * BATCH, config.lr.ref_lr, config.lr.decay_images, config.lr.rampup_images)
            engine.step(rate, (step + 1) * BATCH)
        results.append(found)
        engine._deepspeed.destroy()
    return results


def check(data: str, layouts: dict[int, list[tuple]]) -> None:
    reference = {}
    for world, cases in layouts.items():
        ranks = on_ranks(world, seen_and_lost, data, cases)
        for i, case in enumerate(cases):
            together = {key: value for rank in ranks for key, value in rank[i].items()}
            assert sorted(together) == [(s, s * BATCH + p) for s in range(STEPS) for p in range(BATCH)]
            expected = reference.setdefault(case[1], together)
            for key, (bits, loss) in together.items():
                assert bits == expected[key][0], (world, case, key)
                assert loss == pytest.approx(expected[key][1], rel=1e-6, abs=0), (world, case, key)
    dropped = reference.get(0.3)
    assert dropped is None or any(abs(dropped[k][1] - reference[0.0][k][1]) > 1e-3 for k in dropped), (
        "dropout does something"
    )


def test_one_and_two_ranks(digits):
    check(digits, {1: [(16, 0.0, 0, False), (16, 0.3, 0, False)], 2: [(8, 0.0, 1, False), (2, 0.3, 1, False)]})


@pytest.mark.slow
def test_one_two_and_four_ranks_with_recomputation(digits):
    one = [(m, d, 1, False) for m in (16, 4, 1) for d in (0.0, 0.3)]
    more = [(m, d, stage, stage > 1) for m in (4, 2) for d in (0.0, 0.3) for stage in (1, 2, 3)]
    check(digits, {1: one, 2: more, 4: more})
