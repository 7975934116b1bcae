"""MDS laws: the library's files read as they are, ours are its own byte for byte, and no damage goes unseen.

tests/data/mds was written by mosaicml-streaming 0.13.0's MDSWriter: 25 samples {"latent": ndarray:float16:8,4,4, "label": i % 5},
standard normals of default_rng(0), size_limit 3000, hashes xxh3_64.
"""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import adopt, convert, manifest, mds, npy, verify, wds
from tests.shards import make_samples

LIBRARY = Path(__file__).parent / "data" / "mds"


def library_samples():
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((8, 4, 4)).astype(np.float16), i % 5) for i in range(25)]


def test_the_librarys_files_read_as_they_are(tmp_path):
    shutil.copytree(LIBRARY, tmp_path / "d")
    with wds.open_source(tmp_path / "d", 4, 2, codec="sd-vae-ft-mse") as source:
        m = source.manifest
        assert (m.container, m.num_samples, m.shape, m.label_dim, len(m.shards)) == ("mds", 25, (8, 4, 4), 5, 3)
        batch, ids = source.batch(np.arange(25)), source.sample_ids(np.arange(25))
    samples = library_samples()
    assert (batch.stored.numpy() == np.stack([samples[i][0] for i in ids])).all()
    assert batch.labels.tolist() == [samples[i][1] for i in ids]
    hashes = [s["raw_data"]["hashes"]["xxh3_64"] for s in json.loads((LIBRARY / "index.json").read_text())["shards"]]
    assert [s.xxh3_64 for s in m.shards] == hashes
    assert verify.main([str(tmp_path / "d")]) == 0


def write_ours(folder, sizes=(6, 4), labelled=True):
    layout = npy.Layout("float16", (8, 4, 4))
    folder.mkdir(exist_ok=True)
    shards, entries = make_samples(sizes), []
    for number, samples in enumerate(shards):
        path = folder / f"shard.{number:05d}.mds"
        mds.write_shard(path, samples, layout, labelled)
        entries.append(manifest.Shard(path.name, len(samples), path.stat().st_size, wds.hash_file(path), ""))
    (folder / "index.json").write_bytes(mds.index_json(entries, layout, labelled))
    return [sample for shard in shards for sample in shard]


@pytest.mark.extras
@pytest.mark.parametrize("labelled", [True, False])
def test_ours_open_with_the_stock_library(tmp_path, labelled):
    if importlib.util.find_spec("streaming") is None:
        pytest.skip("mosaicml-streaming is not installed: pip install '.[mds]'")
    streaming = mds.library()
    samples = write_ours(tmp_path / "d", labelled=labelled)
    found = streaming.StreamingDataset(local=str(tmp_path / "d"), batch_size=1, validate_hash="xxh3_64")
    for i, (key, array, label) in enumerate(samples):
        sample = found[i]
        assert sample["key"] == key and (sample["sample"] == array).all() and sample.get("label", label) == label
        assert ("label" in sample) == labelled
    with streaming.MDSWriter(
        out=str(tmp_path / "theirs"),
        columns=mds.columns(npy.Layout("float16", (8, 4, 4)), labelled),
        hashes=["xxh3_64"],
        size_limit=None,
    ) as writer:
        for key, array, label in samples[:6]:
            writer.write({"key": key, "sample": array} | ({"label": label} if labelled else {}))
    ours, theirs = tmp_path / "d" / "shard.00000.mds", tmp_path / "theirs" / "shard.00000.mds"
    assert ours.read_bytes() == theirs.read_bytes()
    index = [json.loads((p.parent / "index.json").read_text())["shards"][0] for p in (ours, theirs)]
    assert index[0] == index[1]


def test_ours_read_back(tmp_path):
    samples = write_ours(tmp_path / "d")
    adopt.adopt(tmp_path / "d", "mine", progress=lambda text: None)
    rows, layout = mds.index_mds(tmp_path / "d" / "shard.00000.mds")
    assert [r["key"].decode() for r in rows] == [s[0] for s in samples[:6]] and layout.shape == (8, 4, 4)
    with wds.open_source(tmp_path / "d", 0, 1) as source:
        batch, ids = source.batch(np.arange(10)), source.sample_ids(np.arange(10))
    assert (batch.stored.numpy() == np.stack([samples[i][1] for i in ids])).all()


def test_dynamic_arrays_are_read():
    """As the library writes `ndarray` and `ndarray:float16` columns: codes of dtype and shape before the values."""
    values = np.arange(6, dtype=np.float16).tobytes()
    head = bytes([(3 << 2) | 0, 1, 2, 3])
    expected = npy.Layout("float16", (1, 2, 3))
    assert mds.parse_array("ndarray", bytes([18]) + head + values) == (expected, 5)
    assert mds.parse_array("ndarray:float16", head + values) == (expected, 4)
    assert mds.parse_array("ndarray:float16:1,2,3", values) == (expected, 0)
    for encoding, data in [
        ("ndarray", b""),
        ("ndarray", bytes([66]) + head + values),
        ("ndarray:float16", head + values[:-1]),
        ("ndarray:float16", bytes([2 << 2, 1, 2]) + values),
        ("ndarray:float64:1,2,3", values),
        ("ndarray:float16:2,3", values),
        ("ndarray:float16:1,2,0", b""),
    ]:
        with pytest.raises(ValueError):
            mds.parse_array(encoding, data)


def test_no_truncation_goes_unseen(tmp_path):
    data = (LIBRARY / "shard.00000.mds").read_bytes()
    path = tmp_path / "x.mds"
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"x\.mds"):
            mds.index_mds(path)


