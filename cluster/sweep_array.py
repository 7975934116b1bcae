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


def execute(run: Path, root: Path, commands: list[list[str]], parallel: int) -> None:
    """Run all commands as one Slurm job array, `parallel` at once, to its end; ValueError naming the first that failed."""
    c = load(run / "config.yaml").cluster
    made = submitit.SlurmExecutor(run / "logs" / "sweep")
    made.update_parameters(
        **slurm.parameters(c, root),
        job_name=f"{run.name}-sweep",
        nodes=1,
        ntasks_per_node=1,
        gpus_per_node=min(c.gpus_per_node, 1) or None,
        array_parallelism=parallel,
    )

    def submit() -> list[submitit.Job]:
        with made.batch():
            return [made.submit(run_one, root, command) for command in commands]

    jobs = slurm.submit_quietly(submit)
    array = jobs[0].job_id.partition("_")[0]
    print(f"submitted Slurm job {array}: {len(jobs)} tasks; logs in {run / 'logs' / 'sweep'}", flush=True)
    try:
        for job in jobs:
            _wait(job)
    except KeyboardInterrupt:
        subprocess.run(["scancel", array], check=False)
        raise


def submit_later(run: Path, words: list[str], after: str) -> str:
    """Submit a whole sweep as one job that starts when `after` allows, from RUN/code; return its id."""
    c, code = load(run / "config.yaml").cluster, run / "code"
    made = submitit.SlurmExecutor(run / "logs" / "sweep")
    made.update_parameters(
        **slurm.parameters(c, code, after),
        job_name=f"{run.name}-sweep",
        nodes=1,
        ntasks_per_node=1,
        gpus_per_node=min(c.gpus_per_node, 1) or None,
    )
    return slurm.submit_quietly(lambda: made.submit(run_one, code, ["cluster.sweep", str(run), *words])).job_id


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
