"""Follow a local run in the foreground: progress, Ctrl-C, restarts, and what to do with the result.

Fed by the run's own files (metrics.jsonl, state.json), so it shows what any other reader could see. After Ctrl-C the run saves and
leaves; a second one kills. Restarts follow the same policy as on Slurm: as long as the clock advances.
"""

import contextlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from cluster import endings, job, picture
from cluster.endings import Outcome
from cluster.local import Attempt
from cluster.run_directory import clock, is_finished, python, read_json, shown
from trainer.config import Config, format_size

LOOK_SECONDS = 0.2
LINE_SECONDS = 5.0  # between plain lines where stdout is no terminal
TAIL_LINES = 15
NEWEST_BYTES = 2**20  # of metrics.jsonl, where it was cut back: more than a line of the largest network
FROM_OUTSIDE = (signal.SIGTERM, signal.SIGHUP)
STAGES = {"encode": "encoding", "preflight": "preflight", "train": "training", "finish": "drawing"}


class Tail:
    """The newest values of a growing JSONL file, read piece by piece; a half-written last line waits for its rest."""

    def __init__(self, path: Path):
        self.path, self.values = path, {}
        self._offset, self._rest = 0, b""

    def skip(self) -> None:
        """Pass over what is there: of a long run hundreds of megabytes."""
        with contextlib.suppress(FileNotFoundError):
            self._offset = self.path.stat().st_size

    def read(self) -> dict:
        """Return the last whole line's object, merged over those before it."""
        try:
            with open(self.path, "rb") as f:
                size = f.seek(0, 2)
                if size < self._offset:  # cut back by a resumed trainer: the newest lines say all
                    self._offset, self._rest = max(0, size - NEWEST_BYTES), b""
                f.seek(self._offset)
                new = f.read()
        except FileNotFoundError:
            return self.values
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            try:
                found = json.loads(line)
            except ValueError:
                continue  # a line torn by a crash; the trainer writes on after it
            if isinstance(found, dict):
                self.values.update(found)
        return self.values


class Display:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, config: Config):
        self.run, self.total = Path(config.run), config.duration_images
        self.tail = Tail(self.run / "metrics.jsonl")
        self.tail.skip()  # lines of earlier attempts are no news
        self.console = Console(highlight=False, soft_wrap=True)
        self.bar = None
        if self.console.is_terminal:
            columns = [
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}% {task.fields[text]}"),
            ]
            self.bar = Progress(*columns, console=self.console, refresh_per_second=5)
            self.task = self.bar.add_task("starting", total=self.total, text="")
            self.bar.start()
        self._line_at, self._line = 0.0, ""

    def say(self, text: str) -> None:
        """Print a line (above the bar)."""
        self.console.print(text, markup=False)

    def show(self, stage: str) -> None:
        """Show how far the run is."""
        values = self.tail.read()
        images = max(int(values.get("evenkeel_images_seen") or 0), clock(self.run))
        text = describe(images, self.total, values)
        if self.bar:
            self.bar.update(self.task, completed=min(images, self.total), description=stage, text=text)
        elif (line := f"{stage}: {text}") != self._line and time.monotonic() - self._line_at >= LINE_SECONDS:
            self._line_at, self._line = time.monotonic(), line
            self.say(line)

    def close(self) -> None:
        """Take the bar down."""
        if self.bar:
            self.bar.stop()
            self.bar = None


def describe(images: int, total: int, values: dict) -> str:
    """Return one line of numbers: images, speed, loss, time left."""
    parts = [f"{short(images)}/{short(total)} images"]
    for key, form in (
        ("evenkeel_images_per_second", lambda v: f"{v:,.0f} images/s"),
        ("evenkeel_loss", lambda v: f"loss {v:.4f}"),
        ("evenkeel_eta_seconds", lambda v: f"{duration(v)} left"),
    ):
        value = values.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            parts.append(form(value))
    return ", ".join(parts)


def short(images: int) -> str:
    """Return a count of images in few characters: 160Ki, 2.1Gi, 731."""
    for suffix, unit in (("Gi", 2**30), ("Mi", 2**20), ("Ki", 2**10)):
        if images >= unit:
            return format_size(images) if images % unit == 0 else f"{images / unit:.1f}{suffix}"
    return str(images)


