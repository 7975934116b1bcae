"""Conversion laws: the same samples in every container, the same stream from both, nothing lost on a round trip."""

import dataclasses
import io
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline import convert, latents, manifest, verify, wds
from tests.shards import make_dataset, make_tars
from tests.test_wds import flip


def run(*arguments):
    return convert.main([str(a) for a in arguments])


def stream(folder):
    positions = np.arange(75)  # two epochs and a half
    with wds.open_source(folder, 9, 2) as source:
        batch = source.batch(positions)
        return batch.stored, batch.labels, latents.whiten(batch.stored, source.manifest)


def test_tar_and_mds_give_the_same_stream(tmp_path):
    make_dataset(tmp_path / "tar")
    assert run(tmp_path / "tar", tmp_path / "mds", "--format", "mds") == 0
    assert run(tmp_path / "mds", tmp_path / "back", "--format", "webdataset") == 0
    for name in ("mds", "back"):
        for a, b in zip(stream(tmp_path / "tar"), stream(tmp_path / name)):
            assert torch.equal(a, b)
        assert verify.main([str(tmp_path / name)]) == 0
    for k in range(3):
        tar = f"shard-{k:06d}.tar"
        assert (tmp_path / "tar" / tar).read_bytes() == (tmp_path / "back" / tar).read_bytes()
    assert manifest.load(tmp_path / "mds").container == "mds"


def test_edm2_zip_round_trip_is_lossless(tmp_path):
    samples = make_dataset(tmp_path / "tar")
    assert run(tmp_path / "tar", tmp_path / "x.zip", "--format", "edm2-zip") == 0
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        array = np.load(io.BytesIO(archive.read("00000/img-mean-std-00000007.npy")), allow_pickle=False)
        assert array.dtype == np.float32 and (array == samples[7][1]).all()
        assert json.loads(archive.read("dataset.json"))["labels"][7] == [
            "00000/img-mean-std-00000007.npy",
            samples[7][2],
        ]
    arguments = ("--format", "webdataset", "--dtype", "float16", "--samples-per-shard", 13, "--keep-order")
    assert run(tmp_path / "x.zip", tmp_path / "back", *arguments) == 0
    m = manifest.load(tmp_path / "back")
    assert (m.codec, m.moments, m.whitening, [s.samples for s in m.shards]) == (
        "sd-vae-ft-mse",
        "mean_std",
        "published",
        [13, 13, 4],
    )
    with wds.open_source(tmp_path / "back", 0, 9) as source:
        batch, ids = source.batch(np.arange(30)), source.sample_ids(np.arange(30))
    assert (batch.stored.numpy() == np.stack([samples[i][1] for i in ids])).all()
    assert batch.labels.tolist() == [samples[i][2] for i in ids]
    assert run(tmp_path / "x.zip", tmp_path / "full", "--format", "mds", "--label-dim", 1000) == 0
    m = manifest.load(tmp_path / "full")
    assert (m.dtype, m.label_dim, m.classes_present) == ("float32", 1000, (0, 1, 2, 3, 4))
    assert run(tmp_path / "x.zip", tmp_path / "small", "--format", "mds", "--label-dim", 2) == 2


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_become_png(tmp_path, channels):
    samples = make_dataset(tmp_path / "tar", codec="pixels", shape=(channels, 8, 8), dtype="uint8")
    assert run(tmp_path / "tar", tmp_path / "x.zip", "--format", "edm2-zip") == 0
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        image = np.asarray(Image.open(io.BytesIO(archive.read("00000/img00000003.png"))))
    assert (image.reshape(8, 8, channels).transpose(2, 0, 1) == samples[3][1]).all()
    assert run(tmp_path / "x.zip", tmp_path / "back", "--format", "webdataset") == 0
    assert manifest.load(tmp_path / "back").codec == "pixels"


def test_foreign_shards_are_left_alone(tmp_path):
    make_tars(tmp_path / "tar")
    before = sorted(p.name for p in (tmp_path / "tar").iterdir())
    assert run(tmp_path / "tar", tmp_path / "mds", "--format", "mds", "--codec", "mine") == 0
    assert sorted(p.name for p in (tmp_path / "tar").iterdir()) == before
    assert manifest.load(tmp_path / "mds").codec == "mine"


def test_what_is_known_carries_over(tmp_path):
    make_dataset(tmp_path / "tar")
    m = manifest.load(tmp_path / "tar")
    known = dataclasses.replace(m, codec_hash="ab", label_dim=9, class_counts=(*m.class_counts, 0, 0, 0, 0))
    manifest.save(known, tmp_path / "tar")
    assert run(tmp_path / "tar", tmp_path / "mds", "--format", "mds") == 0
    found = manifest.load(tmp_path / "mds")
    for name in (
        "codec",
        "codec_hash",
        "moments",
        "label_dim",
        "class_counts",
        "mean",
        "std",
        "whitening",
        "shape",
        "dtype",
    ):
        assert getattr(found, name) == getattr(known, name)


