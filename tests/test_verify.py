"""Every kind of damage is found, and the bad shard named."""

import os

import pytest
from PIL import Image

from data_pipeline import inspect, manifest, verify, wds
from tests.shards import make_dataset


@pytest.fixture
def folder(tmp_path):
    make_dataset(tmp_path / "data")
    return tmp_path / "data"


def test_a_good_dataset_is_well(folder, capsys):
    assert verify.main([str(folder)]) == 0
    assert "30 samples in 3 shards" in capsys.readouterr().out


def damage_at(find):
    def damage(path):
        data = bytearray(path.read_bytes())
        data[find(data)] ^= 1
        path.write_bytes(data)

    return damage


DAMAGES = {
    "payload": damage_at(lambda d: next(wds.walk_tar(d)).offset + 200),
    "label": damage_at(lambda d: next(m.offset for m in wds.walk_tar(d) if m.name.endswith("cls"))),
    "tar header": damage_at(lambda d: 3),
    "npy header": damage_at(lambda d: next(m.offset for m in wds.walk_tar(d) if m.name.endswith("npy")) + 20),
    "padding": damage_at(lambda d: next(m.offset + m.size for m in wds.walk_tar(d) if m.name.endswith("cls")) + 1),
    "truncated": lambda p: os.truncate(p, p.stat().st_size - 10240),
    "grown": lambda p: p.write_bytes(p.read_bytes() + bytes(512)),
    "missing": lambda p: p.unlink(),
    "missing index": lambda p: p.with_suffix(".idx").unlink(),
    "damaged index": lambda p: damage_at(lambda d: 40)(p.with_suffix(".idx")),
    "swapped": lambda p: p.write_bytes(p.with_name("shard-000002.tar").read_bytes()),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_named(folder, capsys, name):
    DAMAGES[name](folder / "shard-000001.tar")
    assert verify.main([str(folder)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 and out[0].startswith("bad: shard-000001.tar: ") and out[1].startswith("1 of 3 shards")


def test_all_bad_shards_are_named(folder, capsys):
    (folder / "shard-000000.tar").unlink()
    (folder / "shard-000002.idx").write_bytes(b"")
    assert verify.main([str(folder), "--quick"]) == 1
    out = capsys.readouterr().out
    assert "shard-000000.tar" in out and "shard-000002.tar" in out and "shard-000001" not in out


def test_nothing_to_verify_is_an_error(tmp_path, capsys):
    assert verify.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_inspect_draws_what_is_there(tmp_path, capsys):
    make_dataset(tmp_path / "d", codec="pixels", shape=(3, 8, 8), dtype="uint8")
    assert inspect.main([str(tmp_path / "d"), "--png", str(tmp_path / "x.png"), "--count", "10", "--columns", "4"]) == 0
    out = capsys.readouterr().out
    assert "uint8 [3, 8, 8]" in out and manifest.load(tmp_path / "d").digest in out
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (4 * 32, 3 * 32)


def test_inspect_without_weights(folder, tmp_path, capsys):
    assert inspect.main([str(folder), "--png", str(tmp_path / "x.png")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert inspect.main([str(folder), "--png", str(tmp_path / "x.png"), "--false-colour"]) == 0
