"""Following a run: every snapshot is looked at once, whatever stops the follower, and what comes later is not missed."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline import durable, encode, manifest
from tests.test_generate import DATA, write_network
from trainer import evaluate, evaluations, generate

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["--follow", "--data-images", "10", "--steps", "1"]


@pytest.fixture
def network(tmp_path):
    """Return (run, write): `write(clock, ...)` adds a snapshot that was whitened as the run's data."""
    assert encode.main(["sklearn:digits", str(tmp_path / "data")]) == 0
    m = manifest.load(tmp_path / "data")
    data = DATA | {k: list(getattr(m, k)) for k in ("mean", "std", "shape")} | {"digest": m.digest}
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"data: {{path: {tmp_path / 'data'}}}")
    return run, lambda clock, sigma_rel=0.1, **more: write_network(
        run, clock=clock, sigma_rel=sigma_rel, data=data, **more
    )


def follow(run, *more):
    return evaluate.main([str(run), *QUICK, *map(str, more)])


def test_every_snapshot_once_newest_first_and_again_only_if_written_again(network, capsys):
    run, write = network
    for clock in (64, 128):
        for sigma_rel in (0.05, 0.1):
            write(clock, sigma_rel)
    (run / "state.json").write_text(json.dumps({"status": "finished"}))
    assert follow(run) == 0
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    order = [(e["evenkeel_images_seen"], e["sigma_rel"]) for e in lines]
    assert order == [(128, 0.05), (128, 0.1), (64, 0.05), (64, 0.1)]
    assert all(len(e["bins"]) == 8 and e["mean"] > 0 and e["images"] == 10 for e in lines)
    names = [f"grid-{clock:010d}-{s:.3f}.png" for clock in (64, 128) for s in (0.05, 0.1)]
    assert sorted(p.name for p in (run / "samples").iterdir()) == names
    tile = generate.SMALLEST_TILE_PIXELS + 2
    assert Image.open(run / "samples" / names[0]).size == (8 * tile + 2, 10 * tile + 2)

    write(128, 0.1, seed=1, life=2)  # of a later life: another network
    assert follow(run, "--no-pictures") == 0
    assert "1 snapshots evaluated" in capsys.readouterr().out
    kept = evaluations.read(run)
    assert [e["life"] for e in kept] == [1, 1, 1, 2] and kept[3]["mean"] != lines[1]["mean"] and kept[3]["grid"] is None


def test_a_cut_off_line_is_done_again(network):
    run, write = network
    write(64)
    assert follow(run, "--no-pictures", "--patience", 0) == 0
    path = run / "evaluations.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert evaluations.read(run) == [] and follow(run, "--no-pictures", "--patience", 0) == 0
    (one,) = evaluations.read(run)
    again = json.loads(whole)
    assert {k: v for k, v in one.items() if k != "time"} == {k: v for k, v in again.items() if k != "time"}


@pytest.mark.slow
def test_what_comes_later_is_not_missed_and_a_kill_loses_one_at_most(network):
    run, write = network
    durable.write_atomically(run / "state.json", b'{"status": "running"}')
    write(64)
    command = [sys.executable, "-m", "trainer.evaluate", str(run), *QUICK, "--no-pictures"]

    def start():
        return subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
        )

    def wait_for(count):
        deadline = time.monotonic() + 180
        while len(evaluations.read(run)) < count:
            assert time.monotonic() < deadline
            time.sleep(0.1)

    one = start()
    wait_for(1)
    write(128)
    wait_for(2)
    one.send_signal(signal.SIGKILL)
    one.wait()
    write(192)
    two = start()
    wait_for(3)
    two.send_signal(signal.SIGINT)
    assert two.wait(180) == 130
    three = start()
    write(256)
    durable.write_atomically(run / "state.json", b'{"status": "finished"}')
    assert three.wait(180) == 0
    assert [e["evenkeel_images_seen"] for e in evaluations.read(run)] == [64, 128, 192, 256]


def test_bad_input_is_one_line(network, tmp_path, capsys):
    run, write = network
    write(64)
    cases = [([tmp_path / "nowhere"], "no run directory"), ([run, run], "follows one run")]
    cases.append(([run, "--data", tmp_path / "nowhere"], "not found"))
    for arguments, expected in cases:
        assert evaluate.main([*map(str, arguments), *QUICK]) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1
    assert not (tmp_path / "nowhere").exists()
    with open(run / "evaluations.jsonl", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert follow(run) == 2
    assert "another process follows" in capsys.readouterr().err
