"""Run the children of a sweep: one after another here, or all at once as a Slurm job array (submitit)."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import submitit

from cluster import slurm
from cluster.run_directory import read_json, write_atomically
from trainer.config import load

POLL_SECONDS = 2.0
ROUNDS = 3  # submissions of a task that ends without a word
LOST = "lost"
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
    """Run all commands as one Slurm job array, `parallel` at once, to its end; ValueError naming the first that failed.

    Those that ended without a word are submitted again, up to ROUNDS times in all.
    """
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

    known = run / "logs" / "sweep" / "slurm_job.json"
    for left in reversed(range(ROUNDS)):
        _check_idle(read_json(known).get("job_id", ""))
        jobs = _submit(made, root, commands)
        array = jobs[0].job_id.partition("_")[0]
        write_atomically(known, json.dumps({"job_id": array}))
        print(f"submitted Slurm job {array}: {len(jobs)} tasks; logs in {run / 'logs' / 'sweep'}", flush=True)
        try:
            ends = [_wait(job) for job in jobs]  # all of them: what is left running would be measured twice
        except BaseException:
            subprocess.run(["scancel", array], check=False)
            raise
        commands = [command for command, end in zip(commands, ends) if end == LOST]
        bad = [end for end in ends if end not in ("", LOST)]
        if bad or (commands and not left):
            raise ValueError(
                bad[0]
                if bad
                else f"Slurm job {array} ended without a result {ROUNDS} times; see {jobs[0].paths.stderr}"
            )
        if not commands:
            return


def _check_idle(array: str) -> None:
    """Return when an array of an earlier sweep is over; ValueError where it goes on, its command having been killed."""
    until = time.monotonic() + GRACE_SECONDS  # results are there a moment before Slurm calls a job ended
    while active := [state for state in (slurm.states_of(array) if array else []) if state not in slurm.OVER]:
        if time.monotonic() > until:
            raise ValueError(f"Slurm job {array} of an earlier sweep is {active[0]}; let it end, or: scancel {array}")
        time.sleep(POLL_SECONDS)


def _submit(made: submitit.SlurmExecutor, root: Path, commands: list[list[str]]) -> list[submitit.Job]:
    def submit() -> list[submitit.Job]:
        with made.batch():
            return [made.submit(run_one, root, command) for command in commands]

    return slurm.submit_quietly(submit)


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


def _wait(job: submitit.Job) -> str:
    """Return how a job ended when it has: '' well, LOST without a word (killed, or its node gone), or what it said."""
    over_since = None
    while not job.paths.result_pickle.exists():
        if slurm.state_of(job.job_id) in slurm.OVER:
            over_since = over_since or time.monotonic()
            if time.monotonic() - over_since > GRACE_SECONDS:
                return LOST
        time.sleep(POLL_SECONDS)
    error = job.exception()
    if error is None:
        return ""
    said = re.findall(r"^\w*Error: (.*)$", str(error), re.MULTILINE) or ["failed"]
    return f"{said[-1]} (Slurm job {job.job_id}; see {job.paths.stderr})"
