"""A dataset's description: complete or absent, refused when damaged, edited or of another kind."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from data_pipeline import index, manifest
from data_pipeline.manifest import Manifest, Shard


def some_manifest(**changes) -> Manifest:
    values = {
        "container": "webdataset",
        "codec": "sd-vae-ft-mse",
        "codec_hash": "ab",
        "moments": "mean_std",
        "dtype": "float16",
        "shape": (8, 64, 64),
        "label_dim": 3,
        "class_counts": (2, 0, 3),
        "mean": manifest.SD_VAE_MEAN,
        "std": manifest.SD_VAE_STD,
        "whitening": "published",
        "shards": (Shard("a.tar", 2, 9999, "0f", "aa"), Shard("b.tar", 3, 9999, "0e", "bb")),
    }
    return Manifest(**(values | changes))


def test_round_trip_and_what_follows(tmp_path):
    m = some_manifest()
    manifest.save(m, tmp_path)
    again = manifest.load(tmp_path)
    assert again == m and again.digest == m.digest
    assert manifest.load(tmp_path / "manifest.json") == m
    assert (m.num_samples, m.channels, m.resolution, m.classes_present) == (5, 4, 64, (0, 2))
    assert m.sample_bytes == 8 * 64 * 64 * 2
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]  # no temporary file is left


def test_digest_names_the_content():
    m = some_manifest()
    other = dataclasses.replace(m, shards=(m.shards[0], dataclasses.replace(m.shards[1], index_sha256="bc")))
    assert other.digest != m.digest


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda c: c.pop("format"), "not a manifest"),
        (lambda c: c.update(version=99), "version 99"),
        (lambda c: c.pop("mean"), "'mean' is missing"),
        (lambda c: c.update(label_dim=4), "class_counts"),
        (lambda c: c.update(std=[1, 1, 1, 0]), "not positive"),
        (lambda c: c.update(mean=[1, 2, 3, float("nan")]), "finite"),
        (lambda c: c.update(dtype="object"), "dtype 'object'"),
        (lambda c: c.update(shape=[8, 64]), "[C, H, W]"),
        (lambda c: c.update(shape=[8, 10**6 - 1, 10**6 - 1]), "bytes"),
        (lambda c: c.update(shards=[]), "no shards"),
        (lambda c: c.update(shards=7), "wrong JSON type"),
        (lambda c: c["shards"][0].update(name="../../etc/passwd.tar"), "plain file name"),
        (lambda c: c["shards"][0].update(samples=-1), "sample or byte count"),
        (lambda c: c.update(codec="pixels"), "digest does not match"),
    ],
)
def test_damage_is_refused_in_one_line(tmp_path, damage, words):
    path = manifest.save(some_manifest(), tmp_path)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        manifest.load(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff", "[]"])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match="manifest.json"):
        manifest.load(tmp_path)


def test_absent_manifest_names_the_command(tmp_path):
    with pytest.raises(ValueError, match="python -m data_pipeline.encode"):
        manifest.load(tmp_path)


@pytest.mark.parametrize(
    "asked, words",
    [
        (("pixels", 4, 64, 3), "data.codec"),
        (("sd-vae-ft-mse", 8, 64, 3), "model.channels=4"),
        (("sd-vae-ft-mse", 4, 32, 3), "model.resolution=64"),
        (("sd-vae-ft-mse", 4, 64, 1000), "model.label_dim=3"),
    ],
)
def test_a_dataset_that_does_not_fit_is_refused(asked, words):
    manifest.check_fits(some_manifest(), "sd-vae-ft-mse", 4, 64, 3)
    manifest.check_fits(some_manifest(), "sd-vae-ft-mse", 4, 64, 0)  # labels may go unused
    with pytest.raises(ValueError, match=words):
        manifest.check_fits(some_manifest(), *asked)


def test_login_node_needs_no_torch():
    code = "import sys, data_pipeline.manifest; sys.exit(any(m in sys.modules for m in ('torch', 'webdataset', 'PIL')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_index_round_trip_and_damage(tmp_path):
    rows = index.from_rows([(512, 64, 3, 2**64 - 1, b"a/b"), (1536, 64, -1, 0, "é".encode())])
    path = tmp_path / "s.idx"
    sha256 = index.write(path, rows)
    again = index.read(path, sha256, 2, 64, 4096)
    assert (again == rows).all() and again["key"][1].decode() == "é"
    data = path.read_bytes()
    for damaged in (data[:-1], data[:10], b"", data + b"x", b"X" + data[1:], data[:-1] + b"!"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="s.idx"):
            index.read(path, sha256, 2, 64, 4096)
        if damaged != data[:-1] + b"!":
            with pytest.raises(ValueError, match="s.idx"):
                index.parse(path, damaged, 2, 64, 4096)
    for wrong in (
        {"samples": 3, "sample_bytes": 64, "shard_bytes": 4096},
        {"samples": 2, "sample_bytes": 65, "shard_bytes": 4096},
    ):
        with pytest.raises(ValueError):
            index.parse(path, data, **wrong)
    with pytest.raises(ValueError, match="outside"):
        index.parse(path, data, 2, 64, 1536 + 63)
    assert np.dtype(rows.dtype).itemsize == 40
