"""Where a run's first weights come from: `start_from` names a snapshot, a reconstruction, a consolidated checkpoint or an import.

Weights and buffers are taken, nothing else: moments, averages and the clock start afresh. What must not break: each later file of
the run says what it came from (the header's entry `origin`), and a run that has a checkpoint never reads the file again. Torch-free
but for `load`, so that a login node can check.
"""

import dataclasses
import json
import struct
from pathlib import Path

import xxhash

from trainer.config import Config, to_dict
from trainer.groups import Model

# may differ between a network and the one that goes on from it: how it is regularised and how its ODEs are solved, not what it is
FREE = ("dropout", "ode.solver", "ode.steps", "ode.adjoint", "ode.rtol", "ode.atol")
_RECORDED = ("kind", "run", "clock", "sigma_rel", "life", "commit", "config_hash", "parent", "origin")


def read_header(path: Path) -> dict:
    """Return the evenkeel header of a safetensors file; raise ValueError, in one line, for anything else."""
    name = f"start_from={path}"
    if path.suffix == ".pkl":
        raise ValueError(f"{name}: a pickle; convert it: python -m models.import_edm2 {path} OUT.safetensors")
    if not path.is_file():
        what = "is a folder; name one of its files" if path.is_dir() else "no such file; name one"
        raise ValueError(f"{name}: {what}, for instance runs/NAME/snapshots/ema-....safetensors")
    try:
        with open(path, "rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            if length > path.stat().st_size:
                raise ValueError("header longer than the file")
            header = json.loads(json.loads(f.read(length))["__metadata__"]["evenkeel"])
        return header | {"model": dict(header["model"]), "checksums": dict(header["checksums"])}
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{name}: no weights of evenkeel ({error}); name a snapshot, a reconstruction or an import"
        ) from None


def check(config: Config) -> dict:
    """Return the header of `start_from`; raise ValueError where its network or its data are not those of the config."""
    path = Path(config.start_from)
    header = read_header(path)
    theirs = _flat(dataclasses.asdict(Model()) | header["model"])
    ours = _flat(to_dict(config)["model"])
    differing = [k for k in ours if k in theirs and k not in FREE and theirs[k] != ours[k]]
    if ours["family"] != "unode":
        differing = [k for k in differing if not k.startswith("ode.")]
    if differing:
        there = ", ".join(f"model.{k}={theirs[k]}" for k in differing[:4])
        here = ", ".join(str(ours[k]) for k in differing[:4])
        raise ValueError(
            f"start_from={path}: holds another network ({there}; here {here}); set the config's to the file's"
        )
    codec = header.get("data", {}).get("codec", "")
    if codec and codec != config.data.codec:
        raise ValueError(
            f"start_from={path}: was trained on {codec}, the config has data.codec={config.data.codec}; a network of other "
            f"latents is another network, encode the data with {codec}"
        )
    return header


def doubts(header: dict, manifest) -> list[str]:
    """Return warnings about data that are whitened otherwise than those that the weights have seen."""
    before = header.get("data", {})
    changed = [
        f"{key} {list(before[key])} then, {list(getattr(manifest, key))} now"
        for key in ("mean", "std")
        if key in before and any(abs(a - b) > 1e-6 for a, b in zip(before[key], getattr(manifest, key), strict=False))
    ]
    return [f"warning: the weights have seen other data, whitened by {'; '.join(changed)}"] if changed else []


def provenance(header: dict, path: Path) -> dict:
    """Return what every later file says about where the run began; the origin of an origin is in it."""
    content = xxhash.xxh3_64_hexdigest(json.dumps(header["checksums"], sort_keys=True).encode())
    return {"file": path.name, "digest": content} | {k: header[k] for k in _RECORDED if header.get(k)}


def begin(config: Config, module, manifest, say) -> dict | None:
    """Fill a new run's network with the weights that `start_from` names, if any; return where they come from."""
    if not config.start_from:
        return None
    path = Path(config.start_from)
    header = check(config)
    for line in doubts(header, manifest):
        say(line)
    load(module, path)
    say(f"the weights of {path}; the optimizer, the averages and the clock start afresh")
    return provenance(header, path)


def load(module, path: Path) -> None:
    """Fill a whole module on the CPU with the file's weights and buffers, rows at the fixed point of the normalisation.

    Raise ValueError where a tensor is damaged, missing or of another shape.
    """
    import torch

    from models.magnitude import normalize_rows_
    from trainer import tensor_file

    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    missing = set(own)
    with torch.no_grad():
        for name, tensor in tensor_file.iterate_tensors(path):
            if name in own and own[name].shape != tensor.shape:
                raise ValueError(
                    f"start_from={path}: {name} is {list(tensor.shape)}, the network wants {list(own[name].shape)}"
                )
            if name in own:
                own[name].copy_(tensor)
                missing.discard(name)
    if missing:
        raise ValueError(f"start_from={path}: lacks tensor {min(missing)}; it was written by another version")
    normalize_rows_(module)  # the rows of an average are shorter than those of trained weights


def _flat(plain: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in plain.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
