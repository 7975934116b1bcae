"""Checkpoints: complete or absent, exact, readable by any number of ranks.

RUN/checkpoints/<images>/ holds one safetensors file per rank and a manifest.json with the size and hash of each. Files hold
logical pieces (tensor name, first element, number of elements), never DeepSpeed's flat offsets, so that another world size
or ZeRO stage reads them as they are. Written in a hidden folder (trainer/checkpoint_writer.py), fsynced, renamed: a folder
with its final name is whole. The file `latest` names the newest; it moves last, and the rename is what counts.

`python -m trainer.checkpoint RUN` lists them, --verify compares every checksum, --consolidate writes the weights into one file.
"""

import argparse
import contextlib
import errno
import json
import math
import re
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash
from safetensors import safe_open

from data_pipeline.command import command_line
from trainer.config import parse_size
from trainer.consolidation import consolidate
from trainer.engine import Engine
from trainer.fragments import Fragment

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
    """Return the run's complete checkpoints by (life, clock), oldest first; one that can't be read comes last.

    What a later life saved is newer than what an abandoned one left beyond it.
    """
    # a copy that somebody made, 0000000256.old, is none of the run's
    named = [p for p in (Path(run) / "checkpoints").glob("[0-9]*") if re.fullmatch("[0-9]+", p.name)]
    found = [p for p in named if (p / "manifest.json").is_file()]
    return sorted(found, key=lambda p: (_number(p, "life", unreadable=math.inf), int(p.name)))


def _number(checkpoint: Path, key: str, unreadable: float = 0.0) -> float:
    try:
        return float(read_manifest(checkpoint)[key])
    except (OSError, ValueError, KeyError, TypeError):
        return unreadable


def is_readable(checkpoint: Path) -> bool:
    """Say whether the manifest can be read; nothing is said of the files."""
    return _number(checkpoint, "life", unreadable=-1) >= 0


