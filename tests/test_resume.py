"""Preemption loses nothing: a run that is stopped, killed or damaged and started again ends bitwise as if undisturbed."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline import encode
from data_pipeline.durable import write_atomically
from tests.gloo import ROOT, Ranks
from tests.small_disk import full, mounted
from trainer.audit import committed
from trainer.checkpoint import list_checkpoints, seal
from trainer.snapshots import file_name, list_snapshots, read_header

STEPS, BATCH = 12, 64
OVERRIDES = [
    f"duration_images={STEPS * BATCH}",
    f"global_batch={BATCH}",
    "micro_batch=16",
    "model.model_channels=12",
    "model.channels_per_head=12",
    "snapshots.every_images=128",
    "snapshots.dtype=fp32",
    "checkpoints.every_images=256",
    "checkpoints.keep_last=5",
    f"metrics.every_images={BATCH}",
    "lr.rampup_images=0",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    assert encode.main(["sklearn:digits", str(folder), "--codec", "pixels"]) == 0
    return folder


def start(run: Path, data: Path, *more: str, world: int = 2, fork: bool = True) -> Ranks:
    overrides = [*OVERRIDES, f"run={run}", f"data.path={data}", f"cluster.ranks_per_node={world}", *more]
    return Ranks(world, run / "logs", str(ROOT / "configs/quickstart.yaml"), *overrides, fork=fork)


def finish(run: Path, data: Path, *more: str, world: int = 2) -> None:
    ranks = start(run, data, *more, world=world)
    assert ranks.wait() == [0] * world, ranks.output()


def clock(run: Path) -> int:
    lines = (run / "metrics.jsonl").read_text().split("\n")[:-1] if (run / "metrics.jsonl").exists() else []
    return (
        json.loads(lines[-1])["evenkeel_images_seen"] if lines else 0
    )  # what follows the last newline is being written


def wait_for_clock(run: Path, images: int, ranks: Ranks) -> None:
    deadline = time.monotonic() + 180
    while clock(run) < images:
        alive = all(p.poll() is None for p in ranks.processes)
        assert time.monotonic() < deadline and (alive or clock(run) >= images), ranks.output()
        time.sleep(0.02)


def disturbed(run: Path, data: Path, images: int, act, *more: str, fork: bool = True) -> tuple[Ranks, list[int]]:
    """Start a run, `act` on its ranks from `images` on, return their statuses; again where it had ended before: a busy machine."""
    for _ in range(3):
        ranks = start(run, data, *more, fork=fork)
        wait_for_clock(run, images, ranks)
        act(ranks)
        statuses = ranks.wait()
        if any(statuses):
            break
        shutil.rmtree(run)
    return ranks, statuses


def state_of(run: Path, images: int = STEPS * BATCH) -> dict[str, torch.Tensor]:
    """Return whole logical tensors of a checkpoint, put together from its ranks' files."""
    folder = run / "checkpoints" / f"{images:010d}"
    manifest = json.loads((folder / "manifest.json").read_text())
    parts: dict[str, list] = {}
    for file, entry in manifest["files"].items():
        tensors = load_file(folder / file)
        starts = {name: start for name, start, _ in entry["pieces"]}
        for key, tensor in tensors.items():
            kind, name = key.split("/", 1)
            parts.setdefault(key, []).append((0 if kind == "buffer" else starts[name], tensor.flatten()))
    return {key: torch.cat([t for _, t in sorted(pieces, key=lambda p: p[0])]) for key, pieces in parts.items()}


def snapshots_of(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{p.name}/{name}": t
        for p in sorted((run / "snapshots").glob("*.safetensors"))
        for name, t in load_file(p).items()
    }


def assert_same(run: Path, other: Path) -> None:
    for what in (state_of, snapshots_of):
        a, b = what(run), what(other)
        assert a.keys() == b.keys() and len(a) > 50
        assert [k for k in a if not torch.equal(a[k], b[k])] == []


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(run, data)
    return run


SIGTERM = pytest.param(signal.SIGTERM, 75, False, marks=pytest.mark.slow)


# not forked: the command as a user starts it
@pytest.mark.parametrize("number, status, fork", [SIGTERM, (signal.SIGUSR2, 75, True), (signal.SIGINT, 130, False)])
def test_a_signal_to_one_rank_stops_all_at_one_boundary_and_nothing_is_lost(
    number, status, fork, data, undisturbed, tmp_path
):
    run = tmp_path / "run"
    ranks, statuses = disturbed(run, data, 2 * BATCH, lambda r: r.processes[1].send_signal(number), fork=fork)
    assert statuses == [status, status], ranks.output()
    state = json.loads((run / "state.json").read_text())
    assert state["status"] == "stopped" and 0 < state["clock"] == state["last_checkpoint"] < STEPS * BATCH
    stopped_at = state["clock"]
    finish(run, data)
    last = read_header(run / "snapshots" / file_name(STEPS * BATCH, 0.1))
    assert (last["life"], last["life_start"], last["activations"]) == (2, stopped_at, "fp32")
    state = json.loads((run / "state.json").read_text())
    assert (state["status"], state["clock"], state["attempt"]) == ("finished", STEPS * BATCH, 2)
    assert_same(run, undisturbed)


