"""Exports a run as it goes: Prometheus endpoints, one per rank, and metrics.jsonl, from trainer/metrics_table.py.

Each rank serves on a free port and announces it in RUN/targets/ (Prometheus file_sd), so that ports never collide. The endpoint's
thread answers while a collective hangs. The JSONL has the clock and the attempt in each line and lasts after the run. What must not
break: nothing is exported that is not in the table.
"""

import contextlib
import errno
import io
import json
import math
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, start_http_server

from trainer.metrics_table import BY_NAME
from trainer.state import tell
from trainer.targets import Target

disable_created_metrics()  # one more series per counter, that nobody asked for


LONGEST_LINE_BYTES = 2**24  # of metrics.jsonl
MOST_UNWRITTEN_LINES = 1000  # kept in memory while the disk takes none: tens of megabytes for the largest networks


class Metrics:
    """The values of one rank, published together."""

    def __init__(self, run: Path, rank: int, attempt: int, address: str, port: int, trackers: Sequence = ()):
        self.run, self.rank, self.attempt, self.trackers = run, rank, attempt, list(trackers)
        self.registry = CollectorRegistry()
        self._collectors: dict = {}  # made when first set: a metric that never was must not be served as 0
        self._line: dict = {}
        self._counted: dict[str, float] = {}  # totals that a checkpoint carries on
        self._carried: dict[str, float] = {}
        self._server, self._thread = _serve(address, port + rank if port else 0, self.registry)
        self.endpoint = f"{address}:{self._server.server_port}"
        labels = {"run": run.name, "rank": str(rank), "attempt": str(attempt)}
        self.target = Target(run, rank, self.endpoint, labels)
        self._log = _open_log(run / "metrics.jsonl") if rank == 0 else None
        self._unwritten: deque[bytes] = deque(maxlen=MOST_UNWRITTEN_LINES)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge, or a counter's total; metrics of scope 'run' are dropped on other ranks than 0."""
        metric = BY_NAME.get(name)
        assert metric is not None, f"{name} is not in trainer/metrics_table.py"
        if metric.scope == "run" and self.rank != 0:
            return
        if name not in self._collectors:
            self._collectors[name] = _collector(metric, self.registry)
        child = self._collectors[name].labels(**labels) if labels else self._collectors[name]
        values = self._line.setdefault(name, {}) if labels else self._line
        key = ",".join(f"{k}={v}" for k, v in labels.items()) if labels else name
        if metric.type == "counter":
            child.inc(max(0.0, value - values.get(key, 0.0)))
        else:
            child.set(value)
        values[key] = value

    def forget(self, name: str, **labels: str) -> None:
        """Stop to show a series that has no value any more, if it had one: an old one would pass for today's."""
        key = ",".join(f"{k}={v}" for k, v in labels.items())
        if self._line.get(name, {}).pop(key, None) is not None:
            self._collectors[name].remove(*(labels[k] for k in BY_NAME[name].labels))

    def count(self, name: str, since_start: float) -> None:
        """Set a counter to what was counted in this start of the run, on top of what earlier starts have counted."""
        self._counted[name] = self._carried.get(name, 0) + since_start
        self.set(name, self._counted[name])

    def state(self) -> dict[str, float]:
        """Return this rank's counted totals, for a checkpoint."""
        return {**self._carried, **self._counted}

    def load_state(self, saved: dict, world: int) -> None:
        """Go on from the totals of a checkpoint, {} for none: on as many ranks each its own, else equal shares of the sums."""
        ranks = saved.get("ranks", [])
        if len(ranks) == world:
            self._carried = dict(ranks[self.rank])
            return
        for name in {name for one in ranks for name in one}:
            total = sum(one.get(name, 0) for one in ranks)
            share = total // world + (self.rank < total % world) if isinstance(total, int) else total / world
            self._carried[name] = share

    def publish(self, clock: int) -> None:
        """Append what is set to metrics.jsonl (rank 0), and hand it to the trackers."""
        if self._log is None:
            return
        line = {"time": round(time.time(), 3), "attempt": self.attempt, **self._line}
        self._unwritten.append(json.dumps(_without_nan(line), allow_nan=False).encode() + b"\n")
        self._write_lines()
        for tracker in self.trackers:
            _try(tracker, tracker.log, clock, _flat(self._line))

    def _write_lines(self) -> None:
        """Write the lines that are not written yet, each whole; what the disk refuses waits for the next time."""
        try:
            while self._unwritten:
                _append(self._log, self._unwritten[0])
                self._unwritten.popleft()
        except OSError as error:  # no reason to stop a training
            if len(self._unwritten) == 1:
                tell(f"warning: {self._log.name} is behind: {error}")

    def close(self) -> None:
        """Withdraw the endpoint and its announcement."""
        self.target.withdraw()
        _stop(self._server)
        if self._log is not None:
            self._write_lines()
            if self._unwritten:
                tell(f"warning: {self._log.name} lacks its last {len(self._unwritten)} lines")
            with contextlib.suppress(
                OSError
            ):  # said above, or of the disk's own making: the run itself is saved by now
                os.fsync(self._log.fileno())
            self._log.close()
        for tracker in self.trackers:
            _try(tracker, tracker.close)


def _try(tracker, what, *args) -> None:
    try:
        what(*args)
    except Exception as error:  # a full disk, or whatever a service elsewhere answers: no reason to stop a training
        tell(f"warning: {type(tracker).__name__} is behind: {error}")


def _serve(address: str, port: int, registry: CollectorRegistry):
    """Serve on a port, or on any free one where that is taken: targets/ tells which, and a training needs none of it."""
    try:
        return start_http_server(port, addr=address, registry=registry)
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) != errno.EADDRINUSE:
            raise ValueError(
                f"metrics.address={address}, port {port}: {error}; use metrics.address=127.0.0.1 (0.0.0.0: reachable from "
                f"elsewhere) and metrics.port=0 (any free one), or a port from 1024 to 65535 less the number of ranks"
            ) from None
        tell(f"warning: metrics.port: {port} is taken; serving on a free one, see targets/")
        return start_http_server(0, addr=address, registry=registry)


def _open_log(path: Path) -> io.FileIO:
    """Open a log of JSON lines to append to; what follows its last newline was cut off by a kill, and goes."""
    file = open(path, "ab+", buffering=0)
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - LONGEST_LINE_BYTES))
    tail = file.read()
    file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)
    return file


def _stop(server) -> None:
    """Close a server at once: asked to end it would look up within half a second, while the nodes of a run wait to be let go."""
    ending = threading.Thread(target=server.shutdown)
    ending.start()
    with contextlib.suppress(OSError):
        socket.create_connection(server.server_address[:2], timeout=1).close()
    ending.join()
    server.server_close()


def _append(file: io.FileIO, line: bytes) -> None:
    """Write a whole line, or leave the file as it was: half of one would spoil the next."""
    size = os.fstat(file.fileno()).st_size
    try:
        rest = memoryview(line)
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        file.truncate(size)
        raise


def _collector(metric, registry):
    if metric.type == "counter":
        return Counter(metric.name.removesuffix("_total"), metric.help, metric.labels, registry=registry)
    return Gauge(metric.name, metric.help, metric.labels, registry=registry)


def _flat(line: dict) -> dict[str, float]:
    """Return one number per series, named as Prometheus would write it."""
    flat = {}
    for name, value in line.items():
        for labels, number in value.items() if isinstance(value, dict) else [("", value)]:
            flat[f"{name}/{labels}" if labels else name] = number
    return flat


def _without_nan(value):
    """Return the value with null in place of what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
