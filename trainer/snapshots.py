"""EMA snapshots of a run: listed, checked, loaded (RUN/snapshots/ema-<images>-<sigma_rel>.safetensors).

`SnapshotWriter` (trainer/snapshot_writer.py) writes them, trainer/tensor_file.py knows the bytes. What must not break: listing
reads headers only, so that it stays cheap on a folder of 700 GB.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from models import denoiser, magnitude
from trainer import tensor_file
from trainer.snapshot_writer import SnapshotWriter, file_name
from trainer.tensor_file import read_header, verify

__all__ = ["Snapshot", "SnapshotWriter", "file_name", "list_snapshots", "load_denoiser", "read_header", "verify"]


class Snapshot(NamedTuple):
    """A snapshot on disk."""

    path: Path
    clock: int
    sigma_rel: float
    header: dict


def list_snapshots(run_dir) -> list[Snapshot]:
    """Return the run's snapshots by clock and EMA length; reads headers only. Raise ValueError for a damaged file."""
    found = []
    for path in sorted((Path(run_dir) / "snapshots").glob("ema-*.safetensors")):
        header = read_header(path)
        found.append(Snapshot(path, header["clock"], header["sigma_rel"], header))
    return sorted(found, key=lambda s: (s.clock, s.sigma_rel))


def abandoned(snapshots: Iterable[Snapshot]) -> list[Snapshot]:
    """Return those of an abandoned life: the run went back to before them and a later life has passed by since.

    A later life that wrote at an earlier clock began before it (and where the header says so, at `life_start`).
    """
    snapshots = list(snapshots)
    begun = {s.header["life"]: s.header.get("life_start", s.clock) for s in reversed(snapshots) if "life" in s.header}
    return [
        s
        for s in snapshots
        if any(life > s.header.get("life", life) and start < s.clock for life, start in begun.items())
    ]


def load_denoiser(path, activations: str = "fp32", device: str = "cpu"):
    """Return (Denoiser in eval mode with weights ready for use, header); checksums are compared on the way.

    Raise ValueError where file and network do not fit.
    """
    header = read_header(path)
    state = {name: tensor.float() for name, tensor in tensor_file.iterate_tensors(path)}
    network = denoiser.build(header["model"], activations)
    expected = network.state_dict()
    for name in expected:
        if name not in state:
            raise ValueError(f"{path}: lacks tensor {name}; it was written for another network or by another version")
        if state[name].shape != expected[name].shape:
            raise ValueError(
                f"{path}: tensor {name} is {list(state[name].shape)}, the network wants {list(expected[name].shape)}"
            )
    network.load_state_dict({name: state[name] for name in expected})
    magnitude.use_weights_(network)  # rows of an average are shorter than 1
    return network.eval().requires_grad_(False).to(device), header


def main(argv=None) -> int:
    """List a run's snapshots, or check them."""
    parser = argparse.ArgumentParser(prog="python -m trainer.snapshots", description=main.__doc__)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--verify", action="store_true", help="read every file and compare all checksums")
    options = parser.parse_args(argv)
    try:
        snapshots = list_snapshots(options.run)
        if not snapshots:
            raise ValueError(
                f"{options.run}: no snapshots in {options.run / 'snapshots'}; set snapshots.every_images, or name a run directory"
            )
        lost = {s.path for s in abandoned(snapshots)}
        for s in snapshots:
            if options.verify:
                verify(s.path)
            remark = "  abandoned life" if s.path in lost else "  checksums fit" if options.verify else ""
            size = f"{s.header['dtype']} {s.path.stat().st_size / 2**20:9.1f} MiB"
            print(f"{s.path.name}  {s.clock:>13,} images  sigma_rel {s.sigma_rel:.3f}  {size}{remark}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
