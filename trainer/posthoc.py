"""Rebuild any EMA length after the run from its snapshots (Karras et al. 2024, Section 3.2 and Algorithm 3).

Many lengths in one pass over the files, in chunks, so that memory depends on neither the network nor the number of snapshots.
What must not break: a length or a clock that the snapshots cannot carry is refused by its predicted error, never guessed.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from data_pipeline import devices
from data_pipeline.command import command_line
from data_pipeline.progress import Progress
from trainer import ema_profiles, published, series, tensor_file
from trainer.config import parse_size
from trainer.snapshots import Snapshot, abandoned, list_snapshots

MAX_ERROR = 0.05  # relative L2 distance of profiles
CHUNK_ELEMENTS = 2**24  # of all inputs and outputs together: 64 MiB in fp32


class Plan(NamedTuple):
    """Which snapshots make which averages."""

    inputs: list[Snapshot]
    target: int  # clock, images
    sigma_rel: list[float]
    coefficients: np.ndarray  # [inputs, lengths], float64
    errors: np.ndarray  # [lengths], relative L2 distance of profiles
    rounding: np.ndarray  # [lengths], relative error that the snapshots' dtype leaves in the weights
    notes: list[str]


def file_name(clock: int, sigma_rel: float) -> str:
    """Return a reconstruction's name."""
    return f"phema-{clock:010d}-{sigma_rel:.5f}.safetensors"


def plan(snapshots: Sequence[Snapshot], sigma_rel: Sequence[float], at: int | None = None) -> Plan:
    """Solve for all lengths at clock `at` (the newest life's last snapshot by default), from all snapshots up to there.

    Raises ValueError for mixed runs or networks, and for a target of an abandoned life.
    """
    if not snapshots:
        raise ValueError(
            "no snapshots; set snapshots.every_images in the config, or name a run directory that has some"
        )
    series.check_one_run(snapshots)
    lost = abandoned(snapshots)
    kept = [s for s in snapshots if s not in lost and s.clock > 0]
    newest = max((s.clock for s in kept), default=0)
    target = newest if at is None else at
    if lost and target > newest:
        raise ValueError(
            f"--at {target}: the snapshots after {newest} images belong to an abandoned life of the run; ask for at most that"
        )
    inputs = [s for s in kept if s.clock <= target]
    if not inputs:
        raise ValueError(
            f"--at {target}: no snapshot lies between 1 and {target} images; the first is at {snapshots[0].clock}"
        )
    clocks = [s.clock for s in inputs]
    gamma_in = [ema_profiles.gamma_from_sigma_rel(s.sigma_rel) for s in inputs]
    gamma_out = [ema_profiles.gamma_from_sigma_rel(s) for s in sigma_rel]
    coefficients = ema_profiles.solve_weights(clocks, gamma_in, target, gamma_out)
    errors = ema_profiles.predicted_error(clocks, gamma_in, target, gamma_out, coefficients)
    notes = (
        [f"left out {len(lost)} snapshots of an abandoned life: {', '.join(s.path.name for s in lost)}"] if lost else []
    )
    return Plan(
        inputs,
        target,
        list(sigma_rel),
        coefficients,
        errors,
        ema_profiles.rounding_error(coefficients, series.coarsest(inputs)),
        notes + series.holes(inputs),
    )


def check_errors(plan: Plan, max_error: float = MAX_ERROR) -> None:
    """Raise ValueError naming the lengths that the snapshots cannot carry, or whose rounding would drown them."""
    bad = [f"{s:g} ({100 * e:.3g} %)" for s, e in zip(plan.sigma_rel, plan.errors) if not e <= max_error]
    if bad:
        raise ValueError(
            f"predicted error above {100 * max_error:g} % for sigma_rel {', '.join(bad)} at {plan.target} images; ask for "
            f"lengths nearer to the tracked ones, a clock that has a snapshot, or raise --max-error"
        )
    # large coefficients of alternating sign: of tracked lengths that are close, for instance
    noisy = [f"{s:g} ({100 * r:.3g} %)" for s, r in zip(plan.sigma_rel, plan.rounding) if not r <= max_error]
    if noisy:
        raise ValueError(
            f"the rounding of {series.coarsest(plan.inputs)} snapshots would leave more than {100 * max_error:g} % in the weights "
            f"of sigma_rel {', '.join(noisy)}; ask for lengths nearer to the tracked ones, or raise --max-error"
        )