@pytest.mark.parametrize("form", ["mds", pytest.param("webdataset", marks=pytest.mark.slow)])
def test_a_killed_job_goes_on_where_it_was(tmp_path, form):
    """SIGKILL in the middle of a shard: the next start makes only what is missing, and the same bytes."""
    make_dataset(tmp_path / "tar", sizes=(5, 4, 3, 2))
    arguments = [str(tmp_path / "tar"), str(tmp_path / "d"), "--format", form]
    assert run(tmp_path / "tar", tmp_path / "one", "--format", form) == 0
    slow = (
        "import os, sys; from data_pipeline import convert, index\n"
        "real, made = index.write, []\n"
        "def write(*a):\n"
        "    if len(made) == 2: print('now', flush=True); sys.stdin.read()\n"
        "    made.append(a); return real(*a)\n"
        "index.write = write; sys.exit(convert.main(sys.argv[1:]))"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", slow, *arguments], **pipes, text=True) as process:
        assert process.stdout.readline() == "now\n"
        process.kill()
    shards = [s.name for s in manifest.load(tmp_path / "one").shards]
    times = {name: (tmp_path / "d" / name).stat().st_mtime_ns for name in shards[:2]}
    assert not (tmp_path / "d" / shards[2]).exists() and list((tmp_path / "d").glob(".*.tmp"))
    assert run(*arguments) == 0
    assert {name: (tmp_path / "d" / name).stat().st_mtime_ns for name in shards[:2]} == times
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "d" / path.name).read_bytes() == path.read_bytes(), path.name
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "d").iterdir()}
    assert run(*arguments) == 0 and {p: p.stat().st_mtime_ns for p in (tmp_path / "d").iterdir()} == before
    assert run(*arguments, "--label-dim", "9") == 2  # another job


def test_another_jobs_leavings_are_made_anew(tmp_path):
    """Same names, other samples: a record of another source or setting must not count."""
    make_dataset(tmp_path / "a" / "data", seed=1)
    make_dataset(tmp_path / "b" / "data", seed=2)
    source = convert.open_shards(tmp_path / "a" / "data", None)
    real, count = source.read, []

    def read(number):
        count.append(number)
        if number == 2:
            raise ValueError("stopped")
        return real(number)

    source.read = read
    with pytest.raises(ValueError, match="stopped"):
        convert.write_folder(source, tmp_path / "d", "mds", None)
    assert run(tmp_path / "b" / "data", tmp_path / "d", "--format", "mds") == 0
    assert run(tmp_path / "b" / "data", tmp_path / "one", "--format", "mds") == 0
    assert (tmp_path / "d" / "manifest.json").read_bytes() == (tmp_path / "one" / "manifest.json").read_bytes()


def test_damage_is_found_on_the_way(tmp_path, capsys):
    make_dataset(tmp_path / "tar")
    with wds.open_source(tmp_path / "tar", 0, 1) as source:
        flip(tmp_path / "tar" / "shard-000001.tar", source._get(1).offsets[3])
    for target, form in (("mds", "mds"), ("x.zip", "edm2-zip")):
        assert run(tmp_path / "tar", tmp_path / target, "--format", form) == 2
        assert "shard-000001.tar: sample '00000016'" in capsys.readouterr().err
    assert not (tmp_path / "x.zip").exists() and not (tmp_path / "mds" / "manifest.json").exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_damaged_zips_are_one_line(tmp_path, capsys):
    make_dataset(tmp_path / "tar")
    run(tmp_path / "tar", tmp_path / "x.zip", "--format", "edm2-zip")
    data = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(data[: len(data) // 2])
    flipped = bytearray(data)
    flipped[300] ^= 1
    (tmp_path / "flipped.zip").write_bytes(flipped)
    capsys.readouterr()
    for name in ("cut.zip", "flipped.zip", "nothing.zip"):
        assert run(tmp_path / name, tmp_path / "d", "--format", "webdataset") == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and name in err
        assert not (tmp_path / "d" / "manifest.json").exists()


def test_a_dataset_is_never_overwritten(tmp_path, capsys):
    make_dataset(tmp_path / "tar")
    assert run(tmp_path / "tar", tmp_path / "tar", "--format", "mds") == 2
    assert "holds a dataset already" in capsys.readouterr().err
