"""One part of an encoding that several processes share: what each element of a Slurm job array runs, and whether it goes again.

An encoding may be killed at any time and loses only the shard at hand, so nothing is saved on a signal: the part leaves with 75 and
is started again. `python -m cluster.encode_task --status N` is the batch script's question afterwards, inside a job only.
"""

import argparse
import os
import signal
import subprocess
import sys

from cluster import slurm
from cluster.endings import FINISHED, START_AGAIN, STOPPING, USER_ERROR


def run(command: list[str]) -> None:
    """Run `python -m COMMAND` to its end and exit with its status; with 75 when a signal asked to stop."""
    asked = []
    child = subprocess.Popen([sys.executable, "-m", *command])

    def stop(number, frame) -> None:
        asked.append(number)
        child.terminate()

    for number in STOPPING:  # in place of submitit's handlers
        signal.signal(number, stop)
    status = child.wait()
    sys.exit(START_AGAIN if asked else status if status >= 0 else 128 - status)


def again(status: int, restarts: int, max_restarts: int, state: str) -> bool:
    """Tell whether a part that ended so is to be started again: interrupted ones always, crashed ones a few times."""
    if status in (FINISHED, USER_ERROR) or state != "RUNNING":  # in any other state Slurm is taking it down
        return False
    return status == START_AGAIN or restarts < max_restarts


def main(argv: list[str] | None = None) -> int:
    """Requeue this element where that may help; return the batch script's exit status."""
    parser = argparse.ArgumentParser(prog="python -m cluster.encode_task")
    parser.add_argument("--status", type=int, required=True)
    parser.add_argument("--max-restarts", type=int, required=True)
    a = parser.parse_args(argv)
    job_id, restarts = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    if again(a.status, restarts, a.max_restarts, slurm.describe_job(job_id).get("JobState", "unknown")):
        print(f"ended with status {a.status}; starting again", flush=True)
        subprocess.run(["scontrol", "requeue", job_id], check=False)
    return a.status


if __name__ == "__main__":
    sys.exit(main())
