"""What the groups `noise` and `loss` may not say, without torch: one ValueError line each, with value, rule and remedy."""

import dataclasses
import math

from trainer import curriculum
from trainer.groups import Config, Noise
from trainer.typed import parse_size

# What fp32 squares and sums over a sample without overflow, whatever the prediction and the weighting
LOWEST, HIGHEST = 1e-16, 1e16
# shape -> beyond which of its own units 2^-33 of it lie, the least mass that a draw may have on either side (trainer/draws.py)
_REACH = {"normal": 6.34, "laplace": 22.18, "cosine": 44.84, "logistic": 22.87}
# density -> its shape, centre and scale in logsnr, where no unit is applied yet
_PLACE = {
    "lognormal": lambda n: ("normal", -2 * n["P_mean"], 2 * n["P_std"]),
    "laplace": lambda n: ("laplace", n["mu"], n["b"]),
    "cosine": lambda n: ("cosine", n["mu"], 1 / n["s"]),
    "flow": lambda n: ("logistic", n["mu"], 2.0),
    "logit_normal": lambda n: ("normal", -2 * n["logit_mean"], 2 * n["logit_std"]),
}
_WIDTHS = ("P_std", "b", "s", "gamma", "logit_std", "curve", "rho")


def check_noise(config: Config) -> None:
    """Raise ValueError for a noise density, a curriculum or a weighting that makes no sense."""
    n = config.noise
    for key in _WIDTHS:
        _above_zero(f"noise.{key}", getattr(n, key))
    if n.levels == 1:
        raise ValueError("noise.levels=1: must be 0 (continuous) or at least 2; try 250")
    if n.shift and not (n.density == "polynomial" and n.levels):
        raise ValueError(
            "noise.shift=true: shifts the index of polynomial levels; add noise.levels=250, or leave it out"
        )
    _check_range(n)
    _check_floor(n)
    _check_curriculum(n)
    _check_learning(n)
    _check_reach(n)
    loss = config.loss
    if loss.weighting not in ("edm", "constant") and loss.uncertainty:
        raise ValueError(
            f"loss.weighting={loss.weighting}: the learned uncertainty divides every weight out; add loss.uncertainty=false"
        )
    if loss.gamma < 0:
        raise ValueError(f"loss.gamma={loss.gamma}: must be above 0, or 0 for the published value; try 5")
    _above_zero("loss.p2_k", loss.p2_k)
    _above_zero("model.sigma_data", config.model.sigma_data)


