"""Progress of the data commands: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time

_EVERY_SECONDS = 5.0


class Progress:
    """Count up to a total on stderr; say nothing where it takes no time."""

    def __init__(self, verb: str, total: int, unit: str):
        self.verb, self.total, self.unit = verb, total, unit
        self.done, self.bar, self.task = 0, None, None
        self.start = self.said = time.monotonic()

    def __enter__(self):
        if sys.stderr.isatty() and self.total:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn(self.verb),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(self.unit),
                TimeRemainingColumn(),
            )
            self.bar = Bar(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task(self.verb, total=self.total)
            self.bar.start()
        return self

    def __exit__(self, *_):
        if self.bar:
            self.bar.stop()

    def advance(self, count: int = 1):
        """Note that `count` more are done."""
        self.done += count
        now = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=self.done)
        elif now - self.said > _EVERY_SECONDS:
            self.said = now
            left = (now - self.start) / self.done * (self.total - self.done)
            print(f"{self.verb}: {self.done}/{self.total} {self.unit}, {left:.0f} s left", file=sys.stderr, flush=True)