@pytest.mark.slow
def test_a_killed_rank_takes_the_others_down_and_the_next_start_repeats_the_rest(data, undisturbed, tmp_path):
    run = tmp_path / "run"

    def kill_behind_two(ranks):
        while len(list_checkpoints(run)) < 2 and all(p.poll() is None for p in ranks.processes):
            time.sleep(0.005)
        ranks.processes[1].kill()

    ranks, statuses = disturbed(run, data, 8 * BATCH, kill_behind_two)
    assert statuses[1] == -signal.SIGKILL and statuses[0] not in (0, 2, 75, 130, -signal.SIGKILL), ranks.output()
    # the newest checkpoint is damaged on top: the one before must serve
    before, newest = list_checkpoints(run)[-2:]
    file = newest / "rank00001.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    ranks = start(run, data)
    assert ranks.wait() == [0, 0], ranks.output()
    assert "damaged checkpoint" in ranks.output() and f"continuing at {int(before.name)} images" in ranks.output()
    assert_same(run, undisturbed)


@pytest.mark.slow
def test_another_number_of_ranks_sees_the_same_samples_and_ends_within_rounding(data, undisturbed, tmp_path):
    run = tmp_path / "run"
    ranks, statuses = disturbed(
        run, data, 3 * BATCH, lambda r: r.processes[0].send_signal(signal.SIGTERM), "optimizer.eps=1e-3"
    )
    assert statuses == [75, 75], ranks.output()
    stopped_at = json.loads((run / "state.json").read_text())["clock"]
    before = state_of(run, stopped_at)
    finish(run, data, "optimizer.eps=1e-3", "micro_batch=64", world=1)
    reference = tmp_path / "reference"
    finish(reference, data, "optimizer.eps=1e-3", "micro_batch=64", world=1)
    a, b = state_of(run), state_of(reference)
    for key in a:
        assert float((a[key] - b[key]).abs().max()) <= 2e-5 * float(b[key].abs().max()), key
    assert before.keys() == a.keys()


def test_a_finished_run_ends_at_once_and_moves_nothing(data, undisturbed):
    before = state_of(undisturbed)
    ranks = start(undisturbed, data)
    assert ranks.wait() == [0, 0], ranks.output()
    assert all(torch.equal(before[k], v) for k, v in state_of(undisturbed).items())


def test_a_nonfinite_gradient_stops_every_rank_with_one_line_and_the_weights_of_before(data, tmp_path):
    run = tmp_path / "run"
    ranks = start(run, data, "lr.ref_lr=1e30")  # the second step overflows
    assert ranks.wait() == [1, 1], ranks.output()
    assert "non-finite gradient" in ranks.output() and "the weights did not move" in ranks.output()
    assert "Traceback" not in ranks.output()
    state = json.loads((run / "state.json").read_text())
    assert state["status"] == "failed" and "non-finite gradient" in state["last_error"]


