"""Checkpoints: complete or absent, exact, readable by any number of ranks.

RUN/checkpoints/<images>/ holds one safetensors file per rank and a manifest.json with the size and hash of each. Files hold
logical pieces (tensor name, first element, number of elements), never DeepSpeed's flat offsets, so that another world size
or ZeRO stage reads them as they are. Written in a hidden folder (trainer/checkpoint_writer.py), fsynced, renamed: a folder
with its final name is whole.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash
from safetensors import safe_open

from trainer.engine import Engine
from trainer.optimizer import Fragment

VERSION = 1
MOMENTS = ("exp_avg", "exp_avg_sq")


def state(engine: Engine, fragments: list[Fragment]):
    """Yield (kind, tensor name, first element, 1-D view) of all that is state of these fragments of this rank."""
    adam = engine.optimizer.adam
    for i, f in enumerate(fragments):
        yield "master", f.name, f.start, f.master
        for moment in MOMENTS:
            yield moment, f.name, f.start, f.state(adam, moment)
        for sigma_rel, average in zip(engine.ema.sigma_rel, engine.ema.averages, strict=True):
            yield f"ema_{sigma_rel:.3f}", f.name, f.start, average[i]


def list_checkpoints(run: Path) -> list[Path]:
    """Return the run's complete checkpoints, oldest first."""
    return sorted(p for p in (Path(run) / "checkpoints").glob("[0-9]*") if (p / "manifest.json").is_file())


def verify(checkpoint: Path) -> list[str]:
    """Return what is wrong with a checkpoint, [] if nothing is."""
    problems = []
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        if manifest["version"] > VERSION:
            return [
                f"{checkpoint}: format version {manifest['version']} is newer than this program's {VERSION}; update it"
            ]
        files = manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        return [f"{checkpoint}/manifest.json: not readable ({error})"]
    for name, entry in files.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            problems.append(f"{path}: missing or not {entry['bytes']} bytes long")
        elif hash_file(path) != entry["xxh3"]:
            problems.append(f"{path}: content differs from its checksum")
    return problems


def restore(run: Path, engine: Engine, say) -> tuple[int, dict]:
    """Load the newest whole checkpoint into the engine and return (clock, extras); (0, {}) where there is none.

    Collective. A damaged checkpoint is reported through `say` and the one before it is used.
    """
    choice = [None]
    if engine.rank == 0:
        for candidate in reversed(list_checkpoints(run)):
            problems = verify(candidate)
            if not problems:
                choice = [candidate]
                break
            say(f"damaged checkpoint, using the one before: {problems[0]}")
    dist.broadcast_object_list(choice)
    if choice[0] is None:
        return 0, {}
    manifest = json.loads((choice[0] / "manifest.json").read_text())
    if sorted(manifest["sigma_rel"]) != sorted(engine.ema.sigma_rel):
        raise ValueError(
            f"{choice[0]}: holds averages for ema.sigma_rel={manifest['sigma_rel']}, the config asks for {engine.ema.sigma_rel}; "
            f"keep the list, or start another run"
        )
    _load_state(choice[0], manifest, engine)
    return manifest["clock"], manifest["extras"]


@torch.no_grad()
def _load_state(checkpoint: Path, manifest: dict, engine: Engine) -> None:
    where: dict[str, list[tuple[str, int, int]]] = {}
    for file, entry in manifest["files"].items():
        for name, start, count in entry["pieces"]:
            where.setdefault(name, []).append((file, start, count))
    opened = {file: safe_open(checkpoint / file, framework="pt") for file in manifest["files"]}
    for kind, name, start, tensor in state(engine, engine.fragments):
        if name not in where:
            raise ValueError(f"{checkpoint}: has no tensor {name}; it belongs to another network, start another run")
        filled, end = 0, start + tensor.numel()
        for file, piece_start, count in where[name]:
            a, b = max(start, piece_start), min(end, piece_start + count)
            if a < b:
                piece = opened[file].get_slice(f"{kind}/{name}")[a - piece_start : b - piece_start]
                tensor[a - start : b - start].copy_(piece)
                filled += b - a
        if filled != tensor.numel():
            raise ValueError(
                f"{checkpoint}: {name} has another size there; it belongs to another network, start another run"
            )
    first = opened[min(opened)]
    for name, buffer in engine.buffers().items():
        buffer.copy_(first.get_tensor(f"buffer/{name}"))
    for moments in engine.optimizer.adam.state.values():
        moments["step"].fill_(manifest["adam_step"])
    engine.refresh_copies()


def hash_file(path: Path) -> str:
    state = xxhash.xxh3_64()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            state.update(block)
    return state.hexdigest()
