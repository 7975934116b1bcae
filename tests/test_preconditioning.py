"""Every meaning of the network's output is the same denoiser D(x; sigma), exactly."""

import pytest
import torch

from models.denoiser import build
from models.preconditioning import PREDICTIONS, coefficients
from tests.test_edm2 import trained_like
from tests.test_magnitude import SMALL
from trainer.loss import denoising_loss, sample_weight

SIGMA = torch.logspace(-2, 1.5, 8, dtype=torch.float64)
SD = 0.7


def known():
    """Return data, noise and their mix at every sigma, in float64."""
    torch.manual_seed(0)
    data, noise = SD * torch.randn(8, 16, dtype=torch.float64), torch.randn(8, 16, dtype=torch.float64)
    return data, noise, data + SIGMA[:, None] * noise


def test_a_network_that_predicts_its_target_exactly_denoises_exactly():
    data, noise, x = known()
    s = SIGMA[:, None]
    c_in = (s**2 + SD**2).rsqrt()
    alpha, spread, x0 = SD * c_in, s * c_in, data / SD  # x_t = alpha x0 + spread noise = c_in x
    assert torch.allclose(alpha * x0 + spread * noise, c_in * x)
    targets = {
        "edm": (data - SD**2 * c_in**2 * x) / (s * SD * c_in),
        "epsilon": noise,
        "x0": x0,
        "v": alpha * noise - spread * x0,
    }
    assert set(targets) == set(PREDICTIONS)
    for prediction, target in targets.items():
        c_skip, c_out, same = coefficients(prediction, s, SD)
        assert torch.allclose(c_skip * x + c_out * target, data, atol=1e-12), prediction
        assert torch.equal(same, c_in)


def test_the_constant_weighting_is_the_plain_error_of_the_predicted_quantity():
    """|D - y|^2 lambda = |F - target|^2, so min |eps' - eps|^2 is the SNR-weighted x0 loss, and so on."""
    data, noise, x = known()
    for prediction in PREDICTIONS:
        c_skip, c_out, _ = coefficients(prediction, SIGMA[:, None], SD)
        output, target = noise, (data - c_skip * x) / c_out
        error = (c_skip * x + c_out * output - data).square().sum(1)
        weight = sample_weight(SIGMA, SD, "constant", prediction)
        assert torch.allclose(weight * error, (output - target).square().sum(1), rtol=1e-9), prediction


def test_error_identities_between_epsilon_x0_and_v():
    snr = (SD / SIGMA) ** 2
    x0, epsilon, v = (sample_weight(SIGMA, SD, "constant", p) for p in ("x0", "epsilon", "v"))
    assert torch.allclose(epsilon, snr * x0) and torch.allclose(v, (1 + snr) * x0)
    assert torch.allclose(v, (1 + 1 / snr) * epsilon)
    assert torch.allclose(v, sample_weight(SIGMA, SD))  # EDM's weight is that of v


@pytest.mark.parametrize(
    ("weighting", "gamma", "of_epsilon"),
    [
        ("min_snr", 0.0, lambda snr: (5 / snr).clamp(max=1)),
        ("min_snr", 3.0, lambda snr: (3 / snr).clamp(max=1)),
        ("soft_min_snr", 0.0, lambda snr: 5 / (snr + 5)),
        ("soft_min_snr", 4.0, lambda snr: 4 / (snr + 4)),
        ("p2", 0.0, lambda snr: 1 / (1 + snr)),
        ("p2", 0.5, lambda snr: (1 + snr) ** -0.5),
    ],
)
def test_published_weightings_as_weights_on_epsilon(weighting, gamma, of_epsilon):
    snr = (SD / SIGMA) ** 2
    for prediction in PREDICTIONS:  # a weighting of the error does not depend on what is predicted
        weight = sample_weight(SIGMA, SD, weighting, prediction, gamma)
        assert torch.allclose(weight / sample_weight(SIGMA, SD, "constant", "epsilon"), of_epsilon(snr))


@torch.no_grad()
def test_the_denoiser_is_skip_and_output_of_one_network():
    torch.manual_seed(1)
    x, sigma, labels = torch.randn(4, 2, 8, 8), torch.rand(4) + 0.1, torch.tensor([0, 1, 2, -1])
    f = None
    for prediction in PREDICTIONS:
        net = trained_like({"prediction": prediction})
        c_skip, c_out, _ = coefficients(prediction, sigma.view(-1, 1, 1, 1), net.sigma_data)
        output = (net(x, sigma, labels) - c_skip * x) / c_out
        f = output if f is None else f
        assert torch.allclose(output, f, atol=1e-4), prediction


def test_weighted_losses_train_any_prediction():
    torch.manual_seed(0)
    x, noise, sigma = torch.randn(4, 2, 8, 8), torch.randn(4, 2, 8, 8), torch.rand(4) + 0.1
    labels = torch.tensor([0, 2, -1, 1])
    edm = denoising_loss(trained_like(), x, labels, sigma, noise, uncertainty=False)
    v_weight = {"weighting": "constant", "prediction": "v"}
    same = denoising_loss(trained_like(), x, labels, sigma, noise, uncertainty=False, weighting=v_weight)
    assert torch.allclose(edm[0], same[0], rtol=1e-4)
    p2 = denoising_loss(trained_like(), x, labels, sigma, noise, uncertainty=False, weighting={"weighting": "p2"})
    ratio = sample_weight(sigma, 0.5, "p2") / sample_weight(sigma, 0.5)
    assert torch.allclose(p2[0], edm[0] * ratio, rtol=1e-4)
    assert torch.allclose(p2[1].weighted, edm[1].weighted)  # what is exported does not depend on the objective


def test_an_unknown_prediction_is_one_line():
    with pytest.raises(ValueError, match="model.prediction 'score': choose one of edm, epsilon, x0, v"):
        build({**SMALL, "prediction": "score"})
