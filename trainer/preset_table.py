"""The tables of `trainer.benchmark --preset`: speed, and each part of the step beside its roofline."""

from datetime import date

import torch
from rich.table import Table

PARTS = ("data", "forward", "backward", "optimizer", "communication")


def tables(results: list[dict]) -> list[Table]:
    """Lay measurements out: speed, and each part beside what it must take at least."""
    return [_speed(results), _parts([r for r in results if "images_per_second" in r])]


def _speed(results: list[dict]) -> Table:
    first = results[0]
    title = f"training step, {first['device']}, {date.today()}, torch {torch.__version__}, one process"
    table = Table(title=title, caption=f"MFU of: {first['peak']}, {first['peak_flops'] / 1e12:.3g} TFLOP/s")
    compared = next((r["slower_than"] for r in results if "slower" in r), None)
    ratio = [f"slower than {compared}"] if compared else []
    for column in ("preset", "loop", "activations", "compiled", "micro-batch", "images/s", *ratio, "TFLOP/s", "MFU", "s/step",
                   "host CPU s", "first step", "kernels", "unfused", "peak memory"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("preset", "loop") else "right")
    for r in results:
        if "images_per_second" not in r:
            table.add_row(r["preset"], r["loop"], "", "", str(r["micro_batch"]), "out of memory")
            continue
        slower = [f"{r['slower']:.3g}x" if "slower" in r else ""] if compared else []
        host = f"{r['host_cpu_seconds']:.4g}" + (f" ({r['more_host_cpu']:.3g}x)" if "slower" in r else "")
        table.add_row(r["preset"], r["loop"], r["activations"], "yes" if r["compiled"] else "no", str(r["micro_batch"]),
                      f"{r['images_per_second']:.4g}", *slower, f"{r['flops_per_second'] / 1e12:.4g}", f"{r['mfu']:.1%}",
                      f"{r['step_seconds']:.4g}", host,
                      f"{r['first_step_seconds']:.3g} s", str(r["kernels_per_step"]),
                      str(r["unfused_kernels"]), f"{r['peak_memory_bytes'] / 2**30:.2f} GiB")  # fmt: skip
    return table


def _parts(results: list[dict]) -> Table:
    first = results[0]
    rates = f"{first['measured_flops_per_second'] / 1e12:.3g} TFLOP/s and {first['measured_bytes_per_second'] / 1e9:.3g} GB/s"
    caption = f"roofline at {rates}, measured in the run"
    table = Table(title="ms a step, by part, and the least by roofline", caption=caption)
    columns = (
        "preset",
        "loop",
        "micro-batch",
        *PARTS,
        "other",
        "GFLOP",
        "GB of matrix work",
        "GB elementwise, unfused",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("preset", "loop") else "right")
    for r in results:
        cells = []
        for name in PARTS:
            least = f" ({1e3 * r['least_seconds'][name]:.4g})" if name in r["least_seconds"] else ""
            cells.append(f"{1e3 * r['part_seconds'].get(name, 0.0):.4g}{least}")
        other = r["step_seconds"] - sum(v for k, v in r["part_seconds"].items() if k != "communication")
        gflop = r["flops_per_second"] * r["step_seconds"] / 1e9
        table.add_row(r["preset"], r["loop"], str(r["micro_batch"]), *cells, f"{1e3 * other:.4g}", f"{gflop:.4g}",
                      f"{r['matrix_bytes'] / 1e9:.3g}", f"{r['unfused_elementwise_bytes'] / 1e9:.3g}")  # fmt: skip
    return table