@pytest.mark.slow
def test_skipped_steps_are_counted_and_one_too_many_stops_every_rank(data, tmp_path):
    run = tmp_path / "run"
    keys = ("lr.ref_lr=1e30", "optimizer.nonfinite=skip", "optimizer.max_skipped_steps=3")
    ranks = start(run, data, *keys)
    assert ranks.wait() == [1, 1], ranks.output()
    assert "non-finite gradient (4 steps)" in ranks.output() and "Traceback" not in ranks.output()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["evenkeel_nonfinite_steps_total"] for line in lines][:4] == [0, 1, 2, 3], "the clock goes on"
    assert [line["evenkeel_images_seen"] for line in lines][:4] == [BATCH, 2 * BATCH, 3 * BATCH, 4 * BATCH]


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_gone_or_damaged_is_refused_and_not_begun_again(data, undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    shutil.rmtree(list_checkpoints(run)[-1])
    ranks = start(run, data, world=2)
    assert ranks.wait() == [0, 0] and f"the checkpoint at {STEPS * BATCH} images" in ranks.output(), ranks.output()
    assert_same(run, undisturbed)
    before = snapshots_of(run)
    for path in list_checkpoints(run):
        (path / "rank00000.safetensors").write_bytes(b"")
    ranks = start(run, data, world=1)
    assert ranks.wait() == [2] and "no checkpoint before it is whole" in ranks.output(), ranks.output()
    shutil.rmtree(run / "checkpoints")
    ranks = start(run, data, world=1)
    assert ranks.wait() == [2] and f"tells of a checkpoint at {STEPS * BATCH} images" in ranks.output(), ranks.output()
    assert "Traceback" not in ranks.output()
    after = snapshots_of(run)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.slow
def test_a_last_save_waits_for_space_and_ends_in_a_line_on_every_rank_where_none_comes(data, tmp_path):
    with mounted(tmp_path / "disk", 2**24) as folder:
        run = folder / "run"
        keys = ["snapshots.every_images=0", "checkpoints.every_images=512", f"run={run}", f"data.path={data}"]
        keys += ["duration_images=1Mi", "cluster.ranks_per_node=2"]
        for patient in (True, False):
            ranks = Ranks(2, tmp_path / f"logs-{patient}", str(ROOT / "configs/quickstart.yaml"), *OVERRIDES, *keys)
            before = json.loads((run / "state.json").read_text())["last_checkpoint"] if run.exists() else 0
            wait_for_clock(run, before + 10 * BATCH, ranks)
            while not list_checkpoints(run):
                time.sleep(0.05)
            with full(folder):
                time.sleep(1)  # metrics and state go on without a disk
                assert all(p.poll() is None for p in ranks.processes), ranks.output()
                ranks.processes[0].send_signal(signal.SIGTERM)
                if patient:
                    while "trying again" not in ranks.output():
                        assert all(p.poll() is None for p in ranks.processes), ranks.output()
                        time.sleep(0.05)
                else:
                    assert ranks.wait() == [1, 1], ranks.output()
            if patient:
                assert ranks.wait() == [75, 75], ranks.output()
                stopped = json.loads((run / "state.json").read_text())
                assert stopped["clock"] == stopped["last_checkpoint"], "what was trained is saved"
        saved = json.loads((run / "state.json").read_text())["last_checkpoint"]
        assert ranks.output().count("not saved: rank") >= 2 and "Traceback" not in ranks.output(), ranks.output()
        ranks = start(run, data, "snapshots.every_images=0", f"duration_images={saved + 4 * BATCH}")
        assert ranks.wait() == [0, 0] and f"continuing at {saved} images" in ranks.output(), ranks.output()


@pytest.mark.slow
def test_a_rank_that_never_comes_is_a_line(data, tmp_path):
    ranks = start(tmp_path / "run", data, "engine.hang_seconds=3")
    ranks.processes[1].kill()
    assert ranks.processes[0].wait(60) == 1
    assert "error: not all 2 ranks came within 3 s" in ranks.output() and "Traceback" not in ranks.output()


@pytest.mark.slow
def test_steps_that_were_zeroed_do_not_stop_a_run_that_goes_on_with_another_policy(data, undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    path = list_checkpoints(run)[-1] / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["extras"] |= {"nonfinite_steps": 7, "nonfinite": {"policy": "zero", "before": 0}}
    path.write_text(json.dumps(seal(manifest)))
    for steps, policy in ((4, "stop"), (8, "stop"), (12, "skip")):
        more = ["optimizer.max_skipped_steps=3", f"optimizer.nonfinite={policy}"]
        finish(run, data, f"duration_images={(STEPS + steps) * BATCH}", *more)
        line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        assert (line["evenkeel_nonfinite_steps_total"], line["evenkeel_images_seen"]) == (7, (STEPS + steps) * BATCH)


@pytest.mark.slow
def test_of_two_starts_of_one_run_one_trains(data, tmp_path):
    run = tmp_path / "run"
    first = start(run, data, "duration_images=1Mi", "checkpoints.every_images=64", world=1)
    wait_for_clock(run, 4 * BATCH, first)
    second = start(run, data, "duration_images=1Mi")
    assert second.wait() == [2, 2] and second.output().count("error: ") == 2, second.output()
    assert "is being trained by pid" in second.output() and "Traceback" not in second.output()
    assert json.loads((run / "state.json").read_text())["last_error"] == "", "the file is the first one's"
    # and where nobody can see the first, on another machine for instance, the later one wins
    elsewhere = json.loads((run / "state.json").read_text())
    deadline = time.monotonic() + 60
    while first.processes[0].poll() is None and time.monotonic() < deadline:
        write_atomically(run / "state.json", json.dumps(elsewhere | {"attempt": 9, "host": "elsewhere"}).encode())
        time.sleep(0.2)
    assert first.wait() == [1] and "attempt 9 of this run has begun on elsewhere" in first.output(), first.output()
    assert "Traceback" not in first.output()
    saved = len(list_checkpoints(run))
    assert saved and json.loads((run / "state.json").read_text())["attempt"] == 9


@pytest.mark.slow
def test_another_batch_from_a_checkpoint_on_sees_every_position_once_and_keeps_the_cadences(data, tmp_path):
    run, audited = tmp_path / "run", f"data.audit={tmp_path / 'audit'}"
    finish(run, data, "duration_images=256", audited)
    ranks = start(run, data, "global_batch=96", audited)
    assert ranks.wait() == [0, 0] and "on end at 832, beyond duration_images" in ranks.output(), ranks.output()
    seen, in_vain = committed(tmp_path / "audit")
    assert sorted(seen) == list(range(832)) and {len(times) for times in seen.values()} == {1} and not in_vain
    assert {s.clock for s in list_snapshots(run)} == {128, 256, 448, 544, 640, 832}, "where a multiple of 128 is passed"
    assert [int(p.name) for p in list_checkpoints(run)] == [256, 544, 832]
    series = [s for s in list_snapshots(run) if s.sigma_rel == 0.1]
    assert [s.header["update_interval_images"] for s in series] == [64, 64, 96, 96, 96, 96]
