"""The run directory as cluster/ sees it: made once, continued later, followed by one submitter at a time.

RUN/config.yaml is written last, so a folder that has it is complete. A run that is resubmitted keeps its code/ and its config;
what may change is where it runs (`cluster.*`, `metrics.*`, where the data lies), for a run is elastic.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import socket
import sys
from pathlib import Path

from cluster.code_copy import copy_code
from data_pipeline import durable
from trainer.config import Config, differences, dump, load, to_dict
from trainer.groups import Cluster

PLACEMENT = ("cluster.", "metrics.", "data.path", "data.encode_from", "data.stage", "data.cache_", "run")


def absolute(config: Config, root: Path) -> Config:
    """Return the config with `run` and the data's paths made absolute: relative ones start at the checkout's root."""
    data = dataclasses.replace(config.data, path=_absolute(config.data.path, root))
    if (root / data.encode_from).exists() and data.encode_from:
        data.encode_from = _absolute(data.encode_from, root)
    start_from = config.start_from and _absolute(config.start_from, root)
    return dataclasses.replace(config, run=_absolute(config.run, root), start_from=start_from, data=data)


def _absolute(path: str, root: Path) -> str:
    return path if "://" in path else os.path.normpath(root / os.path.expanduser(path))


def heed_umask(cluster: Cluster) -> None:
    """Have this process make its files, from now on, with the permissions that the config asks for."""
    if cluster.umask:
        os.umask(int(cluster.umask, 8))


def prepare(config: Config, root: Path) -> list[str]:
    """Make RUN, or check that it may go on with this config; return lines that say which. ValueError when it may not."""
    run = Path(config.run)
    if not (run / "config.yaml").is_file():
        _make(config, root)
        return [f"starting {shown(run)}"]
    moved = moves(config)
    if moved:
        write_atomically(run / "config.yaml", dump(config))
    if is_finished(run):
        return [f"{shown(run)} is finished at {clock(run)} images"]
    return [f"resuming {shown(run)} at {saved_images(run)} images", *moved]


def moves(config: Config) -> list[str]:
    """Return what this config changes of the run it names, a line per key; ValueError for what a run may not change."""
    run = Path(config.run)
    moved, refused = sort_out(load(run / "config.yaml"), config)
    if refused:
        raise ValueError(
            f"{shown(run)} was started with another config; submit it unchanged ({python()} cluster/submit.py {shown(run)}), "
            "or start another run from it with --fork NAME. Changed:\n" + "\n".join(refused)
        )
    return moved


def sort_out(old: Config, new: Config) -> tuple[list[str], list[str]]:
    """Return the differences of two configs, a line per key: what only says where a run happens, and all else."""
    moved, other = [], []
    for key, before, after in differences(to_dict(old), to_dict(new)):
        (moved if key.startswith(PLACEMENT) else other).append(f"  {key}: {before!r} -> {after!r}")
    return moved, other


def check_new(run: Path, root: Path) -> None:
    """Raise ValueError where a run would be made in a folder that holds other things."""
    ours = r"(code|logs|checkpoints|snapshots|\.)"
    foreign = [p.name for p in run.iterdir() if not re.match(ours, p.name)] if run.is_dir() else []
    if run == root or (foreign and not (run / "config.yaml").is_file()):
        raise ValueError(
            f"run={run}: this folder holds other things ({', '.join(foreign[:3])}); name a new one, run=runs/..."
        )


def _make(config: Config, root: Path) -> None:
    run = Path(config.run)
    (run / "logs").mkdir(parents=True, exist_ok=True)
    copy_code(root, run / "code")
    write_atomically(run / "config.yaml", dump(config))


def fork(config: Config, name: str, root: Path) -> tuple[Config, list[str]]:
    """Start run NAME, beside the config's run, from that run's last checkpoint; return its config and lines that say so."""
    parent = Path(config.run)
    child = Path(_absolute(name, root)) if "/" in name else parent.with_name(name)
    if not (parent / "config.yaml").is_file():
        raise ValueError(
            f"--fork {name}: {shown(parent)} is no run yet, so nothing can start from it; leave --fork out"
        )
    if child.exists():
        raise ValueError(f"--fork {name}: {shown(child)} exists; name a new run")
    checkpoint = last_checkpoint(parent)
    if checkpoint is None:
        raise ValueError(
            f"--fork {name}: {shown(parent)} has no checkpoint yet to start from; start a plain run with run=..."
        )
    config = dataclasses.replace(config, run=str(child))
    try:
        _link_past(parent, checkpoint, child)
        write_atomically(
            child / "logs" / "forked_from.json", json.dumps({"run": str(parent), "images": int(checkpoint.name)})
        )
        _make(config, root)
        # lives go on counting, so that the child's snapshots are not taken for an abandoned life's
        told = read_json(parent / "state.json")
        begun = {"version": 1, "status": "forked", "attempt": told.get("attempt", 1), "parent": parent.name}
        write_atomically(child / "state.json", json.dumps(begun | {"clock": int(checkpoint.name)}))
    except BaseException:
        shutil.rmtree(child, ignore_errors=True)  # half a fork would stand in the way of the next try
        raise
    return config, [f"starting {shown(child)} from {shown(parent)} at {int(checkpoint.name)} images"]


def _link_past(parent: Path, checkpoint: Path, child: Path) -> None:
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            _link(path, child / "checkpoints" / path.relative_to(checkpoint.parent))
    for snapshot in sorted((parent / "snapshots").glob("*.safetensors")):
        written = re.match(r"ema-(\d+)-", snapshot.name)
        if written and int(written.group(1)) <= int(
            checkpoint.name
        ):  # post-hoc reconstruction needs the average's past
            _link(snapshot, child / "snapshots" / snapshot.name)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(
            source, target
        )  # checkpoints and snapshots are never written to again, so both runs may share the bytes
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def python() -> str:
    """Return how a user calls this interpreter from here."""
    name = shown(Path(sys.executable))
    return "python" if name.startswith("/") else name


# ---------------------------------------------------------------------------------------------------------------------
# What the trainer says of itself.


def read_json(path: Path) -> dict:
    """Return a JSON file's object, {} when it is not there or not (yet) whole."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_state(run: Path) -> dict:
    """Return RUN/state.json, {} before the trainer has written one."""
    return read_json(run / "state.json")


