"""Foreign bytes: whatever a file holds, the parsers give an answer or one ValueError, in bounded time."""

import dataclasses
import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import index, manifest, mds, npy, sources, wds
from tests.shards import make_samples, make_tars
from tests.test_manifest import some_manifest


def mutate(data: bytes, edits) -> bytes:
    damaged = bytearray(data)
    for place, byte in edits:
        damaged[place % len(damaged)] = byte
    return bytes(damaged)


edits = st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 255)), min_size=1, max_size=6)


def tried(call, *arguments):
    try:
        return call(*arguments)
    except ValueError as error:
        assert "\n" not in str(error)


@settings(deadline=None, max_examples=60)
@given(edits, st.booleans())
def test_tars(tmp_path_factory, edits, repair):
    folder = tmp_path_factory.mktemp("t")
    make_tars(folder, sizes=(2,), shape=(1, 2, 2))
    data = bytearray(mutate((folder / "shard-000000.tar").read_bytes()[:5120], edits))
    if repair:  # a header whose checksum is right and whose fields are wild
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
    tried(lambda: list(wds.group_members(wds.walk_tar(bytes(data)))))
    (folder / "x.tar").write_bytes(data)
    tried(lambda: wds.index_tar(folder / "x.tar"))


@settings(deadline=None, max_examples=60)
@given(edits)
def test_mds(tmp_path_factory, edits):
    folder = tmp_path_factory.mktemp("m")
    mds.write_shard(folder / "x.mds", make_samples((3,), (1, 2, 2))[0], npy.Layout("float16", (1, 2, 2)), True)
    (folder / "x.mds").write_bytes(mutate((folder / "x.mds").read_bytes(), edits))
    tried(lambda: mds.index_mds(folder / "x.mds"))


@settings(deadline=None, max_examples=300)
@given(edits, st.binary(max_size=300))
def test_npy_headers(edits, other):
    good = npy.to_bytes(np.zeros((1, 2, 2), dtype=np.float16))
    for data in (mutate(good, edits), good[:10] + other, other):
        tried(npy.parse_header, data)


@settings(deadline=None, max_examples=200)
@given(edits)
def test_indices(edits):
    rows = index.from_rows([(0, 8, 1, 5, b"a"), (8, 8, 1, 5, b"b")])
    found = tried(lambda: index.parse("x.idx", mutate(index.to_bytes(rows), edits), 2, 8, 64))
    assert found is None or (found["offset"] + found["length"] <= 64).all()


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.just(10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(list(manifest.Manifest.__dataclass_fields__)), values)
def test_manifests(name, value):
    content = json.loads(json.dumps({"format": manifest.FORMAT, "version": 1, **dataclasses.asdict(some_manifest())}))
    content[name] = value
    tried(lambda: manifest.parse(content))
    if isinstance(value, dict):
        content = json.loads(
            json.dumps({"format": manifest.FORMAT, "version": 1, **dataclasses.asdict(some_manifest())})
        )
        content["shards"][0].update(value)
        tried(lambda: manifest.parse(content))


@settings(deadline=None, max_examples=200)
@given(values)
def test_label_files(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "labels.json"
    path.write_text(json.dumps(value))
    tried(lambda: sources.read_labels(path))
    path = path.with_suffix(".csv")
    path.write_text(str(value))
    tried(lambda: sources.read_labels(path))
