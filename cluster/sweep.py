"""Sweep the EMA length (and the guidance weight) after a run: reconstruct, measure, table, picture, best network.

    python cluster/sweep.py runs/edm2_xl --sigma-rel 0.02:0.20:0.01 [--guidance 1.0:2.0:0.2 --guide FILE] [--metric latent,fid]

One pass over the snapshots makes all lengths; then they are measured, on this machine or as a Slurm job array. Every measurement is
a file under RUN/sweep/, so a sweep that was stopped goes on where it was. What must not break: torch-free, and nothing is measured
twice or under other settings than its folder's name stands for.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run by path: `cluster` and `trainer` are names that other distributions own too
    sys.path[0] = str(ROOT)

import argparse  # noqa: E402
import csv  # noqa: E402
import dataclasses  # noqa: E402
import hashlib  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402

from cluster import slurm, sweep_array, sweep_plot  # noqa: E402
from cluster.run_directory import shown, write_atomically  # noqa: E402
from data_pipeline.command import command_line  # noqa: E402
from trainer.config import parse_size, read_yaml  # noqa: E402
from trainer.ema_profiles import gamma_from_sigma_rel, parse_range  # noqa: E402

GOLDEN_RATIO = (5**0.5 - 1) / 2
METRICS = (
    "loss",
    "denoise",
    "chain",
    "latent",
    "fid",
    "fd_dinov2",
    "digits",
)  # of trainer.evaluate, which needs torch (a test compares)


@dataclasses.dataclass
class Sweep:
    """What is swept over, where its files lie, and how children are run."""

    run: Path
    clock: int
    metrics: list[str]
    options: list[str]  # handed to trainer.evaluate
    max_error: str
    kind: str = "local"
    parallel: int = 8  # of a job array's elements, at once

    @property
    def folder(self) -> Path:
        """Return where results lie: another metric, clock or option is another folder."""
        text = json.dumps([self.metrics, self.options])
        return self.run / "sweep" / f"{self.clock:010d}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def reconstruction(self, sigma_rel: float) -> Path:
        """Name a reconstruction, as trainer.posthoc does in a folder."""
        return self.folder / f"phema-{self.clock:010d}-{sigma_rel:.5f}.safetensors"

    def result(self, sigma_rel: float, guidance: float) -> Path:
        """Name a measurement, as trainer.evaluate does in a folder."""
        return self.folder / f"guidance-{guidance:g}" / f"{self.reconstruction(sigma_rel).stem}.json"

    def measure(self, lengths: list[float], guidances: list[float]) -> None:
        """Reconstruct and measure what is missing; ValueError with a child's reason where one fails."""
        points = [(s, g) for g in guidances for s in lengths if not self.result(s, g).is_file()]
        absent = sorted({s for s, _ in points if not self.reconstruction(s).is_file()})
        self.folder.mkdir(parents=True, exist_ok=True)
        if absent:
            self.reconstruct(absent)
        commands = []
        for g in guidances:
            files = [str(self.reconstruction(s)) for s, of in points if of == g]
            end = [
                "--metric",
                ",".join(self.metrics),
                "--results",
                str(self.result(0.1, g).parent),
                "--guidance",
                f"{g:g}",
            ]
            # on one machine a process measures many; a job array has one element each
            for part in [files] if self.kind == "local" and files else [[f] for f in files]:
                commands.append(["trainer.evaluate", *part, *end, *self.of_guidance(g)])
        if commands:
            print(f"measuring {len(points)} networks: {', '.join(self.metrics)}", flush=True)
            self.execute(commands)

    def reconstruct(self, lengths: list[float]) -> None:
        """Make the reconstructions of these lengths in one pass."""
        out = self.reconstruction(lengths[0]) if len(lengths) == 1 else self.folder
        listed = ",".join(f"{s:g}" for s in lengths)
        command = ["trainer.posthoc", str(self.run), "--sigma-rel", listed, "--at", str(self.clock)]
        self.execute([[*command, "--out", str(out), "--max-error", self.max_error]])

    def of_guidance(self, guidance: float) -> list[str]:
        """Return the options for this weight: a guide is only named where it guides."""
        if guidance != 1 or "--guide" not in self.options:
            return self.options
        at = self.options.index("--guide")
        return self.options[:at] + self.options[at + 2 :]

    def execute(self, commands: list[list[str]]) -> None:
        """Run `python -m ...` commands, here one after another or all at once on Slurm."""
        if self.kind == "slurm":
            sweep_array.execute(self.run, ROOT, commands, self.parallel)
            return
        for command in commands:
            sweep_array.run_one(ROOT, command)

    def rows(self, lengths: list[float], guidances: list[float]) -> list[dict]:
        """Return one row per measurement."""
        rows = []
        for g in guidances:
            for s in sorted(lengths):
                found = json.loads(self.result(s, g).read_text())["metrics"]
                rows.append({"sigma_rel": s, "guidance": g, **{m: found[m]["value"] for m in self.metrics}})
        return rows

    def better(self) -> list[str]:
        """Return for each metric whether low or high is better, as its results say."""
        one = json.loads(next(self.folder.glob("guidance-*/*.json")).read_text())["metrics"]
        return [one[m]["better"] for m in self.metrics]


