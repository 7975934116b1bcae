"""RUN/targets/: where each rank serves its metrics, for Prometheus' file_sd.

The file's modification time is the rank's heartbeat: touching it makes Prometheus read nothing anew (file_sd ignores changes of
attributes), and it stops with the process, also after SIGKILL. Files whose heart stopped are removed by rank 0 of the run, at its
start and as it goes; those of a run that is gone altogether by `python -m cluster.monitoring.targets`.
"""

import contextlib
import json
import os
import threading
from pathlib import Path

from data_pipeline.durable import write_atomically

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0  # longer than any pause of a live process, and than clocks of nodes may differ


class Target:
    """The announcement of one rank."""

    def __init__(
        self, run: Path, rank: int, endpoint: str, labels: dict[str, str], every_seconds: float = HEARTBEAT_SECONDS
    ):
        self.folder, self.rank, self.every_seconds = run / "targets", rank, every_seconds
        self.path = self.folder / f"rank{rank:05d}.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.content = json.dumps([{"targets": [endpoint], "labels": labels}]).encode()
        write_atomically(self.path, self.content)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while True:
            if self.rank == 0:
                remove_stale(self.folder, self.path)
            if self._ended.wait(self.every_seconds):
                return
            # no disk at present: the next beat tries again, and nothing but the announcement is at stake
            with contextlib.suppress(OSError):
                try:
                    os.utime(self.path)
                except FileNotFoundError:  # this process was suspended, and taken for dead
                    write_atomically(self.path, self.content)

    def withdraw(self) -> None:
        """Remove the announcement."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # it is stale soon
            self.path.unlink(missing_ok=True)


def remove_stale(folder: Path, mine: Path, stale_seconds: float = STALE_SECONDS) -> list[Path]:
    """Remove the announcements in `folder` whose heart stopped, by the clock of the file system: `mine` was touched just now."""
    removed = []
    try:
        now = mine.stat().st_mtime
        for path in folder.glob("rank*.json"):
            if now - path.stat().st_mtime > stale_seconds:
                path.unlink()
                removed.append(path)
    except OSError:  # removed by another meanwhile, or no disk at present; the next beat looks again
        pass
    return removed
