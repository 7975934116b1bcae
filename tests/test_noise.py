"""Densities over logSNR are densities, and their quantiles, truncations and noise levels belong to them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import noise, sampler
from models.densities import Discrete, Mixture, Polynomial
from models.learned_densities import Histogram, MonotoneSchedule

NAMES = {
    "lognormal": {"density": "lognormal", "P_mean": -0.4, "P_std": 1.0},
    "edm": {"density": "lognormal", "P_mean": -1.2, "P_std": 1.2},
    "laplace": {"density": "laplace", "mu": 0.0, "b": 0.5},
    "laplace moved": {"density": "laplace", "mu": 1.3, "b": 0.75},
    "cosine": {"density": "cosine"},
    "cosine scaled": {"density": "cosine", "mu": -0.5, "s": 1.3},
    "cauchy": {"density": "cauchy", "mu": 0.3, "gamma": 0.5},
    "flow": {"density": "flow"},
    "logit normal": {"density": "logit_normal", "logit_mean": 0.5, "logit_std": 0.8},
    "polynomial": {"density": "polynomial", "curve": 4.0},
}
RANGE = {"sigma_min": 0.05, "sigma_max": 3.0}
FLOOR = {"floor": 0.1, "floor_sigma_min": 0.002, "floor_sigma_max": 80.0}

# logsnr at t = 1 - cdf (Hang & Gu 2024, in closed form); rows of the noise-schedule paper's Table 1
AT = (0.01, 0.10, 0.25, 0.50, 0.90, 0.99, 0.999)
VECTORS = [
    ({"density": "cosine"}, (8.3070, 3.6855, 1.7627, 0, -3.6855, -8.3070, -12.9123)),
    ({"density": "laplace", "b": 0.5}, (1.9560, 0.8047, 0.3466, 0, -0.8047, -1.9560, -3.1073)),
    ({"density": "laplace", "b": 0.75}, (2.9340, 1.2071, 0.5199, 0, -1.2071, -2.9340, -4.6610)),
    ({"density": "cosine", "s": 1.3}, (6.3900, 2.8350, 1.3560, 0, -2.8350, -6.3900, -9.9326)),
    ({"density": "cauchy", "gamma": 0.5}, (15.9103, 1.5388, 0.5000, 0, -1.5388, -15.9103, -159.1544)),
    ({"density": "flow"}, (9.1902, 4.3944, 2.1972, 0, -4.3944, -9.1902, -13.8135)),
]
# share of |logsnr| below 1, 2, 4 for data of variance 1 (the same paper's densities, in closed form, to the digits given)
SHARES = [
    ({"density": "cosine"}, (0.31, 0.55, 0.83)),
    ({"density": "laplace", "b": 0.5}, (0.865, 0.982, 0.9997)),
    ({"density": "laplace", "b": 0.75}, (0.74, 0.93, 0.995)),
    ({"density": "cauchy", "gamma": 0.5}, (0.70, 0.84, 0.92)),
    ({"density": "cosine", "s": 1.3}, (0.39, 0.66, 0.91)),
    ({"density": "lognormal", "P_mean": -1.2, "P_std": 1.2}, (0.20, 0.40, 0.74)),
]


def grid(density, count=400_001):
    low = density.low if math.isfinite(density.low) else -80.0
    high = density.high if math.isfinite(density.high) else 80.0
    return torch.linspace(low, high, count, dtype=torch.float64)


@pytest.fixture(params=[(name, more) for name in NAMES for more in ("", "cut", "floor", "cut floor")], ids=str)
def density(request):
    name, more = request.param
    if name == "cauchy" and "cut" not in more:
        pytest.skip("nothing on a finite grid integrates a Cauchy density")
    options = (RANGE if "cut" in more else {}) | (FLOOR if "floor" in more else {})
    return noise.density(NAMES[name] | options, 0.5)


def test_the_pdf_is_the_slope_of_the_cdf_and_integrates_to_one(density):
    x = grid(density)
    pdf = density.pdf(x)
    pdf[~torch.isfinite(pdf)] = 0  # a polynomial density has a pole at its lowest level
    jumps = (
        (pdf.diff().abs() > 1e-3).nonzero().flatten()
    )  # at a cut, a pole or the floor's end the trapezoid rule fails
    steps = (pdf[1:] + pdf[:-1]) / 2 * x.diff() - density.cdf(x).diff()
    steps[jumps] = 0
    assert len(jumps) < 3000 and steps.abs().sum() < 1e-5
    assert density.cdf(x[-1:]).item() - density.cdf(x[:1]).item() == pytest.approx(1, abs=1e-6)
    assert pdf.dtype == density.cdf(x).dtype == torch.float64


def test_sf_is_the_rest_of_the_cdf(density):
    x = grid(density, 2001)
    assert torch.allclose(density.cdf(x) + density.sf(x), torch.ones_like(x), atol=1e-14)
    assert (density.cdf(x).diff() >= 0).all() and (density.sf(x).diff() <= 0).all()


def test_icdf_and_isf_invert_into_the_tails(density):
    u = torch.cat([10.0 ** -torch.arange(1, 16, dtype=torch.float64), torch.linspace(0.05, 0.95, 19).double()])
    # beside a cut, a floor's end and a polynomial's pole, float64 cannot tell levels apart whose masses differ by less
    smooth = math.inf in (density.high, -density.low) and not isinstance(density, Mixture)
    pole = 2e-3 if isinstance(getattr(density, "first", density), Polynomial) else 1e-13
    assert torch.allclose(density.cdf(density.icdf(u)), u, rtol=1e-9, atol=0 if smooth else 1e-13)
    assert torch.allclose(density.sf(density.isf(u)), u, rtol=1e-9, atol=0 if smooth else pole)
    upper = 1 - u[:8]
    assert torch.allclose(density.cdf(density.icdf(upper)), upper, rtol=1e-12, atol=pole)
    assert (density.icdf(torch.linspace(0.001, 0.999, 999).double()).diff() > 0).all()
    ends = density.icdf(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([density.low, density.high], rel=1e-12)


WIDTHS = {"lognormal": "P_std", "laplace": "b", "cosine": "s", "cauchy": "gamma", "logit_normal": "logit_std"}
CENTRES = {"lognormal": "P_mean", "logit_normal": "logit_mean"} | dict.fromkeys(
    ("laplace", "cosine", "cauchy", "flow"), "mu"
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(CENTRES)),
    st.floats(-3, 3),
    st.floats(0.1, 4),
    st.floats(1e-12, 1 - 1e-12),
    st.floats(0.2, 2),
    st.sampled_from(["auto", "one", "sigma_data"]),
    st.sampled_from([0.0, 0.05]),
)
def test_any_parameters_any_tail(name, centre, width, u, sigma_data, sigma_unit, floor):
    options = {"density": name, CENTRES[name]: centre, "sigma_unit": sigma_unit, "P_std": width, **FLOOR} | RANGE
    options |= {WIDTHS.get(name, "b"): width, "floor": floor}
    density = noise.density(options, sigma_data)
    level = density.icdf(torch.tensor(u, dtype=torch.float64))
    assert density.cdf(level).item() == pytest.approx(u, rel=1e-8, abs=1e-13)
    assert density.low - 1e-12 <= level.item() <= density.high + 1e-12 and density.pdf(level) > 0
    assert density.sf(density.isf(torch.tensor(u, dtype=torch.float64))).item() == pytest.approx(u, rel=1e-8, abs=1e-13)


@pytest.mark.parametrize(("parameters", "values"), VECTORS)
def test_published_quantiles(parameters, values):
    t = torch.tensor(AT, dtype=torch.float64)
    density = noise.density(parameters, 0.5)
    assert density.icdf(1 - t).tolist() == pytest.approx(values, abs=1e-4)
    assert density.isf(t).tolist() == pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize(("parameters", "shares"), SHARES)
def test_published_shares(parameters, shares):
    density = noise.density(parameters, 1.0)
    edges = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    assert (density.cdf(edges) - density.cdf(-edges)).tolist() == pytest.approx(shares, abs=5.1e-3)


def test_the_two_densities_called_edm():
    """Karras's is N(1.014, 2.4^2) in our logSNR; the noise-schedule paper's table row is N(2.4, 2.4^2) at data of variance 1."""
    karras, table = (
        noise.density({"P_mean": -1.2, "P_std": 1.2, "sigma_unit": unit}, 0.5) for unit in ("one", "sigma_data")
    )
    z = torch.special.ndtri(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    p = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    assert torch.allclose(karras.icdf(p), 2.4 + 2 * math.log(0.5) + 2.4 * z, atol=1e-12)
    assert karras.icdf(p)[1].item() == pytest.approx(1.014, abs=1e-3)
    assert torch.allclose(table.icdf(p), 2.4 + 2.4 * z, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "polynomial"])
def test_the_unit_of_sigma_shifts_by_two_ln_sigma_data(name):
    one, data = (noise.density(NAMES[name] | {"sigma_unit": unit}, 0.3) for unit in ("one", "sigma_data"))
    p = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    assert torch.allclose(one.icdf(p), data.icdf(p) + 2 * math.log(0.3), atol=1e-9)
    # measured in units of one, sigma does not depend on sigma_data
    other = noise.density(NAMES[name] | {"sigma_unit": "one"}, 2.0)
    assert torch.allclose(noise.sigma_from_uniform(one, p, 0.3), noise.sigma_from_uniform(other, p, 2.0), rtol=1e-9)


def test_flow_matching_is_uniform_in_time_and_logit_normal_normal_in_its_logit():
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    sigma = noise.sigma_from_uniform(noise.density(NAMES["flow"], 0.5), u, 0.5) / 0.5
    t = sigma / (1 + sigma)  # x_t = (1 - t) x0 + t n
    assert torch.allclose(t.flip(0), u, atol=1e-12)
    sigma = noise.sigma_from_uniform(noise.density(NAMES["logit normal"], 0.5), u, 0.5) / 0.5
    assert torch.allclose(torch.logit(sigma / (1 + sigma)).flip(0), 0.5 + 0.8 * torch.special.ndtri(u), atol=1e-9)


def test_lognormal_is_normal_in_log_sigma():
    density = noise.density(NAMES["lognormal"], 0.7)
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    logs = noise.sigma_from_uniform(density, u, 0.7).log()
    assert logs.mean().item() == pytest.approx(-0.4, abs=1e-6) and logs.std().item() == pytest.approx(1.0, abs=1e-3)
    z = torch.special.ndtri(u)
    assert torch.allclose(logs.flip(0), -0.4 + z, atol=1e-9)


def test_polynomial_levels_are_powers_of_an_even_u_on_the_ramp():
    density = noise.density({"density": "polynomial", "curve": 3.0, "rho": 7.0}, 0.5)
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    expected = (0.002 ** (1 / 7) + u**3 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    assert torch.allclose(noise.sigma_from_logsnr(density.isf(u), 0.5), expected, rtol=1e-9)
    assert noise.density(NAMES["polynomial"] | RANGE, 0.5).icdf(torch.tensor([0.0, 1.0])).tolist() == pytest.approx(
        [2 * math.log(0.5 / 3), 2 * math.log(0.5 / 0.05)]
    )


def test_discrete_polynomial_draws_are_the_papers_index():
    """round(u^c (N - 1)) on the EDM ramp of N levels."""
    density = noise.density({"density": "polynomial", "curve": 4.0, "levels": 20}, 0.5)
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    ramp = sampler.edm_grid(20)[:-1].flip(0)
    # torch rounds halves to even, which no u hits
    expected = ramp[(u**4 * 19).round().long()]
    assert torch.allclose(noise.sigma_from_uniform(density, 1 - u, 0.5), expected, rtol=1e-9)


@pytest.mark.parametrize("levels", [20, 250])
def test_shifted_polynomial_draws_are_the_papers_index(levels):
    """round(u^c (N - 1) + n), n ~ N(N^(1/5), 1); beyond the ends without n: against a million draws of it."""
    density = noise.density({"density": "polynomial", "curve": 4.0, "levels": levels, "shift": True}, 0.5)
    torch.manual_seed(0)
    place = torch.rand(1_000_000, dtype=torch.float64) ** 4 * (levels - 1)
    index = (place + torch.randn(len(place), dtype=torch.float64) + levels**0.2).round()
    index = torch.where((index < 0) | (index > levels - 1), place.round(), index).long()
    shares = torch.bincount(index, minlength=levels) / len(index)
    # levels rise with the index, logsnr falls
    assert (density.mass.flip(0) - shares).abs().max() < 1.5e-3 and density.mass.sum().item() == pytest.approx(1)
    assert torch.allclose(noise.sigma_from_logsnr(density.levels, 0.5), sampler.edm_grid(levels)[:-1], rtol=1e-9)
    plain = noise.density({"density": "polynomial", "curve": 4.0, "levels": levels}, 0.5)
    assert density.mass[-1] < 0.5 * plain.mass[-1], "the lowest level loses most"


@pytest.mark.parametrize(
    ("name", "keys", "shape"),
    [
        ("logit_normal", {"logit_mean": 0.0, "logit_std": 0.5}, "normal"),
        ("laplace", {"mu": 0.0, "b": 1.0}, "laplace"),
        ("cosine", {"mu": 0.0, "s": 1.0}, "cosine"),
        ("flow", {"mu": 0.0}, "logistic"),
    ],
)
def test_the_config_knows_without_torch_how_far_a_density_reaches(name, keys, shape):
    from trainer import noise_checks

    _, _, scale = noise_checks._PLACE[name](keys)
    farthest = noise.density({"density": name, **keys}, 0.5).isf(torch.tensor(2.0**-33, dtype=torch.float64)).item()
    assert farthest / scale == pytest.approx(noise_checks._REACH[shape], abs=0.006)


@pytest.mark.parametrize("which", ["uniform", "nonuniform"])
def test_fast_ddpm_draws_the_levels_of_its_own_grid_equally(which):
    density = noise.density({"density": f"fastddpm-{which}"}, 0.5)
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    sigma, counts = torch.unique(noise.sigma_from_uniform(density, u, 0.5), return_counts=True)
    assert counts.tolist() == [100] * 10
    assert torch.allclose(sigma.flip(0), sampler.fast_ddpm_grid(which)[:-1], rtol=1e-12)


@given(st.lists(st.integers(-10, 10), min_size=1, max_size=12, unique=True), st.floats(0, 1), st.randoms())
def test_discrete_quantiles_are_levels_that_reach_the_mass(levels, p, random):
    density = Discrete(levels, [random.random() + 0.01 for _ in levels])
    p = torch.tensor(p, dtype=torch.float64)
    level = density.icdf(p)
    assert level.item() in density.levels.tolist()
    assert density.cdf(level) >= p - 1e-12 and density.cdf(level - 1e-12) <= p + 1e-12
    assert density.pdf(density.levels).sum().item() == pytest.approx(1)
    assert density.cdf(level).item() + density.sf(level).item() == pytest.approx(1)
    assert density.pdf(torch.tensor(10.5)).item() == 0


def test_logsnr_is_zero_where_noise_equals_data():
    assert noise.logsnr_from_sigma(torch.tensor(0.7), 0.7).item() == pytest.approx(0, abs=1e-7)
    sigma = torch.logspace(-3, 2, 50, dtype=torch.float64)
    assert torch.allclose(noise.sigma_from_logsnr(noise.logsnr_from_sigma(sigma, 0.5), 0.5), sigma, rtol=1e-13)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "polynomial"])
def test_truncated_draws_stay_in_range_and_keep_proportions(name):
    whole, cut = noise.density(NAMES[name], 0.5), noise.density(NAMES[name] | RANGE, 0.5)
    u = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    sigma = noise.sigma_from_uniform(cut, u, 0.5)
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


def test_a_floor_adds_its_share_everywhere():
    base, mixed = noise.density(NAMES["laplace"], 0.5), noise.density(NAMES["laplace"] | FLOOR, 0.5)
    ends = noise.logsnr_from_sigma(torch.tensor([80.0, 0.002]), 0.5)
    x = torch.linspace(ends[0] + 0.1, ends[1] - 0.1, 99, dtype=torch.float64)
    assert torch.allclose(mixed.pdf(x), 0.9 * base.pdf(x) + 0.1 / (ends[1] - ends[0]), rtol=1e-9)
    beyond = torch.tensor([-12.0, 12.0])
    assert torch.allclose(mixed.pdf(beyond), 0.9 * base.pdf(beyond), rtol=1e-9)


def test_the_ends_of_the_uniform_give_finite_levels():
    for parameters in NAMES.values():
        for more in ({}, FLOOR):
            cut = RANGE if parameters["density"] == "cauchy" else {}
            density = noise.density(parameters | more | cut, 0.5)
            sigma = noise.sigma_from_uniform(density, torch.tensor([0.0, 1.0], dtype=torch.float64), 0.5)
            assert torch.isfinite(sigma).all() and (sigma > 0).all()
            assert noise.sigma_from_uniform(density, 0.5, 0.5).shape == ()


MADE = {
    "adaptive": lambda: Histogram(torch.tensor([-3.0, -1.0, 0.0, 4.0]), torch.tensor([1.0, 0.0, 3.0])),
    "learned": lambda: MonotoneSchedule(torch.tensor([0.999, 0.7, 0.65, 0.1, 0.001])),
    "discrete": lambda: noise.density({"density": "polynomial", "levels": 20}, 0.5),
    "fastddpm": lambda: noise.density({"density": "fastddpm-uniform"}, 0.5),
} | {name: lambda n=n: noise.density(n, 0.5) for name, n in NAMES.items()}


@pytest.mark.parametrize("name", MADE)
def test_any_shape_any_type_both_ends_and_no_probability_outside_them(name):
    density = MADE[name]()
    for f in (density.pdf, density.cdf, density.sf, density.icdf, density.isf):
        for x in (0.3, [0.1, 0.2], torch.rand(2, 3, 4).mT, torch.zeros(0), torch.tensor([0, 1])):
            y = f(x)
            assert y.dtype == torch.float64 and y.shape == torch.as_tensor(x).shape and not y.isnan().any()
        assert f(torch.tensor(0.3, dtype=torch.float64)).item() == f([0.3]).item()
    ends = torch.tensor([-math.inf, density.low, density.high, math.inf], dtype=torch.float64)
    below = 0 if density.levels is None else density.mass[0].item()
    assert density.cdf(ends).tolist() == pytest.approx([0, below, 1, 1], rel=1e-15, abs=0)  # 0 exactly
    assert density.sf(ends).tolist() == pytest.approx([1, 1 - below, 0, 0], rel=1e-15, abs=0)
    assert density.pdf(ends[[0, 3]]).tolist() == [0, 0]
    for f in (density.icdf, density.isf):
        assert f(torch.tensor([-1e-9, 1 + 1e-9, math.nan], dtype=torch.float64)).isnan().all()


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