def best_of(rows: list[dict], metric: str, better: str) -> dict:
    """Return the row with the best value."""
    return (min if better == "low" else max)(rows, key=lambda row: row[metric])


def refine(sweep: Sweep, lengths: list[float], guidances: list[float], steps: int) -> list[float]:
    """Measure up to `steps` more lengths by golden-section search around the grid's best; return them.

    At an end of the grid there is nothing to search between: widen the range.
    """
    metric, better = sweep.metrics[0], sweep.better()[0]
    lengths = sorted(lengths)
    best = best_of(sweep.rows(lengths, guidances), metric, better)
    at = lengths.index(best["sigma_rel"])
    if not 0 < at < len(lengths) - 1:
        print(f"the best length, {best['sigma_rel']:g}, is an end of the range; widen --sigma-rel to refine")
        return []
    low, middle, high = lengths[at - 1 : at + 2]
    value, probes = best[metric], []
    for _ in range(steps):
        side = high if high - middle > middle - low else low  # probe the longer side
        probe = round(middle + (1 - GOLDEN_RATIO) * (side - middle), 5)
        if probe in (low, middle, high):
            break  # as fine as file names tell lengths apart
        sweep.measure([probe], [best["guidance"]])
        probes.append(probe)
        (found,) = (row[metric] for row in sweep.rows([probe], [best["guidance"]]))
        if found < value if better == "low" else found > value:
            low, middle, high = (middle, probe, high) if side == high else (low, probe, middle)
            value = found
        else:
            low, high = (low, probe) if side == high else (probe, high)
    return probes


def last_clock(run: Path) -> int:
    """Return the clock of the newest snapshot by its name; ValueError where there is none."""
    clocks = [
        int(m[1])
        for p in (run / "snapshots").glob("ema-*")
        if (m := re.match(r"ema-(\d+)-[\d.]+\.safetensors$", p.name))
    ]
    if not clocks:
        raise ValueError(
            f"{shown(run)}: no snapshots in {shown(run / 'snapshots')}; name a run directory that has some"
        )
    return max(clocks)


