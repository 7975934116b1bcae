"""A checkout with the true cluster/ and config, and a stand-in trainer that behaves as told: what tests of cluster/ submit.

Everything else is real: submit.py as a process, submitit, the tasks, signals. The stand-in keeps the two words that trainer and
cluster share (exit status, state.json) and is told what to do by the variable BEHAVE, a JSON object. What a test does to a living
run it does while that holds ("hold"): a run that goes on might have ended first.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_SECONDS = 180.0  # for what takes a second on an idle machine: a busy one is no failure

CONFIG = """\
run: runs/small
duration_images: 400
global_batch: 20
micro_batch: 10
model: {resolution: 8, channels: 1, label_dim: 10}
data: {path: data/small, codec: pixels}
cluster: {kind: local, ranks_per_node: 2}
"""

TRAINER = """
import json, math, os, signal, sys, time
from pathlib import Path

behave = json.loads(os.environ.get("BEHAVE", "{}"))
time.sleep(behave.get("deaf_seconds", 0))
asked = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda n, f: asked.append(n))
from trainer.config import load

config = load(sys.argv[1])
run, rank = Path(config.run), int(os.environ["RANK"])
print("rank", rank, "of", os.environ["WORLD_SIZE"], "at", os.environ["MASTER_ADDR"], __file__, flush=True)
saved = sorted((run / "checkpoints").glob("[0-9]*"))
clock = int(saved[-1].name) if saved else 0
lives = run / f".lives{rank}"
life = len(lives.read_text()) + 1 if lives.exists() else 1
lives.write_text("x" * life)


def tell(status):
    if rank == 0:
        state = {"status": status, "clock": clock, "attempt": life, "pid": os.getpid(), "host": os.uname().nodename}
        beside = run / ".state"
        beside.write_text(json.dumps(state))
        beside.replace(run / "state.json")


def save():
    time.sleep(behave.get("save_seconds", 0))
    if rank == 0:
        (run / "checkpoints" / f"{clock:010d}").mkdir(parents=True, exist_ok=True)
        (run / "checkpoints" / f"{clock:010d}" / "manifest.json").touch()


tell("running")
while clock < config.duration_images:
    time.sleep(behave.get("step_seconds", 0.05))
    clock += config.global_batch
    holds = life == 1 and clock >= behave.get("hold", math.inf)
    if holds:  # told when all ranks do: one that is still starting would begin its first life in the next attempt
        (run / f".held{rank}").touch()
        marks = [run / f".held{k}" for k in range(int(os.environ["WORLD_SIZE"]))]
        while rank == 0 and not asked and not all(mark.exists() for mark in marks):
            time.sleep(0.02)
    tell("running")
    if rank == 0:
        with open(run / "metrics.jsonl", "a") as f:
            f.write(json.dumps({"evenkeel_images_seen": clock, "evenkeel_images_per_second": 400.0, "evenkeel_loss": 0.5}) + "\\n")
    while holds and not asked and not (run / ".release").exists():
        time.sleep(0.02)
    for wrong in behave.get("wrongs", []):
        if life in wrong["lives"] and clock == wrong["clock"] and rank in wrong.get("ranks", [0, 1]):
            if wrong.get("save"):
                save()
            print("something went wrong in rank", rank, flush=True)
            if wrong["status"] is None:
                time.sleep(600)
            if wrong["status"] < 0:
                os.kill(os.getpid(), -wrong["status"])
            sys.exit(wrong["status"])
    if asked:
        save()
        tell("stopped")
        sys.exit(130 if signal.SIGINT in asked else 75)
save()
tell("finished")
"""

POSTHOC = """
import pathlib, sys
p = pathlib.Path(sys.argv[-1]); p.parent.mkdir(parents=True); p.write_text(" ".join(sys.argv[1:]))
"""
ENCODE = """
import json, os, pathlib, sys, time
time.sleep(60 if sys.argv[1] == "slow" else 0.2)
if sys.argv[1] == "wrong":
    print("error: no such source"); sys.exit(2)
import numpy as np
from data_pipeline import adopt, wds
p = pathlib.Path(sys.argv[2]); p.mkdir(parents=True); (p / "source.json").write_text(json.dumps(sys.argv[1:]))
wds.write_shard(p / "shard-000000.tar", [(f"{k:08d}", np.zeros((1, 8, 8), np.uint8), k) for k in range(10)])
adopt.adopt(p, "pixels", progress=lambda text: None)
"""


def make(folder: Path) -> Path:
    """Write the checkout into `folder` and return it."""
    root = folder / "checkout"
    for room in ("cluster", "trainer", "data_pipeline"):
        shutil.copytree(ROOT / room, root / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in {
        "trainer/train.py": TRAINER,
        "trainer/posthoc.py": POSTHOC,
        "trainer/generate.py": POSTHOC,
        "data_pipeline/encode.py": ENCODE,
        "configs/small.yaml": CONFIG,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def environment(behave: dict | None = None) -> dict:
    """Return this process' environment with the stand-in told how to behave."""
    return {**os.environ, "BEHAVE": json.dumps(behave or {})}


def start(
    root: Path, *words: str, behave: dict | None = None, config: str = "configs/small.yaml", **how
) -> subprocess.Popen:
    """Start submit.py in the checkout, in a session of its own like a terminal's."""
    command = [sys.executable, "cluster/submit.py", config, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **how}
    return subprocess.Popen(command, cwd=root, env=environment(behave), text=True, start_new_session=True, **pipes)


def submit(
    root: Path, *words: str, behave: dict | None = None, config: str = "configs/small.yaml"
) -> tuple[int, str, str]:
    """Run submit.py to its end; return its exit status, output and errors."""
    process = start(root, *words, behave={"step_seconds": 0.01, **(behave or {})}, config=config)
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, out, err


def held(root: Path, *words: str, behave: dict | None = None, clock: int = 60) -> subprocess.Popen:
    """Start submit.py, and return when the run's first life holds at this clock: until it is asked to stop, or released."""
    process = start(root, *words, behave={"step_seconds": 0.01, "hold": clock, **(behave or {})})
    wait_for(lambda: process.poll() is not None or state(root / "runs/small").get("clock", 0) >= clock)
    assert process.poll() is None, process.communicate()
    return process


def release(run: Path) -> None:
    """Let a run that holds go on."""
    (run / ".release").touch()


def wait_for(condition, seconds: float = PATIENCE_SECONDS):
    """Return the first true value of `condition()`; fail when there is none in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"nothing came of {condition} within {seconds} s")


def state(run: Path) -> dict:
    """Return the run's state.json, {} before there is one."""
    try:
        return json.loads((run / "state.json").read_text())
    except FileNotFoundError:
        return {}


def processes_of(root: Path) -> list[str]:
    """Return the command lines of all living processes that work in or for the checkout."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            where = os.readlink(path / "cwd")
        except OSError:
            continue
        if words and int(path.name) != os.getpid() and (str(root) in words or where.startswith(str(root))):
            found.append(f"{path.name}: {words}")
    return found


def check_nothing_left(root: Path) -> None:
    """Fail where processes of the checkout outlive what was run in it, and end them; one that was killed is gone in an instant."""
    end = time.monotonic() + 10
    while (left := processes_of(root)) and time.monotonic() < end:
        time.sleep(0.05)
    for line in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(line.split(":")[0]), signal.SIGKILL)
    assert not left, "processes left behind"


def interrupt(process: subprocess.Popen, number: int = signal.SIGINT) -> None:
    """Send a signal to the whole foreground process group, as a terminal does."""
    os.killpg(process.pid, number)
