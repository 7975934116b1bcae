"""Rerun a comparison of configs/experiments/: every arm with every seed is an ordinary run, then measured, then tabulated.

    python -m trainer.experiments noise [--data FOLDER] [--seeds 0,1,2] [--evaluate OPTIONS] [key=value ...]

What must not break: all cells see the same data and the same measurement, a seed is finished for all arms before the next begins,
and nothing that is done is done twice: a command that was stopped or killed goes on in the middle of a cell.
"""

import argparse
import dataclasses
import fcntl
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from data_pipeline import durable, manifest
from data_pipeline.command import command_line
from data_pipeline.progress import Progress
from trainer import config, state
from trainer.child import die_with_parent
from trainer.groups import Data
from trainer.typed import build, list_of, one_of, required

FOLDER = config.CONFIGS / "experiments"
LOOK_SECONDS = 0.5


@dataclasses.dataclass
class Experiment:
    """A file of configs/experiments/."""

    arms: dict = dataclasses.field(default_factory=dict)  # name -> list: a config of configs/, then overrides
    cells_of: str = ""  # another experiment, whose arms, seeds and runs these are
    set: list[str] = list_of()  # overrides of all arms
    seeds: list[int] = list_of(0, 1, 2)
    baseline: str = required()  # the arm that the others are compared with, seed by seed
    evaluate: str = required()  # options of trainer.evaluate, the same for all arms
    plot: str = one_of("absolute", "absolute", "ratio")  # curves as they are, or over the baseline's


@dataclasses.dataclass
class Cell:
    """One arm with one seed."""

    arm: str
    seed: int
    config: config.Config

    @property
    def folder(self) -> Path:
        return Path(self.config.run)

    def finished(self) -> bool:
        """Say whether the run has come to its end."""
        return state.read(self.folder).get("status") == "finished"

    def clock(self) -> int:
        """Return how many images the run has seen, as others can know."""
        return min(state.read(self.folder).get("clock", 0), self.config.duration_images)


def read(name: str) -> Experiment:
    """Read an experiment by name or file; raise ValueError for one that makes no sense."""
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(
            f"{name}: no such experiment; there are {', '.join(sorted(p.stem for p in FOLDER.glob('*.yaml')))}"
        )
    found = build(Experiment, config.read_yaml(path))
    if found.cells_of:
        other = read(str(path.with_name(f"{found.cells_of}.yaml")))
        found = dataclasses.replace(found, arms=other.arms, set=other.set, seeds=other.seeds)
    for arm, parts in found.arms.items():
        if not isinstance(parts, list) or not parts or not all(isinstance(p, str) for p in parts):
            raise ValueError(f"{path}: arms.{arm}: must be a list, a config of configs/ and its overrides")
    if found.baseline not in found.arms:
        raise ValueError(f"{path}: baseline={found.baseline}: is no arm; they are {', '.join(found.arms)}")
    return found


def cells(
    experiment: Experiment, folder: Path, data: Path | None, seeds: list[int], overrides: list[str]
) -> list[Cell]:
    """Return the cells seed by seed, every config checked; raise ValueError where a folder holds a run of another config."""
    found, composed = [], {}
    for seed in seeds:
        for arm, (base, *own) in experiment.arms.items():
            values = [*experiment.set, *own]
            values = [*values, *(_data_keys(data, values) if data else []), *overrides]
            own_keys = {"seed": seed, "run": str((folder / f"{arm}-seed{seed}").resolve())}
            if arm not in composed:  # Hydra takes its time: once for all seeds
                values += [f"{key}={value}" for key, value in own_keys.items()]
                composed[arm] = config.to_dict(config.load(config.CONFIGS / f"{base}.yaml", values))
            cell = Cell(arm, seed, config.from_dict(composed[arm] | own_keys))
            if "://" not in cell.config.data.path:
                cell.config.data.path = str(config.ROOT / cell.config.data.path)
            if (cell.folder / "config.yaml").is_file():
                there = config.digest(config.load(cell.folder))
                if there != config.digest(cell.config):
                    raise ValueError(
                        f"{cell.folder}: holds a run of another config; remove it, or give another --runs folder"
                    )
            found.append(cell)
    return found


def _data_keys(folder: Path, values: list[str]) -> list[str]:
    """Return the overrides that make a config fit another dataset; without classes where `values` leave them out."""
    m = manifest.load(folder)
    channels = m.shape[0] // 2 if m.moments == "mean_std" else m.shape[0]
    keys = [f"data.path='{folder.resolve()}'", f"data.codec={m.codec}", "data.encode_from="]
    keys += [f"model.channels={channels}", f"model.resolution={m.shape[-1]}"]
    return keys if "model.label_dim=0" in values else [*keys, f"model.label_dim={m.label_dim}"]


def encode_once(data: Data) -> None:
    """Make the dataset where there is none yet and the config says of what."""
    if not (Path(data.path) / "manifest.json").is_file() and data.encode_from:
        from data_pipeline import encode

        if encode.main([data.encode_from, data.path, "--codec", data.codec]):
            raise ValueError(f"{data.encode_from}: could not be encoded into {data.path}")


