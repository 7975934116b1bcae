"""Run a job on Slurm: the batch script through submitit's executor, and what Slurm says of a job.

srun starts one task per rank (cluster/job.py) and kills the others when one ends badly; afterwards the batch script itself asks
cluster/requeue.py whether to go again. Without accounting `sacct` knows nothing, so states come from squeue and scontrol.
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError

from cluster import job
from cluster.run_directory import next_attempt, python, read_json, shown, write_atomically
from trainer.config import Config

OVER = ("", "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")


class Executor(submitit.SlurmExecutor):
    """submitit's Slurm executor that can also write its script where there is no Slurm, for --dry-run."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def executor(config: Config, attempt: int) -> Executor:
    """Return the executor for this config; ValueError for a Slurm parameter that submitit does not take."""
    c, run = config.cluster, Path(config.run)
    made = Executor(run / "logs" / "submitit" / "slurm")
    code, python = shlex.quote(str(run / "code")), shlex.quote(sys.executable)
    again = f"{python} -m cluster.requeue {shlex.quote(str(run))} --attempt {attempt} --status $status"
    made.update_parameters(
        job_name=run.name,
        nodes=c.nodes,
        ntasks_per_node=c.ranks_per_node,
        cpus_per_task=c.cpus_per_rank,
        gpus_per_node=c.gpus_per_node or None,
        mem=f"{c.memory_gb}GB" if c.memory_gb else None,
        time=c.time_minutes or None,
        signal_delay_s=c.signal_seconds,
        partition=c.partition or None,
        account=c.account or None,
        qos=c.qos or None,
        constraint=c.constraint or None,
        exclude=c.exclude or None,
        mail_user=c.mail_user or None,
        mail_type="BEGIN,END,FAIL,REQUEUE" if c.mail_user else None,
        wckey=None,
        stderr_to_stdout=True,
        additional_parameters={
            "requeue": True,
            **({"reservation": c.reservation} if c.reservation else {}),
            **({"dependency": c.dependency} if c.dependency else {}),
            **c.slurm_parameters,
        },
        setup=[
            f"cd {code} || exit 1",
            f"export PYTHONPATH={code}",
            *([f"umask {c.umask}"] if c.umask else []),
            *c.setup,
        ],
        # since 22.05 srun does not inherit the batch job's --cpus-per-task
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={c.cpus_per_rank}", *c.srun_arguments],
        # asking for a requeue brings a SIGTERM upon whoever asks, which must not come before Slurm has heard all of it
        teardown=["status=$?", "trap '' TERM", again, "exit $?"],
    )
    return made


def script(config: Config) -> str:
    """Return the batch script."""
    made = executor(config, 1)
    return made._make_submission_file_text(made._submitit_command_str, "")


def submit(config: Config) -> list[str]:
    """Submit the run and return lines that say how to follow it; ValueError with sbatch's reason when it is refused."""
    run = Path(config.run)
    if shutil.which("sbatch") is None:
        raise ValueError(
            "cluster.kind=slurm: no sbatch on this machine; log in to the cluster, or use cluster.kind=local"
        )
    for name in [n for n in os.environ if n.startswith("SLURM_") and n != "SLURM_CONF"]:
        del os.environ[name]  # a job submitted from inside another one must not inherit its shape
    attempt = next_attempt(run)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what sbatch said and raises it as well
            submitted = executor(config, attempt).submit(job.run, {"run": str(run), "attempt": attempt})
    except FailedJobError as error:
        said = [line for line in str(error).splitlines() if "error:" in line] or str(error).splitlines()
        reason = " ".join(line.partition("error:")[2].strip() or line for line in said[-2:])
        raise ValueError(
            f"sbatch refused the job: {reason}; see cluster.* in {shown(run / 'config.yaml')}, and sinfo"
        ) from None
    write_atomically(run / "logs" / "slurm_job.json", json.dumps({"job_id": submitted.job_id, "attempt": attempt}))
    c = config.cluster
    return [
        f"submitted Slurm job {submitted.job_id}: {c.nodes} nodes x {c.ranks_per_node} ranks",
        f"  logs:    {shown(run / 'logs')}/{attempt:04d}_rank*.log (from when it starts; a restart opens the next number)",
        f"  batch:   {shown(submitted.paths.stdout)}",
        f"  follow:  {python()} -m cluster.status {shown(run)}",
        f"  stop:    {python()} -m cluster.cancel {shown(run)} (saves first)",
    ]


def job_of(run: Path) -> str:
    """Return the id of the Slurm job last submitted for a run, '' if there is none."""
    return read_json(run / "logs" / "slurm_job.json").get("job_id", "")


def state_of(job_id: str) -> str:
    """Return a job's state in Slurm's words, '' when Slurm no longer knows it; OSError when Slurm does not answer."""
    done = subprocess.run(
        ["squeue", "--noheader", "--states=all", "--format=%T", "--jobs", job_id], capture_output=True, text=True
    )
    if done.returncode == 0:
        return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""
    if "Invalid job id" in done.stderr:
        return ""
    raise OSError(f"squeue does not answer ({done.stderr.strip().splitlines()[-1]}); try again when Slurm is back")


def active_state(run: Path) -> str:
    """Return the state of the run's Slurm job while it is pending, running or about to come back; '' otherwise."""
    job_id = job_of(run)
    if not job_id or shutil.which("squeue") is None:
        return ""
    state = state_of(job_id)
    return "" if state in OVER else state


def check_idle(run: Path) -> None:
    """Raise ValueError when a Slurm job of this run is active."""
    state = active_state(run)
    if state:
        raise ValueError(
            f"{shown(run)} is active: Slurm job {job_of(run)} is {state}; stop it first: python -m cluster.cancel {shown(run)}"
        )


def describe_job(job_id: str) -> dict[str, str]:
    """Return what `scontrol show job` says, {} when it does not know the job."""
    done = subprocess.run(["scontrol", "show", "job", "--oneliner", job_id], capture_output=True, text=True)
    return dict(re.findall(r"(\w+)=(\S*)", done.stdout)) if done.returncode == 0 else {}
