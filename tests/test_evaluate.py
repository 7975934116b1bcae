"""Metrics: real data score as real, noise scores as noise, and the command tells it in one object."""

import json

import numpy as np
import pytest
import torch

from data_pipeline import encode, manifest
from tests.test_generate import DATA, write_network
from trainer import digit_labels, evaluate, features
from trainer.drawing import Drawing


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    return write_network(tmp_path_factory.mktemp("run") / "a.safetensors")


@pytest.fixture(scope="module")
def reader():
    return digit_labels.train_reader()


def real_digits():
    from sklearn.datasets import load_digits

    found = load_digits()
    return np.rint(found.images * (255 / 16)).astype(np.uint8)[:, None], found.target


def test_the_reader_reads_real_digits(reader):
    read, accuracy = reader
    assert accuracy >= digit_labels.LOWEST_READER_ACCURACY
    images, labels = real_digits()
    result = digit_labels.agreement(read, images, labels)
    assert result["share"] > 0.99 and result["images"] == 1797 and len(result["per_digit"]) == 10


def test_wrong_labels_and_noise_are_seen(reader):
    read, _ = reader
    images, labels = real_digits()
    assert digit_labels.agreement(read, images, (labels + 1) % 10)["share"] < 0.01
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    assert digit_labels.agreement(read, noise, labels)["share"] < 0.2


def run(*arguments):
    return evaluate.main([str(a) for a in arguments])


def test_an_untrained_network_draws_no_digits(snapshot, capsys):
    assert run(snapshot, "--metric", "digits", "--per-class", 4, "--steps", 2, "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["metrics"]["digits"]["share"] < 0.5 and made["metrics"]["digits"]["images"] == 40
    assert made["origin"]["clock"] == 64 and made["origin"]["steps"] == 2
    assert run(snapshot, "--per-class", 1, "--steps", 1) == 0
    assert "carry the digit asked for" in capsys.readouterr().out


def test_bad_input_is_one_line(snapshot, tmp_path, capsys):
    other = write_network(tmp_path / "b.safetensors", resolution=16)
    cases = [
        ([snapshot, "--metric", "beauty"], "known are"),
        ([snapshot, "--per-class", "0"], "at least 1"),
        ([other, "--metric", "digits"], "draws no 8x8 digits"),
        ([tmp_path / "nowhere"], "no such snapshot"),
    ]
    for arguments, expected in cases:
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1


def test_absent_scikit_learn_is_one_line(snapshot, capsys, monkeypatch):
    import sys

    evaluate._reader.cache_clear()
    for name in ("sklearn", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run(snapshot, "--metric", "digits") == 2
    assert "pip install scikit-learn" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run_with_data(tmp_path_factory):
    """Return a run directory that names real data, and two snapshots in it that were whitened as that data."""
    folder = tmp_path_factory.mktemp("whole")
    assert encode.main(["sklearn:digits", str(folder / "data")]) == 0
    m = manifest.load(folder / "data")
    for key in ("mean", "std", "shape"):
        DATA_OF_RUN[key] = list(getattr(m, key))
    DATA_OF_RUN["digest"] = m.digest
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(f"data: {{path: {folder / 'data'}}}")
    paths = [write_network(folder / "run", clock=c, seed=c, data=DATA | DATA_OF_RUN) for c in (64, 128)]
    return folder / "run", paths


DATA_OF_RUN = {}
FEW = ["--steps", 2, "--images", 60, "--data-images", 200]


def test_loss_and_latent_distance_of_several_snapshots(run_with_data, tmp_path, capsys):
    run_dir, paths = run_with_data
    options = [
        *FEW,
        "--metric",
        "loss,latent",
        "--cache",
        tmp_path / "cache",
        "--results",
        tmp_path / "results",
        "--json",
    ]
    assert run(*paths, *options) == 0
    made = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [m["origin"]["clock"] for m in made] == [64, 128]
    for m in made:
        loss, latent = m["metrics"]["loss"], m["metrics"]["latent"]
        assert len(loss["bins"]) == 8 and loss["error"] > 0 and loss["images"] == 200
        assert latent["value"] > 1 and latent["precision"] < 0.5 and latent["images"] == 60
    assert len(list((tmp_path / "cache").iterdir())) == 1  # the statistics of the data are worked out once
    kept = json.loads((tmp_path / "results" / f"{paths[0].stem}.json").read_text())
    assert kept == made[0]
    assert run(*paths, *options) == 0 and capsys.readouterr().out == ""  # nothing is left to do
    assert run(run_dir, *FEW, "--metric", "loss") == 0
    assert "training data" in capsys.readouterr().out


def test_real_images_are_at_distance_zero(run_with_data, tmp_path, monkeypatch):
    """What a perfect generator would score: the data themselves, passed through the whole of the metric."""
    run_dir, paths = run_with_data
    options = evaluate._parser().parse_args([str(a) for a in (paths[0], *FEW, "--cache", tmp_path, "--images", 200)])

    def draw(self, positions, batch):
        subject = evaluate.Subject(paths[0], self, {})
        return ((where, x) for where, x, _ in evaluate._data(subject, options).batches(batch))

    monkeypatch.setattr(Drawing, "batches", draw)
    result = evaluate.measure(paths[0], ["latent"], options)["metrics"]["latent"]
    assert abs(result["value"]) < 1e-6 and result["precision"] == result["recall"] == 1


def test_feature_networks_come_from_files(run_with_data, tmp_path, capsys, monkeypatch):
    class Inception(torch.nn.Module):
        def forward(self, images: torch.Tensor, return_features: bool = False):
            return images.float().mean((2, 3))

    torch.jit.script(Inception()).save(tmp_path / "i.pt")
    paths = run_with_data[1]
    options = [*FEW, "--metric", "fid", "--cache", tmp_path / "cache"]
    assert run(paths[0], *options) == 2
    assert "inception-2015-12-05.pt" in capsys.readouterr().err
    assert run(paths[0], *options, "--weights", f"fid={tmp_path / 'i.pt'}") == 0
    assert "not comparable" in capsys.readouterr().out
    monkeypatch.setenv("EVENKEEL_INCEPTION", str(tmp_path / "i.pt"))
    np.savez(tmp_path / "ref.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert run(paths[0], *options, "--reference", tmp_path / "ref.npz", "--json") == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["fid"]["value"] > 0
    np.savez(tmp_path / "ref.npz", mu=np.zeros(4), sigma=np.eye(4))
    assert run(paths[0], *options, "--reference", tmp_path / "ref.npz") == 2
    assert "give the right file" in capsys.readouterr().err
    (tmp_path / "i.pt").write_bytes(b"nothing")
    assert run(paths[0], *options) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_large_latents_are_averaged_to_few_features():
    extract = features.latent((4, 64, 64))
    assert extract.of(torch.ones(2, 4, 64, 64), None).shape == (2, 1024) and "squares of 4" in extract.name


def test_without_a_run_the_data_must_be_named(snapshot, capsys):
    assert run(snapshot, "--metric", "loss") == 2
    assert "--data" in capsys.readouterr().err
