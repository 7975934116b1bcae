"""Submit a run: compose and check its config, copy the code, start it on this machine or on Slurm.

    python cluster/submit.py configs/edm2_xl.yaml [key=value ...] [--dry-run] [--fork NAME] [--after JOB]
    python cluster/submit.py configs/edm2_xs.yaml --sweep lr.ref_lr=0.008,0.01,0.012 [--sweep seed=0,1] [--parallel 2]

Never imports torch: a wrong config dies here, on the login node, within a second or two, in one line with exit status 2.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run by path: `cluster` and `trainer` are names that other distributions own too
    sys.path[0] = str(ROOT)

import argparse  # noqa: E402
import difflib  # noqa: E402
import os  # noqa: E402

from cluster import endings, follow, forecast, job, points, run_directory, slurm, sweep_table  # noqa: E402
from cluster.run_directory import shown  # noqa: E402
from data_pipeline import manifest  # noqa: E402
from data_pipeline.command import command_line  # noqa: E402
from trainer import communication, origin  # noqa: E402
from trainer.config import Config, dump, load  # noqa: E402


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str):
        raise ValueError(message)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; ValueError for an option there is not."""
    parser = Parser(
        prog="python cluster/submit.py", description="Submit a run to this machine or to Slurm.", allow_abbrev=False
    )
    parser.add_argument("config", help="a YAML file, or the run directory of a run to go on with")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for instance global_batch=1024 cluster.nodes=8"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the composed config (and the sbatch script), submit nothing"
    )
    parser.add_argument("--fork", metavar="NAME", help="start run NAME from the last checkpoint of the config's run")
    parser.add_argument(
        "--after",
        action="append",
        default=[],
        metavar="JOB",
        help="start when this Slurm job (an id, a RUN or a sweep) has ended well",
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="key=a,b,c",
        help="a run for each value; several: for each combination",
    )
    parser.add_argument("--parallel", type=int, metavar="N", help="points of a sweep at once, on Slurm (default: 2)")
    argv = sys.argv[1:] if argv is None else argv
    options = [o for a in parser._actions for o in a.option_strings]
    for word in argv:
        name = word.partition("=")[0]
        if word.startswith("-") and name not in options:
            close = difflib.get_close_matches(name, options, 1, 0.8)
            hint = (
                f"did you mean {close[0]}?"
                if close
                else f"there are {', '.join(options)}; a config key is set as key=value"
            )
            raise ValueError(f"{word}: no such option; {hint}")
    if not argv:
        raise ValueError("no config given; try: python cluster/submit.py configs/quickstart.yaml")
    return parser.parse_intermixed_args(argv)


@command_line()
def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status, which for a local run is the trainer's."""
    arguments = parse(argv)
    if arguments.sweep:
        return sweep(arguments)
    if arguments.parallel is not None:
        raise ValueError(f"--parallel {arguments.parallel}: is for a sweep; add --sweep key=a,b,c")
    config = run_directory.absolute(load(arguments.config, arguments.overrides), ROOT)
    after = check(config, arguments.after)
    warnings = doubts(config)
    if arguments.dry_run:
        print(dump(config), end="")
        if config.cluster.kind == "slurm":
            print(f"\n# sbatch script:\n{slurm.script(config, after)}")
        print("\n# what it will need\n" + "\n".join([*forecast.forecast(config), *communication.lines(config)]))
        print("\n".join(warnings))
        return 0
    run_directory.heed_umask(config.cluster)
    return submit(config, arguments.fork, warnings, after)


