"""Integrity laws: every kind of damage, in tars and in MDS, is found before its samples reach the model, and handled by the policy.

Each is a real file or a real HTTP server; what comes over the network otherwise is in test_fetch.py and test_s3.py.
"""

import os
import shutil

import numpy as np
import pytest
import torch

from data_pipeline import adopt, convert, manifest, order, shard_file, wds
from tests.gloo import on_ranks
from tests.shards import SHAPE, SHARDS, make_dataset
from tests.test_wds import deny, flip, replace_by_html, truncate

N = sum(SHARDS)
CONTAINERS = ("webdataset", "mds")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The same samples in both containers."""
    folder = tmp_path_factory.mktemp("originals")
    samples = make_dataset(folder / "webdataset")
    convert.write_folder(convert.open_shards(folder / "webdataset", None), folder / "mds", "mds", None)
    return folder, samples


@pytest.fixture(params=CONTAINERS)
def dataset(request, originals, tmp_path):
    shutil.copytree(originals[0] / request.param, tmp_path / "d")
    return tmp_path / "d", originals[1]


def shard_path(folder, number):
    return folder / manifest.load(folder).shards[number].name


def offset_of(folder, shard, number):
    with wds.open_source(folder, 0, 1) as source:
        return source._get(shard).offsets[number]


def epoch(folder, world=1, step=10, **options):
    """Read an epoch as `world` ranks do, each with a source of its own; return the stream and the first rank's counters."""
    parts, counters = {}, []
    for rank in range(world):
        with wds.open_source(folder, 3, 2, **options) as source:
            size = step // world
            for start in range(0, N, step):
                at = start + rank * size
                parts[at] = source.batch(np.arange(at, at + size))
            counters.append(source.counters())
    batches = [parts[at] for at in sorted(parts)]
    return torch.cat([b.stored for b in batches]), torch.cat([b.labels for b in batches]), counters


# -- a damaged shard that was whole when it was indexed ------------------------------------------------------------------


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


def cut_the_end(path):
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("access", ["mmap", "pread"])
@pytest.mark.parametrize("damage", [truncate, cut_the_end, empty, remove, deny, replace_by_html])
def test_a_bad_shard_stops_or_is_replaced(dataset, damage, access):
    folder, samples = dataset
    path = shard_path(folder, 1)
    damage(path)
    with pytest.raises(ValueError, match=path.name) as error:
        epoch(folder, access=access)
    assert "\n" not in str(error.value)
    stored, labels, counters = epoch(folder, access=access, on_bad="replace", max_bad=7)
    ids = order.sample_at(3, np.arange(N), SHARDS, 2)
    used = [20 + (i - 13) % 10 if 13 <= i < 20 else i for i in ids]
    assert (stored.numpy() == np.stack([samples[i][1] for i in used])).all()
    assert labels.tolist() == [samples[i][2] for i in used]
    assert counters[0]["replaced"] == 7 and counters[0]["quarantined_shards"] == 1
    with pytest.raises(ValueError, match="more than max_bad=6"):
        epoch(folder, access=access, on_bad="replace", max_bad=6)


@pytest.mark.parametrize("damage", ["first byte", "last byte", "zeroed", "other sample"])
def test_a_bad_sample_stops_or_is_replaced(dataset, damage):
    folder, samples = dataset
    path, offset, size = shard_path(folder, 2), offset_of(folder, 2, 4), samples[0][1].nbytes
    if damage in ("first byte", "last byte"):
        flip(path, offset + (size - 1 if damage == "last byte" else 0))
    else:
        data = bytearray(path.read_bytes())
        other = offset_of(folder, 2, 5)
        data[offset : offset + size] = bytes(size) if damage == "zeroed" else data[other : other + size]
        path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{path.name}.*fails its checksum"):
        epoch(folder)
    stored, _, counters = epoch(folder, on_bad="replace")
    ids = order.sample_at(3, np.arange(N), SHARDS, 2)
    assert (stored.numpy() == np.stack([samples[25 if i == 24 else i][1] for i in ids])).all()
    assert counters[0] | {"replaced": 1, "quarantined_samples": 1, "checksum_failures": 1} == counters[0]


