"""Encoding laws: restartable at every shard, the same bytes however the work is shared, complete or absent."""

import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline import codecs, encode, latents, manifest, sources, wds


def picture(number: int, width=12, height=8) -> bytes:
    """Return a PNG whose pixels tell its number."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


NAMES = [f"{'ab'[k % 2]}/{k:02d}.png" for k in range(10)]


def make_folder(folder):
    for k, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(k))
    return folder


def make_tar(path, names, extra=lambda k: ()):
    with tarfile.open(path, "w") as tar:
        for k, name in names:
            for member, data in ((name, picture(k)), *extra(k)):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def content(folder):
    """Return every sample of a dataset as (bytes, label), and check the folder's completeness on the way."""
    m = manifest.load(folder)
    names = {"manifest.json"} | {s.name for s in m.shards} | {s.index_name for s in m.shards}
    assert set(os.listdir(folder)) == names
    found = []
    for shard in m.shards:
        rows, layout = wds.index_tar(folder / shard.name)
        data = np.memmap(folder / shard.name, dtype=np.uint8, mode="r")
        assert wds.hash_file(folder / shard.name) == shard.xxh3_64
        found += [(bytes(data[int(r["offset"]) :][: layout.bytes]), int(r["label"])) for r in rows]
    return found


def run(*arguments):
    return encode.main([str(a) for a in arguments])


def test_digits(tmp_path, capsys):
    assert run("sklearn:digits", tmp_path / "d", "--samples-per-shard", 500) == 0
    m = manifest.load(tmp_path / "d")
    assert (m.num_samples, m.shape, m.dtype, m.label_dim, len(m.shards)) == (1797, (1, 8, 8), "uint8", 10, 4)
    assert sum(m.class_counts) == 1797 and m.classes_present == tuple(range(10)) and m.whitening == "measured"
    manifest.check_fits(m, "pixels", 1, 8, 10)
    with wds.open_source(tmp_path / "d", 0, 16) as source:
        batch = source.batch(np.arange(1797))
    x = latents.whiten(batch.stored, m)
    assert x.dtype == torch.float32 and abs(float(x.mean())) < 1e-5 and abs(float(x.std()) - 0.5) < 1e-4
    assert torch.equal(latents.decode(x, m), batch.stored)
    digits = sources.Digits()
    assert batch.labels.bincount().tolist() == np.bincount(digits.labels).tolist()
    capsys.readouterr()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "d").iterdir()}
    assert run("sklearn:digits", tmp_path / "d", "--samples-per-shard", 500) == 0
    assert "up to date" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "d").iterdir()} == before
    assert run("sklearn:digits", tmp_path / "d", "--samples-per-shard", 400) == 2
    assert "holds another dataset" in capsys.readouterr().err


def test_every_kind_of_source_gives_the_same_samples(tmp_path):
    folder = make_folder(tmp_path / "folder")
    order = sorted(range(10), key=lambda k: NAMES[k])
    make_tar(tmp_path / "x.tar", [(k, NAMES[k]) for k in order])
    (tmp_path / "wds").mkdir()
    for shard, part in enumerate((order[:6], order[6:])):
        make_tar(
            tmp_path / "wds" / f"s{shard}.tar",
            [(k, f"{k:02d}.png") for k in part],
            lambda k: [(f"{k:02d}.json", json.dumps({"label": k % 2}).encode())],
        )
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for place, k in enumerate(order):
            archive.writestr(f"00000/img{place:08d}.png", picture(k))
        labels = [[f"00000/img{place:08d}.png", k % 2] for place, k in enumerate(order)]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    expected = None
    for number, source in enumerate((folder, tmp_path / "x.tar", tmp_path / "wds", tmp_path / "x.zip")):
        assert run(source, tmp_path / str(number), "--resolution", 8, "--samples-per-shard", 4) == 0
        expected = expected or content(tmp_path / "0")
        assert content(tmp_path / str(number)) == expected
    assert sorted(label for _, label in expected) == [0] * 5 + [1] * 5
    assert run(folder, tmp_path / "kept", "--resolution", 8, "--samples-per-shard", 4, "--keep-order") == 0
    assert [label for _, label in content(tmp_path / "kept")] == [0] * 5 + [1] * 5
    assert sorted(content(tmp_path / "kept")) == sorted(expected) and content(tmp_path / "kept") != expected
    m = manifest.load(tmp_path / "0")
    assert (m.mean, m.std, m.whitening) == (manifest.RGB_MEAN, manifest.RGB_STD, "published")