def reconstruct(plan: Plan, paths: Sequence[Path], dtype: str | None = None) -> None:
    """Write one file per length, all in one pass; raise ValueError for a missing tensor, a damaged one or values not finite.

    Nothing is written to the final names before everything is.
    """
    last = plan.inputs[-1]
    layouts = [tensor_file.read_layout(s.path)[1] for s in plan.inputs]
    _check_layouts(plan.inputs, layouts)
    dtype = dtype or last.header["dtype"]
    buffers = set(last.header["buffers"])
    spans = layouts[-1]
    output = {n: (s.dtype if n in buffers else tensor_file.DTYPES[dtype], s.shape) for n, s in spans.items()}
    coefficients = torch.from_numpy(plan.coefficients.T.astype(np.float32).copy())
    chunk = max(CHUNK_ELEMENTS // (len(plan.inputs) + len(paths)), 1)
    with ExitStack() as stack:
        files = [stack.enter_context(open(s.path, "rb")) for s in plan.inputs]
        outputs = [
            stack.enter_context(tensor_file.TensorFile(path, header, output))
            for path, header in zip(paths, _headers(plan, dtype), strict=True)
        ]
        order = [n for n in outputs[0].layout if torch.Size(output[n][1]).numel()]
        progress = stack.enter_context(Progress("reconstructing", len(order), "tensors"))
        for name in order:
            which = slice(-1, None) if name in buffers else slice(None)
            sums = [h["checksums"][name] for h in (s.header for s in plan.inputs[which])]
            for block in _blocks(name, files[which], [layout[name] for layout in layouts[which]], sums, chunk):
                made = block.expand(len(paths), -1) if name in buffers else coefficients @ block
                for file, row in zip(outputs, made, strict=True):
                    file.write(name, row)
            progress.advance()


def _blocks(
    name: str, files: Sequence, spans: Sequence[tensor_file.Span], checksums: Sequence[str], chunk: int
) -> Iterator[Tensor]:
    """Yield a tensor of all inputs in fp32 blocks [inputs, elements]; check its checksums at the end."""
    count = torch.Size(spans[0].shape).numel()
    hashes = [xxhash.xxh3_64() for _ in files]
    block = torch.empty(len(files), min(chunk, count))
    raw = bytearray(block.shape[1] * max(s.dtype.itemsize for s in spans))
    for start in range(0, count, chunk):
        n = min(chunk, count - start)
        for row, file, span, checksum in zip(block, files, spans, hashes, strict=True):
            size = span.dtype.itemsize
            part = memoryview(raw)[: n * size]
            file.seek(span.offset + start * size)
            if file.readinto(part) != len(part):
                raise ValueError(f"{file.name}: cut off in tensor {name}; copy it again")
            checksum.update(part)
            row[:n].copy_(torch.frombuffer(part, dtype=span.dtype))
        yield block[:, :n]
    for file, checksum, wanted in zip(files, hashes, checksums, strict=True):
        if checksum.hexdigest() != wanted:
            raise ValueError(
                f"{file.name}: tensor {name} differs from its checksum; the file is damaged, copy it again"
            )


def _check_layouts(inputs: Sequence[Snapshot], layouts: Sequence[dict]) -> None:
    shapes, last = {name: span.shape for name, span in layouts[-1].items()}, inputs[-1].path.name
    for s, layout in zip(inputs, layouts, strict=True):
        for name in sorted(shapes.keys() | layout.keys()):
            if name not in layout or name not in shapes:
                here, there = (s.path.name, last) if name not in layout else (last, s.path.name)
                raise ValueError(
                    f"{here}: lacks tensor {name} of {there}; it is damaged or of another network, remove it"
                )
            if layout[name].shape != shapes[name]:
                raise ValueError(
                    f"{s.path.name}: tensor {name} has another shape than in {last}; they are of two networks"
                )
        for name in inputs[-1].header["buffers"]:  # constants drawn once per run: others mean another initialisation
            if s.header["checksums"][name] != inputs[-1].header["checksums"][name]:
                raise ValueError(f"{s.path.name}: buffer {name} differs from that in {last}; they are of two networks")


def _headers(plan: Plan, dtype: str) -> list[dict]:
    """Return the headers of all outputs: the last input's, with what they were made of."""
    headers = []
    for j, sigma_rel in enumerate(plan.sigma_rel):
        made_of = [
            [s.path.name, s.clock, s.sigma_rel, float(plan.coefficients[i, j])] for i, s in enumerate(plan.inputs)
        ]
        own = {"kind": "posthoc", "clock": plan.target, "sigma_rel": sigma_rel, "dtype": dtype, "inputs": made_of}
        errors = {"predicted_error": float(plan.errors[j]), "rounding_error": float(plan.rounding[j])}
        headers.append({k: v for k, v in plan.inputs[-1].header.items() if k != "checksums"} | own | errors)
    return headers


def output_paths(out: Path, clock: int, sigma_rel: Sequence[float]) -> list[Path]:
    """Return where the results go: `out` itself for one length (unless it is a folder), else a folder of named files."""
    if len(sigma_rel) == 1 and not out.is_dir():
        out.parent.mkdir(parents=True, exist_ok=True)
        return [out]
    if out.suffix == ".safetensors" or out.is_file():
        raise ValueError(f"--out {out}: names a file, {len(sigma_rel)} lengths need a folder")
    out.mkdir(parents=True, exist_ok=True)
    return [out / file_name(clock, s) for s in sigma_rel]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.posthoc", description=main.__doc__)
    parser.add_argument("run", type=Path, help="run directory, or a folder of published EDM2 snapshots (.pkl)")
    parser.add_argument("--sigma-rel", help="EMA length or lengths: 0.13, 0.05,0.13 or 0.02:0.20:0.01 (end included)")
    parser.add_argument("--at", help="clock in images, such as 1280Mi (default: the last snapshot)")
    parser.add_argument("--out", type=Path, help="a file for one length, a folder for several")
    parser.add_argument("--dtype", choices=tensor_file.DTYPES, help="of the result (default: that of the snapshots)")
    parser.add_argument(
        "--max-error", type=float, default=MAX_ERROR, help="refuse a larger predicted error (default %(default)s)"
    )
    advice = parser.add_argument_group("advice, also while the run trains")
    advice.add_argument("--advise", action="store_true", help="the best length so far, its drift, deletable snapshots")
    advice.add_argument("--data", type=Path, help="dataset (default: what the run held out of its own)")
    advice.add_argument("--data-images", type=int, help="at most so many images (default 1000)")
    advice.add_argument("--drift", type=int, default=3, help="earlier clocks to look at (default %(default)s)")
    advice.add_argument(
        "--keep-error", type=float, default=0.005, help="that deletions may leave (default %(default)s)"
    )
    advice.add_argument("--batch", type=int, default=64)
    advice.add_argument("--device", default=devices.own_device())
    advice.add_argument("--activations", default="fp32", choices=("fp32", "bf16", "fp16"))
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError where options are missing or cannot be."""
    if options.advise:
        devices.checked(options.device)
        if options.out or options.at:
            raise ValueError(
                "--advise: takes neither --out nor --at; it reports on the newest snapshot and on earlier ones"
            )
        for key in ("data_images", "batch"):
            if getattr(options, key) is not None and getattr(options, key) < 2:
                raise ValueError(f"--{key.replace('_', '-')} {getattr(options, key)}: must be at least 2")
        if options.drift < 0:
            raise ValueError(f"--drift {options.drift}: must be 0 or more")
    elif not options.sigma_rel or not options.out:
        raise ValueError("--sigma-rel and --out say what to rebuild and where to; or ask for advice with --advise")


@command_line("nothing was written")
def main(argv=None) -> int:
    """Rebuild one or many EMA lengths from a run's snapshots, or advise on them."""
    options = _parser().parse_args(argv)
    _check(options)
    if options.advise:
        from trainer import advisor  # it imports this module

        print("\n".join(advisor.advise(options.run, options)))
        return 0
    try:
        _rebuild(options)
    except OSError as error:
        where, what = error.filename or options.out, error.strerror or str(error)
        raise ValueError(f"{where}: {what}; nothing was written") from None
    return 0


def _rebuild(options: argparse.Namespace) -> None:
    for line in published.adopt(options.run):
        print(line)
    at = None if options.at is None else int(parse_size(options.at))
    made = plan(list_snapshots(options.run), ema_profiles.parse_range(options.sigma_rel), at)
    last = made.inputs[-1].clock
    print(f"{len(made.inputs)} snapshots up to {last} images; reconstructing at {made.target} images")
    for note in made.notes:
        print(note)
    for s, error, rounding in zip(made.sigma_rel, made.errors, made.rounding):
        print(f"sigma_rel {s:.5f}  predicted error {100 * error:8.4f} %  rounding {100 * rounding:8.4f} %")
    check_errors(made, options.max_error)
    paths = output_paths(options.out, made.target, made.sigma_rel)
    reconstruct(made, paths, options.dtype)
    for path in paths:
        print(f"wrote {os.fspath(path)}")


if __name__ == "__main__":
    sys.exit(main())
