"""Snapshots: what the ranks hold is what the file holds, whole or absent, whatever the disk and the peers do."""

import errno
import json
import os
import stat
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import denoiser, magnitude
from tests.gloo import fork, on_ranks
from tests.small_checkout import wait_for
from tests.small_disk import disk, full  # noqa: F401 - disk is a fixture
from trainer import snapshot_writer, snapshots, tensor_file
from trainer.snapshots import SnapshotWriter

ROOT = Path(__file__).parent.parent
HEADER = {"dtype": "fp16", "run": "a", "life": 1, "model": {"family": "edm2"}, "data": {}, "update_interval_images": 64}
SMALL = {
    **{"family": "edm2", "resolution": 8, "channels": 1, "label_dim": 10, "model_channels": 16, "channel_mult": [1, 2]},
    **{"num_blocks": 1, "attn_resolutions": [4], "channels_per_head": 16, "logvar_channels": 16},
}


def pieces(state, rank=0, world=1):
    """Cut the flattened concatenation of all tensors into equal shards, as ZeRO does: cuts fall inside tensors."""
    total = sum(t.numel() for t in state.values())
    low, high = total * rank // world, total * (rank + 1) // world
    first = 0
    for name, tensor in state.items():
        start, end = max(low - first, 0), min(high - first, tensor.numel())
        if start < end:
            yield name, tuple(tensor.shape), start, tensor.reshape(-1)[start:end].clone()
        first += tensor.numel()


