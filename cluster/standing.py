"""How a run stands: a row of the table of `python -m cluster.status`, from what the run, its lock and Slurm say."""

import socket
import time
from pathlib import Path

from cluster import slurm
from cluster.follow import Tail, duration, short
from cluster.run_directory import read_json, read_state, runs_training, saved_images, shown

COLUMNS = ("run", "state", "clock", "images/s", "left", "saved at", "attempt", "seen", "last error", "logs")


def row(run: Path) -> list[str]:
    """Return one run's line of the table, by COLUMNS."""
    state, values = read_state(run), Tail(run / "metrics.jsonl").read()
    status = state.get("status") or "not started"
    if (
        status in ("starting", "running")
        and state.get("host") == socket.gethostname()
        and not runs_training(state.get("pid", 0))
    ):
        status = "gone"  # killed before it could say so
    running = status in ("starting", "running")
    job_state = slurm.active_state(run)
    if job_state and (not running or job_state != "RUNNING"):
        status = job_state  # waiting, or between two lives
    error = str(state.get("last_error") or "").split("\n")[0]
    if not running and status != "finished":
        error = error or read_json(run / "logs" / "verdict.json").get("verdict", "")
    rate, left = values.get("evenkeel_images_per_second"), values.get("evenkeel_eta_seconds")
    clock = short(state.get("clock") or 0) + (f"/{short(state['duration'])}" if state.get("duration") else "")
    return [
        shown(run),
        status,
        clock,
        f"{rate:,.0f}" if running and rate else "",
        duration(left) if running and left is not None else "",
        short(saved_images(run)),
        str(state.get("attempt") or ""),
        f"{duration(max(0.0, time.time() - state['time']))} ago" if state.get("time") else "",
        error,
        shown(run / "logs"),
    ]