def clock(run: Path) -> int:
    """Return images_seen by RUN/state.json."""
    return int(read_state(run).get("clock") or 0)


def is_finished(run: Path) -> bool:
    """Tell whether the trainer has reached the run's duration."""
    return read_state(run).get("status") == "finished"


def last_checkpoint(run: Path) -> Path | None:
    """Return the newest checkpoint folder, which the trainer's pointer names; without one, that of the most images.

    Checkpoints are complete or absent, and named by their images; one of an abandoned life may have more than the newest.
    """
    with contextlib.suppress(OSError):  # a run from before the pointer
        name = (run / "checkpoints" / "latest").read_text().strip()
        if re.fullmatch(r"\d{10,}", name) and (run / "checkpoints" / name / "manifest.json").is_file():
            return run / "checkpoints" / name
    found = [
        p
        for p in (run / "checkpoints").glob("*")
        if re.fullmatch(r"\d{10,}", p.name) and (p / "manifest.json").is_file()
    ]
    return max(found, key=lambda p: int(p.name), default=None)


def saved_images(run: Path) -> int:
    """Return the clock of the newest checkpoint, 0 without one."""
    checkpoint = last_checkpoint(run)
    return int(checkpoint.name) if checkpoint else 0


# ---------------------------------------------------------------------------------------------------------------------
# One submitter at a time.


def hold(run: Path) -> int:
    """Lock the run for this process's life and return the descriptor; ValueError when another submission is active."""
    lock = os.open(run / ".lock", os.O_RDWR | os.O_CREAT, 0o664)
    try:
        durable.lock(lock)
    except BlockingIOError:
        who = os.read(lock, 200).decode().strip() or "another process"
        os.close(lock)
        raise ValueError(
            f"{shown(run)} is being submitted or followed by {who}; stop that first (Ctrl-C there saves)"
        ) from None
    os.ftruncate(lock, 0)
    os.write(lock, f"pid {os.getpid()} on {socket.gethostname()}".encode())
    state = read_state(run)
    alive = state.get("host") == socket.gethostname() and state.get("pid") and runs_training(int(state["pid"]))
    if state.get("status") in ("starting", "running") and alive:
        os.close(lock)
        raise ValueError(
            f"{shown(run)} is active: its trainer runs as pid {state['pid']} here; stop it first (kill {state['pid']} saves)"
        )
    return lock


def follower(run: Path) -> tuple[int, str]:
    """Return pid and host of the submission that holds the run, (0, "") when none does."""
    try:
        with open(run / ".lock", "rb") as lock:
            durable.lock(lock, shared=True)
    except FileNotFoundError:
        return 0, ""
    except BlockingIOError:
        found = re.fullmatch(r"pid (\d+) on (.+)", (run / ".lock").read_text())
        return (int(found.group(1)), found.group(2)) if found else (0, "")
    return 0, ""


def runs_training(pid: int) -> bool:
    """Tell whether a process of this machine is a trainer (a pid alone may have been given to somebody else)."""
    try:
        return b"trainer" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return False
    except OSError:
        return False
    return is_alive(pid)


def is_alive(pid: int) -> bool:
    """Tell whether a process of this machine exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def next_attempt(run: Path) -> int:
    """Return the number of the next attempt: one more than any that left a log."""
    numbers = [int(m.group(1)) for p in (run / "logs").rglob("*") if (m := re.match(r"(\d{4})(_rank|$)", p.name))]
    return max(numbers, default=0) + 1


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that others may be reading, its folder too; see data_pipeline/durable.py."""
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write_atomically(path, text.encode())


def shown(path: Path) -> str:
    """Return a path the way to type it: relative where it lies below the working directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
