"""What the network sees depends on (seed, position) alone: same samples, same noise on any number of ranks, bitwise."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import encode, order
from trainer.config import ROOT, load
from trainer.examples import Examples, micro_batches


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_micro_batches_of_all_ranks_are_the_step_once(steps, world, micro_batch, micro_steps):
    batch = world * micro_batch * micro_steps
    clock = steps * batch
    parts = [list(micro_batches(clock, batch, micro_batch, rank, world)) for rank in range(world)]
    assert all(len(p) == micro_steps and all(len(here) == micro_batch for here, _ in p) for p in parts)
    assert np.concatenate([here for p in parts for here, _ in p]).tolist() == list(range(clock, clock + batch))
    following = [next(micro_batches(clock + batch, batch, micro_batch, rank, world)) for rank in range(world)]
    for part, (after, _) in zip(parts, following, strict=True):
        upcoming = [u.tolist() for _, u in part]
        assert upcoming == [here.tolist() for here, _ in part[1:]] + [after.tolist()], (
            "what is read ahead is what comes"
        )


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    assert encode.main(["sklearn:digits", str(folder), "--codec", "pixels"]) == 0
    return folder


def examples_of(folder, *overrides) -> Examples:
    config = load(ROOT / "configs/quickstart.yaml", [f"data.path={folder}", *overrides])
    return Examples(config, torch.device("cpu"))


def test_inputs_are_bitwise_equal_for_any_layout(digits):
    source = examples_of(digits, "loss.label_dropout=0.1")
    whole = source.at(np.arange(1790, 1822))  # across the end of the epoch
    for start, size in ((0, 8), (8, 8), (16, 16)):
        part = source.at(np.arange(1790 + start, 1790 + start + size))
        for name in ("positions", "latents", "labels", "sigma", "noise", "label_uniform"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[start : start + size]), name


def test_latents_have_the_models_standard_deviation(digits):
    e = examples_of(digits).at(np.arange(1797))
    assert abs(float(e.latents.mean())) < 1e-3 and abs(float(e.latents.std()) - 0.5) < 1e-3
    assert sorted(set(e.labels.tolist())) == list(range(10))


def test_a_seed_changes_order_and_noise(digits):
    a, b = examples_of(digits).at(np.arange(64)), examples_of(digits, "seed=1").at(np.arange(64))
    assert (
        not torch.equal(a.latents, b.latents)
        and not torch.equal(a.noise, b.noise)
        and not torch.equal(a.sigma, b.sigma)
    )


def test_a_dataset_that_does_not_fit_is_refused_in_one_line(digits):
    for overrides in (
        ["data.codec=sd-vae-ft-mse"],
        ["model.channels=4"],
        ["model.resolution=16"],
        ["model.label_dim=5"],
    ):
        with pytest.raises(ValueError) as caught:
            examples_of(digits, *overrides)
        assert "\n" not in str(caught.value), caught.value


def test_a_part_is_held_out_of_training(digits):
    examples = examples_of(digits, "data.heldout=0.1")
    n = examples.source.num_samples
    kept = ~order.held_out(1797, 0.1)
    assert sorted(examples.source.sample_ids(np.arange(n)).tolist()) == np.flatnonzero(kept).tolist()
    assert examples_of(digits).source.num_samples == 1797
    for overrides in (["data.heldout=1"], ["data.heldout=0.1", "data.reader=stock"]):
        with pytest.raises(ValueError, match="data.heldout"):
            examples_of(digits, *overrides)
    with pytest.raises(ValueError, match="data.on_bad"):
        examples_of(digits, "data.on_bad=replace", "data.reader=stock")


def test_dropout_masks_are_functions_of_layer_and_position(digits):
    mask = examples_of(digits, "model.dropout=0.25").dropout_mask
    at = torch.arange(64)
    whole = mask(at)(3, (64, 5, 8, 8))
    assert torch.equal(whole[10:20], mask(at[10:20])(3, (10, 5, 8, 8)))
    assert not torch.equal(whole, mask(at)(4, (64, 5, 8, 8)))
    assert abs(float(whole.float().mean()) - 0.75) < 0.01
    assert examples_of(digits).dropout_mask(at) is None
