"""The loss is the paper's, summed per sample; every draw comes from the caller."""

import pytest
import torch
from torch import nn

from models.denoiser import build
from models.magnitude import normalize_rows_
from models.preconditioning import PREDICTIONS
from tests.test_magnitude import SMALL
from trainer.loss import denoising_loss, drop_labels
from trainer.noise_checks import HIGHEST, LOWEST


class Known(nn.Module):
    """A denoiser that returns what it is told."""

    def __init__(self, denoised, logvar):
        super().__init__()
        self.denoised, self.logvar, self.labels = denoised, logvar, None

    def forward(self, x, sigma, labels, return_logvar, collect, dropout_mask):
        self.x, self.labels = x, labels
        return self.denoised, self.logvar


@pytest.fixture
def batch():
    torch.manual_seed(0)
    shape = (3, 2, 4, 4)
    return {
        "latents": torch.randn(shape),
        "sigma": torch.tensor([0.01, 0.5, 20.0]),
        "noise": torch.randn(shape),
        "denoised": torch.randn(shape),
        "logvar": torch.randn(3, 1, 1, 1),
    }


def call(batch, **options):
    known = Known(batch["denoised"], batch["logvar"])
    result = denoising_loss(known, batch["latents"], None, batch["sigma"], batch["noise"], **options)
    return known, *result


def test_equals_the_elementwise_definition(batch):
    known, losses, parts = call(batch, sigma_data=0.7)
    s, sd = batch["sigma"].reshape(-1, 1, 1, 1).double(), 0.7
    weight = (s**2 + sd**2) / (s * sd) ** 2
    u = batch["logvar"].double()
    elements = weight / u.exp() * (batch["denoised"].double() - batch["latents"]) ** 2 + u
    assert torch.allclose(losses.double(), elements.sum(dim=(1, 2, 3)), rtol=1e-5)
    assert torch.allclose(known.x, batch["latents"] + batch["sigma"].reshape(-1, 1, 1, 1) * batch["noise"])
    squared = (batch["denoised"] - batch["latents"]).square().mean(dim=(1, 2, 3))
    assert torch.allclose(parts.unweighted, squared) and torch.allclose(parts.logvar, batch["logvar"].flatten())
    assert torch.allclose(parts.weighted.double(), weight.flatten() * squared, rtol=1e-5)


def test_uncertainty_is_optimal_at_the_log_of_the_weighted_error(batch):
    _, _, parts = call(batch)
    batch["logvar"] = parts.weighted.log().reshape(-1, 1, 1, 1).requires_grad_()
    _, losses, _ = call(batch)
    (gradient,) = torch.autograd.grad(losses.sum(), batch["logvar"])
    assert gradient.abs().max() < 1e-3 * batch["latents"][0].numel()


def test_without_uncertainty_the_head_gets_zero_gradients_not_none(batch):
    batch["logvar"].requires_grad_()
    _, losses, parts = call(batch, uncertainty=False)
    (gradient,) = torch.autograd.grad(losses.sum(), batch["logvar"])
    assert not gradient.any()
    assert torch.allclose(losses, parts.weighted * batch["latents"][0].numel(), rtol=1e-5)


def test_a_sample_does_not_see_the_others():
    torch.manual_seed(0)
    net = build(SMALL)
    normalize_rows_(net)
    with torch.no_grad():
        net.unet.out_gain.fill_(0.7)
        x, noise, sigma = torch.randn(4, 2, 8, 8), torch.randn(4, 2, 8, 8), torch.rand(4) + 0.1
        labels = torch.tensor([0, 2, -1, 1])
        whole, _ = denoising_loss(net, x, labels, sigma, noise)
        halves = [denoising_loss(net, x[i], labels[i], sigma[i], noise[i])[0] for i in (slice(0, 2), slice(2, 4))]
    assert torch.allclose(whole, torch.cat(halves), rtol=1e-5)


def test_labels_are_dropped_where_the_uniform_says_so():
    labels, uniform = torch.tensor([3, 0, 5, 1]), torch.tensor([0.05, 0.5, 0.0999, 0.1])
    assert drop_labels(labels, uniform, 0.1).tolist() == [-1, 0, -1, 1]
    assert drop_labels(torch.eye(4), uniform, 0.1).sum(1).tolist() == [0, 1, 0, 1]
    assert drop_labels(labels, uniform, 0.0) is labels and drop_labels(None, uniform, 0.1) is None
    with pytest.raises(ValueError, match="label_uniform"):
        drop_labels(labels, None, 0.1)


def test_dropped_labels_reach_the_network(batch):
    known = Known(batch["denoised"], batch["logvar"])
    labels, uniform = torch.tensor([0, 1, 2]), torch.tensor([0.0, 0.9, 0.9])
    denoising_loss(
        known,
        batch["latents"],
        labels,
        batch["sigma"],
        batch["noise"],
        label_dropout=0.5,
        label_uniform=uniform,
    )
    assert known.labels.tolist() == [-1, 1, 2]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_lowest_and_the_highest_level_that_a_config_may_ask_for_are_finite_in_fp32(prediction):
    torch.manual_seed(0)
    net = build({**SMALL, "prediction": prediction})
    normalize_rows_(net)
    torch.nn.init.constant_(net.unet.out_gain, 1.0)
    x, sigma = torch.randn(2, 2, 64, 64), torch.tensor([LOWEST, HIGHEST])
    for weighting in ("edm", "constant", "min_snr", "soft_min_snr", "p2"):
        net.zero_grad()
        chosen = {"weighting": weighting, "prediction": prediction}
        losses, parts = denoising_loss(net, x, None, sigma, torch.randn_like(x), uncertainty=False, weighting=chosen)
        losses.sum().backward()
        for found in (losses, parts.weighted, parts.unweighted, *(p.grad for p in net.parameters())):
            assert torch.isfinite(found).all(), weighting


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    net = build(SMALL)
    normalize_rows_(net)
    x = torch.randn(2, 2, 8, 8)
    for uncertainty in (True, False):
        losses, parts = denoising_loss(
            net, x, torch.tensor([0, 1]), torch.ones(2), x, uncertainty=uncertainty, collect=True
        )
        assert losses.shape == (2,) and losses.dtype == torch.float32 and parts.magnitudes
        net.zero_grad()
        losses.sum().backward()
        assert all(p.grad is not None for p in net.parameters())