def write_results(sweep: Sweep, rows: list[dict], keep: bool) -> list[str]:
    """Write sweep.csv, sweep.png and best.safetensors into RUN/sweep/; return lines that tell."""
    better, out = sweep.better(), sweep.run / "sweep"
    text = io.StringIO()
    table = csv.DictWriter(text, ["sigma_rel", "guidance", *sweep.metrics], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_atomically(out / "sweep.csv", text.getvalue())
    title = f"{sweep.run.name} at {sweep.clock:,} images"
    sweep_plot.write(out / "sweep.png", title, rows, list(zip(sweep.metrics, better)))
    best = best_of(rows, sweep.metrics[0], better[0])
    source, target = sweep.reconstruction(best["sigma_rel"]), out / "best.safetensors"
    if not source.is_file():  # measured in an earlier call that cleared up after itself
        sweep.reconstruct([best["sigma_rel"]])
    beside = out / f".best.{os.getpid()}.writing"
    shutil.copyfile(source, beside)
    os.replace(beside, target)
    if not keep:
        for path in sweep.folder.glob("phema-*.safetensors"):
            path.unlink()
    lines = []
    for metric, way in zip(sweep.metrics, better):
        row = best_of(rows, metric, way)
        guided = f", guidance {row['guidance']:g}" if row["guidance"] != 1 else ""
        lines.append(f"best {metric}: {row[metric]:.6g} at sigma_rel {row['sigma_rel']:g}{guided}")
    return [*lines, f"wrote {shown(out / 'sweep.csv')}, {shown(out / 'sweep.png')} and {shown(target)}"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python cluster/sweep.py",
        description="Sweep the EMA length after a run.",
        epilog="All other options go to trainer.evaluate: --images, --steps, --data, --guide, --weights, ...",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--sigma-rel", required=True, help="0.02:0.20:0.01 (end included) or a list")
    parser.add_argument("--guidance", default="1", help="weights, 1.0:2.0:0.2 or a list (default: none)")
    parser.add_argument("--metric", default="loss", help=f"one or more of {', '.join(METRICS)}; the first decides")
    parser.add_argument("--at", help="clock in images, such as 1280Mi (default: the last snapshot)")
    parser.add_argument(
        "--refine", type=int, default=0, metavar="STEPS", help="golden-section steps around the grid's best"
    )
    parser.add_argument(
        "--max-error", default="0.05", help="refuse lengths with a larger predicted error (default %(default)s)"
    )
    parser.add_argument("--kind", choices=("local", "slurm"), help="where (default: as the run's config says)")
    parser.add_argument("--parallel", type=int, default=8, help="jobs at once on Slurm (default %(default)s)")
    parser.add_argument(
        "--after",
        action="append",
        default=[],
        metavar="JOB",
        help="run the sweep as one Slurm job when this one (an id or a RUN) has ended well",
    )
    parser.add_argument("--keep", action="store_true", help="keep all reconstructions, not only the best")
    return parser


def _without(words: list[str], options: argparse.Namespace) -> list[str]:
    """Return the command line of the job that does what this one asks for: here, where the run is, and at once."""
    words = list(words)
    words.remove(str(options.run))
    for name in ("--after", "--kind"):
        while name in words:
            del words[words.index(name) : words.index(name) + 2]
        words = [word for word in words if not word.startswith(f"{name}=")]
    return [*words, "--kind", "local"]


@command_line("the same command goes on from here", also=(subprocess.SubprocessError,))
def main(argv: list[str] | None = None) -> int:
    """Sweep the EMA length after a run."""
    options, others = _parser().parse_known_args(argv)
    run = options.run.resolve()
    clock = int(parse_size(options.at)) if options.at else 0 if options.after else last_clock(run)
    lengths, guidances = parse_range(options.sigma_rel), parse_range(options.guidance)
    for length in lengths:
        gamma_from_sigma_rel(length)
    if any(g != 1 for g in guidances) and "--guide" not in others:
        raise ValueError(f"--guidance {options.guidance}: needs a guide; add --guide FILE, or --guide self")
    config = run / "config.yaml"
    kind = options.kind or (read_yaml(config).get("cluster", {}).get("kind", "local") if config.is_file() else "local")
    metrics = options.metric.split(",")
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"--metric {metric}: known are {', '.join(METRICS)}")
    if metrics == ["loss"] and guidances != [1]:
        raise ValueError(
            f"--guidance {options.guidance}: the loss is not guided; add a metric of drawn images, --metric latent"
        )
    if options.parallel < 1:
        raise ValueError(f"--parallel {options.parallel}: must be at least 1")
    if options.after:
        words = _without(sys.argv[1:] if argv is None else argv, options)
        job_id = sweep_array.submit_later(run, words, slurm.after(options.after))
        print(
            f"submitted Slurm job {job_id}: the sweep as one job; log: {shown(run / 'logs' / 'sweep')}/{job_id}_0_log.out"
        )
        return 0
    sweep = Sweep(run, clock, metrics, others, options.max_error, kind, options.parallel)
    sweep.measure(lengths, guidances)
    rows = sweep.rows(lengths, guidances)
    for probe in refine(sweep, lengths, guidances, options.refine) if options.refine else []:
        rows += [row for g in guidances if sweep.result(probe, g).is_file() for row in sweep.rows([probe], [g])]
    rows.sort(key=lambda row: (row["guidance"], row["sigma_rel"]))
    print("\n".join(write_results(sweep, rows, options.keep)))
    return 0


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C does: the jobs are taken down
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