def _above_zero(key: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{key}={value}: must be above 0; try 1")


def _discrete(n: Noise) -> bool:
    return n.density.startswith("fastddpm-") or n.density == "polynomial" and n.levels > 0


def _check_range(n: Noise) -> None:
    if n.sigma_max and n.sigma_max <= n.sigma_min:
        raise ValueError(f"noise.sigma_max={n.sigma_max}: must exceed noise.sigma_min={n.sigma_min}; exchange them")
    if n.density.startswith("fastddpm-") and (n.sigma_min or n.sigma_max):
        raise ValueError(
            f"noise.density={n.density}: its ten levels are fixed, sigma_min and sigma_max cannot cut them; leave both at 0"
        )
    if n.density == "cauchy" and not (n.sigma_min and n.sigma_max):
        raise ValueError(
            "noise.density=cauchy: its tails need noise.sigma_min and noise.sigma_max; use noise=cauchy, "
            "or add noise.sigma_min=0.002 noise.sigma_max=80"
        )
    if n.density == "polynomial":
        if n.sigma_unit == "sigma_data":
            raise ValueError(
                "noise.sigma_unit=sigma_data: polynomial levels lie between sigma_min and sigma_max themselves; use auto"
            )
        low, high = n.sigma_min or 0.002, n.sigma_max or 80.0
        if low >= high:
            raise ValueError(f"noise.sigma_min={low:g}: must be below sigma_max={high:g} (0 stands for 0.002 and 80)")


def _check_reach(n: Noise) -> None:
    """Refuse noise levels that fp32 cannot compute with: of the ends of a range, and of a density that is not cut there."""
    ends = [(key, getattr(n, key)) for key in ("sigma_min", "sigma_max", "floor_sigma_min", "floor_sigma_max")]
    for key, value in ends + [
        (f"curriculum.to.{k}", n.curriculum.to[k]) for k in curriculum.RANGE if k in n.curriculum.to
    ]:
        if value and not LOWEST <= value <= HIGHEST:
            raise ValueError(
                f"noise.{key}={value:g}: must lie between {LOWEST:g} and {HIGHEST:g}, for fp32; try 0.002 or 80"
            )
    if n.density not in _PLACE:
        return
    plain = dataclasses.asdict(n)
    for moved in (plain, plain | n.curriculum.to):
        shape, centre, scale = _PLACE[n.density](moved)
        reach = _REACH[shape] * scale
        if not n.sigma_max and (reach - centre) / 2 > math.log(HIGHEST):
            raise ValueError(
                f"noise.density={n.density}: as it is set, levels reach beyond {HIGHEST:g}; add noise.sigma_max=80"
            )
        if not n.sigma_min and (reach + centre) / 2 > -math.log(LOWEST):
            raise ValueError(
                f"noise.density={n.density}: as it is set, levels reach below {LOWEST:g}; add noise.sigma_min=0.002"
            )


def _check_floor(n: Noise) -> None:
    if n.floor >= 1:
        raise ValueError(f"noise.floor={n.floor}: must be below 1; try 0.05")
    if n.floor and _discrete(n):
        raise ValueError(f"noise.floor={n.floor}: a discrete density ({n.density}) has no broad floor; use floor=0")
    if not 0 < n.floor_sigma_min < n.floor_sigma_max:
        raise ValueError(
            f"noise.floor_sigma_min={n.floor_sigma_min}: must lie between 0 and floor_sigma_max={n.floor_sigma_max}; try 0.002"
        )


def _check_curriculum(n: Noise) -> None:
    c, known = n.curriculum, curriculum.PARAMETERS[n.density]
    if not c.to:
        if c.over_images:
            raise ValueError("noise.curriculum.over_images: nothing moves; add noise.curriculum.to={mu: -1}")
        return
    if not c.over_images:
        raise ValueError("noise.curriculum.over_images=0: state in how many images the end is reached; try 8Mi")
    for key, value in c.to.items():
        name = f"noise.curriculum.to.{key}"
        if key not in known:
            rule = f"{n.density} moves {', '.join(known)}" if known else f"{n.density} has nothing that moves"
            raise ValueError(f"{name}: {rule}; correct the name or the density")
        try:
            end = float(parse_size(str(value)))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        c.to[key] = end
        if key in (*_WIDTHS, *curriculum.RANGE):
            _above_zero(name, end)
        if key in curriculum.RANGE and not getattr(n, key):
            raise ValueError(f"{name}={end:g}: moves from noise.{key}, which is not set; add noise.{key}={end:g}")
        if key == "levels" and (end < 2 or n.levels < 2):
            raise ValueError(f"{name}={end:g}: levels move from 2 or more to 2 or more; set noise.levels=20")
    low, high = (c.to.get(key, getattr(n, key)) for key in curriculum.RANGE)
    if high and high <= low:
        raise ValueError(
            f"noise.curriculum.to: ends at sigma_max={high:g}, not above sigma_min={low:g}; widen the range"
        )


def _check_learning(n: Noise) -> None:
    both = {"adaptive": n.adaptive.strength, "learned": n.learned.strength}
    for key, strength in both.items():
        if strength >= 1:
            raise ValueError(
                f"noise.{key}.strength={strength}: must be below 1, so that no level is abandoned; try 0.5"
            )
        if strength and _discrete(n):
            raise ValueError(f"noise.{key}.strength={strength}: a discrete density ({n.density}) learns nothing; use 0")
        if strength and n.curriculum.to:
            raise ValueError(f"noise.{key}.strength={strength}: not together with noise.curriculum; drop one of them")
    if all(both.values()):
        raise ValueError(
            "noise.adaptive.strength and noise.learned.strength: both are above 0; choose one, set the other to 0"
        )
