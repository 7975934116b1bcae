"""A preset's config for one device, composed without Hydra: what a benchmark runs on a machine that has torch and little else."""

from pathlib import Path

import yaml

from trainer.config import CONFIGS, Config, from_dict, read_yaml


def compose(preset: str, overrides: list[str], micro_batch: int, on_gpu: bool) -> Config:
    """Return the config of `configs/edm2_<preset>.yaml` (or `configs/<preset>.yaml`) for one device, without Hydra."""
    known = {p.stem.removeprefix("edm2_"): p for p in CONFIGS.glob("edm2_*.yaml") if "img64" not in p.stem}
    if preset not in known:
        raise ValueError(f"--preset {preset}: choose among {', '.join(sorted(known))}")
    plain = _merged(known[preset])
    own = {"cluster.nodes": 1, "cluster.ranks_per_node": 1, "global_batch": micro_batch, "micro_batch": micro_batch}
    own |= {"run": "unused"}
    if not on_gpu:  # fp16 is slow on CPUs, and compiling takes minutes
        own |= {"engine.activations": "fp32", "engine.compile": "false"}
    for key, value in own.items():
        _put(plain, key, value)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r}: must be written key=value, for instance engine.compile=true")
        try:
            _put(plain, key, yaml.safe_load(value))
        except (yaml.YAMLError, AttributeError, TypeError):  # no YAML, or a key inside of what holds none
            raise ValueError(f"override {override!r}: cannot be read; write KEY=VALUE as in a config") from None
    if isinstance(plain["global_batch"], int):
        plain["duration_images"] = 1_000_000 * plain["global_batch"]  # whole batches: nothing here ends
    return from_dict(plain)


def _merged(path: Path) -> dict:
    plain, own = {}, read_yaml(path)
    for entry in own.pop("defaults", []):
        for group, name in entry.items() if isinstance(entry, dict) else ():
            plain[group] = _merged(CONFIGS / group / f"{name}.yaml")
    for key, value in own.items():
        plain[key] = {**plain.get(key, {}), **value} if isinstance(value, dict) else value
    return plain


def _put(plain: dict, key: str, value) -> None:
    *groups, name = key.split(".")
    for group in groups:
        plain = plain.setdefault(group, {})
    plain[name] = value
