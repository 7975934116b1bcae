"""EMA snapshots of a run: listed, checked, loaded, thinned, priced (RUN/snapshots/ema-<images>-<sigma_rel>.safetensors).

`SnapshotWriter` (trainer/snapshot_writer.py) writes them, trainer/tensor_file.py knows the bytes. What must not break: listing
reads headers only, so that it stays cheap on a folder of 700 GB.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from data_pipeline.command import command_line
from models import denoiser, magnitude, prepared
from trainer import config, snapshot_plan, state, tensor_file
from trainer.ema_profiles import parse_range
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
        if lacking := [key for key in ("clock", "sigma_rel", "dtype") if key not in header]:
            raise ValueError(f"{path}: its header lacks {lacking[0]}; it is damaged or no snapshot, move it away")
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
    network = network.eval().requires_grad_(False).to(device)
    prepared.prepare_(network, network.activations)  # once for all evaluations
    return network, header


def to_come(run_dir: Path, clock: int) -> list[tuple[int, float]]:
    """Return (clock, length) of the snapshots that an unfinished run has still to write after `clock`, by its config."""
    path = Path(run_dir) / "config.yaml"
    if not path.is_file() or state.read(run_dir).get("status") == "finished":
        return []
    c = config.load(path)
    clocks = snapshot_plan.clocks_of(c.duration_images, c.snapshots.every_images)
    return [(later, s) for later in clocks if later > clock for s in c.ema.sigma_rel]


def thin(run_dir: Path, wanted: Sequence[float], max_error: float, remove: bool) -> None:
    """Say which snapshots `wanted` lengths need and what error results, then remove the others if told to.

    Lengths are wanted at the newest clock, and at the end of a run that has not finished.
    """
    series = list_snapshots(run_dir)
    lost = {s.path for s in abandoned(series)}
    usable = [s for s in series if s.path not in lost and s.clock > 0]
    if not usable:
        raise ValueError(f"{run_dir}: no snapshots to thin; name a run directory that has some")
    now, coming = usable[-1].clock, to_come(run_dir, usable[-1].clock)
    kept, errors = snapshot_plan.needed_until_end(
        [s.clock for s in usable], [s.sigma_rel for s in usable], wanted, max_error, coming
    )
    until = f" and at the end, {coming[-1][0]}," if coming else ""
    for sigma_rel, error in zip(wanted, errors):
        print(
            f"sigma_rel {sigma_rel:.5f} at {now}{until} images: predicted error {100 * error:.4f} % with what is kept"
        )
    keep = {usable[i].path for i in kept}
    others = [s.path for s in series if s.path not in keep]
    mebibytes = sum(p.stat().st_size for p in others) / 2**20
    print(f"{len(keep)} of {len(series)} snapshots are needed; the others take {mebibytes:.1f} MiB")
    print("without them, lengths at earlier clocks and other lengths can no longer be made")
    if not remove:
        print("nothing removed; add --yes to remove them")
        return
    for path in others:
        path.unlink()
    print(f"removed {len(others)} snapshots")


def plan(path: Path) -> list[str]:
    """Price the snapshots of a config before it runs."""
    c = config.load(path)
    with torch.device("meta"):
        network = denoiser.build(config.to_dict(c)["model"])
    weights = sum(p.numel() for p in network.parameters()) * tensor_file.DTYPES[c.snapshots.dtype].itemsize
    size = weights + sum(4 * b.numel() for b in network.buffers())
    return snapshot_plan.price(c.duration_images, c.snapshots.every_images, c.ema.sigma_rel, c.snapshots.dtype, size)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.snapshots", description=main.__doc__)
    parser.add_argument("run", type=Path, help="run directory, or a config (.yaml) to price its snapshots")
    parser.add_argument("--verify", action="store_true", help="read every file and compare all checksums")
    parser.add_argument(
        "--thin", metavar="SIGMA_REL", help="which snapshots these lengths need: 0.05:0.20:0.01 or a list"
    )
    parser.add_argument(
        "--max-error", type=float, default=snapshot_plan.GOOD_ERROR, help="for --thin (default %(default)s)"
    )
    parser.add_argument("--yes", action="store_true", help="with --thin: remove the others")
    return parser


@command_line()
def main(argv=None) -> int:
    """List a run's snapshots, check or thin them, or price those of a config."""
    options = _parser().parse_args(argv)
    if options.run.suffix in (".yaml", ".yml"):
        print("\n".join(plan(options.run)))
        return 0
    if options.thin:
        thin(options.run, parse_range(options.thin), options.max_error, options.yes)
        return 0
    snapshots = list_snapshots(options.run)
    if not snapshots:
        where = options.run / "snapshots"
        raise ValueError(f"no snapshots in {where}; set snapshots.every_images, or name a run directory")
    lost = {s.path for s in abandoned(snapshots)}
    for s in snapshots:
        if options.verify:
            verify(s.path)
        remark = "  abandoned life" if s.path in lost else "  checksums fit" if options.verify else ""
        size = f"{s.header['dtype']} {s.path.stat().st_size / 2**20:9.1f} MiB"
        print(f"{s.path.name}  {s.clock:>13,} images  sigma_rel {s.sigma_rel:.3f}  {size}{remark}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
