"""The points of a hyper-parameter sweep: an ordinary run directory each, and SWEEP/sweep.json that lists them.

On this machine they run one after another; on Slurm in lanes, where each job starts when the one before it in its lane has ended,
however it ended. What must not break: nothing starts before every point has been checked, and the same command starts only what
is neither finished nor active.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cluster import endings, forecast, job, run_directory, slurm
from cluster.run_directory import differences, is_finished, read_json, shown, write_atomically
from trainer.config import Config, from_dict, load, to_dict
from trainer.size import count

FILE, VERSION = "sweep.json", 1
MAX_NAME = 120  # characters; file systems take 255, and a checkpoint's temporary name is longer than its own


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    values: dict[str, str]  # as written on the command line
    config: Config

    @property
    def run(self) -> Path:
        """Return its run directory."""
        return Path(self.config.run)

    @property
    def name(self) -> str:
        """Return the name of its run directory."""
        return self.run.name

    def is_done(self) -> bool:
        """Tell whether nothing of it is left to do."""
        wants_grid = self.config.cluster.finish_sigma_rel and not job.finish_files(self.config)[1].is_file()
        return is_finished(self.run) and not wants_grid


# ---------------------------------------------------------------------------------------------------------------------
# What is swept over.


def parse(words: list[str]) -> dict[str, list[str]]:
    """Read `key=a,b,c` words into {key: values}; ValueError for what is none."""
    found: dict[str, list[str]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        values = split(text)
        if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key) or not all(values):
            raise ValueError(f"--sweep {word}: must be written key=a,b,c, for instance lr.ref_lr=0.008,0.01,0.012")
        if key == "run" or key in found:
            why = "every point has a run directory of its own" if key == "run" else "is swept over twice"
            raise ValueError(f"--sweep {word}: {key}: {why}; leave one out")
        if len(set(values)) < len(values):
            raise ValueError(f"--sweep {word}: a value occurs twice; name each once")
        found[key] = values
    return found


def split(text: str) -> list[str]:
    """Split at the commas outside of brackets: '[1,2],[3]' -> ['[1,2]', '[3]']."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "[{(") - (c in "]})")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def name_of(base: Config, values: dict[str, str]) -> str:
    """Return a point's folder name, in characters that paths, Slurm and shells leave alone.

    It names the run in squeue and as a label of its metrics, so it says which config it is of.
    """
    parts = [f"{key}={re.sub(r'[^A-Za-z0-9.+-]+', '-', value).strip('-')}" for key, value in values.items()]
    name = "_".join([Path(base.run).name, *parts])
    if len(name) <= MAX_NAME:
        return name
    return f"{name[:MAX_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def folder_of(base: Config) -> Path:
    """Return where the points lie: beside the run that the same config without --sweep would be."""
    return Path(f"{base.run}-sweep")


def compose(file: str, overrides: list[str], axes: dict[str, list[str]], root: Path) -> list[Point]:
    """Return all points with their checked configs; ValueError that names the point whose config is wrong."""
    base = run_directory.absolute(load(file, overrides), root)
    points: list[Point] = []
    for combination in itertools.product(*axes.values()):
        values = dict(zip(axes, combination))
        words = [f"{key}={value}" for key, value in values.items()]
        try:
            config = run_directory.absolute(load(file, [*overrides, *words]), root)
        except ValueError as error:
            raise ValueError(f"--sweep point {' '.join(words)}: {error}") from None
        config = replace(config, run=str(folder_of(base) / name_of(base, values)))
        for other in points:
            same = not differences(to_dict(other.config) | {"run": ""}, to_dict(config) | {"run": ""})
            if same or other.name == config.run.rpartition("/")[2]:
                raise ValueError(f"--sweep: {' '.join(words)} is the same as {other.name}; leave one out")
        points.append(Point(values, config))
    return points


# ---------------------------------------------------------------------------------------------------------------------
# The folder.


def is_sweep(folder: Path) -> bool:
    """Tell whether a folder holds a sweep's points."""
    return (folder / FILE).is_file()


def spread(words: list[str]) -> list[str]:
    """Return the words with the runs of a sweep in place of its folder."""
    return [
        w for word in words for w in ([f"{word}/{n}" for n in recorded(Path(word))] if is_sweep(Path(word)) else [word])
    ]


def recorded(folder: Path) -> dict[str, dict]:
    """Return {point's name: {values, lane}} in the order of submission; ValueError for a version that is not ours."""
    found = read_json(folder / FILE)
    if found.get("version", VERSION) != VERSION:
        raise ValueError(
            f"{shown(folder / FILE)}: is of version {found['version']}, this reads {VERSION}; update evenkeel"
        )
    return found.get("points", {})