@pytest.mark.parametrize("name", ["l.csv", "l.json"])
def test_labels_from_a_file(tmp_path, name):
    folder = make_folder(tmp_path / "folder")
    if name == "l.csv":
        (tmp_path / name).write_text("name,label\n" + "".join(f"{n},{'yx'[k % 2]}\n" for k, n in enumerate(NAMES)))
    else:
        (tmp_path / name).write_text(json.dumps({n: 1 - k % 2 for k, n in enumerate(NAMES)}))
    assert (
        run(folder, tmp_path / "d", "--labels", tmp_path / name, "--resolution", 8, "--label-dim", 7, "--keep-order")
        == 0
    )
    m = manifest.load(tmp_path / "d")
    assert [label for _, label in content(tmp_path / "d")] == [1] * 5 + [0] * 5
    assert m.label_dim == 7 and m.classes_present == (0, 1)


def test_parts_make_the_same_dataset_as_one_job(tmp_path, capsys):
    folder = make_folder(tmp_path / "folder")
    assert run(folder, tmp_path / "one", "--resolution", 8, "--samples-per-shard", 3) == 0
    for part in ("2/3", "0/3", "1/3"):
        assert not (tmp_path / "parts" / "manifest.json").exists()
        assert run(folder, tmp_path / "parts", "--resolution", 8, "--samples-per-shard", 3, "--part", part) == 0
    assert (tmp_path / "parts" / "manifest.json").read_bytes() == (tmp_path / "one" / "manifest.json").read_bytes()
    assert content(tmp_path / "parts") == content(tmp_path / "one")


def holds_at(image: int) -> str:
    """Return an encoder's program that says "now" and holds when it is to decode its n-th image."""
    return (
        "import sys; from data_pipeline import encode, sources\n"
        "real, seen = sources.decode_image, []\n"
        "def decode_image(file):\n"
        "    seen.append(file)\n"
        f"    if len(seen) == {image}: print('now', flush=True); sys.stdin.read()\n"
        "    return real(file)\n"
        "sources.decode_image = decode_image; sys.exit(encode.main(sys.argv[1:]))"
    )


def wait_for_hold(process) -> None:
    while (line := process.stdout.readline()) != "now\n":
        assert line, "it ended"


def test_killed_job_continues_where_it_was(tmp_path):
    """SIGKILL in the middle of a shard: the next start makes only what is missing, and the same bytes."""
    folder = make_folder(tmp_path / "folder")
    assert run(folder, tmp_path / "one", "--resolution", 8, "--samples-per-shard", 2) == 0
    arguments = [str(folder), str(tmp_path / "killed"), "--resolution", "8", "--samples-per-shard", "2"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", holds_at(6), *arguments], **pipes) as process:
        wait_for_hold(process)
        process.kill()
    made = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("*.tar")}
    assert "shard-000000.tar" in made and not (tmp_path / "killed" / "manifest.json").exists()
    assert run(*arguments) == 0
    assert (tmp_path / "killed" / "shard-000000.tar").stat().st_mtime_ns == made["shard-000000.tar"]
    assert content(tmp_path / "killed") == content(tmp_path / "one")
    assert (tmp_path / "killed" / "manifest.json").read_bytes() == (tmp_path / "one" / "manifest.json").read_bytes()


@pytest.mark.slow  # five processes import torch
def test_three_processes_share_the_work_though_one_is_killed(tmp_path):
    """A job array of three, at once, one of them killed and started again: the dataset of one job, byte for byte."""
    folder = make_folder(tmp_path / "folder")
    arguments = ["--resolution", "8", "--samples-per-shard", "1"]
    assert run(folder, tmp_path / "one", *arguments) == 0
    shared = tmp_path / "shared"

    def start(part, code="import sys; from data_pipeline import encode; sys.exit(encode.main(sys.argv[1:]))"):
        command = [sys.executable, "-c", code, str(folder), str(shared), *arguments, "--part", f"{part}/3"]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    parts = [start(0), start(1, holds_at(2)), start(2)]
    wait_for_hold(parts[1])
    parts[1].kill()
    said = [part.communicate()[0] for part in parts]
    assert [part.returncode for part in parts] == [0, -9, 0]
    assert not (shared / "manifest.json").exists() and "the last part to finish" in said[0]
    again = [start(1), start(2)]  # the killed one, and one that has nothing left to do
    said = [part.communicate()[0] for part in again]
    assert [part.returncode for part in again] == [0, 0], said
    assert content(shared) == content(tmp_path / "one")
    assert (shared / "manifest.json").read_bytes() == (tmp_path / "one" / "manifest.json").read_bytes()