def test_replacement_is_the_same_for_any_world(dataset):
    """A bad shard, a bad sample where its replacements come from, and two bad ones in a row, met in any order by any rank."""
    folder, _ = dataset
    shard_path(folder, 0).unlink()
    for number in (0, 4, 5):
        flip(shard_path(folder, 1), offset_of(folder, 1, number))
    options = {"on_bad": "replace", "max_bad": 16}
    stored, labels, _ = epoch(folder, **options)
    for world in (2, 5, 10):
        other_stored, other_labels, counters = epoch(folder, world, **options)
        assert torch.equal(other_stored, stored) and torch.equal(other_labels, labels), f"world {world}"
        assert len(counters) == world
    with wds.open_source(folder, 3, 2, **options) as source:  # from the end to the beginning
        backwards = [source.batch(np.arange(k, k + 1)).stored for k in reversed(range(N))]
    assert torch.equal(torch.cat(backwards[::-1]), stored)


def test_a_list_from_other_ranks_counts_at_once(dataset):
    """What was read ahead before the ranks put their lists together must not come out of the old list."""
    folder, samples = dataset
    options = {"on_bad": "replace", "max_bad": N}
    with wds.open_source(folder, 3, 2, **options) as one, wds.open_source(folder, 3, 2, **options) as other:
        positions = np.arange(N)
        other.prefetch(positions)
        other._pending[positions.tobytes()].result()
        for source in (one, other):
            source.load_state({"version": 1, "shards": [1], "samples": [2]})
        assert torch.equal(one.batch(positions).stored, other.batch(positions).stored)
        assert other.counters()["replaced"] >= 8
        assert one.state() == {"version": 1, "shards": [1], "samples": [2]}


# -- damage before indexing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(
    "bad", [np.full(SHAPE, np.nan), np.full(SHAPE, np.inf), np.zeros((8, 4, 5)), np.zeros((8, 4, 4), "f8")]
)
def test_bad_values_never_get_an_index(tmp_path, container, bad):
    """NaN latents and wrong shapes are found when shards are indexed: a checksum can't know them later."""
    from data_pipeline import mds, npy
    from tests.shards import make_samples

    samples = make_samples((3,))[0]
    array = bad if bad.dtype == "f8" and bad.shape == SHAPE and not bad.any() else bad.astype("float16")
    if container == "mds" and array.shape == SHAPE and array.dtype == "f8":
        pytest.skip("a column of MDS has one dtype; test_mds.py has the column of another")
    samples.append(("00000003", array, 1))
    if container == "webdataset":
        wds.write_shard(tmp_path / "shard-000000.tar", samples)
    else:
        path = tmp_path / "shard.00000.mds"
        layout = npy.Layout("float16", SHAPE)
        mds.write_shard(path, samples, layout, True)
        entry = manifest.Shard(path.name, 4, path.stat().st_size, wds.hash_file(path), "")
        (tmp_path / "index.json").write_bytes(mds.index_json([entry], layout, True))
    with pytest.raises(ValueError, match="NaN|the first sample is|dtype|bytes") as error:
        adopt.adopt(tmp_path, "mine", progress=lambda text: None)
    assert "\n" not in str(error.value) and not (tmp_path / "manifest.json").exists()


# -- a shard that changes while it is open ----------------------------------------------------------------------------------


def shrink_while_open(folder, access):
    """Truncate a shard in place while it is open, under both policies; return the error and what replacing gives."""
    path = shard_path(folder, 1)
    kept = path.read_bytes()
    with wds.open_source(folder, 3, 2, access=access) as source:
        source.batch(np.arange(N))
        os.truncate(path, 700)
        with pytest.raises(ValueError, match=path.name) as error:
            source.batch(np.arange(N))
    path.write_bytes(kept)
    with wds.open_source(folder, 3, 2, access=access, on_bad="replace", max_bad=7) as source:
        before = source.batch(np.arange(N)).stored
        os.truncate(path, 700)
        after = source.batch(np.arange(N)).stored
        changed = int((after != before).flatten(1).any(1).sum())
        return str(error.value), changed, source.counters()["quarantined_shards"]


def test_a_shard_that_shrinks_under_pread_is_an_error(dataset):
    message, changed, shards = shrink_while_open(dataset[0], "pread")
    assert "\n" not in message and (changed, shards) == (7, 1)


def test_a_shard_that_shrinks_under_a_map_is_no_crash(originals, tmp_path):
    """In a process of its own, which SIGBUS would kill: the map's pages beyond the new end are gone."""
    shutil.copytree(originals[0] / "webdataset", tmp_path / "d")
    ((message, changed, shards),) = on_ranks(1, shrink_while_open, tmp_path / "d", "mmap")
    assert "shard-000001.tar" in message and (changed, shards) == (7, 1)