def state_of(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (8, 3, 3, 3), "gain": (1,), "b.weight": (5, 7), "c.weight": (11, 16)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def submit_two(folder, leaves=()) -> str:
    """On one gloo rank, submit two snapshots, or leave before anything is sent; return the error, if any."""
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    group = dist.new_group(backend="gloo")
    if rank in leaves:
        return "left"
    writer = SnapshotWriter(folder, HEADER, rank, world, group, timeout_seconds=5 if leaves else 300)
    buffers = {"freqs": torch.full((3,), 1 / 3)}
    try:
        writer.submit(64, 0.05, pieces(state_of(1), rank, world), buffers)
        writer.submit(64, 0.1, pieces(state_of(2), rank, world), buffers)
        dist.barrier()  # the training's own collectives go on while the threads talk
        writer.wait()
        writer.close()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("world", [1, 3])
def test_sharded_equals_whole(tmp_path, world):
    assert on_ranks(world, submit_two, str(tmp_path)) == [""] * world
    for sigma_rel, seed in ((0.05, 1), (0.1, 2)):
        path = tmp_path / "snapshots" / f"ema-0000000064-{sigma_rel:.3f}.safetensors"
        stored, whole = load_file(path), state_of(seed)
        assert torch.equal(stored.pop("freqs"), torch.full((3,), 1 / 3))  # buffers stay fp32
        assert stored.keys() == whole.keys()
        assert all(torch.equal(stored[k], whole[k].half()) for k in whole)
        header = snapshots.verify(path)
        assert (header["clock"], header["sigma_rel"], header["kind"], header["buffers"]) == (
            64,
            sigma_rel,
            "ema",
            ["freqs"],
        )
    assert not list((tmp_path / "snapshots").glob(".*"))


def test_a_dead_peer_is_an_error_in_time(tmp_path):
    started = time.monotonic()
    alive, dead = on_ranks(2, submit_two, str(tmp_path), [1])
    assert alive and dead == "left" and time.monotonic() - started < 120, "gloo itself would wait for half an hour"
    assert not list((tmp_path / "snapshots").glob("ema-*"))


def alone(folder, **header):
    return SnapshotWriter(folder, HEADER | header, 0, 1, None)


def test_every_dtype_and_mode(tmp_path):
    before = os.umask(0o027)
    try:
        for clock, dtype in enumerate(tensor_file.DTYPES, 1):
            writer = alone(tmp_path, dtype=dtype)
            writer.submit(clock, 0.05, pieces(state_of(1)), {})
            writer.close()
            assert writer.written == 1
    finally:
        os.umask(before)
    listed = snapshots.list_snapshots(tmp_path)
    assert [s.clock for s in listed] == [1, 2, 3]
    for s, dtype in zip(listed, tensor_file.DTYPES.values()):
        stored = load_file(s.path)
        assert all(torch.equal(stored[k], v.to(dtype)) for k, v in state_of(1).items())
        assert stat.S_IMODE(s.path.stat().st_mode) == 0o640


def test_a_full_disk_stops_snapshots_and_not_the_training(tmp_path, monkeypatch, capsys):
    full, written = [True], tensor_file.write

    def write(*arguments):
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written(*arguments)

    monkeypatch.setattr(tensor_file, "write", write)
    monkeypatch.setattr(snapshot_writer, "RETRY_SECONDS", 0.05)
    writer = alone(tmp_path)
    for clock in range(1, 5):
        writer.submit(clock, 0.05, pieces(state_of(clock)), {})
        writer.wait()
    assert (writer.written, writer.unwritten) == (0, snapshot_writer.MAX_UNWRITTEN)
    assert writer.retried >= 4 and "waits in memory" in capsys.readouterr().err
    assert writer.queue_bytes == 4 * sum(2 * t.numel() for t in state_of(1).values())
    with pytest.raises(OSError, match="no space for ema-0000000001"):  # the memory is used up, too: nothing is dropped
        writer.submit(5, 0.05, pieces(state_of(5)), {}, patience_seconds=0.1)
    full[0] = False
    writer.submit(5, 0.05, pieces(state_of(5)), {})
    writer.close()
    assert [s.clock for s in snapshots.list_snapshots(tmp_path)] == [1, 2, 3, 4, 5] and writer.queue_bytes == 0

    full[0] = True
    writer = alone(tmp_path)
    writer.submit(7, 0.05, pieces(state_of(7)), {})
    with pytest.raises(OSError, match="no space for ema-0000000007"):
        writer.close(patience_seconds=0)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_real_enospc_leaves_no_trace(tmp_path, monkeypatch):
    import builtins

    real = builtins.open
    monkeypatch.setattr(builtins, "open", lambda p, *a, **k: real("/dev/full" if ".writing" in str(p) else p, *a, **k))
    with pytest.raises(OSError) as error:
        tensor_file.write(tmp_path / "x.safetensors", {}, {"a": torch.zeros(100_000)})
    assert error.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def write_for_ever(folder, ready) -> None:
    writer = SnapshotWriter(folder, HEADER, 0, 1, None)
    ready.touch()
    for clock in range(1, 10**6):
        writer.submit(clock, 0.05, pieces({"w": torch.randn(1000, 1000)}), {})


def test_killed_at_any_instant_every_listed_snapshot_is_readable(tmp_path):
    for delay in (0.02, 0.11, 0.23):
        process = fork(write_for_ever, tmp_path, tmp_path / f"ready{delay}")
        wait_for((tmp_path / f"ready{delay}").exists)
        time.sleep(delay)
        process.kill()
        process.join()
        for s in snapshots.list_snapshots(tmp_path):
            snapshots.verify(s.path)
    alone(tmp_path).close()
    assert not list((tmp_path / "snapshots").glob(".*"))  # the next life clears what the killed ones were writing


def test_what_the_thread_raises_reaches_the_training(tmp_path):
    writer = alone(tmp_path)
    writer.submit(1, 0.05, pieces({"w": torch.tensor([1.0, float("nan")])}), {})
    with pytest.raises(ValueError, match="not finite"):
        writer.wait()
    with pytest.raises(ValueError, match="not finite"):
        writer.submit(2, 0.05, [], {})
    writer = alone(tmp_path)
    writer.submit(1, 0.05, pieces({"w": torch.tensor([1e6])}), {})
    with pytest.raises(ValueError, match="write fp32"):
        writer.close()
    writer = alone(tmp_path)
    writer.submit(1, 0.05, [("w", (4,), 0, torch.zeros(3))], {})
    with pytest.raises(AssertionError, match="cover w"):
        writer.close()
    assert snapshots.list_snapshots(tmp_path) == []


def test_damage_is_found(tmp_path, capsys):
    writer = alone(tmp_path)
    writer.submit(1, 0.05, pieces(state_of(1)), {})
    writer.close()
    assert snapshots.main([str(tmp_path), "--verify"]) == 0
    assert "checksums fit" in capsys.readouterr().out
    path = snapshots.list_snapshots(tmp_path)[0].path
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert snapshots.main([str(tmp_path)]) == 0  # a list reads headers only
    assert snapshots.main([str(tmp_path), "--verify"]) == 2
    assert "checksum" in capsys.readouterr().err
    path.write_bytes(content[:-3])
    assert snapshots.main([str(tmp_path)]) == 2
    assert "cut off" in capsys.readouterr().err
    path.write_bytes(b"\x80\x04 a pickle, say")
    assert snapshots.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert snapshots.main([str(tmp_path / "nowhere")]) == 2


def test_an_abandoned_life_is_known():
    def snapshot(clock, life, **more):
        return snapshots.Snapshot(Path(f"{clock}"), clock, 0.05, {"life": life} | more)

    series = [snapshot(1, 1), snapshot(2, 2), snapshot(3, 2), snapshot(4, 1), snapshot(5, 1)]
    assert [s.clock for s in snapshots.abandoned(series)] == [4, 5]
    series = [snapshot(1, 1), snapshot(2, 1), snapshot(3, 2, life_start=1)]
    assert [s.clock for s in snapshots.abandoned(series)] == [2]
    assert snapshots.abandoned([snapshot(c, c) for c in range(1, 9)]) == []


def test_a_network_comes_back_ready_for_use(tmp_path):
    torch.manual_seed(0)
    network = denoiser.build(SMALL)
    magnitude.normalize_rows_(network)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(torch.full_like(parameter, 0.5) if name.endswith("gain") else parameter)
    weights, buffers = dict(network.named_parameters()), dict(network.named_buffers())
    writer = alone(tmp_path, dtype="fp32", model=SMALL)
    writer.submit(
        64, 0.05, pieces({k: 0.7 * v.detach() if "weight" in k else v.detach() for k, v in weights.items()}), buffers
    )
    writer.close()
    loaded, header = snapshots.load_denoiser(snapshots.list_snapshots(tmp_path)[0].path)
    assert header["model"] == SMALL and not loaded.training
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 2.0]), torch.tensor([3, -1])
    with torch.no_grad():
        assert torch.allclose(
            loaded(x, sigma, labels), network(x, sigma, labels), atol=1e-3
        )  # shorter rows, same network

    other = alone(tmp_path / "other", dtype="fp32", model=SMALL | {"model_channels": 32})
    other.submit(64, 0.05, pieces({k: v.detach() for k, v in weights.items()}), buffers)
    other.close()
    with pytest.raises(ValueError, match="wants"):
        snapshots.load_denoiser(snapshots.list_snapshots(tmp_path / "other")[0].path)