def test_broken_images_stop_or_are_listed(tmp_path, capsys):
    folder = make_folder(tmp_path / "folder")
    (folder / NAMES[3]).write_bytes(picture(3)[:60])
    (folder / NAMES[4]).write_bytes(b"")
    assert run(folder, tmp_path / "d", "--resolution", 8) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (
        run(folder, tmp_path / "d", "--resolution", 8, "--on-broken", "skip", "--samples-per-shard", 3, "--keep-order")
        == 0
    )
    assert "2 images were broken" in capsys.readouterr().out
    m = manifest.load(tmp_path / "d")
    assert m.num_samples == 8 and [line.partition(":")[0] for line in m.broken] == [NAMES[4], NAMES[3]]
    assert m.class_counts == (4, 4)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["/nowhere"], "not found"),
        (["FOLDER", "--codec", "jpeg"], "none of pixels"),
        (["FOLDER"], "no multiple|make them alike|12x8|not"),
        (["FOLDER", "--resolution", "8", "--label-dim", "1"], "label_dim 1"),
        (["FOLDER", "--samples-per-shard", "0"], "at least 1"),
        (["EMPTY"], "no images"),
        (["FOLDER", "--labels", "EMPTY/nothing.csv"], "nothing.csv"),
        (["FOLDER", "--codec", "tinyae4"], "--codec-weights"),
        (["FOLDER", "--resolution", "8", "--device", "cuda:99"], "torch sees"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, arguments, words):
    import re

    make_folder(tmp_path / "folder")
    (tmp_path / "folder" / NAMES[0]).write_bytes(picture(0, 16, 8))  # of another shape
    (tmp_path / "empty").mkdir()
    arguments = [
        a.replace("FOLDER", str(tmp_path / "folder")).replace("EMPTY", str(tmp_path / "empty")) for a in arguments
    ]
    assert run(arguments[0], tmp_path / "d", *arguments[1:]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and re.search(words, err)
    assert not (tmp_path / "d" / "manifest.json").exists()


def test_centre_crop():
    """The long side is cropped in its middle; halving is box averaging; equal sizes change nothing."""
    image = np.zeros((8, 24, 3), dtype=np.uint8)
    image[:, 8:16] = 200
    assert (sources.centre_crop(image, 8) == 200).all()
    assert (sources.centre_crop(image[:, :8], 8) == image[:, :8]).all()
    checker = (np.indices((16, 16)).sum(0) % 2 * 200).astype(np.uint8)[:, :, None]
    assert (sources.centre_crop(checker, 8) == 100).all()
    assert sources.centre_crop(np.zeros((5, 7, 3), dtype=np.uint8), 16).shape == (16, 16, 3)


class Doubling(codecs.Codec):
    """A codec that stores fp16 posterior moments of 2x2 blocks, as the SD-VAE's layout."""

    dtype = "float16"

    def encode(self, images):
        small = images.float()[:, :, ::2, ::2]
        return torch.cat([small, small[:, :1], small, small[:, :1]], dim=1).numpy().astype("float16")


def test_latents_go_the_same_way_as_pixels(tmp_path):
    images = sources.open_images(str(make_folder(tmp_path / "folder")))
    codec = Doubling("sd-vae-ft-mse", "ab" * 32, "mean_std", 2)
    m = encode.encode(encode.Job(images, codec, 4, 8, "stop", None), tmp_path / "d")
    assert (m.dtype, m.shape, m.moments, m.channels, m.codec_hash) == ("float16", (8, 4, 4), "mean_std", 4, "ab" * 32)
    assert (m.mean, m.std, m.whitening) == (manifest.SD_VAE_MEAN, manifest.SD_VAE_STD, "published")


def test_nan_from_a_codec_is_refused(tmp_path):
    class Broken(Doubling):
        def encode(self, images):
            return super().encode(images) * np.float16("nan")

    images = sources.open_images(str(make_folder(tmp_path / "folder")))
    with pytest.raises(ValueError, match="NaN"):
        encode.encode(encode.Job(images, Broken("x", "", "mean", 2), 4, 8, "stop", None), tmp_path / "d")