def test_a_shard_that_is_replaced_by_renaming_is_read_on(dataset):
    """Whoever renames a new file into place leaves the old one to those who have it open."""
    folder, _ = dataset
    with wds.open_source(folder, 3, 2) as source:
        before = source.batch(np.arange(N)).stored
        path = shard_path(folder, 1)
        path.with_suffix(".new").write_bytes(b"something else")
        os.replace(path.with_suffix(".new"), path)
        assert torch.equal(source.batch(np.arange(N)).stored, before)


MOUNTS = """\
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 21 0:40 / /data rw,relatime shared:5 - nfs4 server:/export rw,vers=4.2
31 30 8:2 / /data/local rw,relatime - xfs /dev/sdb rw
32 21 0:41 / /scratch/with\\040space rw - lustre 10.0.0.1@tcp:/fs rw
33 21 0:42 / /bucket rw - fuse.s3fs s3fs rw
34 21 0:43 / /tmp rw - tmpfs tmpfs rw
35 34 0:44 / /tmp rw - overlay overlay rw
"""


@pytest.mark.parametrize(
    "folder, kind",
    [
        ("/home/x", "ext4"),
        ("/data/set", "nfs4"),
        ("/data", "nfs4"),
        ("/database", "ext4"),
        ("/data/local/set", "xfs"),
        ("/scratch/with space/set", "lustre"),
        ("/bucket/a", "fuse.s3fs"),
        ("/tmp/a", "overlay"),
    ],
)
def test_the_file_system_decides_between_mmap_and_pread(folder, kind):
    assert shard_file.file_system(folder, MOUNTS) == kind
    network = kind in ("nfs4", "lustre", "fuse.s3fs")
    assert bool(shard_file.re.fullmatch(shard_file._NETWORKS, kind)) == network


def test_access_is_chosen_or_given(tmp_path):
    assert (
        shard_file.choose_access("pread", tmp_path) == "pread" and shard_file.choose_access("mmap", tmp_path) == "mmap"
    )
    assert shard_file.choose_access("auto", tmp_path) in ("mmap", "pread")
    with pytest.raises(ValueError, match="none of auto, mmap, pread"):
        shard_file.choose_access("direct", tmp_path)


# -- the memory of a batch ----------------------------------------------------------------------------------------------------


def test_memory_is_used_again_only_when_nobody_holds_it(originals):
    """Every way to hold a batch, or part of it, keeps its bytes: the tensor, a view, an array, another thread's prefetch."""
    folder, samples = originals[0] / "webdataset", originals[1]
    ids = order.sample_at(3, np.arange(2 * N), SHARDS, 2)
    with wds.open_source(folder, 3, 2) as source:
        held, places = [], set()
        for k in range(40):
            source.prefetch(np.arange(k, k + 6))
            batch = source.batch(np.arange(k, k + 6))
            places.add(batch.stored.data_ptr())
            kept = [batch.stored, batch.stored[2:], batch.stored.numpy()[1:], batch.stored.view(-1)][k % 4]
            if k % 5 == 0:
                held.append((k, k % 4, kept))
            del batch, kept
        assert len(places) < 30, "memory that was let go is used again"
        for k, kind, kept in held:
            arrays = np.stack([samples[i][1] for i in ids[k : k + 6]])
            expected = [arrays, arrays[2:], arrays[1:], arrays.reshape(-1)][kind]
            assert (np.asarray(kept) == expected).all()


def test_pinned_memory_without_a_device_is_refused(originals):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match="pin=True needs a CUDA device"):
        wds.open_source(originals[0] / "mds", 0, 1, pin=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_pinned_batch_outlives_its_copy(originals):
    """Batches are dropped while their copies to the device wait behind other work: none may be overwritten meanwhile."""
    folder, samples = originals[0] / "webdataset", originals[1]
    ids = order.sample_at(3, np.arange(3 * N), SHARDS, 2)
    with wds.open_source(folder, 3, 2, pin=True) as source:
        assert source.batch(np.arange(4)).stored.is_pinned()
        busy = torch.randn(8192, 8192, device="cuda")
        found = []
        for k in range(2 * N):
            busy = busy @ busy.T / 8192  # the stream is behind by far when the copy is issued
            source.prefetch(np.arange(k + 1, k + 5))
            found.append(source.batch(np.arange(k, k + 4)).stored.to("cuda", non_blocking=True))
        for k, stored in enumerate(found):
            assert (stored.cpu().numpy() == np.stack([samples[i][1] for i in ids[k : k + 4]])).all()
