"""A checkpoint is complete or absent, exact, and the same state for any number of ranks and any ZeRO stage."""

import json
import os
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from tests.gloo import on_ranks
from tests.test_engine import BATCH, build, config_of, losses_of, rate
from tests.test_resume import state_of


def train_and_save(run: str, stage: int, clocks: list[int], fill_disk: bool = False) -> list[str]:
    """On each rank: two steps, then a checkpoint at each of `clocks`; return what went wrong."""
    os.umask(0o027)  # as cluster.umask does before the trainer starts
    from trainer import checkpoint_writer
    from trainer.engine import Engine, start_process_group

    rank, world = start_process_group()
    engine = Engine(config_of(engine__zero_stage=stage, micro_batch=BATCH // world), build(config_of()))
    for step in range(2):
        part = BATCH // world
        engine.backward(losses_of(engine.denoiser, step, slice(rank * part, (rank + 1) * part)))
        engine.step(rate(step), (step + 1) * BATCH)
    problems = []
    if fill_disk and rank == 1:
        checkpoint_writer.save_file = no_space
    writer = writer_of(run, engine, keep_last=2)
    for clock in clocks:
        try:
            writer.save(clock, life=1, extras={"version": 1})
            engine.fragments[0].master.fill_(
                -float(clock)
            )  # training goes on: what is saved must be what was there before
            writer.wait()
        except OSError as error:
            problems.append(str(error))
    return problems


def save_at_last(run: str, refusals: int, number: int, patience: float) -> tuple[str, int]:
    """On each rank: save durably where rank 1's disk refuses so often, with this errno; return what was said, how many tries."""
    from trainer import checkpoint_writer
    from trainer.engine import Engine, start_process_group

    rank, world = start_process_group()
    engine = Engine(config_of(micro_batch=BATCH // world), build(config_of()))
    real, tried, copies = checkpoint_writer.save_file, [], []

    def refused(tensors, path):
        tried.append(path)
        assert all(copy() is None for copy in copies), "one copy of the state is in host memory at a time"
        copies.extend(weakref.ref(t) for t in tensors.values())
        if rank == 1 and len(tried) <= refusals:
            raise SafetensorError(f"I/O error: no (os error {number})")  # as the library tells it
        real(tensors, path)

    checkpoint_writer.save_file, checkpoint_writer.RETRY_SECONDS = refused, 0.01
    try:
        writer_of(run, engine, keep_last=2).save_durably(12, life=1, extras={}, patience_seconds=patience)
    except checkpoint_writer.NotSaved as error:
        return str(error), len(tried)
    return "", len(tried)


class NoSnapshots:
    """A snapshot service with nothing to write."""

    def wait_durable(self):
        pass


def writer_of(run: str, engine, keep_last: int, keep_every: int = 0):
    from trainer.checkpoint_writer import CheckpointWriter
    from trainer.config import to_dict

    group = torch.distributed.new_group(backend="gloo") if engine.world > 1 else None
    header = {"model": to_dict(engine.config)["model"], "data": {}}
    return CheckpointWriter(Path(run), engine, group, NoSnapshots(), keep_last, keep_every, header)


def no_space(tensors, path):
    """What a full disk does: some bytes get there, then ENOSPC."""
    Path(path).write_bytes(b"half")
    raise OSError(28, "No space left on device")


def kept(run: str) -> list[list[str]]:
    """Keep one, where a damaged one lies beyond the clock; one and those at multiples of 24; two of the living; two readable."""
    from trainer.checkpoint import list_checkpoints
    from trainer.engine import Engine, start_process_group

    start_process_group()
    engine = Engine(config_of(micro_batch=BATCH), build(config_of()))
    (Path(run) / "checkpoints/0000000099").mkdir(parents=True)
    (Path(run) / "checkpoints/0000000099/manifest.json").write_text("{")
    writer = writer_of(run, engine, keep_last=1)
    for clock in (12, 24):
        writer.save(clock, life=1, extras={})
        writer.wait()
    one = [p.name for p in list_checkpoints(Path(run))]
    every = Path(run) / "every"
    writer = writer_of(every, engine, keep_last=1, keep_every=24)
    for clock in (12, 24, 36, 48, 60):
        writer.save(clock, life=1, extras={})
    writer.wait()
    lives = Path(run) / "lives"
    writer = writer_of(lives, engine, keep_last=2)
    for clock, life in ((12, 1), (24, 1), (36, 2)):  # life 2 went on from 12, for 24 was damaged
        writer.header |= {"life_start": 12} if life == 2 else {}
        writer.save(clock, life, extras={})
        writer.wait()
    unreadable = Path(run) / "unreadable"
    writer = writer_of(unreadable, engine, keep_last=2)
    left = []
    for clock in (12, 24, 36, 48):
        writer.save(clock, life=1, extras={})
        writer.wait()
        if clock == 24:
            (unreadable / "checkpoints/0000000024/manifest.json").write_text("{")
        left.append("+".join(sorted(str(int(p.name)) for p in list_checkpoints(unreadable))))
    return [*([p.name for p in list_checkpoints(run)] for run in (every, lives)), one, left]


def choose_one(run: str) -> str:
    """Return the name of the checkpoint to go on from, or why there is none."""
    from trainer import checkpoint
    from trainer.engine import start_process_group

    start_process_group()
    try:
        return checkpoint.choose(Path(run), print).name
    except ValueError as error:
        return str(error)


def load_and_save(source: str, target: str, stage: int) -> tuple[int, bool]:
    """On each rank: restore into a network of other weights, save again elsewhere; return (clock, copies equal masters)."""
    import shutil

    from trainer import checkpoint
    from trainer.engine import Engine, start_process_group

    rank, world = start_process_group()
    engine = Engine(config_of(engine__zero_stage=stage, micro_batch=BATCH // world, seed=99), build(config_of(seed=99)))
    if rank == 0:
        shutil.copytree(source, target)
    torch.distributed.barrier()
    clock, _ = checkpoint.restore(checkpoint.choose(Path(target), print), engine)
    parameters = dict(engine.module.named_parameters())
    same = all(
        torch.equal(parameters[f.name].detach().flatten()[f.start : f.start + len(f.master)], f.master)
        for f in engine.fragments
    )
    writer = writer_of(target, engine, keep_last=9)
    writer.save(clock + BATCH, life=2, extras={})
    writer.wait()
    return clock, same


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("saved")
    assert on_ranks(2, train_and_save, str(run), 1, [12, 24, 36]) == [[], []]
    return run


def test_only_the_last_are_kept_and_verify(saved):
    from trainer import checkpoint

    kept = checkpoint.list_checkpoints(saved)
    assert [p.name for p in kept] == ["0000000024", "0000000036"]
    assert [checkpoint.verify(p) for p in kept] == [[], []]
    assert not list((saved / "checkpoints").glob(".*")), "nothing half-written is left"
    modes = {oct(p.stat().st_mode & 0o777) for p in (saved / "checkpoints").rglob("*") if p.is_file()}
    folders = {oct(p.stat().st_mode & 0o777) for p in kept}
    assert (modes, folders) == ({"0o640"}, {"0o750"}), "what the umask leaves: the group reads"
    for clock, before in ((24, 12), (36, 24)):
        values = torch.cat([v for k, v in state_of(saved, clock).items() if k.startswith("master/")])
        assert bool((values == -before).any()) and not bool((values == -clock).any()), (
            "what came after the call is not in it"
        )


def test_a_damaged_newer_one_does_not_push_out_the_good_one_and_some_are_kept_for_good(tmp_path):
    assert on_ranks(1, kept, str(tmp_path)) == [
        [
            ["0000000024", "0000000048", "0000000060"],
            ["0000000012", "0000000036"],
            ["0000000024", "0000000099"],
            ["12", "12+24", "12+24+36", "36+48"],  # 24 can't be read: it neither counts nor goes before its time
        ]
    ]


def test_a_checkpoint_of_a_later_program_is_never_gone_back_behind(saved, tmp_path):
    import shutil

    from trainer.checkpoint import seal

    run = tmp_path / "run"
    shutil.copytree(saved, run)
    manifest = run / "checkpoints/0000000036/manifest.json"
    manifest.write_text(json.dumps(seal(json.loads(manifest.read_text()) | {"version": 2})))
    [said] = on_ranks(1, choose_one, str(run))
    assert "format version 2 is newer" in said and "update" in said


def test_latest_moves_last_and_is_never_followed_to_something_incomplete(saved, tmp_path):
    import shutil

    from trainer.checkpoint import latest

    assert latest(saved).name == "0000000036" and latest(tmp_path) is None
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    pointer = run / "checkpoints/latest"
    pointer.write_text("0000000024\n")  # killed between the rename and the pointer
    assert latest(run).name == "0000000024"
    for wrong in ("0000000099\n", "", "../..", None):  # not there; empty; elsewhere; a run from before the pointer
        pointer.unlink() if wrong is None else pointer.write_text(wrong)
        assert latest(run).name == "0000000036"


def test_what_a_later_life_saved_is_newer_than_what_lies_beyond_it(saved, tmp_path, capsys):
    import shutil

    from trainer import checkpoint
    from trainer.checkpoint import list_checkpoints, seal, verify

    run = tmp_path / "run"
    shutil.copytree(saved, run)
    manifest = run / "checkpoints/0000000024/manifest.json"
    manifest.write_text(json.dumps(seal(json.loads(manifest.read_text()) | {"life": 2})))
    assert [p.name for p in list_checkpoints(run)] == ["0000000036", "0000000024"]
    assert verify(manifest.parent) == []
    (run / "checkpoints/latest").write_text("0000000024\n")
    assert checkpoint.main([str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "abandoned life" in lines[0] and "36 images" in lines[0] and "abandoned" not in lines[1]
    manifest.write_text(manifest.read_text().replace('"life": 2', '"life": 3'))
    assert "differs from its checksum" in verify(manifest.parent)[0]


def test_the_command_lists_verifies_and_consolidates(saved, tmp_path, capsys):
    import shutil

    from trainer import checkpoint, snapshots

    run = tmp_path / "run"
    shutil.copytree(saved, run)
    assert checkpoint.main([str(run), "--verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "36 images  life 1" in lines[1] and "2 ranks  ZeRO-1" in lines[1]
    assert "<- latest" in lines[1] and "complete" in lines[0] and "checksums fit" in lines[0]
    out = tmp_path / "weights.safetensors"
    assert checkpoint.main([str(run), "--consolidate", str(out), "--at", "24"]) == 0
    header = snapshots.verify(out)
    assert (header["kind"], header["clock"], header["dtype"]) == ("checkpoint", 24, "fp32")
    from safetensors.torch import load_file

    stored, whole = load_file(out), state_of(run, 24)
    assert all(torch.equal(t.flatten(), whole.get(f"master/{n}", whole.get(f"buffer/{n}"))) for n, t in stored.items())
    assert {f"master/{n}" for n in stored} >= {k for k in whole if k.startswith("master/")}
    snapshots.load_denoiser(out)  # ready to draw with
    capsys.readouterr()
    flip(run / "checkpoints/0000000036/rank00001.safetensors")
    for bad in (
        ["--verify"],
        ["--consolidate", str(out)],
        ["--consolidate", str(out), "--at", "7"],
        ["--consolidate", "x.pt", "--at", "24"],
    ):
        assert checkpoint.main([str(run), *bad]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert "rank00001.safetensors" in error or "--at" in bad
    assert checkpoint.main([str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize("world, stage", [(1, 0), (1, 1), (2, 2), (3, 1)])
def test_state_survives_any_ranks_and_stage_bit_for_bit(saved, tmp_path, world, stage):
    results = on_ranks(world, load_and_save, str(saved), str(tmp_path / "run"), stage)
    assert results == [(36, True)] * world
    before, after = state_of(saved, 36), state_of(tmp_path / "run", 48)
    assert before.keys() == after.keys() and len(before) > 200
    assert [k for k in before if not torch.equal(before[k], after[k])] == []
    kinds = {k.split("/")[0] for k in before}
    assert kinds == {"master", "exp_avg", "exp_avg_sq", "ema_0.050", "ema_0.100", "buffer"}


def test_a_full_disk_on_one_rank_is_told_to_all_and_older_checkpoints_stay(tmp_path):
    from trainer import checkpoint

    problems = on_ranks(2, train_and_save, str(tmp_path), 1, [12], True)
    assert all("rank 1: [Errno 28]" in p[0] and "intact" in p[0] for p in problems)
    assert checkpoint.list_checkpoints(tmp_path) == [] and not list((tmp_path / "checkpoints").iterdir())


def test_the_last_checkpoint_waits_for_space_and_for_nothing_that_stays(tmp_path):
    from trainer.checkpoint import list_checkpoints, verify

    no_space, no_permission = 28, 13
    assert on_ranks(2, save_at_last, str(tmp_path / "a"), 3, no_space, 60.0) == [("", 4)] * 2
    [found] = list_checkpoints(tmp_path / "a")
    assert verify(found) == []
    for number, patience in ((no_space, 0.0), (no_permission, 60.0)):
        told = on_ranks(2, save_at_last, str(tmp_path / "b"), 3, number, patience)
        assert [n for _, n in told] == [1, 1] and all("not saved: rank 1: I/O error" in line for line, _ in told)
        assert list_checkpoints(tmp_path / "b") == []


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda p: (p / "rank00001.safetensors").unlink(), "missing"),
        (lambda p: (p / "rank00000.safetensors").write_bytes(b""), "bytes long"),
        (lambda p: flip(p / "rank00000.safetensors"), "differs from its checksum"),
        (lambda p: (p / "manifest.json").write_text("{"), "not readable"),
        (lambda p: newer(p / "manifest.json"), "newer than this program"),
    ],
)
def test_damage_is_found(saved, tmp_path, damage, said):
    import shutil

    from trainer import checkpoint

    copy = tmp_path / "0000000036"
    shutil.copytree(saved / "checkpoints/0000000036", copy)
    assert checkpoint.verify(copy) == []
    damage(copy)
    assert said in checkpoint.verify(copy)[0]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def newer(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))


def odd_names(run: str) -> list:
    """What is kept beside a copy that a user made, and beyond ten digits; what there is of a clock while it is replaced."""
    import shutil

    from trainer import checkpoint_writer
    from trainer.checkpoint import latest, list_checkpoints
    from trainer.engine import Engine, start_process_group

    start_process_group()
    engine = Engine(config_of(micro_batch=BATCH), build(config_of()))
    writer = writer_of(run, engine, keep_last=2)
    folder, there = Path(run) / "checkpoints", []
    writer.save(12, life=1, extras={})
    writer.wait()
    shutil.copytree(folder / "0000000012", folder / "0000000012.mine")
    remove = shutil.rmtree

    def watched(path, **how):
        if Path(path).name == ".0000000012.discarded" and Path(path).exists():
            there.append((folder / "0000000012/manifest.json").is_file())
        remove(path, **how)

    checkpoint_writer.shutil.rmtree = watched
    writer.save(12, life=1, extras={})
    for clock in (9_999_999_996, 10_000_000_008, 10_000_000_020):
        writer.save(clock, life=1, extras={})
    writer.wait()
    mine = (folder / "0000000012.mine/manifest.json").is_file()
    return [[p.name for p in list_checkpoints(Path(run))], latest(Path(run)).name, mine, there[0]]


def test_copies_are_left_alone_many_images_sort_as_numbers_and_a_replaced_one_is_never_gone(tmp_path):
    [found] = on_ranks(1, odd_names, str(tmp_path))
    assert found == [["10000000008", "10000000020"], "10000000020", True, True]
    from cluster.run_directory import last_checkpoint

    assert last_checkpoint(tmp_path).name == "10000000020"
    (tmp_path / "checkpoints/latest").unlink()
    assert last_checkpoint(tmp_path).name == "10000000020"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that gives EIO")
def test_a_sector_that_cannot_be_read_is_damage_too(saved, tmp_path):
    import shutil

    from trainer import checkpoint

    shutil.copytree(saved, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/0000000036"
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"]["rank00001.safetensors"]["bytes"] = 0
    (newest / "rank00001.safetensors").unlink()
    (newest / "rank00001.safetensors").symlink_to("/proc/self/mem")  # empty, and reading it is an I/O error
    (newest / "manifest.json").write_text(json.dumps(checkpoint.seal(manifest)))
    assert "rank00001.safetensors: not readable ([Errno 5]" in checkpoint.verify(newest)[0]
    assert on_ranks(1, choose_one, str(tmp_path / "run")) == ["0000000024"]


def test_a_file_that_cannot_be_removed_does_not_keep_a_run_from_starting(tmp_path):
    import subprocess
    from types import SimpleNamespace

    from trainer.checkpoint_writer import CheckpointWriter

    held = tmp_path / "checkpoints/.nfs000000000000000a0000001f"  # as a file server names what another host has open
    held.parent.mkdir()
    held.write_text("x")
    if os.geteuid() or subprocess.run(["mount", "--bind", str(held), str(held)], capture_output=True).returncode:
        pytest.skip("only root can make a file busy")
    try:
        CheckpointWriter(tmp_path, SimpleNamespace(rank=0, module=torch.nn.Linear(1, 1)), None, NoSnapshots(), 2)
    finally:
        subprocess.run(["umount", str(held)], check=True)