def sweep(arguments: argparse.Namespace) -> int:
    """Check all points of a sweep, then start those that are missing; return the exit status."""
    found = points.compose(arguments.config, arguments.overrides, points.parse(arguments.sweep), ROOT)
    base = run_directory.absolute(load(arguments.config, arguments.overrides), ROOT)
    on_slurm = base.cluster.kind == "slurm"
    parallel = arguments.parallel or (2 if on_slurm else 1)
    if arguments.fork:
        raise ValueError(f"--fork {arguments.fork}: does not go with --sweep, whose points start from nothing")
    if arguments.parallel is not None and arguments.parallel < 1 or (parallel > 1 and not on_slurm):
        raise ValueError(f"--parallel {arguments.parallel}: must be at least 1, and 1 without cluster.kind=slurm")
    after = ""
    for point in found:
        after = check(point.config, arguments.after)
    warnings = list(dict.fromkeys(line for point in found for line in doubts(point.config)))
    points.check(found, base, ROOT)
    folder = points.folder_of(base)
    print(f"{len(found)} points in {shown(folder)}, {parallel} at once", flush=True)
    if arguments.dry_run:
        print("\n".join([*points.plan(found), *warnings]))
        return 0
    print("\n".join(warnings), end="\n" if warnings else "", flush=True)
    run_directory.heed_umask(base.cluster)
    folder.mkdir(parents=True, exist_ok=True)
    lock = run_directory.hold(folder)  # until this process ends
    assert lock >= 0
    if on_slurm:
        print("\n".join(points.submit_all(found, base, parallel, after, ROOT)))
        print(f"follow:  {run_directory.python()} -m cluster.status {shown(folder)}")
        print(f"stop:    {run_directory.python()} -m cluster.cancel {shown(folder)} (saves first)")
        return endings.FINISHED
    status = points.run_here(found, base, lambda config: submit(config, None, []))
    print("\n".join(sweep_table.lines(folder)))
    return status


def check(config: Config, after: list[str]) -> str:
    """Return what the job waits for; ValueError where the config asks its cluster for something it cannot do."""
    if config.cluster.kind == "local" and config.cluster.nodes != 1:
        raise ValueError(
            f"cluster.nodes={config.cluster.nodes}: a local run has one node; use cluster.nodes=1 with more "
            "cluster.ranks_per_node, or cluster.kind=slurm"
        )
    if config.cluster.kind == "local" and after:
        raise ValueError(f"--after {after[0]}: waits for a Slurm job, but this is a local run; add cluster.kind=slurm")
    return slurm.after(points.spread(after)) if after else ""


def doubts(config: Config) -> list[str]:
    """Return warnings about what the job will find; ValueError where it would certainly fail on its data."""
    data, m = config.data, config.model
    if config.start_from and not run_directory.last_checkpoint(Path(config.run)):
        origin.check(config)
    folder, lines = Path(data.path), []
    if "://" in data.path or manifest.manifest_path(folder).is_file():
        found = manifest.load(data.path)
        manifest.check_fits(found, data.codec, m.channels, m.resolution, m.label_dim)
        size = sum(shard.bytes for shard in found.shards)
        if ("://" in data.path or data.stage) and size > data.cache_bytes:
            lines.append(
                f"warning: the dataset has {size / 1e9:,.3g} GB, more than data.cache_bytes={data.cache_bytes}: every node copies "
                "shards again in every epoch; make it larger if the disk is"
            )
    elif not data.encode_from and not any(folder.glob("*.tar")):  # tars that others wrote are indexed on first use
        lines.append(
            f"warning: {shown(folder)} holds no dataset yet; make it before the job starts: "
            f"{run_directory.python()} -m data_pipeline.encode SRC {shown(folder)}"
        )
    return [*lines, *forecast.shortages(config)]


def submit(config: Config, fork: str | None, warnings: list[str], after: str = "") -> int:
    """Make or continue the run directory and start the job."""
    lines = []
    if fork:
        config, lines = run_directory.fork(config, fork, ROOT)
    run = Path(config.run)
    run_directory.check_new(run, ROOT)
    slurm.check_idle(run)
    run.mkdir(parents=True, exist_ok=True)
    lock = run_directory.hold(run)
    try:
        return start(config, lines or run_directory.prepare(config, ROOT), warnings, after)
    finally:
        os.close(lock)


def start(config: Config, lines: list[str], warnings: list[str], after: str) -> int:
    """Start the job of a run directory that is ours; return the exit status."""
    run = Path(config.run)
    print("\n".join(lines + warnings), flush=True)
    wants_grid = config.cluster.finish_sigma_rel and not job.finish_files(config)[1].is_file()
    if run_directory.is_finished(run) and not wants_grid:
        print("\n".join(follow.summary(config)[1:]))
        return endings.FINISHED
    if config.cluster.kind == "slurm":
        print("\n".join(slurm.submit(config, after)))
        return endings.FINISHED
    attempt = run_directory.next_attempt(run)
    print(f"logs: {shown(run / 'logs')}/{attempt:04d}_rank*.log", flush=True)
    return follow.Follower(config).follow(attempt)


if __name__ == "__main__":
    sys.exit(main())
