"""The loss on given data: a perfect network scores what it must, whatever the batch."""

import numpy as np
import pytest
import torch

from data_pipeline import encode, manifest, order, wds
from data_pipeline.latents import whiten
from trainer import heldout


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    assert encode.main(["sklearn:digits", str(folder)]) == 0
    m = manifest.load(folder)
    fields = ("codec", "codec_hash", "moments", "mean", "std", "shape", "label_dim", "digest")
    return folder, {f: list(v) if isinstance(v := getattr(m, f), tuple) else v for f in fields}


class Network:
    """Predict nothing: F = 0, so that D = c_skip x."""

    sigma_data = 0.5

    def __call__(self, x, sigma, labels):
        return x * (0.25 / (sigma**2 + 0.25)).view(-1, 1, 1, 1)


class Oracle(Network):
    """Know the answer for one image at a time."""

    def __call__(self, x, sigma, labels):
        return self.truth + torch.zeros_like(x)


def test_predicting_nothing_costs_one(digits):
    data = heldout.Data(digits[0], digits[1], 1000)
    losses = heldout.bin_losses(Network(), data, 100)
    summary = heldout.summary(losses)
    assert losses.shape == (1000, 8)
    # E |F target|^2 = 1 by construction of EDM's preconditioning, for data of standard deviation 0.5
    assert [b["loss"] for b in summary["bins"]] == pytest.approx([1] * 8, abs=0.1)
    assert summary["error"] < 0.02


def test_the_batch_changes_nothing(digits):
    data = heldout.Data(digits[0], digits[1], 20)
    np.testing.assert_allclose(
        heldout.bin_losses(Network(), data, 20), heldout.bin_losses(Network(), data, 7), rtol=1e-6
    )


def test_each_image_once_and_whitened_as_the_network_wants(digits):
    data = heldout.Data(digits[0], digits[1], 10**6)
    assert data.num == 1797 and "training data" in data.name
    latents = torch.cat([x for _, x, _ in data.batches(500)])
    labels = torch.cat([y for _, _, y in data.batches(500)])
    assert latents.mean().abs() < 1e-3 and latents.std() == pytest.approx(0.5, rel=1e-3)
    assert len(torch.unique(latents.flatten(1), dim=0)) > 1790 and torch.bincount(labels).min() > 170
    other = heldout.Data(digits[0], digits[1] | {"mean": [0.0], "std": [127.5], "digest": "another"}, 100)
    assert "held out" in other.name
    assert next(other.batches(100))[1].min() == 0  # pixels 0 are 0 where the network says that the mean is 0


def test_a_run_that_held_something_out_is_measured_on_that(digits):
    """The two parts of the training data have nothing in common and are all of it."""
    header = digits[1] | {"heldout": 0.1}
    data = heldout.Data(digits[0], header, 10**6)
    chosen = order.held_out(1797, 0.1)
    assert data.num == chosen.sum() and "held out" in data.name
    assert data.digest != heldout.Data(digits[0], digits[1], 10).digest  # statistics of the two must not be mixed up
    found = torch.cat([x for _, x, _ in data.batches(50)])
    with wds.open_source(digits[0], 0, 16, heldout=0.1) as source:
        trained_on = whiten(source.batch(np.arange(source.num_samples)).stored, source.manifest)
    assert len(trained_on) + len(found) == 1797
    seen = {x.numpy().tobytes() for x in trained_on}
    assert not any(x.numpy().tobytes() in seen for x in found)
    assert heldout.Data(digits[0], header | {"digest": "another"}, 10**6).num == 1797  # of other data, everything


def test_other_data_is_refused(digits):
    for key, value in (("codec", "sd-vae-ft-mse"), ("shape", [4, 64, 64]), ("label_dim", 1000)):
        with pytest.raises(ValueError, match="give data like it"):
            heldout.Data(digits[0], digits[1] | {key: value}, 10)
    with pytest.raises(ValueError, match="not found"):
        heldout.Data(digits[0] / "nowhere", digits[1], 10)


def test_a_broken_network_is_refused(digits):
    broken = Oracle()
    broken.truth = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        heldout.bin_losses(broken, heldout.Data(digits[0], digits[1], 4), 4)
