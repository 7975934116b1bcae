"""Which keys of the config group `model` mean something to which family of networks; a key without a meaning is refused.

A composed config holds every key, so "set" means: not the default. Imports no torch, like the rest of the config.
"""

import dataclasses

from trainer.groups import Engine, Model, Ode

ADAPTIVE = ("dopri5", "bosh3", "adaptive_heun")

_MAGNITUDE_PRESERVING = (
    *("num_blocks", "channels_per_head", "channel_mult_noise", "channel_mult_emb", "label_balance", "concat_balance"),
    *("residual_balance", "attn_balance", "clip_act", "dropout", "resample_filter"),
)
# the families' keys that mean nothing to it; what is not named here is common to all
MEANINGLESS = {
    "edm2": ("ode",),
    "ddpm_unet": (*_MAGNITUDE_PRESERVING, "ode"),
    "unode mp": ("residual_balance", "ode.norm"),  # the force's strength stands for the balance
    "unode paper": (*_MAGNITUDE_PRESERVING, "ode.omega", "ode.strength", "ode.hidden", "ode.norm"),
    "unode released": (*_MAGNITUDE_PRESERVING, "ode.omega", "ode.strength", "ode.hidden"),
}


def check_model(model: Model, engine: Engine) -> None:
    """Raise ValueError for a key that the family does not know, and for solvers that do not go with the rest."""
    kind = f"unode {model.ode.mode}" if model.family == "unode" else model.family
    for key in MEANINGLESS[kind]:
        value = _value(model, key)
        if value != _value(Model(), key):
            if key == "ode":
                key, value = _first_difference(model.ode)
            raise ValueError(f"model.{key}={value}: means nothing to the family {kind}; remove it")
    _check_widths(model, kind)
    if model.family == "unode":
        _check_ode(model, engine)


def _check_widths(model: Model, kind: str) -> None:
    """Refuse widths that cannot be halved into position and velocity, or have no 8 groups to normalise."""
    grouped = kind in ("ddpm_unet", "unode paper") or kind == "unode released" and model.ode.norm == "group"
    unit = 8 if grouped else 2 if model.family == "unode" else 1
    for width in (model.model_channels * mult for mult in model.channel_mult):
        if width % unit:
            raise ValueError(
                f"model.model_channels={model.model_channels}: makes a level of {width} channels, and {kind} needs a multiple of "
                f"{unit}; try {-(-model.model_channels // unit) * unit}"
            )


def _check_ode(model: Model, engine: Engine) -> None:
    ode = model.ode
    if ode.mode != "mp" and ode.solver == "split":
        raise ValueError(
            f"model.ode.solver=split: is for model.ode.mode=mp; with mode {ode.mode} set model.ode.solver=rk4, the papers'"
        )
    if ode.adjoint and ode.solver == "split":
        raise ValueError(
            "model.ode.adjoint=true: needs a Runge-Kutta solver; set model.ode.solver=rk4, or adjoint=false"
        )
    if ode.solver in ADAPTIVE and max(ode.rtol, ode.atol) < 1e-7:
        raise ValueError(
            f"model.ode.rtol={ode.rtol:g} and atol={ode.atol:g}: no adaptive solver gets there in fp32, one must be at least 1e-7; "
            f"try 1e-3"
        )
    if engine.zero_stage == 3 and ode.solver in ADAPTIVE:
        raise ValueError(
            f"model.ode.solver={ode.solver}: ranks would take different numbers of steps, and with engine.zero_stage=3 each step "
            f"gathers weights from all: they would wait forever; use a fixed-step solver or engine.zero_stage=2"
        )
    if engine.compile == "true" and not compiles(model):
        what = "model.ode.adjoint=true" if ode.adjoint else f"model.ode.solver={ode.solver}"
        raise ValueError(
            f"{what}: does not compile as one graph; set engine.compile=false, or fixed steps without adjoint"
        )
    if ode.mode == "released" and model.label_dim:
        raise ValueError(
            f"model.label_dim={model.label_dim}: the released network sees no class; set model.label_dim=0"
        )


def compiles(model: Model) -> bool:
    """Say whether the network compiles as one graph: an adaptive solver or the adjoint method does not."""
    return model.family != "unode" or not (model.ode.adjoint or model.ode.solver in ADAPTIVE)


def _value(model: Model, key: str):
    for name in key.split("."):
        model = getattr(model, name)
    return model


def _first_difference(ode: Ode) -> tuple[str, object]:
    plain, default = dataclasses.asdict(ode), dataclasses.asdict(Ode())
    name = next(n for n in plain if plain[n] != default[n])
    return f"ode.{name}", plain[name]
