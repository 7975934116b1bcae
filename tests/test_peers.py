"""A rank that dies takes the others down at once, with one line; a signal at any time leads all to one status."""

import json
import signal
import time
from pathlib import Path

import pytest

from tests.gloo import ROOT, free_port, on_ranks
from tests.test_resume import OVERRIDES, data, start, wait_for_clock  # noqa: F401 - data is a fixture


def farewells(folder: str) -> bool:
    from datetime import timedelta
    from pathlib import Path

    import torch.distributed as dist

    from trainer.peers import Peers

    dist.init_process_group("gloo", timeout=timedelta(hours=1))
    rank, world = dist.get_rank(), dist.get_world_size()
    peers = Peers(Path(folder), rank, world, dist.new_group(backend="gloo", timeout=timedelta(hours=1)))
    time.sleep(rank)
    peers.close()
    return peers.gone() is None


def test_farewells_are_no_deaths(tmp_path):
    assert on_ranks(3, farewells, str(tmp_path)) == [True] * 3


def last_one_dies(folder: str) -> None:
    import os
    from datetime import timedelta
    from pathlib import Path

    import torch.distributed as dist

    from trainer import peers

    dist.init_process_group("gloo", timeout=timedelta(hours=1))
    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(backend="gloo", timeout=timedelta(hours=1))
    mine = peers.Peers(Path(folder), rank, world, group)
    dist.barrier()
    if rank == world - 1:
        os._exit(0)
    died = time.monotonic()
    while (gone := mine.gone()) is None:
        assert time.monotonic() - died < peers.GRACE_SECONDS
    (Path(folder) / str(rank)).write_text(f"{gone}, {gone.status}")


def test_the_news_of_a_death_is_around_the_ring_before_the_first_one_ends(tmp_path):
    with pytest.raises(AssertionError, match="rank 3 left no result"):
        on_ranks(4, last_one_dies, str(tmp_path))
    said = {p.name: p.read_text() for p in tmp_path.iterdir() if p.name.isdigit()}
    assert said == {str(r): "rank 3 is gone; this start ends, the last checkpoint stands, 1" for r in range(3)}


def dies_while_the_others_connect(folder: str) -> None:
    import os
    from datetime import timedelta

    import torch.distributed as dist

    from trainer import peers

    with peers.connected_within(2, Path(folder)):
        store, rank, world = peers.meet(60)
        if rank == 1:
            os._exit(0)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(hours=1))


def test_a_rank_that_dies_between_meeting_and_connecting_is_an_error_in_time(tmp_path):
    with pytest.raises(AssertionError, match="left no result"):
        on_ranks(2, dies_while_the_others_connect, str(tmp_path), timeout_seconds=60)
    assert "not all ranks were connected within 2 s" in json.loads((tmp_path / "state.json").read_text())["last_error"]


def first_collective_waits_forever(config: str) -> int:
    """As on GPUs, where no collective knows that a rank is gone."""
    import os

    from trainer import run, train

    def waits(*_):
        if os.environ["RANK"] == "1":
            os._exit(0)
        time.sleep(100)

    run.dist.broadcast_object_list = waits
    return train.main([config])


def test_a_death_is_heard_of_from_the_first_collective_on(data, tmp_path):  # noqa: F811
    from trainer.config import dump, load

    keys = [*OVERRIDES, f"run={tmp_path}", f"data.path={data}", "cluster.ranks_per_node=2"]
    (tmp_path / "config.yaml").write_text(dump(load(ROOT / "configs/quickstart.yaml", keys)))
    with pytest.raises(AssertionError, match="left no result"):
        on_ranks(2, first_collective_waits_forever, str(tmp_path / "config.yaml"), timeout_seconds=60)
    assert "rank 1 is gone" in json.loads((tmp_path / "state.json").read_text())["last_error"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_killing_one_rank_at_the_start_is_a_line_for_the_other(data, tmp_path, rank):  # noqa: F811
    ranks, deadline = start(tmp_path / "run", data), time.monotonic() + 180
    while "attempt" not in ranks.output():
        assert time.monotonic() < deadline, ranks.output()
        time.sleep(0.01)
    ranks.processes[rank].kill()
    assert ranks.processes[1 - rank].wait(60) == 1, ranks.output()
    ranks.kill()
    assert f"error: rank {rank} is gone" in ranks.output() and "Traceback" not in ranks.output()


@pytest.mark.parametrize(("rank", "seconds"), [("0", 1), pytest.param("1", 3, marks=pytest.mark.slow)])
def test_a_missing_rank_is_an_error_in_time(rank, seconds, monkeypatch):
    from trainer import peers

    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=f"not all 2 ranks came within {seconds} s"):
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for key, value in {"RANK": rank, "WORLD_SIZE": "2", **there}.items():
            monkeypatch.setenv(key, value)
        peers.meet(seconds)
    assert time.monotonic() - begun < seconds + 10, "torch's own patience is minutes"


