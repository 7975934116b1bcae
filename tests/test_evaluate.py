"""Metrics: real data score as real, noise scores as noise, and the command tells it in one object."""

import json

import numpy as np
import pytest

from tests.test_generate import write_network
from trainer import digit_labels, evaluate


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

    for name in ("sklearn", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run(snapshot, "--metric", "digits") == 2
    assert "pip install scikit-learn" in capsys.readouterr().err
