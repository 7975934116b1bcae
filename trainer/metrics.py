"""Exports a run as it goes: Prometheus endpoints, one per rank, and metrics.jsonl, from trainer/metrics_table.py.

Each rank serves on a free port and announces it in RUN/targets/ (Prometheus file_sd), so that ports never collide. The endpoint's
thread answers while a collective hangs. The JSONL has the clock and the attempt in each line and lasts after the run.
"""

import json
import math
import os
import time
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, start_http_server

from trainer.metrics_table import BY_NAME, TABLE
from trainer.state import write_atomically

disable_created_metrics()  # one more series per counter, that nobody asked for


class Metrics:
    """The values of one rank, published together."""

    def __init__(self, run: Path, rank: int, attempt: int, address: str, port: int):
        self.run, self.rank, self.attempt = run, rank, attempt
        self.registry = CollectorRegistry()
        self._collectors = {m.name: _collector(m, self.registry) for m in TABLE if m.scope == "rank" or rank == 0}
        self._line: dict = {}
        self._server, self._thread = start_http_server(port + rank if port else 0, addr=address, registry=self.registry)
        self._target = run / "targets" / f"rank{rank:05d}.json"
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self.endpoint = f"{address}:{self._server.server_port}"
        labels = {"run": run.name, "rank": str(rank), "attempt": str(attempt)}
        write_atomically(self._target, json.dumps([{"targets": [self.endpoint], "labels": labels}]).encode())
        self._log = open(run / "metrics.jsonl", "a") if rank == 0 else None

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge, or a counter's total; metrics of scope 'run' are dropped on other ranks than 0."""
        collector = self._collectors.get(name)
        if collector is None:
            assert name in BY_NAME, f"{name} is not in trainer/metrics_table.py"
            return
        child = collector.labels(**labels) if labels else collector
        if BY_NAME[name].type == "counter":
            child.inc(max(0.0, value - self._line.get(name, 0.0)))
        else:
            child.set(value)
        if labels:
            self._line.setdefault(name, {})[",".join(f"{k}={v}" for k, v in labels.items())] = value
        else:
            self._line[name] = value

    def publish(self) -> None:
        """Append what is set to metrics.jsonl (rank 0)."""
        if self._log is not None:
            line = {"time": round(time.time(), 3), "attempt": self.attempt, **self._line}
            self._log.write(json.dumps(_without_nan(line), allow_nan=False) + "\n")
            self._log.flush()

    def close(self) -> None:
        """Withdraw the endpoint and its announcement."""
        self._target.unlink(missing_ok=True)
        self._server.shutdown()
        self._server.server_close()
        if self._log is not None:
            os.fsync(self._log.fileno())
            self._log.close()


def _collector(metric, registry):
    if metric.type == "counter":
        return Counter(metric.name.removesuffix("_total"), metric.help, metric.labels, registry=registry)
    return Gauge(metric.name, metric.help, metric.labels, registry=registry)


def _without_nan(value):
    """Return the value with null in place of what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