def test_one_flipped_bit_anywhere_in_the_header_is_told_in_one_line(tmp_path):
    writer = alone(tmp_path, life_start=0)
    writer.submit(64, 0.05, pieces(state_of(1)), {})
    writer.close()
    [before] = snapshots.list_snapshots(tmp_path)
    whole = before.path.read_bytes()
    told = 0
    places = range(0, 8 + int.from_bytes(whole[:8], "little"), 3)
    for i in places:
        content = bytearray(whole)
        content[i] ^= 1 << i % 8
        before.path.write_bytes(content)
        try:
            [read] = snapshots.list_snapshots(tmp_path)  # white space, or the name of the digest itself
            assert read.header.items() >= before.header.items() and read[:3] == before[:3]
        except ValueError as error:
            told += str(before.path) in str(error) and "\n" not in str(error)
            continue
    assert told > 0.95 * len(places)


def test_a_snapshot_of_an_earlier_version_has_no_digest_and_opens(tmp_path):
    header = HEADER | {"clock": 64, "sigma_rel": 0.05, "format_version": 1}
    checksum = {"checksums": {"w": tensor_file.xxhash.xxh3_64_hexdigest(bytes(12))}}
    path = tmp_path / "snapshots" / snapshots.file_name(64, 0.05)
    path.parent.mkdir()
    save_file({"w": torch.zeros(3)}, path, {"evenkeel": json.dumps(header | checksum)})
    assert [(s.clock, s.header["life"]) for s in snapshots.list_snapshots(tmp_path)] == [(64, 1)]
    snapshots.verify(path)
    for broken in ({}, header, checksum, header | checksum | {"clock": None, "format_version": "1"}):
        save_file({"w": torch.zeros(3)}, path, {"evenkeel": json.dumps(broken)})
        assert snapshots.main([str(tmp_path)]) == 2


def test_a_header_that_finds_no_space_leaves_no_trace(disk):  # noqa: F811
    layout = {
        f"a name of a layer as long as those of large networks are {i}": (torch.float32, (1,)) for i in range(2000)
    }
    with full(disk):
        with pytest.raises(OSError, match="No space left"):
            tensor_file.TensorFile(disk / "x.safetensors", {}, layout)
        assert [p.name for p in disk.iterdir()] == ["ballast"]