def duration(seconds: float) -> str:
    """Return a time span as 45s, 3m05s or 7h12m."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    return f"{s // 60}m{s % 60:02d}s" if s < 3600 else f"{s // 3600}h{s % 3600 // 60:02d}m"


class Follower:
    """Attempts at a run, one after the other, until it is finished, stopped, or no longer worth a restart."""

    def __init__(self, config: Config):
        self.config, self.run = config, Path(config.run)
        self.asked: list[int] = []  # signals that came to us
        self.passed_on = 0
        self.attempt: Attempt | None = None

    def follow(self, first_attempt: int) -> int:
        """Run to the end and return the exit status: the trainer's own."""
        before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, *FROM_OUTSIDE)}
        self.display = Display(self.config)
        number, idle, reached = first_attempt, 0, clock(self.run)
        try:
            while True:
                outcome = self.one_attempt(number)
                status = self.judge(outcome)
                if status is not None:
                    break
                idle, verdict = endings.count_idle(idle, reached, clock(self.run), outcome)
                reached = max(reached, clock(self.run))
                if idle > self.config.cluster.max_restarts:
                    self.display.say(f"giving up after {idle} attempts without progress beyond {reached} images")
                    status = outcome.status
                    break
                number += 1
                self.display.say(f"attempt {number - 1} ended with status {outcome.status}; {verdict}")
        finally:
            self.display.close()
        self.report(outcome, status)
        for number, handler in before.items():  # a sweep goes on with its next point
            signal.signal(number, handler)
        return status

    def note(self, number: int, frame) -> None:
        """Remember a signal that came to us."""
        self.asked.append(number)
        if number == signal.SIGHUP:  # the terminal is gone, and writing to it would be an error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)

    def one_attempt(self, number: int) -> Outcome:
        """Start the job, follow it until nothing of it runs, and return how it ended."""
        self.passed_on = 0
        self.attempt = attempt = Attempt(self.config, number)
        while attempt.running():
            self.pass_on()
            self.display.show(self.stage())
            time.sleep(LOOK_SECONDS)
        outcome = attempt.outcome()
        if outcome.status not in (endings.FINISHED, endings.START_AGAIN, endings.INTERRUPTED):
            attempt.kill()  # what a crashed trainer may have left, loader processes for instance
        self.display.show("finished" if outcome.status == endings.FINISHED else "stopped")
        return outcome

    def stage(self) -> str:
        """Return a word for what rank 0 does at present."""
        if self.asked:
            return "saving"
        zero = read_json(self.attempt.folder / "rank0.json")
        return STAGES.get(zero.get("stage"), "starting")

    def pass_on(self) -> None:
        """Hand signals that came to us on to the job: the first asks it to save, a second Ctrl-C ends it."""
        asked = list(self.asked)  # another signal may come while we talk about this one
        if len(asked) == self.passed_on:
            return
        if asked.count(signal.SIGINT) >= 2:
            self.display.say("killed; the last checkpoint is intact")
            self.attempt.kill()
        elif not self.passed_on:
            first = signal.Signals(asked[0])
            again = " (Ctrl-C again kills it)" if first == signal.SIGINT else ""
            self.display.say(f"stopping: saving a checkpoint ...{again}")
            self.attempt.stop(signal.SIGINT if first == signal.SIGINT else signal.SIGTERM)
        self.passed_on = len(asked)

    def judge(self, outcome: Outcome) -> int | None:
        """Return the final exit status, or None for a restart."""
        if outcome.status == endings.FINISHED:
            return endings.FINISHED
        if self.asked.count(signal.SIGINT) >= 2:
            return endings.INTERRUPTED
        if self.asked or outcome.status in (endings.USER_ERROR, endings.INTERRUPTED) or outcome.stage == "finish":
            return outcome.status
        return None

    def report(self, outcome: Outcome, status: int) -> None:
        """Say how it ended and what to do next."""
        if status == endings.FINISHED:
            _, grid = job.finish_files(self.config)
            if sys.stdout.isatty() and grid.is_file():
                picture.show(grid)
            print("\n".join(summary(self.config)))
        elif status == endings.INTERRUPTED or (status == endings.START_AGAIN and self.asked):
            print(f"stopped at {clock(self.run)} images; go on with: {python()} cluster/submit.py {shown(self.run)}")
        else:
            print(
                f"failed: rank {outcome.rank} ended with status {outcome.status} while {STAGES.get(outcome.stage, 'starting')}"
            )
            for line in last_lines(outcome.log, TAIL_LINES):
                print(f"  | {line}")
            print(f"log: {shown(outcome.log)}")
        sys.stdout.flush()


def last_lines(path: Path, count: int) -> list[str]:
    """Return a log's last lines, [] where there is none."""
    try:
        with open(path, "rb") as f:
            f.seek(max(0, f.seek(0, 2) - 20_000))
            return f.read().decode(errors="replace").splitlines()[-count:]
    except FileNotFoundError:
        return []


def summary(config: Config) -> list[str]:
    """Return where a finished run's results lie and three commands to try next."""
    run = Path(config.run)
    snapshot, grid = job.finish_files(config)
    name = shown(run)
    lines = [f"{name} is finished at {clock(run)} images" if is_finished(run) else f"{name} has ended"]
    found = sorted((run / "snapshots").glob("*.safetensors"))
    for label, path, there in (
        ("picture", shown(grid), grid.is_file()),
        ("snapshots", f"{shown(run / 'snapshots')} ({len(found)} files)", bool(found)),
        ("reconstruction", shown(snapshot), snapshot.is_file()),
        ("metrics", shown(run / "metrics.jsonl"), (run / "metrics.jsonl").is_file()),
        ("logs", shown(run / "logs"), True),
    ):
        if there:
            lines.append(f"  {label + ':':<16}{path}")
    sample = shown(snapshot) if snapshot.is_file() else shown(found[-1]) if found else f"{name}/snapshots/FILE"
    call = python()
    metric = "digits" if config.data.encode_from == "sklearn:digits" else "fid"
    lines += [
        "try next:",
        f"  {call} -m trainer.posthoc {name} --sigma-rel 0.08 --out {name}/posthoc/sigma_rel_0.08.safetensors",
        f"  {call} -m trainer.generate {sample} --classes all --per-class 16 --out {name}/samples/more.png",
        f"  {call} -m trainer.evaluate {sample} --metric {metric}",
    ]
    return lines