def test_a_damaged_head_never_gives_other_arrays(tmp_path):
    data = (LIBRARY / "shard.00000.mds").read_bytes()
    path = tmp_path / "x.mds"
    path.write_bytes(data)
    good, _ = mds.index_mds(path)
    for offset in range(int.from_bytes(data[4:8], "little")):
        damaged = bytearray(data)
        damaged[offset] ^= 0x20
        path.write_bytes(damaged)
        try:
            rows, _ = mds.index_mds(path)
        except ValueError as error:
            assert "\n" not in str(error)
        else:  # a flip in a column's name, which means nothing to the samples; the file's hash tells
            assert (rows["offset"] == good["offset"]).all() and (rows["hash"] == good["hash"]).all()


def test_adopt_command(tmp_path, capsys):
    shutil.copytree(LIBRARY, tmp_path / "d")
    assert adopt.main([str(tmp_path / "d"), "--codec", "mine", "--label-dim", "9"]) == 0
    assert manifest.load(tmp_path / "d").class_counts == (5, 5, 5, 5, 5, 0, 0, 0, 0)
    assert adopt.main([str(tmp_path), "--codec", "mine"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    "content, words",
    [
        ("[]", "no index"),
        ("{", "no index"),
        ('{"shards": []}', "names no shards"),
        ('{"shards": [{"raw_data": {"basename": "../x.mds"}}]}', "other folders"),
        ('{"shards": [{"raw_data": {"basename": "x.mds"}, "zip_data": {"basename": "../x.zstd"}}]}', "other folders"),
        ('{"shards": [{"raw_data": {"basename": "x.mds", "bytes": "7"}}]}', "no index"),
        ('{"shards": [{"raw_data": {"basename": "x.mds"}, "zip_data": {"basename": "x.mds.gz"}}]}', "restore one of"),
    ],
)
def test_bad_indices_are_one_line(tmp_path, content, words):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        adopt.adopt(tmp_path, "mine")


# -- compressed shards ------------------------------------------------------------------------------------------------------


def pack(folder, suffix, compress):
    """Make of plain shards what the library leaves behind with compression=SUFFIX: packed files, and both in index.json."""
    path = folder / "index.json"
    content = json.loads(path.read_text())
    for shard in content["shards"]:
        raw = folder / shard["raw_data"]["basename"]
        packed = compress(raw.read_bytes())
        shard["compression"] = suffix
        shard["zip_data"] = {"basename": f"{raw.name}.{suffix}", "bytes": len(packed), "hashes": {}}
        (folder / f"{raw.name}.{suffix}").write_bytes(packed)
        raw.unlink()
    path.write_text(json.dumps(content))


@pytest.fixture(params=["gz", "bz2", pytest.param("zstd", marks=pytest.mark.extras)])
def packed(request, tmp_path):
    shutil.copytree(LIBRARY, tmp_path / "d")
    module = {"gz": "gzip", "bz2": "bz2", "zstd": "zstd"}[request.param]
    pack(tmp_path / "d", request.param, pytest.importorskip(module).compress)
    return tmp_path / "d", request.param


def test_compressed_shards_are_unpacked_once(packed):
    folder, _ = packed
    with wds.open_source(folder, 4, 2, codec="mine") as source:
        batch, ids = source.batch(np.arange(25)), source.sample_ids(np.arange(25))
    samples = library_samples()
    assert (batch.stored.numpy() == np.stack([samples[i][0] for i in ids])).all()
    for path in LIBRARY.glob("*.mds"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    wds.open_source(folder, 4, 2).close()
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before and verify.main([str(folder)]) == 0


def test_damaged_or_missing_packed_shards_are_one_line(packed):
    folder, suffix = packed
    path = folder / f"shard.00001.mds.{suffix}"
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    for damaged in (data[: len(data) // 2], bytes(flipped), b"", b"<html>", None):
        path.unlink(missing_ok=True) if damaged is None else path.write_bytes(damaged)
        with pytest.raises(ValueError, match="restore|holds") as error:
            adopt.adopt(folder, "mine", progress=lambda text: None)
        assert "\n" not in str(error.value) and not (folder / "manifest.json").exists()
        assert not (folder / "shard.00001.mds").exists() and not list(folder.glob(".*.tmp"))


def test_a_missing_decompressor_is_named(tmp_path, monkeypatch, capsys):
    shutil.copytree(LIBRARY, tmp_path / "d")
    pack(tmp_path / "d", "zstd", lambda data: data)
    monkeypatch.setitem(sys.modules, "zstd", None)
    assert adopt.main([str(tmp_path / "d"), "--codec", "mine"]) == 2
    assert "pip install zstd" in capsys.readouterr().err
    assert convert.main([str(tmp_path / "d"), str(tmp_path / "e"), "--format", "webdataset", "--codec", "mine"]) == 2
    assert "data_pipeline.adopt" in capsys.readouterr().err


@pytest.mark.extras
def test_what_the_library_compressed_is_read(tmp_path):
    if importlib.util.find_spec("streaming") is None:
        pytest.skip("mosaicml-streaming is not installed: pip install '.[mds]'")
    options = {
        "columns": {"latent": "ndarray:float16:8,4,4", "label": "int"},
        "hashes": ["xxh3_64"],
        "size_limit": 3000,
    }
    with mds.library().MDSWriter(out=str(tmp_path / "d"), compression="zstd:3", **options) as writer:
        for array, label in library_samples():
            writer.write({"latent": array, "label": label})
    assert not list((tmp_path / "d").glob("*.mds"))
    with wds.open_source(tmp_path / "d", 4, 2, codec="mine") as source:
        batch, ids = source.batch(np.arange(25)), source.sample_ids(np.arange(25))
    assert (batch.stored.numpy() == np.stack([library_samples()[i][0] for i in ids])).all()
