"""What runs where, and how far: `python -m cluster.status [RUN ...]`; without a RUN, all of runs/. Of a sweep, its points."""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster import points, standing, sweep_table
from data_pipeline.command import command_line


@command_line()
def main(argv: list[str] | None = None) -> int:
    """Print the tables; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cluster.status", description="Show what runs where, and how far.")
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="run or sweep directories; default: all of runs/"
    )
    arguments = parser.parse_intermixed_args(argv)
    sweeps = [run for run in arguments.runs if points.is_sweep(run)]
    runs = [run for run in arguments.runs if run not in sweeps]
    for run in runs:
        if not (run / "config.yaml").is_file():
            print(f"error: {run}: no run directory (it has no config.yaml); try: ls runs", file=sys.stderr)
            return 2
    if not arguments.runs:
        found = [p for pattern in ("*/config.yaml", f"*/{points.FILE}") for p in Path("runs").glob(pattern)]
        found += [c for p in found if p.name == points.FILE for c in p.parent.glob("*/config.yaml")]
        runs = sorted(p.parent for p in found if p.name == "config.yaml")
        if not runs:
            print("no runs in runs/ yet; start one: python cluster/submit.py configs/quickstart.yaml")
            return 0
    if runs:
        show(list(standing.COLUMNS), [standing.row(run) for run in runs])
    for folder in sweeps:
        columns, found = sweep_table.write(folder)
        show(columns, [sweep_table.cells(row, columns) for row in found])
        print("\n".join(sweep_table.best(folder, found)), file=sys.stderr)
    return 0


def show(columns: list[str], rows: list[list[str]]) -> None:
    """Print a table."""
    console = Console(highlight=False)
    if console.is_terminal:
        table = Table(*columns, box=None)
        for cells in rows:
            table.add_row(*cells)
        console.print(table)
    else:  # a pipe gets columns that survive `cut` and `awk`
        print("\n".join("\t".join(cells) for cells in [columns, *rows]))


if __name__ == "__main__":
    sys.exit(main())
