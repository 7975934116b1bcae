"""Distances between sets of images: the reference's number, exact streaming, and nothing that runs when a file is read."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from trainer import frechet

GOLDEN = load_file(Path(__file__).parent / "data" / "frechet.safetensors")  # made by the EDM2 reference
GOLDEN_DISTANCE = 1.9591060389375667


def statistics(rows, parts=1):
    made = frechet.Statistics("x", rows.shape[1])
    for part in np.array_split(rows, parts):
        one = frechet.Statistics("x", rows.shape[1])
        one.add(part)
        made.merge(one)
    return made


def test_distance_is_the_references():
    a, b = (statistics(GOLDEN[f"feat_{x}"]).moments() for x in "ab")
    assert np.allclose(a[0], GOLDEN["mu_a"], rtol=1e-12) and np.allclose(
        a[1], GOLDEN["sigma_a"], rtol=1e-12, atol=1e-14
    )
    assert frechet.distance(*a, *b) == pytest.approx(GOLDEN_DISTANCE, rel=1e-12)
    assert frechet.distance(*b, *a) == pytest.approx(GOLDEN_DISTANCE, rel=1e-10)
    assert abs(frechet.distance(*a, *a)) < 1e-10


def test_gaussians_have_their_closed_form():
    mean, spread = np.array([1.0, -2.0]), np.array([0.5, 3.0])
    got = frechet.distance(np.zeros(2), np.eye(2), mean, np.diag(spread**2))
    assert got == pytest.approx((mean**2).sum() + ((spread - 1) ** 2).sum())
    flat = np.diag([1.0, 0.0])  # fewer images than features: a singular covariance
    assert frechet.distance(np.zeros(2), flat, np.zeros(2), flat) == pytest.approx(0, abs=1e-12)


def test_parts_add_up_to_the_whole():
    rows = np.random.default_rng(0).standard_normal((1000, 6)) * 3 + 100
    whole, parts = statistics(rows).moments(), statistics(rows, 7).moments()
    assert np.allclose(whole[0], rows.mean(0)) and np.allclose(whole[1], np.cov(rows.T), rtol=1e-9)
    assert np.allclose(parts[1], whole[1], rtol=1e-9)


def test_what_is_kept_comes_back(tmp_path):
    mean, covariance = statistics(GOLDEN["feat_a"]).moments()
    frechet.save(tmp_path / "new" / "a.npz", mean, covariance, {"images": 200}, GOLDEN["feat_a"])
    got = frechet.load(tmp_path / "new" / "a.npz", "latent")
    assert np.array_equal(got[0], mean) and np.array_equal(got[1], covariance)
    assert got[2] == {"images": 200} and got[3].shape == (200, 8)


def test_published_layout_is_read_and_nothing_in_it_runs(tmp_path):
    mean, covariance = statistics(GOLDEN["feat_a"]).moments()
    path = tmp_path / "refs.pkl"
    path.write_bytes(pickle.dumps({"num_images": 7, "fid": {"mu": mean, "sigma": covariance}}))
    got = frechet.load(path, "fid")
    assert np.array_equal(got[1], covariance) and got[2]["num_images"] == 7 and got[3] is None
    with pytest.raises(ValueError, match="fd_dinov2"):
        frechet.load(path, "fd_dinov2")
    np.savez(tmp_path / "plain.npz", mu=mean, sigma=covariance)
    assert np.array_equal(frechet.load(tmp_path / "plain.npz", "fid")[0], mean)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path.write_bytes(pickle.dumps({"fid": Evil()}))
    with pytest.raises(ValueError, match="refused"):
        frechet.load(path, "fid")
    assert not (tmp_path / "ran").exists()
    for content in (b"", b"nonsense", pickle.dumps([1])):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no statistics"):
            frechet.load(path, "fid")


def test_precision_and_recall_tell_fidelity_from_variety():
    rng = np.random.default_rng(0)
    real = rng.standard_normal((500, 4))
    precision, recall = frechet.precision_recall(real, rng.standard_normal((500, 4)))
    assert precision > 0.9 and recall > 0.9
    narrow = 0.2 * rng.standard_normal((500, 4))
    precision, recall = frechet.precision_recall(real, narrow)
    assert precision > 0.95 and recall < 0.3
    precision, recall = frechet.precision_recall(real, real + 50)
    assert precision == recall == 0
    with pytest.raises(ValueError, match="draw more"):
        frechet.precision_recall(real[:3], real)


def test_broken_features_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        frechet.Statistics("x", 1).add(np.array([[np.nan]]))
    with pytest.raises(ValueError, match="at least two"):
        frechet.Statistics("x", 1).moments()
