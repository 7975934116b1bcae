"""Densities over logSNR are densities, and their quantiles, truncations and noise levels belong to them."""

import math

import pytest
import torch

from models import noise

NAMES = {
    "lognormal": {"density": "lognormal", "P_mean": -0.4, "P_std": 1.0},
    "edm": {"density": "lognormal", "P_mean": -1.2, "P_std": 1.2},
    "laplace": {"density": "laplace", "mu": 0.0, "b": 0.5},
    "laplace moved": {"density": "laplace", "mu": 1.3, "b": 0.75},
    "cosine": {"density": "cosine"},
    "cosine scaled": {"density": "cosine", "mu": -0.5, "s": 1.3},
}
RANGE = {"sigma_min": 0.05, "sigma_max": 3.0}

# logsnr at t = 1 - cdf (Hang & Gu 2024, in closed form); rows of the noise-schedule paper's Table 1
AT = (0.01, 0.10, 0.25, 0.50, 0.90, 0.99, 0.999)
VECTORS = [
    ({"density": "cosine"}, (8.3070, 3.6855, 1.7627, 0, -3.6855, -8.3070, -12.9123)),
    ({"density": "laplace", "b": 0.5}, (1.9560, 0.8047, 0.3466, 0, -0.8047, -1.9560, -3.1073)),
    ({"density": "laplace", "b": 0.75}, (2.9340, 1.2071, 0.5199, 0, -1.2071, -2.9340, -4.6610)),
    ({"density": "cosine", "s": 1.3}, (6.3900, 2.8350, 1.3560, 0, -2.8350, -6.3900, -9.9326)),
]


def grid(density, count=400_001):
    low = density.low if math.isfinite(density.low) else -80.0
    high = density.high if math.isfinite(density.high) else 80.0
    return torch.linspace(low, high, count, dtype=torch.float64)


@pytest.fixture(params=[(name, cut) for name in NAMES for cut in (False, True)], ids=str)
def density(request):
    name, cut = request.param
    return noise.density(NAMES[name] | (RANGE if cut else {}), 0.5)


def test_integrates_to_one(density):
    x = grid(density)
    assert abs(torch.trapezoid(density.pdf(x), x).item() - 1) < 1e-6


def test_cdf_is_the_integral_of_the_pdf(density):
    x = grid(density)
    integral = torch.cumulative_trapezoid(density.pdf(x), x)
    assert (density.cdf(x[1:]) - density.cdf(x[:1]) - integral).abs().max() < 1e-6
    assert density.pdf(x).dtype == density.cdf(x).dtype == torch.float64


def test_icdf_inverts_the_cdf_into_the_tails(density):
    u = torch.cat([10.0 ** -torch.arange(1, 16, dtype=torch.float64), torch.linspace(0.05, 0.95, 19).double()])
    assert torch.allclose(density.cdf(density.icdf(u)), u, rtol=1e-9, atol=1e-15)
    upper = 1 - u[:8]
    assert torch.allclose(density.cdf(density.icdf(upper)), upper, rtol=1e-12)
    order = density.icdf(torch.linspace(0.001, 0.999, 999).double())
    assert (order.diff() > 0).all()


@pytest.mark.parametrize(("parameters", "values"), VECTORS)
def test_published_quantiles(parameters, values):
    t = torch.tensor(AT, dtype=torch.float64)
    assert noise.density(parameters, 1.0).icdf(1 - t).tolist() == pytest.approx(values, abs=1e-4)


def test_lognormal_is_normal_in_log_sigma():
    density = noise.density(NAMES["lognormal"], 0.7)
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    logs = density.sigma_from_uniform(u).log()
    assert logs.mean().item() == pytest.approx(-0.4, abs=1e-6) and logs.std().item() == pytest.approx(1.0, abs=1e-3)
    z = torch.special.ndtri(u)
    assert torch.allclose(logs.flip(0), -0.4 + z, atol=1e-9)


def test_logsnr_is_zero_where_noise_equals_data():
    assert noise.logsnr_from_sigma(torch.tensor(0.7), 0.7).item() == pytest.approx(0, abs=1e-7)
    sigma = torch.logspace(-3, 2, 50, dtype=torch.float64)
    assert torch.allclose(noise.sigma_from_logsnr(noise.logsnr_from_sigma(sigma, 0.5), 0.5), sigma, rtol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_truncated_draws_stay_in_range_and_keep_proportions(name):
    whole, cut = noise.density(NAMES[name], 0.5), noise.density(NAMES[name] | RANGE, 0.5)
    u = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    sigma = cut.sigma_from_uniform(u)
    assert sigma.min() >= 0.05 * (1 - 1e-12) and sigma.max() <= 3.0 * (1 + 1e-12)
    a, b = torch.tensor([-0.5, 0.7], dtype=torch.float64)
    ratio = whole.pdf(a) / whole.pdf(b)
    assert torch.allclose(cut.pdf(a) / cut.pdf(b), ratio, rtol=1e-12)
    assert cut.pdf(torch.tensor([-9.0, 9.0])).tolist() == [0, 0]
    one_sided = noise.density(NAMES[name] | {"sigma_max": 3.0}, 0.5)
    assert one_sided.high == math.inf and one_sided.low == cut.low


def test_a_range_far_in_a_tail_is_exact():
    # ln sigma beyond 8 standard deviations, where 1 - cdf would be 0 in float64
    for parameters in ({"sigma_min": 1e5, "sigma_max": 1e6}, {"sigma_min": 1e-6, "sigma_max": 1e-5}):
        density = noise.density({"P_mean": -0.4, "P_std": 1.0} | parameters, 0.5)
        x = grid(density)
        assert abs(torch.trapezoid(density.pdf(x), x).item() - 1) < 1e-6
        u = torch.linspace(0.01, 0.99, 99).double()
        assert torch.allclose(density.cdf(density.icdf(u)), u, rtol=1e-6)


def test_the_ends_of_the_uniform_give_finite_levels():
    for parameters in NAMES.values():
        sigma = noise.density(parameters, 0.5).sigma_from_uniform(torch.tensor([0.0, 1.0], dtype=torch.float64))
        assert torch.isfinite(sigma).all() and (sigma > 0).all()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"density": "uniform"}, "noise.density 'uniform'"),
        ({"density": "lognormal", "P_mean": 0.0}, "noise.P_std is missing"),
        ({"density": "laplace", "b": 0.0}, "scale"),
        ({"density": "cosine", "sigma_min": 2.0, "sigma_max": 1.0}, "sigma_min"),
        ({"density": "laplace", "sigma_min": 1e-200, "sigma_max": 1e-199}, "no mass"),
    ],
)
def test_errors_are_one_line(parameters, message):
    with pytest.raises(ValueError, match=message) as error:
        noise.density(parameters, 0.5)
    assert "\n" not in str(error.value)
