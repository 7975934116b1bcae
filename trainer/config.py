"""What a run is: one dataclass per config group, composed from YAML, checked before anything starts.

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
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from trainer.typed import at_least, build, list_of, one_of, required
from trainer.typed import format_size as format_size  # the sizes are part of the config language
from trainer.typed import parse_size as parse_size

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"

# ---------------------------------------------------------------------------------------------------------------------
# The groups.


@dataclass
class Model:
    """The network; names follow the EDM2 paper (Karras et al. 2024, Table 6 and Appendix A)."""

    family: str = one_of("edm2", "edm2")
    resolution: int = at_least(64, 1)  # height and width of what is diffused: latents or pixels
    channels: int = at_least(4, 1)
    label_dim: int = at_least(1000, 0)  # 0: unconditional
    model_channels: int = at_least(192, 1)
    channel_mult: list[int] = list_of(1, 2, 3, 4)
    num_blocks: int = at_least(3, 1)
    attn_resolutions: list[int] = list_of(16, 8)
    channels_per_head: int = at_least(64, 1)
    channel_mult_noise: int = at_least(0, 0)  # 0: the first level's width
    channel_mult_emb: int = at_least(0, 0)  # 0: the widest level's width
    label_balance: float = 0.5
    concat_balance: float = 0.5
    residual_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float = 256.0  # 0: off
    dropout: float = at_least(0.0, 0.0)
    resample_filter: list[int] = list_of(1, 1)
    logvar_channels: int = at_least(128, 1)
    sigma_data: float = 0.5


@dataclass
class Noise:
    """The density of noise levels in training."""

    density: str = one_of("lognormal", "lognormal", "laplace", "cosine")
    P_mean: float = -0.4  # of ln sigma, lognormal (EDM2: -0.4 for latents, -0.8 for ImageNet-64 pixels)
    P_std: float = at_least(1.0, 0.0)
    mu: float = 0.0  # of logsnr, laplace (Hang & Gu 2024)
    b: float = 0.5
    sigma_min: float = at_least(0.0, 0.0)  # 0: no lower bound
    sigma_max: float = at_least(0.0, 0.0)  # 0: no upper bound


@dataclass
class Loss:
    """The training objective (Karras et al. 2024, Eq. 14-21)."""

    uncertainty: bool = True
    label_dropout: float = at_least(0.0, 0.0)


@dataclass
class Optimizer:
    """Adam on magnitude-preserving shards; betas from Karras et al. 2024, Table 1."""

    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    nonfinite: str = one_of("stop", "stop", "skip", "zero")
    max_skipped_steps: int = at_least(10, 0)  # with nonfinite=skip: more than this many in a run stop it


@dataclass
class LearningRate:
    """Inverse-square-root decay with linear ramp-up (Karras et al. 2024, Eq. 67), in images."""

    ref_lr: float = 0.01
    decay_images: int = at_least(143_360_000, 0)  # 70,000 batches of 2,048; 0: no decay
    rampup_images: int = at_least(10_000_000, 0)  # 0: none


@dataclass
class Ema:
    """Power-function averages tracked during training, by their relative width."""

    sigma_rel: list[float] = list_of(0.05, 0.10)


@dataclass
class Snapshots:
    """EMA snapshots for post-hoc reconstruction."""

    every_images: int = at_least(8 * 2**20, 0)  # 0: none
    dtype: str = one_of("fp16", "fp16", "bf16", "fp32")


@dataclass
class Checkpoints:
    """The state a run continues from, bitwise."""

    every_images: int = at_least(128 * 2**20, 0)  # 0: only when stopping
    keep_last: int = at_least(2, 1)
    keep_every_images: int = at_least(0, 0)  # keep those at its multiples for good; 0: none


@dataclass
class Data:
    """The shards."""

    path: str = required()
    codec: str = "sd-vae-ft-mse"  # must equal the manifest's: a network trained on other latents is another network
    encode_from: str = ""  # source for data_pipeline.encode when `path` has no manifest yet
    window: int = at_least(16, 1)  # shards whose samples are mixed
    reader: str = one_of("indexed", "indexed", "stock")  # stock: the libraries' own iterators, behind guards
    verify: bool = True  # check every sample against its hash in the index
    on_bad: str = one_of("stop", "stop", "replace")  # replace: deterministically, counted, up to max_bad
    max_bad: int = at_least(0, 0)  # samples; 0: one in 10,000
    threads: int = at_least(1, 1)  # that copy samples into a batch
    cache_folder: str = (
        "~/.cache/evenkeel"  # for a remote `path`: shards are fetched whole; ranks and jobs of a node share it
    )
    cache_bytes: int = at_least(64 * 2**30, 1)


@dataclass
class Engine:
    """How the step is executed."""

    zero_stage: int = field(default=1, metadata={"choices": (0, 1, 2)})
    activations: str = one_of("fp32", "fp32", "bf16", "fp16")
    activation_checkpointing: bool = False
    compile: bool = False
    hang_seconds: int = at_least(
        600, 0
    )  # without a step for so long, every rank dumps its stacks and asks to be restarted; 0: off


@dataclass
class Metrics:
    """What is exported, how often."""

    every_images: int = at_least(128 * 2**10, 1)
    address: str = "127.0.0.1"
    port: int = at_least(0, 0)  # 0: any free one; it is written to RUN/targets/


@dataclass
class Cluster:
    """Where the ranks run, and what follows the training."""

    kind: str = one_of("local", "local", "slurm")
    nodes: int = at_least(1, 1)
    ranks_per_node: int = at_least(1, 1)
    gpus_per_node: int = at_least(0, 0)
    cpus_per_rank: int = at_least(1, 1)
    memory_gb: int = at_least(0, 0)  # per node; 0: the partition's default
    time_minutes: int = at_least(0, 0)  # 0: the partition's default
    signal_seconds: int = at_least(120, 0)  # warning before the time limit; a save must fit
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    exclude: str = ""
    reservation: str = ""
    mail_user: str = ""
    slurm_parameters: dict = field(default_factory=dict)  # any further sbatch options, by name
    setup: list[str] = list_of()  # lines of the batch script before srun
    max_restarts: int = at_least(3, 0)  # in a row without progress of the clock
    finish_sigma_rel: float = at_least(0.0, 0.0)  # after the run: reconstruct this EMA length; 0: nothing
    finish_images_per_class: int = at_least(8, 0)  # ... and draw a grid with it


@dataclass
class Config:
    """A whole run."""

    run: str = required()  # the run directory
    duration_images: int = required(1)
    global_batch: int = required(1)
    micro_batch: int = required(1)  # samples of one forward on one rank
    seed: int = at_least(0, 0)
    model: Model = field(default_factory=Model)
    noise: Noise = field(default_factory=Noise)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr: LearningRate = field(default_factory=LearningRate)
    ema: Ema = field(default_factory=Ema)
    snapshots: Snapshots = field(default_factory=Snapshots)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    data: Data = field(default_factory=Data)
    engine: Engine = field(default_factory=Engine)
    metrics: Metrics = field(default_factory=Metrics)
    cluster: Cluster = field(default_factory=Cluster)


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


def digest(config: Config) -> str:
    """Return a short hash that names this config wherever it is recorded; paths and placement leave no trace in it."""
    plain = to_dict(config)
    for key in ("run", "cluster", "metrics"):
        plain.pop(key)
    plain["data"].pop("path")
    plain["data"].pop("encode_from")
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
    levels = len(config.model.channel_mult)
    if config.model.resolution % 2 ** (levels - 1):
        raise ValueError(
            f"model.resolution={config.model.resolution}: must be divisible by {2 ** (levels - 1)} for the {levels} levels "
            f"of model.channel_mult; use another resolution or fewer levels"
        )
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
    if config.noise.sigma_max and config.noise.sigma_max <= config.noise.sigma_min:
        raise ValueError(
            f"noise.sigma_max={config.noise.sigma_max}: must exceed noise.sigma_min={config.noise.sigma_min}"
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
