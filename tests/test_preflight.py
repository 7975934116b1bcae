"""A node that is not fit for a run is found before the ranks meet, and named."""

import json
import os
import time

import pytest

from cluster import job, preflight
from cluster.ranks import free_port
from tests import shards
from tests.gloo import Forked
from tests.small_checkout import CONFIG
from trainer.config import load


@pytest.fixture
def run(tmp_path):
    """A run directory whose data is really there."""
    shards.make_dataset(tmp_path / "data/small")
    (tmp_path / "config.yaml").write_text(
        CONFIG.replace("runs/small", str(tmp_path)).replace("data/small", str(tmp_path / "data/small"))
    )
    return tmp_path


@pytest.fixture
def rank0(monkeypatch):
    for key in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(key, "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")


def test_a_healthy_node_has_no_problems(run, rank0):
    assert preflight.inspect_node(load(run / "config.yaml")) == []
    assert not list(run.glob(".preflight*"))


def test_data_that_cannot_be_read_or_has_another_size(run, rank0):
    config = load(run / "config.yaml")
    shard = run / "data/small/shard-000000.tar"
    with open(shard, "r+b") as f:
        f.truncate(1000)
    (problem,) = preflight.inspect_node(config)
    assert "has 1000 bytes here" in problem and shard.name in problem
    shard.unlink()
    (problem,) = preflight.inspect_node(config)
    assert f"{shard} cannot be read here: No such file" in problem
    (run / "data/small/manifest.json").unlink()
    (run / "data/small/shard-000001.tar").unlink()
    (run / "data/small/shard-000002.tar").unlink()
    (problem,) = preflight.inspect_node(config)
    assert "manifest.json not found" in problem


def test_gpus_that_are_not_there(run, rank0):
    config = load(run / "config.yaml")
    config.cluster.gpus_per_node = 99
    os.environ["LOCAL_WORLD_SIZE"] = "99"
    (problem,) = [p for p in preflight.inspect_node(config) if "GPU" in p]
    assert "GPUs visible, 99 needed" in problem


@pytest.mark.parametrize(
    ("clocks", "bad"), [([100.0, 100.9, 100.2], []), ([100.0, 100.2, 160.0], [2]), ([7.0, 7.1], [])]
)
def test_clocks_are_compared_with_the_median(clocks, bad):
    assert [k for k in range(len(clocks)) if preflight.skew(clocks, k)] == bad


def test_bad_nodes_are_those_with_problems_and_those_others_waited_for(tmp_path):
    for record in (
        {"rank": 0, "host": "a", "problems": [], "met": True, "blames": {"2": "did not answer within 5 s"}},
        {"rank": 1, "host": "b", "problems": ["GPU 0: broken"], "met": False, "blames": {}},
    ):
        (tmp_path / f"preflight{record['rank']}.json").write_text(json.dumps(record))
    found = preflight.bad_nodes(tmp_path, ["a", "b", "c"])
    assert found == {"b": "GPU 0: broken", "c": "did not answer within 5 s"}


def start(run, rank, world, port):
    variables = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    environment = {**os.environ, **{k: str(v) for k, v in variables.items()}}
    environment |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    words = (str(run), str(run / "control"), f"node{rank}")
    return Forked(environment, run / f"said{rank}", words, module="cluster.preflight")


def test_two_nodes_meet(run):
    port = free_port()
    ranks = [start(run, rank, 2, port) for rank in range(2)]
    assert [r.wait(timeout=180) for r in ranks] == [0, 0], [p.read_text() for p in run.glob("said*")]
    record = json.loads((run / "control/preflight0.json").read_text())
    assert record["met"] and record["all-reduce between nodes, GB/s"] > 0 and record["host"] == "node0"


def test_a_node_that_never_comes_is_blamed_in_bounded_time(run):
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace("{kind:", "{preflight_seconds: 3, kind:")
    )
    started = time.monotonic()
    alone = start(run, 0, 2, free_port())
    assert alone.wait(timeout=180) == preflight.BAD_NODE
    assert time.monotonic() - started < 120, "gloo itself would wait for half an hour"
    assert "not there: ranks [1]" in (run / "said0").read_text()
    assert preflight.bad_nodes(run / "control", ["node0", "node1"]) == {"node1": "did not answer within 3 s"}


def test_the_trainer_hears_how_many_nodes_were_left_out(run, monkeypatch):
    variables = {"JOB_ID": 123, "NTASKS": 2, "JOB_NUM_NODES": 1, "NODEID": 0, "GLOBALID": 0, "LOCALID": 0}
    for name, value in variables.items():
        monkeypatch.setenv(f"SUBMITIT_LOCAL_{name}", str(value))
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    task = job.Task({"run": str(run), "attempt": 1, "master_port": 4242})
    assert task.environment()["EVENKEEL_PREFLIGHT_FAILURES"] == "0"
    (run / "logs").mkdir()
    (run / "logs/excluded.json").write_text('{"gpu003": "slow", "gpu007": "no data"}')
    assert task.environment()["EVENKEEL_PREFLIGHT_FAILURES"] == "2"
