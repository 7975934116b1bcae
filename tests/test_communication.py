"""The bytes that a step is said to move are those that DeepSpeed moves, operation by operation, for every stage."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models import denoiser
from tests.gloo import ROOT, Forked, on_ranks
from tests.test_engine import BATCH, build, config_of, one_step
from trainer import communication
from trainer.config import load, to_dict

OPERATIONS = {
    "c10d.allreduce_": "all-reduce",
    "c10d._allgather_base_": "all-gather",
    "c10d._reduce_scatter_base_": "reduce-scatter",
}
CASES = [(0, 2, "fp32"), (1, 6, "fp32"), (1, 2, "fp32"), (2, 2, "fp32"), (2, 2, "bf16"), (3, 6, "fp32"), (3, 2, "bf16")]


class Collectives(TorchDispatchMode):
    """Adds up the payload of every collective: the largest tensor of each call."""

    def __init__(self):
        super().__init__()
        self.moved: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removesuffix(".default")
        if name.startswith("c10d.") and "barrier" not in name:
            payload = max(t.numel() * t.element_size() for t in _tensors(args))
            self.moved[OPERATIONS[name]] = self.moved.get(OPERATIONS[name], 0) + payload
        return function(*args, **(kwargs or {}))


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def moved_in_a_step(cases: list) -> list[dict]:
    from trainer.engine import Engine, start_process_group

    start_process_group()
    results = []
    for stage, micro, weights in cases:
        config = config_of(engine__zero_stage=stage, micro_batch=micro, engine__weights=weights)
        engine = Engine(config, build(config))
        for step in range(2):  # stage 3 learns the order of the layers
            one_step(engine, step)
        with Collectives() as seen:
            one_step(engine, 2)
        results.append(seen.moved)
        engine._deepspeed.destroy()
    return results


def test_predicted_bytes_are_those_that_are_moved():
    parameters = sum(p.numel() for p in build(config_of()).parameters())
    for (stage, micro, weights), moved in zip(CASES, on_ranks(2, moved_in_a_step, CASES)[0], strict=True):
        expected = {
            t.operation: t.payload_bytes * t.times
            for t in communication.per_step(parameters, stage, BATCH // 2 // micro, weights)
        }
        small = 0.02 * 4 * parameters  # cut rows, norms, padding
        for operation in {*moved, *expected}:
            most = expected.get(operation, 0)
            least = 0.8 * most if (stage, operation) == (3, "all-gather") else most
            assert least - small <= moved.get(operation, 0) <= most + small, (stage, micro, weights, operation)


def test_gradients_are_reduced_once_a_step_at_stage_1_whatever_the_accumulation():
    for micro_steps in (1, 4, 32):
        (gradients, weights) = communication.per_step(1000, 1, micro_steps)
        assert (gradients.payload_bytes * gradients.times, weights.payload_bytes * weights.times) == (4000, 4000)
    assert communication.per_step(1000, 2, 4)[0].times == 4


def test_a_ring_sends_what_theory_says():
    t = communication.Traffic("gradients", "all-reduce", 800, 3)
    assert t.sent_bytes(1) == 0 and t.sent_bytes(8) == 3 * 2 * 700


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_preset_is_priced_for_its_true_number_of_parameters(path):
    config = load(path, ["cluster.ranks_per_node=2", "cluster.nodes=1", "cluster.kind=local", "engine.zero_stage=0"])
    if config.model.family != "edm2":
        assert communication.of_config(config) == [], "only counting the true network tells its size"
        return
    (traffic,) = communication.of_config(config)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in denoiser.build(to_dict(config)["model"]).parameters())
    assert traffic.payload_bytes == 4 * parameters


def test_the_dry_run_says_what_a_step_sends():
    command = [sys.executable, "cluster/submit.py", "configs/edm2_xs.yaml", "--dry-run", "cluster.kind=local"]
    done = subprocess.run(
        [*command, "cluster.nodes=1", "cluster.ranks_per_node=8"], cwd=ROOT, capture_output=True, text=True
    )
    assert "each rank sends" in done.stdout and "all-reduce of 0.499 GB" in done.stdout, done.stdout + done.stderr


def benched(config: str) -> dict:
    from trainer.comm_bench import bench, table
    from trainer.engine import start_process_group

    start_process_group()
    facts = bench(load(ROOT / config), repeats=8)
    assert table(facts).row_count == len(facts["rows"])
    return facts


def test_bench_measures_the_runs_own_sizes():
    for facts in on_ranks(2, benched, "configs/quickstart.yaml"):
        assert [r["operation"] for r in facts["rows"]] == ["all-reduce", "all-gather"]
        assert all(r["sent_bytes_per_second"] > 1e5 for r in facts["rows"])
        assert math.isclose(facts["rows"][0]["message_bytes"], 4 * facts["parameters"], rel_tol=0.01)
        assert facts["sent_bytes_per_step"] == (2 + 1) * 0.5 * 4 * facts["parameters"]
        assert 0 < facts["measured_step_seconds"] < 50 * facts["predicted_step_seconds"]


def test_bench_runs_alone(tmp_path):
    words = ("configs/quickstart.yaml", "--repeats", "2", "--json")
    alone = Forked(dict(os.environ), tmp_path / "said", words, module="trainer.comm_bench")
    assert alone.wait(180) == 0, (tmp_path / "said").read_text()
    assert json.loads((tmp_path / "said").read_text().splitlines()[-1])["world"] == 1