def latest(run: Path) -> Path | None:
    """Return the checkpoint that RUN/checkpoints/latest names, the newest complete one where it names none; None without any."""
    folder = Path(run) / "checkpoints"
    try:
        named = folder / (folder / "latest").read_text().strip()
        if named.parent == folder and (named / "manifest.json").is_file():
            return named
    except OSError:  # a run from before the pointer, or one that was killed before it first moved
        pass
    return (list_checkpoints(run) or [None])[-1]


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
        if manifest.get("digest", _digest(manifest)) != _digest(manifest):
            return [f"{checkpoint}/manifest.json: content differs from its checksum"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{checkpoint}/manifest.json: not readable ({error})"]
    for name, entry in files.items():
        path = checkpoint / name
        try:
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                problems.append(f"{path}: missing or not {entry['bytes']} bytes long")
            elif hash_file(path) != entry["xxh3"]:
                problems.append(f"{path}: content differs from its checksum")
        except OSError as error:
            if error.errno != errno.EIO:  # a file server's trouble may pass: that is for another start to find out
                raise
            problems.append(f"{path}: not readable ({error})")  # a bad sector does not heal
    return problems


def choose(run: Path, say) -> Path | None:
    """Return the newest whole checkpoint, the same on every rank; None where the run has none yet. Collective.

    A damaged one is reported through `say` and the one before it is used. Raise ValueError where none is whole, or the newest is of
    a later program: to begin again at 0, or before it, would overwrite what the run has made.
    """
    chosen, refusal = None, ""
    if dist.get_rank() == 0:
        for candidate in reversed(list_checkpoints(run)):
            problems = verify(candidate)
            if not problems:
                chosen, refusal = candidate, ""
                break
            if _number(candidate, "version") > VERSION:
                refusal = problems[0]
                break
            refusal = (
                f"{problems[0]}; no checkpoint before it is whole; copy one back, or move {run} away to start anew"
            )
            say(f"damaged checkpoint, looking for the one before: {problems[0]}")
    shared = [chosen, refusal]
    dist.broadcast_object_list(shared)
    if shared[1]:
        raise ValueError(shared[1])
    return shared[0]


def restore(checkpoint: Path, engine: Engine) -> tuple[int, dict]:
    """Load a checkpoint into the engine, whatever ranks and ZeRO stage wrote it; return (clock, extras)."""
    manifest = read_manifest(checkpoint)
    if sorted(manifest["sigma_rel"]) != sorted(engine.ema.sigma_rel):
        raise ValueError(
            f"{checkpoint}: holds averages for ema.sigma_rel={manifest['sigma_rel']}, the config asks for {engine.ema.sigma_rel}; "
            f"keep the list, or start another run"
        )
    _load_state(checkpoint, manifest, engine)
    return manifest["clock"], manifest["extras"]


def read_manifest(checkpoint: Path) -> dict:
    """Return a checkpoint's manifest."""
    return json.loads((checkpoint / "manifest.json").read_text())


class Stored:
    """A checkpoint's tensors, whatever the number of ranks that wrote them."""

    def __init__(self, checkpoint: Path, manifest: dict):
        self.checkpoint = checkpoint
        self._where: dict[str, list[tuple[str, int, int]]] = {}
        for file, entry in manifest["files"].items():
            for name, start, count in entry["pieces"]:
                self._where.setdefault(name, []).append((file, start, count))
        self._opened = {file: safe_open(checkpoint / file, framework="pt") for file in manifest["files"]}

    def read(self, kind: str, name: str, start: int, count: int) -> torch.Tensor:
        """Return `count` elements of a tensor from the first on, 1-D fp32 on the CPU; raise ValueError where they are not there."""
        if name not in self._where:
            raise ValueError(
                f"{self.checkpoint}: has no tensor {name}; it belongs to another network, start another run"
            )
        whole, filled, end = torch.empty(count), 0, start + count
        for file, piece_start, piece_count in self._where[name]:
            a, b = max(start, piece_start), min(end, piece_start + piece_count)
            if a < b:
                piece = self._opened[file].get_slice(f"{kind}/{name}")[a - piece_start : b - piece_start]
                whole[a - start : b - start].copy_(piece)
                filled += b - a
        if filled != count:
            raise ValueError(
                f"{self.checkpoint}: {name} has another size there; it belongs to another network, start another run"
            )
        return whole

    def buffer(self, name: str) -> torch.Tensor:
        """Return a buffer of the network."""
        return self._opened[min(self._opened)].get_tensor(f"buffer/{name}")


@torch.no_grad()
def _load_state(checkpoint: Path, manifest: dict, engine: Engine) -> None:
    stored = Stored(checkpoint, manifest)
    for kind, name, start, tensor in state(engine, engine.fragments):
        tensor.copy_(stored.read(kind, name, start, tensor.numel()))
    for name, buffer in engine.buffers().items():
        buffer.copy_(stored.buffer(name))
    for moments in engine.optimizer.adam.state.values():
        moments["step"].fill_(manifest["adam_step"])
    engine.refresh_copies()


def origin_of(checkpoint: Path) -> dict | None:
    """Return where the weights of its run came from, None where they were random (trainer/origin.py)."""
    return read_manifest(checkpoint).get("header", {}).get("origin")


def hash_file(path: Path) -> str:
    state = xxhash.xxh3_64()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def seal(manifest: dict) -> dict:
    """Return the manifest with its own checksum in it."""
    return manifest | {"digest": _digest(manifest)}


def _digest(manifest: dict) -> str:
    content = json.dumps({k: v for k, v in manifest.items() if k != "digest"}, sort_keys=True)
    return xxhash.xxh3_64_hexdigest(content.encode())


def _describe(checkpoint: Path) -> str:
    """Return a line of the list: clock, life, size, world, stage, age."""
    try:
        m = json.loads((checkpoint / "manifest.json").read_text())
        mebibytes = sum(entry["bytes"] for entry in m["files"].values()) / 2**20
        hours = (time.time() - (checkpoint / "manifest.json").stat().st_mtime) / 3600
        whole = all(
            (checkpoint / n).is_file() and (checkpoint / n).stat().st_size == e["bytes"] for n, e in m["files"].items()
        )
        state = "complete" if whole else "DAMAGED"
        return (
            f"{checkpoint.name}  {m['clock']:>13,} images  life {m['life']}  {mebibytes:9.1f} MiB  {m['world']} ranks  "
            f"ZeRO-{m['zero_stage']}  {hours:6.1f} h ago  {state}"
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{checkpoint.name}  DAMAGED: manifest.json is not readable"


def abandoned(checkpoints: list[Path]) -> list[Path]:
    """Return those that a run went back behind: a later life began before them and saved since."""
    lives = []
    for p in checkpoints:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # described as damaged
            m = read_manifest(p)
            lives.append((p, m["clock"], m["life"], m.get("header", {}).get("life_start", m["clock"])))
    return [p for p, clock, life, _ in lives if any(later > life and start < clock for _, _, later, start in lives)]


def _choose(run: Path, clock: str | None) -> Path:
    found = list_checkpoints(run)
    if not found:
        raise ValueError(f"no checkpoints in {run / 'checkpoints'}; name a run directory that has some")
    if clock is None:
        return latest(run)
    match = [p for p in found if int(p.name) == parse_size(clock)]
    if not match:
        raise ValueError(f"--at {clock}: no checkpoint there; there are {', '.join(str(int(p.name)) for p in found)}")
    return match[0]


def _check(checkpoint: Path) -> None:
    if problems := verify(checkpoint):
        raise ValueError("; ".join(problems))


@command_line()
def main(argv=None) -> int:
    """List a run's checkpoints, compare their checksums, or write one's weights into one file."""
    parser = argparse.ArgumentParser(prog="python -m trainer.checkpoint", description=main.__doc__)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--verify", action="store_true", help="read every file and compare all checksums")
    parser.add_argument("--consolidate", metavar="OUT", type=Path, help="write the weights to OUT.safetensors")
    parser.add_argument("--at", metavar="IMAGES", help="for --consolidate: another checkpoint than the latest")
    options = parser.parse_args(argv)
    chosen = _choose(options.run, options.at)
    if options.consolidate:
        if options.consolidate.suffix != ".safetensors":
            raise ValueError(f"--consolidate {options.consolidate}: must be a file name that ends in .safetensors")
        _check(chosen)
        consolidate(chosen, options.consolidate)
        print(f"wrote {options.consolidate}: the weights at {int(chosen.name)} images")
        return 0
    problems, checkpoints, newest = [], list_checkpoints(options.run), latest(options.run)
    lost = abandoned(checkpoints)
    for p in checkpoints:
        found = verify(p) if options.verify else []
        problems += found
        remark = "  <- latest" if p == newest else "  abandoned life" if p in lost else ""
        remark += "" if not options.verify else "  checksums differ" if found else "  checksums fit"
        print(_describe(p) + remark)
    if problems:
        raise ValueError("; ".join(problems))
    return 0


if __name__ == "__main__":
    sys.exit(main())
