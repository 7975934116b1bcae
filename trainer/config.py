"""What a run is: the groups of trainer/groups.py, composed from YAML, checked before anything starts.

Imports no torch, so that a login node answers within a second. Hydra is needed (and imported) only to compose a file that has a
`defaults:` list or overrides; a composed RUN/config.yaml loads without it. Every error is one ValueError line: value, rule, remedy.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import re
import typing
from pathlib import Path

import yaml

from trainer.groups import Config
from trainer.model_keys import check_model, compiles
from trainer.noise_checks import check_noise
from trainer.typed import build
from trainer.typed import format_size as format_size  # the sizes are part of the config language
from trainer.typed import parse_size as parse_size

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"

GROUPS = tuple(f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type))


# ---------------------------------------------------------------------------------------------------------------------
# Plain dict <-> dataclasses.


def from_dict(plain: dict) -> Config:
    """Build a checked Config from nested plain data; raise ValueError for an unknown key, a wrong type, a missing value."""
    config = build(Config, plain)
    check(config)
    return config


def to_dict(config: Config) -> dict:
    """Return nested plain data, complete, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def dump(config: Config) -> str:
    """Return the composed config as YAML; `load` reads it back without Hydra."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=120)


def differences(old: dict, new: dict, prefix: str = "") -> list[tuple[str, object, object]]:
    """Return (dotted key, old value, new value) for every leaf that differs."""
    found = []
    for key in [*old, *(k for k in new if k not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append((prefix + key, before, after))
    return found


def digest(config: Config) -> str:
    """Return a short hash that names this config wherever it is recorded; paths and placement leave no trace in it."""
    plain = to_dict(config)
    for key in ("run", "start_from", "cluster", "metrics"):  # where it starts from: the files' own entry `origin`
        plain.pop(key)
    plain["data"].pop("path")
    plain["data"].pop("encode_from")
    plain["data"].pop("audit")
    plain["data"].pop("stage")
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Checks that span keys.


def check(config: Config) -> None:
    """Raise ValueError where values contradict each other."""
    check_batch(config, config.cluster.nodes * config.cluster.ranks_per_node)
    if config.duration_images % config.global_batch:
        below = config.duration_images // config.global_batch * config.global_batch
        raise ValueError(
            f"duration_images={config.duration_images}: must be a multiple of global_batch={config.global_batch}; "
            f"try {below or config.global_batch} or {below + config.global_batch}"
        )
    check_engine(config)
    levels = len(config.model.channel_mult)
    if config.model.resolution % 2 ** (levels - 1):
        raise ValueError(
            f"model.resolution={config.model.resolution}: must be divisible by {2 ** (levels - 1)} for the {levels} levels "
            f"of model.channel_mult; use another resolution or fewer levels"
        )
    check_model(config.model, config.engine)
    for value in config.ema.sigma_rel:
        if not 0 < value < 12**-0.5:
            raise ValueError(f"ema.sigma_rel={value}: must lie between 0 and 0.2886 (12**-0.5); try 0.05 or 0.10")
    if len({f"{value:.3f}" for value in config.ema.sigma_rel}) != len(config.ema.sigma_rel):
        raise ValueError(
            f"ema.sigma_rel={config.ema.sigma_rel}: must differ in three decimals (they name the files); drop one"
        )
    for key, value in (("model.dropout", config.model.dropout), ("loss.label_dropout", config.loss.label_dropout)):
        if value >= 1:
            raise ValueError(f"{key}={value}: must be below 1; try 0.1")
    if config.data.heldout >= 1:
        raise ValueError(f"data.heldout={config.data.heldout}: must be below 1; try 0.01")
    if config.data.heldout and config.data.reader == "stock":
        raise ValueError(
            "data.heldout does not go with data.reader=stock, which reads everything; use data.reader=indexed"
        )
    if config.data.stage and config.data.reader == "stock":
        raise ValueError("data.stage does not go with data.reader=stock, which reads in place; use data.reader=indexed")
    if config.data.on_bad == "replace" and config.data.reader == "stock":
        raise ValueError(
            "data.on_bad=replace does not go with data.reader=stock, which can only stop; use data.reader=indexed"
        )
    if not re.fullmatch(r"([0-7]{3,4})?", config.cluster.umask):
        raise ValueError(
            f"cluster.umask={config.cluster.umask!r}: must be octal; try '0027' (group reads, others nothing)"
        )
    for key, value in config.cluster.environment.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", str(key)) or isinstance(value, dict | list):
            raise ValueError(
                f"cluster.environment.{key}={value!r}: must be NAME: text, for instance NCCL_SOCKET_IFNAME: ib0"
            )
    check_noise(config)


def check_engine(config: Config) -> None:
    """Raise ValueError for a combination that DeepSpeed cannot do, or does wrongly (0.19.8; tests/test_grid.py tries them all)."""
    e = config.engine
    if e.weights == "bf16" and e.zero_stage < 2:
        reason = {
            0: "DeepSpeed has no bf16 engine with fp32 sums of gradients without ZeRO",
            1: "DeepSpeed then keeps fp32 gradients whole on every rank and drops non-finite steps in silence",
        }[e.zero_stage]
        raise ValueError(
            f"engine.weights=bf16 with engine.zero_stage={e.zero_stage}: {reason}; use engine.zero_stage=2, or engine.weights=fp32"
        )
    if e.cuda_graphs and (e.compile == "false" or e.zero_stage == 3 or not compiles(config.model)):
        raise ValueError(
            "engine.cuda_graphs=true: only a network compiled as one graph is captured, which engine.compile=false, "
            "engine.zero_stage=3 and adaptive solvers rule out; set engine.cuda_graphs=false"
        )
    if e.compile == "true" and e.zero_stage == 3 and config.model.family != "edm2":
        raise ValueError(
            f"engine.compile=true with engine.zero_stage=3: stage 3 gathers weights between the blocks of edm2 alone, which can be "
            f"compiled, but model.family is {config.model.family}; use engine.zero_stage=2, or engine.compile=false"
        )


def check_batch(config: Config, world: int) -> None:
    """Raise ValueError unless `global_batch` divides evenly over `world` ranks and their micro-batches."""
    unit = world * config.micro_batch
    if config.global_batch % unit:
        fits = [m for m in range(1, config.global_batch + 1) if config.global_batch % (world * m) == 0]
        near = min(fits, key=lambda m: abs(m - config.micro_batch), default=0)
        remedy = f"micro_batch={near}" if near else f"global_batch={max(1, round(config.global_batch / unit)) * unit}"
        raise ValueError(
            f"global_batch={config.global_batch}: must be a multiple of ranks x micro_batch = {world} x {config.micro_batch} "
            f"= {unit}; try {remedy}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Files.


def load(path: str | os.PathLike, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file, compose its defaults and the `key=value` overrides, and return the checked Config."""
    path = _existing(Path(path))
    plain = read_yaml(path)
    try:
        if plain.get("defaults") or overrides:
            plain = compose(path, plain, overrides)
        return from_dict(plain)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_yaml(path: Path) -> dict:
    """Return a YAML file's mapping; raise a one-line ValueError for a syntax error."""
    try:
        plain = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "not readable as text"
        raise ValueError(f"{path}:{where} is no valid YAML ({reason}); mind colons and indentation") from None
    if not isinstance(plain, dict):
        raise ValueError(
            f"{path}: holds no keys; expected a YAML file of key: value lines such as configs/quickstart.yaml"
        )
    return plain


