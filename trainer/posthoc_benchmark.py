"""Speed of a reconstruction: `python -m trainer.posthoc_benchmark [--full]`: 19 lengths over 32 snapshots in one pass.

Compared with plain reading of the same files, and with reading and checksumming them, in the same run and from the same page cache.
The network has the shapes of EDM2-XS: by default with a quarter of its channels (32 x 16 MB), with --full all of them (125 M
parameters, 32 x 0.25 GB read and 19 x 0.25 GB written: needs 13 GB of disk for as long as it runs).
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
import xxhash
from rich.console import Console
from rich.table import Table

from data_pipeline.command import command_line
from models import denoiser
from trainer import config, posthoc, snapshots, tensor_file
from trainer.snapshot_writer import file_name

CLOCKS, LENGTHS = 16, [round(0.02 + 0.01 * i, 2) for i in range(19)]  # two tracked lengths: 32 files
BUFFER_BYTES = 2**24


def write_series(run: Path, model: dict) -> int:
    """Write 32 fp16 snapshots of random weights and return their bytes."""
    with torch.device("meta"):
        network = denoiser.build(model)
    shapes = {name: t.shape for name, t in network.state_dict().items()}
    buffers = sorted(name for name, _ in network.named_buffers())
    header = {"kind": "ema", "run": "benchmark", "model": model, "data": {}, "dtype": "fp16", "buffers": buffers}
    (run / "snapshots").mkdir()
    # the same values in every file: they are nothing to the speed, and making others would take longer than all the rest
    tensors = {n: torch.ones(s) if n in buffers else torch.randn(s).half() for n, s in shapes.items()}
    for clock in range(1, CLOCKS + 1):
        for sigma_rel in (0.05, 0.10):
            path = run / "snapshots" / file_name(clock, sigma_rel)
            tensor_file.write(path, header | {"clock": clock, "sigma_rel": sigma_rel, "life": 1}, tensors)
    return sum(p.stat().st_size for p in (run / "snapshots").iterdir())


def read(run: Path, checksum: bool) -> tuple[float, float]:
    """Return the seconds, on the clock and of the CPU, that reading all files takes, in blocks into one buffer."""
    buffer, started = bytearray(BUFFER_BYTES), _now()
    for path in sorted((run / "snapshots").iterdir()):
        hashed = xxhash.xxh3_64()
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                if checksum:
                    hashed.update(memoryview(buffer)[:count])
    return _since(started)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(started: tuple[float, float]) -> tuple[float, float]:
    return time.perf_counter() - started[0], time.process_time() - started[1]


def measure(folder: Path, model: dict) -> list[dict]:
    """Return one row per way of going through the files."""
    num_bytes = write_series(folder, model)
    plain, checked = (min(read(folder, checksum) for _ in range(2)) for checksum in (False, True))
    plan = posthoc.plan(snapshots.list_snapshots(folder), LENGTHS)
    started = _now()
    posthoc.reconstruct(plan, posthoc.output_paths(folder / "made", plan.target, LENGTHS))
    ways = {
        "plain reading": plain,
        "reading and checksums": checked,
        f"{len(LENGTHS)} lengths, written and synced": _since(started),
    }
    size = num_bytes / 1e9
    return [
        {
            "way": way,
            "gigabytes": size,
            "seconds": s,
            "cpu_seconds": cpu,
            "gigabytes_per_second": size / s,
            "of_plain": plain[0] / s,
        }
        for way, (s, cpu) in ways.items()
    ]


@command_line()
def main(argv=None) -> int:
    """Measure how fast 19 EMA lengths come out of 32 snapshots, against plain reading of the same files."""
    parser = argparse.ArgumentParser(prog="python -m trainer.posthoc_benchmark", description=main.__doc__)
    parser.add_argument("--full", action="store_true", help="the 125 M-parameter network")
    parser.add_argument("--folder", type=Path, help="where to work (default: the temporary folder)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    model = config.to_dict(config.load(config.ROOT / "configs" / "edm2_xs.yaml"))["model"]
    if not options.full:
        model["model_channels"] //= 4
        model["channels_per_head"] //= 4
    needed, free = (13.5e9 if options.full else 1.2e9), shutil.disk_usage(options.folder or tempfile.gettempdir()).free
    if free < needed:
        raise ValueError(f"{free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed; name another --folder")
    with tempfile.TemporaryDirectory(prefix="evenkeel-posthoc-", dir=options.folder) as folder:
        rows = measure(Path(folder), model)
    if options.json:
        print(json.dumps(rows))
        return 0
    table = Table(title=f"{rows[0]['gigabytes']:.2f} GB of snapshots, {torch.get_num_threads()} threads")
    for name in ("way", "s", "CPU s", "GB/s", "of plain reading"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for row in rows:
        figures = [f"{row[k]:.2f}" for k in ("seconds", "cpu_seconds", "gigabytes_per_second")]
        table.add_row(row["way"], *figures, f"{row['of_plain']:.3f}")
    Console(width=100).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
