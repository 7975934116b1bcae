"""How an attempt at a run ended, and whether that calls for another.

Exit statuses: 0 finished; 2 the user's error, never restart; 75 saved, start again; 130 saved after Ctrl-C, don't restart; 137 and
all else: a crash, worth a restart while the clock advances. Both who restart (cluster/follow.py here, cluster/requeue.py on Slurm)
go by what the tasks (cluster/job.py) wrote of their ends.
"""

import signal
from dataclasses import dataclass
from pathlib import Path

from cluster.run_directory import read_json

FINISHED, USER_ERROR, START_AGAIN, INTERRUPTED, KILLED = 0, 2, 75, 130, 137
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
# Endings that no other rank's end brings about: SIGKILL, SIGSEGV, SIGBUS. Of two ranks that ended together such a one is guilty.
CERTAIN = (KILLED, 139, 135)
TOGETHER_SECONDS = 2.0


def asked_status(number: int) -> int:
    """Return the exit status of a stop that was asked for by this signal."""
    return INTERRUPTED if number == signal.SIGINT else START_AGAIN


def translate(returncode: int, wanted: int) -> int:
    """Turn subprocess' return code into an exit status.

    `wanted` is the signal the job was asked to stop with, 0 for none: a child that died of such a signal was only asked too early.
    """
    if returncode >= 0:
        return returncode
    if wanted and -returncode in STOPPING:
        return asked_status(wanted)
    return 128 - returncode


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: the status that decides, and whose it is."""

    status: int
    rank: int
    stage: str
    log: Path
    asked: bool  # a signal told the job to stop: no fault of its own


def control_folder(run: Path, attempt: int) -> Path:
    """Return where the tasks of an attempt and those who watch it talk to each other."""
    return run / "logs" / "submitit" / f"{attempt:04d}"


def count_idle(idle: int, reached: int, clock: int, outcome: Outcome) -> tuple[int, str]:
    """Return how many attempts in a row have now failed without progress, and a word for the restart."""
    if clock > reached:
        return 0, f"restarting from the last checkpoint, after progress to {clock} images"
    if outcome.asked:  # preempted before it came to a step: not its fault
        return idle, "restarting from the last checkpoint"
    return idle + 1, f"restarting from the last checkpoint, {idle + 1} times without progress"


def read_outcome(control: Path, fallback_logs: list[Path], silent_are_guilty: bool) -> Outcome:
    """Return how the ranks of an ended attempt ended together: by the rank that brought the others down.

    `fallback_logs` hold a task's output before its trainer's log. A task without a record of its end was killed: on its own where
    nobody else kills tasks (`silent_are_guilty`, a local job), for a peer's sake under srun.
    """
    ends = []
    for k, fallback in enumerate(fallback_logs):
        r = read_json(control / f"rank{k}.json")
        silent = r.get("status") is None
        log = Path(r["log"]) if r and Path(r["log"]).is_file() else fallback
        outcome = Outcome(KILLED if silent else r["status"], k, r.get("stage", "start"), log, bool(r.get("asked")))
        victim = r.get("by") == "peer" or (silent and not silent_are_guilty)
        ends.append((victim, 0.0 if silent else r["time"], outcome))
    ends = [e for e in ends if e[2].status != FINISHED] or ends[:1]
    ends = [e for e in ends if not e[0]] or ends
    first = min(time for _, time, _ in ends)
    together = [e for e in ends if e[1] - first < TOGETHER_SECONDS]
    return min(together, key=lambda e: (e[2].status != USER_ERROR, e[2].status not in CERTAIN, e[1]))[2]