def _existing(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir() and (path / "config.yaml").is_file():
        return path / "config.yaml"  # a run directory stands for its config
    known = {p.stem: p for p in sorted(CONFIGS.glob("*.yaml"))}
    close = difflib.get_close_matches(path.stem, list(known), 3)
    hint = "did you mean " + " or ".join(f"configs/{name}.yaml" for name in close) + "?" if close else ""
    hint = hint or f"presets are configs/{{{','.join(known)}}}.yaml"
    raise ValueError(f"{path}: no such config file; {hint}")


def compose(path: Path, plain: dict, overrides: typing.Sequence[str]) -> dict:
    """Let Hydra merge the defaults list, the file and the overrides; return nested plain data, not yet checked."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    chosen = {k for entry in plain.get("defaults", []) if isinstance(entry, dict) for k in entry}
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(path.resolve().parent), version_base="1.3"):
            search = [f"hydra.searchpath=[file://{CONFIGS}]"] if path.resolve().parent != CONFIGS else []
            merged = hydra_compose(path.stem, [_hydra_override(o, chosen) for o in overrides] + search)
        return OmegaConf.to_container(merged, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        reason = str(error).strip().splitlines()[0]
        if "LexerNoViableAlt" in reason or "no viable alternative" in reason or "mismatched input" in reason:
            reason = f"overrides {' '.join(overrides)}: not understood ({reason}); put quotes around values with special characters"
        raise ValueError(reason) from None


def _group(name: str) -> type:
    return next(f.type for f in dataclasses.fields(Config) if f.name == name)


def _hydra_override(override: str, chosen: set[str]) -> str:
    """Turn `key=value` into Hydra's grammar: a group is chosen, any other key is set whether or not the file has it."""
    key, equals, value = override.partition("=")
    if override.startswith("-") or not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key):
        raise ValueError(f"override {override!r}: must be written key=value, for instance global_batch=1024")
    if "${" in value:
        raise ValueError(f"override {override!r}: interpolations are not supported; write the value itself")
    if key not in GROUPS:
        return f"++{key}={value}"
    options = sorted(p.stem for p in (CONFIGS / key).glob("*.yaml"))
    if not options:
        keys = ", ".join(f"{key}.{f.name}" for f in dataclasses.fields(_group(key))[:3])
        raise ValueError(f"override {override!r}: {key} is a group of keys; set one of them: {keys}, ...")
    if value not in options:
        close = difflib.get_close_matches(value, options, 1)
        hint = f"did you mean {key}={close[0]}?" if close else f"there are {', '.join(options) or 'none'}"
        raise ValueError(f"{override}: no file configs/{key}/{value}.yaml; {hint}")
    return override if key in chosen else f"+{override}"
