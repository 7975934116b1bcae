"""One safetensors file with the weights of a checkpoint, whole, under a snapshot's header: what trainer.generate takes.

Tensor by tensor, so that memory holds the largest tensor at most, whatever wrote the checkpoint.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open

from trainer import tensor_file


def consolidate(checkpoint: Path, target: Path) -> None:
    """Write the fp32 masters and buffers of a checkpoint; raise ValueError where it does not say which network it is."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    header = manifest.get("header") or _header_beside(checkpoint)
    shapes = manifest.get("shapes") or _shapes_of(header)
    opened = {file: safe_open(checkpoint / file, framework="pt") for file in manifest["files"]}
    where: dict[str, list[tuple[int, str]]] = {}
    for file, entry in manifest["files"].items():
        for name, start, _ in entry["pieces"]:
            where.setdefault(name, []).append((start, file))
    first = opened[min(opened)]
    buffers = {
        key.removeprefix("buffer/"): first.get_tensor(key) for key in list(first.keys()) if key.startswith("buffer/")
    }
    layout = {name: (b.dtype, tuple(b.shape)) for name, b in buffers.items()}
    layout |= {name: (torch.float32, tuple(shapes[name])) for name in where}
    own = {
        "kind": "checkpoint",
        "clock": manifest["clock"],
        "life": manifest["life"],
        "dtype": "fp32",
        "sigma_rel": 0.0,
    }
    with tensor_file.TensorFile(target, header | own | {"buffers": sorted(buffers)}, layout) as file:
        for name in file.layout:
            if name in buffers:
                file.write(name, buffers[name])
            else:
                for _, source in sorted(where[name]):
                    file.write(name, opened[source].get_tensor(f"master/{name}"))


def _header_beside(checkpoint: Path) -> dict:
    """Return the header of a snapshot of the same run: checkpoints of the first versions do not say which network they hold."""
    found = sorted((checkpoint.parent.parent / "snapshots").glob("ema-*.safetensors"))
    if not found:
        raise ValueError(f"{checkpoint}: does not say which network it holds, and the run has no snapshot that does")
    header = tensor_file.read_header(found[-1])
    return {key: value for key, value in header.items() if key not in ("checksums", "format_version")}


def _shapes_of(header: dict) -> dict[str, tuple[int, ...]]:
    from models import denoiser

    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in denoiser.build(header["model"]).named_parameters()}
