"""Every family of networks goes the whole way: trains on two ranks, continues bitwise, and its averages are rebuilt and drawn."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.gloo import ROOT, Ranks
from tests.test_resume import data, snapshots_of, state_of  # noqa: F401 (data is a fixture)
from trainer import flops, generate, posthoc
from trainer.config import load, to_dict

STEPS, BATCH = 6, 64
HALFWAY = STEPS * BATCH // 2
OVERRIDES = [f"duration_images={STEPS * BATCH}", f"global_batch={BATCH}", "micro_batch=16", "model.model_channels=16"]
OVERRIDES += [f"checkpoints.every_images={HALFWAY}", "snapshots.every_images=128", "snapshots.dtype=fp32"]
OVERRIDES += [f"metrics.every_images={BATCH}", "lr.rampup_images=0"]


def finish(preset: str, run: Path, data: Path, *more: str) -> list[dict]:  # noqa: F811
    overrides = [*OVERRIDES, f"run={run}", f"data.path={data}", *more]
    ranks = Ranks(2, run / "logs", str(ROOT / f"configs/{preset}.yaml"), *overrides)
    assert ranks.wait(180) == [0, 0], ranks.output()
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def all_the_way(preset: str, data: Path, folder: Path, *more: str) -> list[dict]:  # noqa: F811
    """Train, continue a copy from halfway, compare, rebuild an average, draw; return the metrics."""
    run, other = folder / "run", folder / "other"
    metrics = finish(preset, run, data, *more)
    (other / "checkpoints").mkdir(parents=True)
    shutil.copytree(run / f"checkpoints/{HALFWAY:010d}", other / f"checkpoints/{HALFWAY:010d}")
    shutil.copytree(
        run / "snapshots", other / "snapshots"
    )  # those up to halfway are history, later ones are made again
    finish(preset, other, data, *more)
    assert "continuing at 192 images" in "".join(p.read_text() for p in (other / "logs").iterdir())
    a, b = (state_of(r, STEPS * BATCH) | snapshots_of(r) for r in (run, other))
    assert a.keys() == b.keys() and len(a) > 50
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    made = folder / "made.safetensors"
    assert posthoc.main([str(run), "--sigma-rel", "0.08", "--out", str(made)]) == 0
    assert generate.main([str(made), "--out", str(folder / "grid.png"), "--per-class", "1", "--steps", "3"]) == 0
    assert (folder / "grid.png").stat().st_size > 500
    return metrics


@pytest.mark.slow
def test_a_u_node_goes_the_whole_way(data, tmp_path):  # noqa: F811
    metrics = all_the_way("unode_quickstart", data, tmp_path, "model.channels_per_head=16")
    blocks = ("enc.8x8_block0", "enc.4x4_block0", "dec.8x8_block0")
    last = metrics[-1]
    assert last["evenkeel_function_evaluations"] == {f"block=unet.{name}": 2 for name in blocks}
    assert last["evenkeel_row_rms_deviation"] < 1e-5
    size = flops.count(to_dict(load(tmp_path / "run"))["model"])
    assert last["evenkeel_parameters"] == {
        "kind=trainable": size.trainable_parameters,
        "kind=with_frozen_tables": size.parameters + size.frozen_table_values,
    }
    magnitudes = last["evenkeel_activation_magnitude"]
    assert {label for label in magnitudes if "mean" in label} == {
        f"side={side},resolution={res},statistic=mean" for side, res in (("Enc", 8), ("Enc", 4), ("Dec", 8))
    }
    assert all(0.3 < value < 3 for label, value in magnitudes.items() if "mean" in label)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["ddpm_unet_quickstart", "unode_paper_quickstart"])
def test_networks_without_normalised_rows_go_the_whole_way(preset, data, tmp_path):  # noqa: F811
    metrics = all_the_way(preset, data, tmp_path)
    assert metrics[-1]["evenkeel_loss"] < metrics[0]["evenkeel_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["unode_quickstart", "ddpm_unet_quickstart"])
def test_stage_3_trains_them_to_the_weights_of_stage_1(preset, data, tmp_path):  # noqa: F811
    more = ["model.channels_per_head=16"] if preset == "unode_quickstart" else []
    finish(preset, tmp_path / "one", data, *more)
    finish(preset, tmp_path / "three", data, *more, "engine.zero_stage=3")
    last = [json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[-1]) for n in ("one", "three")]
    assert last[0]["evenkeel_loss"] == pytest.approx(last[1]["evenkeel_loss"], rel=1e-4)
