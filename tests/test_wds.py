"""Reading laws: the right bytes at every position on any layout, and no damage that goes unseen."""

import os
import signal
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
import torch

from data_pipeline import adopt, manifest, order, wds
from tests.gloo import on_ranks
from tests.shards import SHAPE, SHARDS, make_dataset, make_samples, make_tars

N = sum(SHARDS)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean") / "data"
    return folder, make_dataset(folder)


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "data"
    return folder, make_dataset(folder)


def flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))


# -- the right samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"access": "pread"}, {"access": "mmap"}, {"checked": False}, {"threads": 3}, {"max_open": 1}]
)
def test_batches_are_the_samples_in_order(clean, options):
    folder, samples = clean
    positions = np.arange(2 * N + 3)  # runs into the third epoch
    with wds.open_source(folder, 5, 2, **options) as source:
        ids = order.sample_at(5, positions, SHARDS, 2)
        batch = source.batch(positions)
        assert batch.stored.dtype == torch.float16 and batch.position.tolist() == positions.tolist()
        assert (batch.stored.numpy() == np.stack([samples[i][1] for i in ids])).all()
        assert batch.labels.tolist() == [samples[i][2] for i in ids]
        assert sorted(ids[:N].tolist()) == list(range(N))
        counters = source.counters()
        assert counters["samples"] == len(positions) and counters["bytes"] == batch.stored.nbytes


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_global_batch_does_not_depend_on_the_world(clean, world):
    folder, _ = clean
    positions = np.arange(17, 17 + 24)
    with wds.open_source(folder, 0, 16) as source:
        whole = source.batch(positions)
    parts = []
    for rank in range(world):
        with wds.open_source(folder, 0, 16) as source:
            mine = positions[rank * 24 // world : (rank + 1) * 24 // world]
            source.prefetch(mine)
            parts.append(source.batch(mine))
    assert torch.equal(torch.cat([p.stored for p in parts]), whole.stored)
    assert torch.equal(torch.cat([p.labels for p in parts]), whole.labels)


def test_prefetch_changes_nothing_but_time(clean):
    folder, _ = clean
    blocks = [np.arange(k, k + 6) for k in range(0, 60, 6)]
    with wds.open_source(folder, 1, 2) as plain, wds.open_source(folder, 1, 2) as ahead:
        for block, following in zip(blocks, [*blocks[1:], None]):
            if following is not None:
                ahead.prefetch(following)
                ahead.prefetch(following + 1000)  # a hint that is never asked for
            assert torch.equal(plain.batch(block).stored, ahead.batch(block).stored)
        first = ahead.batch(blocks[0]).stored
        first.fill_(0)  # the caller owns what it gets
        assert torch.equal(ahead.batch(blocks[0]).stored, plain.batch(blocks[0]).stored)


def read_with_descriptors(folder, soft: int, hard: int) -> tuple[int, int, int]:
    """In a process of its own, return how many shards are open, samples replaced and read."""
    import resource

    from data_pipeline import reader

    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    reader._SPARE_DESCRIPTORS = 40
    with wds.open_source(folder, 0, 40, on_bad="replace", max_bad=40) as source:
        found = source.batch(np.arange(80)).stored
        return len(source._open), source.counters()["replaced"], len(found)


def test_a_wide_window_has_its_descriptors(tmp_path):
    """Every shard of a window stays open: the soft limit is raised, and where it cannot be, fewer are open at once."""
    samples = make_dataset(tmp_path / "d", sizes=(1,) * 40)
    for soft, hard, opened in ((60, 400, 40), (60, 60, 10)):
        assert on_ranks(1, read_with_descriptors, tmp_path / "d", soft, hard) == [(opened, 0, 80)]
    assert len(samples) == 40


def test_many_threads_may_read(clean):
    folder, samples = clean
    with wds.open_source(folder, 1, 2, max_open=1) as source:
        expected = {k: source.batch(np.arange(k, k + 8)).stored.clone() for k in range(8)}
        wrong = []

        def read(k):
            for _ in range(30):
                if not torch.equal(source.batch(np.arange(k, k + 8)).stored, expected[k]):
                    wrong.append(k)

        threads = [threading.Thread(target=read, args=(k,)) for k in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert not wrong


def test_parts_are_one_dataset_cut_in_two(clean):
    """An epoch of either part is each of its samples once; the training seed, the window and the layout do not move the cut."""
    folder, samples = clean
    cut = order.held_out(N, 0.3)
    for seed, window in ((0, 2), (5, 99)):
        for part, ids in (("train", np.flatnonzero(~cut)), ("heldout", np.flatnonzero(cut))):
            with wds.open_source(folder, seed, window, heldout=0.3, part=part) as source:
                n = source.num_samples
                assert n == len(ids) < N
                for epoch in range(3):
                    positions = np.arange(epoch * n, (epoch + 1) * n)
                    assert sorted(source.sample_ids(positions).tolist()) == ids.tolist()
                batch, order_of = source.batch(np.arange(n)), source.sample_ids(np.arange(n))
                assert (batch.stored.numpy() == np.stack([samples[i][1] for i in order_of])).all()
                assert batch.labels.tolist() == [samples[i][2] for i in order_of]
    for options in ({"part": "heldout"}, {"part": "test", "heldout": 0.1}, {"heldout": 1.0}, {"heldout": 1e-9}):
        with pytest.raises(ValueError, match=r"heldout|part"):
            wds.open_source(folder, 0, 2, **options)


# -- what the stock library sees --------------------------------------------------------------------------------------


def test_our_tars_open_with_the_stock_library(clean):
    import webdataset

    folder, samples = clean
    urls = [str(folder / f"shard-{k:06d}.tar") for k in range(len(SHARDS))]
    found = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(found) == N
    for sample, (key, array, label) in zip(found, samples):
        assert sample["__key__"] == key and type(sample["cls"]) is int and sample["cls"] == label
        assert sample["npy"].dtype == np.float16 and (sample["npy"] == array).all()


def test_shards_are_byte_reproducible(tmp_path):
    make_tars(tmp_path / "a")
    make_tars(tmp_path / "b")
    for k in range(len(SHARDS)):
        name = f"shard-{k:06d}.tar"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_foreign_tars_are_indexed_once(tmp_path, form, capsys):
    """Long names, PAX times, folders, other members, no labels: as people write them."""
    import io

    from data_pipeline import npy

    arrays = [sample[1] for sample in make_samples((5,))[0]]
    with tarfile.open(tmp_path / "x.tar", "w", format=form) as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for k, array in enumerate(arrays):
            prefix = f"d/{'long' * 20}/{k:090d}" if form != tarfile.USTAR_FORMAT else f"./d/{k}"
            for extension, data in (("json", b"{}"), ("npy", npy.to_bytes(array))):
                info = tarfile.TarInfo(f"{prefix}.{extension}")
                info.size, info.mtime = len(data), 1234.5
                tar.addfile(info, io.BytesIO(data))
    with wds.open_source(tmp_path, 0, 1, codec="mine") as source:
        assert source.manifest.codec == "mine" and source.manifest.label_dim == 0
        batch = source.batch(np.arange(5))
        assert (batch.stored.numpy() == np.stack([arrays[i] for i in source.sample_ids(np.arange(5))])).all()
        assert batch.labels.tolist() == [-1] * 5
    assert "indexed x.tar" in capsys.readouterr().err
    wds.open_source(tmp_path, 0, 1).close()  # now it has a manifest, no codec is asked for
    assert capsys.readouterr().err == ""


def test_foreign_tars_need_a_codec(tmp_path):
    make_tars(tmp_path)
    with pytest.raises(ValueError, match="which codec made them"):
        wds.open_source(tmp_path, 0, 1)


# -- the strict walker ------------------------------------------------------------------------------------------------


def test_walker_agrees_with_tarfile(clean):
    path = clean[0] / "shard-000000.tar"
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar]
    assert [(m.name, m.offset, m.size) for m in wds.walk_tar(path.read_bytes())] == expected


def test_no_truncation_goes_unseen(tmp_path):
    make_tars(tmp_path, sizes=(2,), shape=(1, 2, 2))
    data = (tmp_path / "shard-000000.tar").read_bytes()
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512
    for length in range(0, end + 512, 8):
        with pytest.raises(ValueError, match=r"truncated|damaged|cut|no end"):
            list(wds.walk_tar(data[:length]))
    assert len(list(wds.walk_tar(data[: end + 1024]))) == 4


def test_no_flipped_byte_in_a_header_goes_unseen(tmp_path):
    make_tars(tmp_path, sizes=(1,), shape=(1, 2, 2))
    data = (tmp_path / "shard-000000.tar").read_bytes()
    heads = [m.offset - 512 for m in wds.walk_tar(data)]
    tail = len(data) - 700
    for offset in [head + k for head in heads for k in range(512) if k not in (154, 155)] + [tail]:
        damaged = bytearray(data)
        damaged[offset] ^= 0x41  # 154 and 155 are the terminator of the checksum's own digits, which mean nothing
        with pytest.raises(ValueError):
            list(wds.walk_tar(bytes(damaged)))
    for head in heads:  # a zeroed header is the end of the archive to tarfile
        damaged = bytearray(data)
        damaged[head : head + 512] = bytes(512)
        with pytest.raises(ValueError, match="zeroed header"):
            list(wds.walk_tar(bytes(damaged)))


@pytest.mark.parametrize(
    "array, words",
    [
        (np.full((8, 4, 4), np.nan, dtype="float16"), "NaN"),
        (np.zeros((8, 4, 5), dtype="float16"), "the first sample is"),
        (np.zeros((8, 4, 4), dtype="float64"), "dtype"),
        (np.asfortranarray(np.zeros((8, 4, 4), dtype="float16")), "fortran"),
        (np.zeros((8, 4), dtype="float16"), "[C, H, W]"),
        (np.array([[[object()]]]), "dtype"),
        (b"", "is empty"),
        (b"\x93NUMPY\x01\x00v\x00" + b"{" * 118, "damaged .npy header"),
        (
            b"\x93NUMPY\x01\x00v\x00{'descr': __import__('os').abort(), 'fortran_order': False, 'shape': (1,1,1)}".ljust(
                128
            ),
            "damaged",
        ),
        (b"\x89PNG\r\n" + b"x" * 100, "no .npy"),
    ],
)
def test_bad_arrays_are_found_at_indexing(tmp_path, array, words):
    import io

    def content(value):
        if isinstance(value, bytes):
            return value
        file = io.BytesIO()
        np.save(file, value, allow_pickle=True)
        return file.getvalue()

    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for k, value in enumerate([np.zeros((8, 4, 4), dtype="float16"), array]):
            for name, data in ((f"{k}.cls", b"1"), (f"{k}.npy", content(value))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    with pytest.raises(ValueError) as error:
        adopt.adopt(tmp_path, "mine")
    assert words in str(error.value) and "x.tar" in str(error.value) and "'1'" in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "manifest.json").exists()


# -- integrity while training -----------------------------------------------------------------------------------------


def sample_offset(folder, shard, number):
    m = manifest.load(folder)
    with wds.open_source(folder, 0, 1) as source:
        return source._get(shard).offsets[number], m.sample_bytes


def whole_epoch(folder, **options):
    with wds.open_source(folder, 3, 2, **options) as source:
        batch = source.batch(np.arange(source.num_samples))
        return source.sample_ids(np.arange(source.num_samples)), batch, source.counters(), source.state()


@pytest.mark.parametrize("access", ["mmap", "pread"])
def test_flipped_byte_stops_or_is_replaced(dataset, access):
    folder, samples = dataset
    offset, size = sample_offset(folder, 1, 2)
    flip(folder / "shard-000001.tar", offset + size // 2)
    bad = SHARDS[0] + 2
    with pytest.raises(
        ValueError, match=rf"shard-000001.tar: sample '{bad:08d}' at offset {offset} fails its checksum"
    ):
        whole_epoch(folder, access=access)
    ids, batch, counters, state = whole_epoch(folder, on_bad="replace", access=access)
    used = [i + 1 if i == bad else i for i in ids]
    assert (batch.stored.numpy() == np.stack([samples[i][1] for i in used])).all()
    assert batch.labels.tolist() == [samples[i][2] for i in used]
    assert (counters["replaced"], counters["quarantined_samples"], counters["checksum_failures"]) == (1, 1, 1)
    assert state == {"version": 1, "shards": [], "samples": [bad]}


def test_error_reaches_the_caller_through_prefetch(dataset):
    folder, _ = dataset
    offset, _ = sample_offset(folder, 0, 0)
    flip(folder / "shard-000000.tar", offset)
    with wds.open_source(folder, 3, 2) as source:
        source.prefetch(np.arange(N))
        with pytest.raises(ValueError, match="checksum"):
            source.batch(np.arange(N))


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def deny(path):
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read everything: a folder in its place cannot be read by anyone
        path.unlink()
        path.mkdir()


def replace_by_html(path):
    path.write_text("<html>404 Not Found</html>")


@pytest.mark.parametrize(
    "damage", [truncate, deny, replace_by_html, lambda p: p.write_bytes(b""), lambda p: p.unlink()]
)
@pytest.mark.parametrize("suffix", ["tar", "idx"])
def test_bad_shard_stops_or_is_replaced(dataset, damage, suffix):
    folder, samples = dataset
    damage(folder / f"shard-000001.{suffix}")
    with pytest.raises(ValueError, match="shard-000001") as error:
        whole_epoch(folder)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="more than max_bad=6"):
        whole_epoch(folder, on_bad="replace", max_bad=6)
    ids, batch, counters, state = whole_epoch(folder, on_bad="replace", max_bad=7)
    used = [20 + (i - 13) % 10 if 13 <= i < 20 else i for i in ids]  # the same row of the next shard
    assert (batch.stored.numpy() == np.stack([samples[i][1] for i in used])).all()
    assert (counters["replaced"], counters["quarantined_shards"]) == (7, 1)
    assert state["shards"] == [1]


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_replacements_stay_in_their_part(dataset, part):
    """What was held out must not come into training in place of what is bad."""
    folder, samples = dataset
    (folder / "shard-000001.tar").unlink()
    offset, _ = sample_offset(folder, 2, 3)
    flip(folder / "shard-000002.tar", offset)
    mine = np.flatnonzero(order.held_out(N, 0.4) == (part == "heldout"))
    values = {samples[i][1].tobytes() for i in mine}
    _, batch, counters, _ = whole_epoch(folder, on_bad="replace", max_bad=8, heldout=0.4, part=part)
    assert counters["replaced"] > 0 and {array.tobytes() for array in batch.stored.numpy()} <= values


def test_replacements_are_the_same_after_a_restart(dataset):
    """A checkpoint carries the quarantine list: a shard that was repaired meanwhile must not change a resumed run."""
    folder, _ = dataset
    shard = folder / "shard-000001.tar"
    kept = shard.read_bytes()
    shard.unlink()
    _, straight, _, state = whole_epoch(folder, on_bad="replace", max_bad=7)
    shard.write_bytes(kept)
    with wds.open_source(folder, 3, 2, on_bad="replace", max_bad=7) as source:
        source.load_state(state)
        parts = [source.batch(np.arange(0, 11)), source.batch(np.arange(11, N))]
    assert torch.equal(torch.cat([p.stored for p in parts]), straight.stored)


def test_nothing_good_left_stops(dataset):
    folder, _ = dataset
    for k in range(len(SHARDS)):
        (folder / f"shard-{k:06d}.tar").unlink()
    with pytest.raises(ValueError, match="every sample"):
        whole_epoch(folder, on_bad="replace", max_bad=N)


def test_nothing_is_left_after_sigkill(dataset, tmp_path):
    """No shared memory, no worker processes, no files."""
    folder, _ = dataset
    code = (
        "import numpy as np, sys; from data_pipeline import wds\n"
        f"s = wds.open_source({str(folder)!r}, 0, 2, threads=2)\n"
        "s.prefetch(np.arange(8)); s.batch(np.arange(8)); print('ready', flush=True); sys.stdin.read()"
    )
    listing, before = sorted(os.listdir(folder)), set(os.listdir("/dev/shm"))
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    children = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True).stdout
    mine = {name for name in os.listdir("/dev/shm") if str(process.pid) in name} - before
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()
    assert not children.strip() and not mine
    assert sorted(os.listdir(folder)) == listing


def test_reading_indexed_shards_needs_no_webdataset(clean):
    code = (
        "import sys, numpy as np; from data_pipeline import wds\n"
        f"s = wds.open_source({str(clean[0])!r}, 0, 2); s.batch(np.arange(4)); s.close()\n"
        "sys.exit(any(m in sys.modules for m in ('webdataset', 'PIL', 'fsspec', 'sklearn')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_shape_is_as_written(clean):
    assert manifest.load(clean[0]).shape == SHAPE
