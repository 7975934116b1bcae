"""What the batch script asks when all ranks have ended: again, or is that all? (`python -m cluster.requeue`, inside a job only)

The restart policy of cluster/follow.py with Slurm as the one who restarts. A job that Slurm is already taking down (scancel,
preemption) is left to Slurm: only one that is still RUNNING in its eyes is requeued by us.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from cluster import endings, preflight, slurm
from cluster.run_directory import clock, read_json, write_atomically
from trainer.config import load


def main(argv: list[str] | None = None) -> int:
    """Decide by the ranks' records, requeue if need be, and return the batch script's exit status."""
    parser = argparse.ArgumentParser(prog="python -m cluster.requeue")
    parser.add_argument("run", type=Path)
    parser.add_argument("--attempt", type=int, required=True, help="the job's first attempt")
    parser.add_argument("--status", type=int, required=True, help="srun's exit status")
    a = parser.parse_args(argv)
    if a.status == endings.FINISHED:
        return endings.FINISHED
    job_id, restarts = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    config = load(a.run / "config.yaml")
    world = config.cluster.nodes * config.cluster.ranks_per_node
    logs = a.run / "logs" / "submitit" / "slurm"
    control = endings.control_folder(a.run, a.attempt + restarts)
    outcome = endings.read_outcome(
        control, [logs / f"{job_id}_{k}_log.out" for k in range(world)], silent_are_guilty=False
    )
    again, verdict = decide(a.run, outcome, job_id, config.cluster.max_restarts)
    bad = _bad_nodes(control, world) if outcome.stage == "preflight" else {}
    named = "".join(f"node {node} is left out: {reason}; " for node, reason in bad.items())
    verdict = (
        f"attempt {a.attempt + restarts}: rank {outcome.rank} ended with status {outcome.status}; {named}{verdict}"
    )
    print(f"requeue: {verdict}; log: {outcome.log}", flush=True)
    _record(a.run / "logs" / "verdict.json", {"verdict": verdict, "log": str(outcome.log), "again": again})
    if again:
        done = subprocess.run(["scontrol", "requeue", job_id], capture_output=True, text=True)
        if done.returncode != 0:
            print(f"requeue: Slurm refused: {done.stderr.strip()}", flush=True)
        elif bad:
            exclude(a.run, job_id, bad, config.cluster.exclude)
    return outcome.status or a.status


def _record(path: Path, content: dict) -> bool:
    """Write JSON; say, and tell, where a full disk refuses it: a job that was preempted starts again all the same."""
    try:
        write_atomically(path, json.dumps(content))
    except OSError as error:
        print(f"requeue: {path} not written: {error}", flush=True)
        return False
    return True


def _bad_nodes(control: Path, world: int) -> dict[str, str]:
    hosts = [read_json(control / f"rank{k}.json").get("host", "") for k in range(world)]
    return {node: reason for node, reason in preflight.bad_nodes(control, hosts).items() if node}


def exclude(run: Path, job_id: str, bad: dict[str, str], configured: str) -> None:
    """Leave nodes out of the job, which is pending by now (Slurm takes it only then), and record them in logs/excluded.json."""
    path = run / "logs" / "excluded.json"
    recorded = {**read_json(path), **bad}
    _record(path, recorded)
    nodes = ",".join([*([configured] if configured else []), *recorded])
    done = subprocess.run(
        ["scontrol", "update", f"jobid={job_id}", f"ExcNodeList={nodes}"], capture_output=True, text=True
    )
    if done.returncode != 0:
        print(f"requeue: Slurm did not leave {nodes} out: {done.stderr.strip()}", flush=True)


def decide(run: Path, outcome: endings.Outcome, job_id: str, max_restarts: int) -> tuple[bool, str]:
    """Return whether to start again, and why (not)."""
    if read_json(run / "logs" / "cancelled.json").get("job_id") == job_id:
        return False, "stopped because cluster.cancel asked for it"
    if outcome.status in (endings.USER_ERROR, endings.INTERRUPTED) or outcome.stage == "finish":
        return False, "a restart would not help"
    state = slurm.describe_job(job_id).get("JobState", "unknown")
    if state != "RUNNING":
        return False, f"left to Slurm, where the job is {state}"
    before = read_json(run / "logs" / "progress.json")
    idle, verdict = endings.count_idle(before.get("idle", 0), before.get("clock", -1), clock(run), outcome)
    reached = {"clock": max(clock(run), before.get("clock", -1)), "idle": idle}
    if not _record(run / "logs" / "progress.json", reached) and not outcome.asked:
        return False, "how often it failed without progress cannot be counted (see above)"
    if idle > max_restarts:
        return (
            False,
            f"{idle} attempts in a row without progress beyond {clock(run)} images, more than cluster.max_restarts={max_restarts}",
        )
    return True, verdict


if __name__ == "__main__":
    sys.exit(main())
