"""What a compiler makes of a block for a GPU, counted without one: next to nothing above the least, by the chains' own doing."""

import pytest
import torch

from models import edm2, magnitude
from trainer.benchmark import main

MODEL = {"resolution": 32, "channels": 4, "label_dim": 10, "model_channels": 64, "channel_mult": [1], "num_blocks": 1,
         "attn_resolutions": [32], "channels_per_head": 64}  # fmt: skip


def counted() -> dict[tuple[str, str], dict]:
    from trainer.fusion_benchmark import rows
    from trainer.lowering import lower

    torch._dynamo.reset()
    return {(r["pass"], r["chain"]): r for r in rows(lower(MODEL, 4))}


def above(found: dict) -> float:
    return sum(r["bytes"] for r in found.values()) / sum(r["least_bytes"] for r in found.values()) - 1


@pytest.mark.slow
def test_chains_are_as_few_passes_as_can_be(monkeypatch):
    found = counted()
    assert all(r["bytes"] >= r["least_bytes"] > 0 and r["kernels"] >= r["regions"] for r in found.values())
    assert above(found) < 0.02
    for chain in ("q, k, v normalised for attention", "clip, MP-cat, MP-SiLU", "modulation, MP-SiLU"):
        r = found["forward", chain]
        assert r["kernels"] == r["regions"] > 0 and r["bytes"] == r["least_bytes"], chain
    # the normalisation reads q, k, v once and writes them once as attention takes them, and RMSs of 16 bits; no copy beside it
    qkv, blocks = found["forward", "q, k, v normalised for attention"], 4
    assert qkv["bytes"] == pytest.approx(blocks * 2 * (4 * 32 * 32 * 3 * 64 * 2), rel=0.05) and qkv["kernels"] == blocks

    monkeypatch.setattr(edm2, "modulate", lambda y, scale: y * scale.to(y.dtype)[:, :, None, None])
    assert above(counted()) > 0.04, "a sum over whole images is a pass of its own"
    monkeypatch.undo()
    monkeypatch.setattr(edm2, "clip", lambda x, bound: x.clamp(-bound, bound))
    monkeypatch.setattr(edm2, "mp_cat", lambda a, b, t, bound: magnitude.mp_cat(a.clamp(-bound, bound), b, t))
    joined = counted()["forward", "clip, MP-cat, MP-SiLU"]
    assert joined["bytes"] > 1.1 * joined["least_bytes"], "so is a mask of its own"


def test_what_is_wrong_is_one_line(capsys):
    assert main(["--table", "fusion", "--batch", "0"]) == 2
    assert main(["--table", "fusion", "--preset", "huge"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
