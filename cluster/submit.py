"""Submit a run: compose and check its config, copy the code, start it on this machine or on Slurm.

    python cluster/submit.py configs/edm2_xl.yaml [key=value ...] [--dry-run] [--fork NAME]

Never imports torch: a wrong config dies here, on the login node, within a second or two, in one line with exit status 2.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run by path: `cluster` and `trainer` are names that other distributions own too
    sys.path[0] = str(ROOT)

import argparse  # noqa: E402
import difflib  # noqa: E402

from cluster import endings, follow, forecast, job, run_directory, slurm  # noqa: E402
from cluster.run_directory import shown  # noqa: E402
from data_pipeline import manifest  # noqa: E402
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
    argv = sys.argv[1:] if argv is None else argv
    options = [o for a in parser._actions for o in a.option_strings]
    for word in argv:
        name = word.partition("=")[0]
        if word.startswith("-") and name not in options:
            close = difflib.get_close_matches(name, options, 1)
            hint = (
                f"did you mean {close[0]}?"
                if close
                else f"there are {', '.join(options)}; a config key is set as key=value"
            )
            raise ValueError(f"{word}: no such option; {hint}")
    if not argv:
        raise ValueError("no config given; try: python cluster/submit.py configs/quickstart.yaml")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status, which for a local run is the trainer's."""
    try:
        arguments = parse(argv)
        config = run_directory.absolute(load(arguments.config, arguments.overrides), ROOT)
        check(config)
        warnings = doubts(config)
        if arguments.dry_run:
            print(dump(config), end="")
            if config.cluster.kind == "slurm":
                print(f"\n# sbatch script:\n{slurm.script(config)}")
            print("\n# what it will need\n" + "\n".join([*forecast.forecast(config), *communication.lines(config)]))
            print("\n".join(warnings))
            return 0
        return submit(config, arguments.fork, warnings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return endings.USER_ERROR
    except KeyboardInterrupt:
        return endings.INTERRUPTED


def check(config: Config) -> None:
    """Raise ValueError where the config asks its cluster for something it cannot do."""
    if config.cluster.kind == "local" and config.cluster.nodes != 1:
        raise ValueError(
            f"cluster.nodes={config.cluster.nodes}: a local run has one node; use cluster.nodes=1 with more "
            "cluster.ranks_per_node, or cluster.kind=slurm"
        )


def doubts(config: Config) -> list[str]:
    """Return warnings about what the job will find; ValueError where it would certainly fail on its data."""
    data, m = config.data, config.model
    if config.start_from and not run_directory.last_checkpoint(Path(config.run)):
        origin.check(config)
    folder, lines = Path(data.path), []
    if "://" in data.path or manifest.manifest_path(folder).is_file():
        found = manifest.load(data.path)
        manifest.check_fits(found, data.codec, m.channels, m.resolution, m.label_dim)
    elif not data.encode_from and not any(folder.glob("*.tar")):  # tars that others wrote are indexed on first use
        lines.append(
            f"warning: {shown(folder)} holds no dataset yet; make it before the job starts: "
            f"{run_directory.python()} -m data_pipeline.encode SRC {shown(folder)}"
        )
    return [*lines, *forecast.shortages(config)]


def submit(config: Config, fork: str | None, warnings: list[str]) -> int:
    """Make or continue the run directory and start the job."""
    lines = []
    if fork:
        config, lines = run_directory.fork(config, fork, ROOT)
    run = Path(config.run)
    run_directory.check_new(run, ROOT)
    slurm.check_idle(run)
    run.mkdir(parents=True, exist_ok=True)
    lock = run_directory.hold(run)  # until this process ends
    assert lock >= 0
    lines = lines or run_directory.prepare(config, ROOT)
    print("\n".join(lines + warnings), flush=True)
    wants_grid = config.cluster.finish_sigma_rel and not job.finish_files(config)[1].is_file()
    if run_directory.is_finished(run) and not wants_grid:
        print("\n".join(follow.summary(config)[1:]))
        return endings.FINISHED
    if config.cluster.kind == "slurm":
        print("\n".join(slurm.submit(config)))
        return endings.FINISHED
    attempt = run_directory.next_attempt(run)
    print(f"logs: {shown(run / 'logs')}/{attempt:04d}_rank*.log", flush=True)
    return follow.Follower(config).follow(attempt)


if __name__ == "__main__":
    sys.exit(main())
