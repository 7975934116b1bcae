"""Run the children of a sweep: one after another here, or all at once as a Slurm job array (submitit)."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import submitit

from cluster import slurm
from trainer.config import load

POLL_SECONDS = 2.0
GRACE_SECONDS = 30.0  # a shared file system may show a result later than Slurm shows the end of its job


def run_one(root: Path, command: list[str]) -> None:
    """Run `python -m COMMAND` in the checkout, its progress passed on; ValueError with the child's own reason where it fails."""
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    last = ""
    try:
        for line in child.stdout:
            last = line.strip() or last
            if not line.startswith("error: "):
                print(line, end="", file=sys.stderr, flush=True)
        status = child.wait()
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
    if status:
        raise ValueError(last.removeprefix("error: ") or f"{command[0]} ended with status {status}")


def execute(run: Path, root: Path, commands: list[list[str]]) -> None:
    """Run all commands as one Slurm job array and return when it is over; ValueError naming the first that failed."""
    config = load(run / "config.yaml")
    c = config.cluster
    made = submitit.SlurmExecutor(run / "logs" / "sweep")
    made.update_parameters(
        job_name=f"{run.name}-sweep",
        nodes=1,
        ntasks_per_node=1,
        cpus_per_task=c.cpus_per_rank,
        gpus_per_node=min(c.gpus_per_node, 1) or None,
        time=c.time_minutes or None,
        partition=c.partition or None,
        account=c.account or None,
        qos=c.qos or None,
        constraint=c.constraint or None,
        array_parallelism=len(commands),
        setup=[f"cd {root} || exit 1", f"export PYTHONPATH={root}", *c.setup],
        srun_args=[f"--cpus-per-task={c.cpus_per_rank}"],
        additional_parameters=dict(c.slurm_parameters),
    )
    with made.batch():
        jobs = [made.submit(run_one, root, command) for command in commands]
    print(
        f"submitted Slurm job {jobs[0].job_id.partition('_')[0]}: {len(jobs)} tasks; logs in {run / 'logs' / 'sweep'}",
        flush=True,
    )
    try:
        for job in jobs:
            _wait(job)
    except KeyboardInterrupt:
        subprocess.run(["scancel", jobs[0].job_id.partition("_")[0]], check=False)
        raise


def _wait(job: submitit.Job) -> None:
    """Return when a job's result is there; a failed one's reason is raised as ValueError."""
    over_since = None
    while not job.paths.result_pickle.exists():
        if slurm.state_of(job.job_id) in slurm.OVER:
            over_since = over_since or time.monotonic()
            if time.monotonic() - over_since > GRACE_SECONDS:
                raise ValueError(f"Slurm job {job.job_id} ended without a result; see {job.paths.stderr}")
        time.sleep(POLL_SECONDS)
    error = job.exception()
    if error is not None:
        said = re.findall(r"^\w*Error: (.*)$", str(error), re.MULTILINE) or ["failed"]
        raise ValueError(f"{said[-1]} (Slurm job {job.job_id}; see {job.paths.stderr})")