@pytest.mark.slow
def test_killing_one_rank_ends_the_other_soon_and_says_why(data, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    ranks = start(run, data, "duration_images=1Mi")
    wait_for_clock(run, 128, ranks)
    ranks.processes[1].kill()
    killed = time.monotonic()
    assert ranks.processes[0].wait(60) == 1, ranks.output()
    assert time.monotonic() - killed < 30
    ranks.kill()
    assert "error: rank 1 is gone" in ranks.output() and "Traceback" not in ranks.output()
    assert "rank 1 is gone" in json.loads((run / "state.json").read_text())["last_error"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "when, numbers, status",
    [
        ("starting", [signal.SIGTERM], 75),
        ("saving", [signal.SIGUSR2], 75),
        ("running", [signal.SIGTERM, signal.SIGINT], 130),
        ("running", [signal.SIGTERM, signal.SIGTERM], 75),
    ],
)
def test_signals_at_any_time_lead_to_one_status(data, tmp_path, when, numbers, status):  # noqa: F811
    run = tmp_path / "run"
    ranks = start(run, data, "duration_images=1Mi")
    deadline = time.monotonic() + 180
    if when == "starting":  # Python's own start is over: its handlers stand
        while "attempt" not in ranks.output():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    else:
        wait_for_clock(run, 128, ranks)
    if when == "saving":
        while not list((run / "checkpoints").glob("*")):
            assert time.monotonic() < deadline
            time.sleep(0.001)
    for number in numbers:
        ranks.processes[1].send_signal(number)
    assert ranks.wait() == [status, status], ranks.output()
    state = json.loads((run / "state.json").read_text())
    assert state["status"] == "stopped" and state["clock"] == state["last_checkpoint"]
    assert (state["clock"] == 0) == (when == "starting"), "no step is waited for"


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "number", "status"), [(0, signal.SIGINT, 130), (1, signal.SIGTERM, 75)])
def test_a_signal_ends_the_wait_for_ranks_that_do_not_come(data, tmp_path, rank, number, status):  # noqa: F811
    ranks = start(tmp_path / "run", data)
    ranks.processes[1 - rank].kill()
    time.sleep(3)  # it waits by now; if not, it stops all the same
    sent = time.monotonic()
    ranks.processes[rank].send_signal(number)
    assert ranks.processes[rank].wait(120) in (status, -number), ranks.output()
    assert time.monotonic() - sent < 100, "without the signal it waits for ten minutes"
    ranks.kill()
    assert "Traceback" not in ranks.output()


def left_alone_with_a_full_log(folder: str) -> str:
    import os
    from datetime import timedelta
    from pathlib import Path

    import torch.distributed as dist

    from trainer.peers import Peers

    dist.init_process_group("gloo", timeout=timedelta(hours=1))
    group = dist.new_group(backend="gloo", timeout=timedelta(hours=1))
    Peers(Path(folder), dist.get_rank(), 2, group)
    dist.barrier()
    if dist.get_rank() == 1:
        os._exit(0)
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
    time.sleep(60)  # as a collective on GPUs does, which knows nothing of sockets
    return "still here"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_on_a_full_disk_does_not_keep_a_rank_that_was_left_alone(tmp_path):
    begun = time.monotonic()
    with pytest.raises(AssertionError, match="left no result"):
        on_ranks(2, left_alone_with_a_full_log, str(tmp_path))
    assert time.monotonic() - begun < 40