def train(cell: Cell, progress: Progress) -> None:
    """Bring a cell to its end in a process of its own, from where it stands; raise ValueError with the trainer's last line.

    The trainer holds the lock too: one whose command was killed is waited for while it saves.
    """
    cell.folder.mkdir(parents=True, exist_ok=True)
    with open(cell.folder / ".training", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _train(cell, progress, lock.fileno())


def _train(cell: Cell, progress: Progress, lock: int) -> None:
    seen = cell.clock()
    if cell.finished():  # by whoever held the lock
        return
    if not (cell.folder / "config.yaml").is_file():
        durable.write_atomically(cell.folder / "config.yaml", config.dump(cell.config).encode())
    command = [sys.executable, "-m", "trainer.train", str(cell.folder / "config.yaml")]
    environment = {"OMP_NUM_THREADS": "1"} | {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    with open(cell.folder / "trainer.log", "ab") as log:
        options = {"cwd": config.ROOT, "env": environment, "stdout": log, "stderr": log, "pass_fds": (lock,)}
        child = subprocess.Popen(command, preexec_fn=die_with_parent, process_group=0, **options)
    try:
        while child.poll() is None:
            time.sleep(LOOK_SECONDS)
            if (now := cell.clock()) > seen:
                progress.advance(now - seen)
                seen = now
    except KeyboardInterrupt:
        child.send_signal(signal.SIGINT)  # it saves and leaves
        child.wait()
        raise
    if not cell.finished():
        last = (cell.folder / "trainer.log").read_text(errors="replace").strip().splitlines()[-1:]
        raise ValueError(f"{cell.folder}: training ended with status {child.returncode}: {''.join(last)}")
    progress.advance(cell.config.duration_images - seen)


def measure(cell: Cell, options: str) -> dict:
    """Return {metric: result} of a finished cell's newest snapshot; a file under RUN/experiment/ that is there is read."""
    from trainer import evaluate
    from trainer.drawing_options import find_snapshot

    snapshot = find_snapshot(cell.folder)
    results = cell.folder / "experiment" / hashlib.sha256(options.encode()).hexdigest()[:8]
    made = results / f"{snapshot.stem}.json"
    if not made.is_file():
        status = evaluate.main([str(snapshot), *shlex.split(options), "--results", str(results)])
        if status == 130:
            raise KeyboardInterrupt
        if status:
            raise ValueError(f"{snapshot}: could not be measured with {options}")
    return json.loads(made.read_text())["metrics"]


def rows(found: list[tuple[Cell, dict]]) -> list[dict]:
    """Return a row per cell, metric and place of its curve: what the CSV holds."""
    from trainer import flops
    from trainer.experiment_report import curve

    counted, result = {}, []
    for cell, metrics in found:
        if cell.arm not in counted:
            counted[cell.arm] = flops.count(config.to_dict(cell.config)["model"])
        counts = counted[cell.arm]
        common = {"arm": cell.arm, "seed": cell.seed, "parameters": counts.parameters}
        common |= {"forward_flops": counts.forward_flops, "images": cell.config.duration_images}
        for metric, values in metrics.items():
            result.append({**common, "metric": metric, "at": "", "value": values["value"]})
            for name, value in values.get("also", {}).items():
                result.append({**common, "metric": f"{metric}, {name}", "at": "", "value": value})
            result += [{**common, "metric": metric, "at": at, "value": value} for at, value in curve(metric, values)]
    return result


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds {text}: must be numbers such as 0,1,2") from None


@command_line("the same command goes on from here")
def main(argv=None) -> int:
    """Train, measure and tabulate an experiment; goes on where it was stopped."""
    parser = argparse.ArgumentParser(prog="python -m trainer.experiments", description=main.__doc__)
    parser.add_argument("experiment", help="a name of configs/experiments/, or a YAML file")
    parser.add_argument("overrides", nargs="*", help="key=value, of all arms; with them give another --runs folder")
    parser.add_argument("--data", type=Path, help="dataset folder instead of the digits")
    parser.add_argument("--seeds", help="for instance 0,1,2; default: the experiment's")
    parser.add_argument("--arms", help="for instance edm2,unode; default: all")
    parser.add_argument("--baseline", help="arm that the others are compared with; default: the experiment's")
    parser.add_argument("--evaluate", metavar="OPTIONS", help="of trainer.evaluate, instead of the experiment's")
    parser.add_argument("--runs", type=Path, default=config.ROOT / "runs" / "experiments", help="default %(default)s")
    parser.add_argument("--out", type=Path, help="folder of NAME.csv, NAME.md, NAME.png (default: that of the runs)")
    options = parser.parse_intermixed_args(argv)  # overrides may follow options
    name, experiment = Path(options.experiment).stem, read(options.experiment)
    arms = options.arms.split(",") if options.arms else list(experiment.arms)
    baseline = options.baseline or experiment.baseline
    for key, arm in [("--arms", arm) for arm in arms] + [("--baseline", baseline)]:
        if arm not in experiment.arms:
            raise ValueError(f"{key} {arm}: is no arm; they are {', '.join(experiment.arms)}")
    if baseline not in arms:
        raise ValueError(f"--arms {options.arms}: leaves out {baseline}; add it, or compare with another --baseline")
    experiment = dataclasses.replace(experiment, arms={arm: experiment.arms[arm] for arm in arms})
    seeds = _seeds(options.seeds) if options.seeds else experiment.seeds
    runs = options.runs / (experiment.cells_of or name)
    every = cells(experiment, runs, options.data, seeds, options.overrides)
    encode_once(every[0].config.data)
    found = []
    open_ = [cell for cell in every if not cell.finished()]
    left = sum(cell.config.duration_images - cell.clock() for cell in open_)
    with Progress(f"training {len(open_)} of {len(every)} runs", left, "images") as progress:
        for cell in open_:
            train(cell, progress)
    for number, cell in enumerate(every, 1):
        print(f"measuring {number} of {len(every)}: {cell.arm}, seed {cell.seed}", file=sys.stderr, flush=True)
        found.append((cell, measure(cell, options.evaluate or experiment.evaluate)))
    from trainer import experiment_report

    made = experiment_report.write(options.out or runs, name, rows(found), baseline, experiment.plot)
    print("\n".join(made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