def check(points: list[Point], base: Config, root: Path) -> None:
    """Raise ValueError where a point may not start or go on in its folder, before anything is made."""
    folder = folder_of(base)
    old = read_json(folder / FILE).get("base")
    if old and (other := run_directory.sort_out(from_dict(old), base)[1]):
        raise ValueError(
            f"{shown(folder)} holds a sweep of another config; name another folder with run=... Changed:\n"
            + "\n".join(other)
        )
    recorded(folder)
    if folder.is_dir() and not is_sweep(folder) and any(folder.iterdir()):
        raise ValueError(f"{shown(folder)}: this folder holds other things; name a new one, run=runs/...")
    for point in points:
        run_directory.check_new(point.run, root)
        if (point.run / "config.yaml").is_file():
            run_directory.moves(point.config)


def record(points: list[Point], base: Config, lanes: dict[str, int]) -> None:
    """Add points, and the lanes they were put in, to SWEEP/sweep.json."""
    known = recorded(folder_of(base))
    for point in points:
        lane = lanes.get(point.name, known.get(point.name, {}).get("lane", 0))
        known[point.name] = {"values": point.values, "lane": lane}
    text = json.dumps({"version": VERSION, "base": to_dict(base), "points": known}, indent=1)
    write_atomically(folder_of(base) / FILE, text)


def plan(points: list[Point]) -> list[str]:
    """Return lines for --dry-run: the points, and what they need together."""
    lines, hours, disk = [], [], 0
    for point in points:
        config, size = point.config, count(to_dict(point.config)["model"])
        hours.append(forecast.gpu_hours(config, size) if size and config.cluster.gpus_per_node else None)
        disk += forecast.disk_bytes(config, size) if size else 0
        state = "finished" if point.is_done() else "in part" if (point.run / "config.yaml").is_file() else "new"
        lines.append(f"{point.name}: {state}" + (f", {hours[-1]:,.0f} GPU-hours" if hours[-1] is not None else ""))
    free = forecast.free_bytes(points[0].run)
    short = " - NOT ENOUGH" if disk > free else ""
    total = f"{sum(hours):,.0f} GPU-hours" if None not in hours else "GPU-hours not known"
    return [
        *lines,
        f"{len(points)} points: {total}, {forecast.gigabytes(disk)} of disk, {forecast.gigabytes(free)} free{short}",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Starting them.


def run_here(points: list[Point], base: Config, submit: Callable[[Config], int]) -> int:
    """Run the points one after another on this machine; return 0, the first bad status, or that of a stop that was asked for."""
    record(points, base, {})
    worst = endings.FINISHED
    for number, point in enumerate(points, 1):
        print(f"point {number} of {len(points)}: {point.name}", flush=True)
        if point.is_done():
            print(f"{shown(point.run)} is finished", flush=True)
            continue
        status = submit(point.config)
        if status in (endings.INTERRUPTED, endings.START_AGAIN):
            return status
        worst = worst or status
    return worst


def submit_all(points: list[Point], base: Config, parallel: int, after: str, root: Path) -> list[str]:
    """Submit what is neither finished nor active to Slurm, `parallel` at once; return a line per point."""
    slurm.check_here()
    lines, lanes = [], _Lanes(folder_of(base), parallel)
    record(points, base, {})
    for point in points:
        if point.is_done():
            lines.append(f"{point.name}: finished")
            continue
        if state := slurm.active_state(point.run):
            lines.append(f"{point.name}: Slurm job {slurm.job_of(point.run)} is {state}")
            continue
        lane, before = lanes.next()
        waits = ",".join(filter(None, (after, before)))
        point.run.mkdir(parents=True, exist_ok=True)
        lock = run_directory.hold(point.run)
        said = run_directory.prepare(point.config, root)[0]
        slurm.submit(point.config, waits)
        os.close(lock)
        job_id = slurm.job_of(point.run)
        lanes.put(lane, job_id)
        record([point], base, {point.name: lane})
        lines.append(f"{point.name}: submitted Slurm job {job_id}{f', {waits}' if waits else ''}; {said}")
    return lines


class _Lanes:
    """Which job the next one of each lane waits for. Lanes of an earlier submission with more of them go on into ours."""

    def __init__(self, folder: Path, parallel: int):
        self.tails: list[list[str]] = [[] for _ in range(parallel)]
        self.lengths = [0] * parallel
        tails: dict[int, str] = {}
        for name, one in recorded(folder).items():
            if slurm.active_state(folder / name):
                job_id, lane = slurm.job_of(folder / name), one["lane"]
                self.lengths[lane % parallel] += 1
                tails[lane] = max(tails.get(lane, ""), job_id, key=lambda text: int(text or 0))
        for lane, job_id in tails.items():
            self.tails[lane % parallel].append(job_id)

    def next(self) -> tuple[int, str]:
        """Return the shortest lane and the dependency on its last job, however that ends: a bad point must not hold up others."""
        lane = min(range(len(self.tails)), key=lambda k: self.lengths[k])
        return lane, f"afterany:{':'.join(self.tails[lane])}" if self.tails[lane] else ""

    def put(self, lane: int, job_id: str) -> None:
        self.tails[lane] = [job_id]
        self.lengths[lane] += 1
