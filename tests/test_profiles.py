"""A trace is made when RUN/profile is touched, by the ranks it names, and never for a request of before."""

import json
import os
import time

import pytest
import torch

from trainer import hardware, profiles
from trainer.groups import Metrics as MetricsGroup
from trainer.profiles import Profiles
from trainer.trackers import open_trackers


@pytest.fixture
def steps(tmp_path, monkeypatch):
    monkeypatch.setattr(profiles, "LOOK_SECONDS", 0.0)

    def run(rank: int, before: str | None, after: str | None):
        path, clock = tmp_path / "profile", 0
        if before is not None:
            path.write_text(before)
        one = Profiles(tmp_path, rank, torch.device("cpu"))
        for step in range(8):
            if step == 2 and after is not None:
                path.write_text(after)
                os.utime(path, (time.time() + 10,) * 2)
            torch.ones(4, 4) @ torch.ones(4, 4)
            one.step(clock, clock + 64)
            clock += 64
        one.close()
        return sorted(p.name for p in (tmp_path / "profiles").glob("*"))

    return run


@pytest.mark.parametrize(
    "rank, words, traced", [(0, "", True), (1, "", False), (1, "all", True), (3, "0 3", True), (2, "0 3", False)]
)
def test_the_named_ranks_trace_their_next_steps(steps, tmp_path, rank, words, traced):
    names = steps(rank, None, words)
    assert names == ([f"0000000192-rank{rank}.json"] if traced else [])
    if traced:
        events = json.loads((tmp_path / "profiles" / names[0]).read_text())["traceEvents"]
        assert sum(e.get("name") == "aten::mm" for e in events) == profiles.STEPS


def test_a_request_from_before_the_start_is_not_answered_again(steps):
    assert steps(0, "", None) == []


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ValueError, match=r"metrics.wandb=mine: .* pip install wandb"):
        open_trackers(tmp_path, MetricsGroup(wandb="mine"), 0, {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_or_its_library_nothing_is_said_of_it():
    assert hardware.gpu_load(torch.device("cpu")) == {} and hardware.gpu_load(torch.device("cuda", 0)) == {}
