"""What DeepSpeed 0.19 does in silence, or stops a run with; each of the five has a test, and so has the check at start-up.

1. It clips gradients at 1.0 unless told: test_engine.test_sharded_equals_whole compares the effective value, and weights with none.
2. Parameters without a dimension crash it: below, for every family.
3. What a forward writes into a weight never reaches the fp32 master: test_sharded_equals_whole compares masters' rows and copies.
4. It drops a step with a non-finite gradient: test_engine.test_nonfinite_gradient_never_reaches_the_weights, at every stage.
5. Its `latest` names a checkpoint before all ranks have written it: ours is killed in the middle, below.

With `round_robin_gradients` its map of the partitions is wrong: the check of the layout refuses to start, below.
"""

import os
from pathlib import Path

import pytest
import torch

from tests.gloo import ROOT, on_ranks
from tests.test_checkpoint import writer_of
from tests.test_engine import BATCH, build, config_of
from trainer import checkpoint

FAMILIES = ("quickstart", "unode_quickstart", "unode_paper_quickstart", "ddpm_unet_quickstart")


@pytest.mark.parametrize("preset", FAMILIES)
def test_no_parameter_is_without_a_dimension(preset):
    from models import denoiser
    from trainer.config import load, to_dict

    with torch.device("meta"):
        module = denoiser.build(to_dict(load(ROOT / f"configs/{preset}.yaml"))["model"])
    assert [n for n, p in module.named_parameters() if p.ndim == 0] == []


def start_with_round_robin() -> str:
    from trainer import zero
    from trainer.engine import Engine, start_process_group

    start_process_group()
    plain = zero.settings

    def trapped(*args):
        told = plain(*args)
        told["zero_optimization"]["round_robin_gradients"] = True
        return told

    zero.settings = trapped
    try:
        Engine(config_of(engine__zero_stage=2), build(config_of()))
    except Exception as error:  # where the other rank found it first, a collective that it left
        return f"{type(error).__name__}: {error}"
    return "started"


def test_a_layout_that_is_not_what_it_says_does_not_start():
    said = on_ranks(2, start_with_round_robin)
    assert "started" not in said
    assert any("the master found is not this parameter's" in line for line in said), said


def dies_while_it_writes(run: str) -> None:
    from trainer import checkpoint_writer
    from trainer.engine import Engine, start_process_group

    rank, world = start_process_group()
    engine = Engine(config_of(micro_batch=BATCH // world), build(config_of()))
    writer = writer_of(run, engine, keep_last=2)
    writer.save(12, life=1, extras={})
    writer.wait()

    def die(tensors, path):
        Path(path).write_bytes(b"half")
        os._exit(9)

    if rank == 1:
        checkpoint_writer.save_file = die
    writer.save(24, life=1, extras={})
    writer.wait()


def test_a_rank_that_dies_while_it_writes_leaves_the_checkpoint_before(tmp_path):
    with pytest.raises(AssertionError):
        on_ranks(2, dies_while_it_writes, str(tmp_path))
    assert (tmp_path / "checkpoints/.0000000024.1.writing/rank00001.safetensors").read_bytes() == b"half"
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["0000000012"]
    assert checkpoint.latest(tmp_path).name == "0000000012" and checkpoint.verify(checkpoint.latest(tmp_path)) == []
