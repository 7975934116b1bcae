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
from cluster.run_directory import is_finished, next_attempt, python, read_json, shown, write_atomically
from data_pipeline import manifest
from trainer.config import Config
from trainer.groups import Cluster

OVER = ("", "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")


class Executor(submitit.SlurmExecutor):
    """submitit's Slurm executor that can also write its script where there is no Slurm, for --dry-run."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def executor(config: Config, attempt: int, after: str = "") -> Executor:
    """Return the executor for this config, to start when `after` allows; ValueError for a parameter that submitit does not take."""
    c, run = config.cluster, Path(config.run)
    again = (
        f"{shlex.quote(sys.executable)} -m cluster.requeue {shlex.quote(str(run))} --attempt {attempt} --status $status"
    )
    made = Executor(run / "logs" / "submitit" / "slurm")
    made.update_parameters(
        **parameters(c, run / "code", after),
        job_name=run.name,
        nodes=c.nodes,
        ntasks_per_node=c.ranks_per_node,
        gpus_per_node=c.gpus_per_node or None,
        # asking for a requeue brings a SIGTERM upon whoever asks, which must not come before Slurm has heard all of it
        teardown=["status=$?", "trap '' TERM", again, "exit $?"],
    )
    return made


def parameters(c: Cluster, code: Path, after: str = "") -> dict:
    """Return what any job of ours tells submitit's Slurm executor: all of it but the name and how many of what."""
    dependency = ",".join(filter(None, (c.dependency, after)))
    folder = shlex.quote(str(code))
    return {
        "cpus_per_task": c.cpus_per_rank,
        "mem": f"{c.memory_gb}GB" if c.memory_gb else None,
        "time": c.time_minutes or None,
        "signal_delay_s": c.signal_seconds,
        "partition": c.partition or None,
        "account": c.account or None,
        "qos": c.qos or None,
        "constraint": c.constraint or None,
        "exclude": c.exclude or None,
        "mail_user": c.mail_user or None,
        "mail_type": "BEGIN,END,FAIL,REQUEUE" if c.mail_user else None,
        "wckey": None,
        "stderr_to_stdout": True,
        "additional_parameters": {
            "requeue": True,
            **({"reservation": c.reservation} if c.reservation else {}),
            # a job whose predecessor failed would wait for ever
            **({"dependency": dependency, "kill_on_invalid_dep": "yes"} if dependency else {}),
            **c.slurm_parameters,
        },
        "setup": [
            f"cd {folder} || exit 1",
            f"export PYTHONPATH={folder}",
            *([f"umask {c.umask}"] if c.umask else []),
            *(f"export {name}={shlex.quote(str(value))}" for name, value in c.environment.items()),
            *c.setup,
        ],
        # since 22.05 srun does not inherit the batch job's --cpus-per-task
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={c.cpus_per_rank}", *c.srun_arguments],
    }


def after(words: list[str]) -> str:
    """Return the dependency `afterok:...` on jobs, each given by its id or by the run directory it was submitted for.

    A job that has ended well asks for nothing; ValueError for one that has not, or that Slurm does not know.
    """
    check_here()
    found = []
    for word in words:
        if _is_done(Path(word)):  # Slurm forgets within minutes
            continue
        job_id = word if re.fullmatch(r"\d+(_\d+)?", word) else job_of(Path(word))
        if not job_id:
            raise ValueError(f"--after {word}: is no job id, and no run directory that a Slurm job was submitted for")
        states = states_of(job_id)
        bad = [state for state in states if state in OVER and state != "COMPLETED"]
        if bad or not states:
            how = f"is {bad[0]}" if bad else "is not known to Slurm (any more)"
            raise ValueError(f"--after {word}: Slurm job {job_id} {how}; what follows it would never start")
        if any(state != "COMPLETED" for state in states):
            found.append(job_id)
    return f"afterok:{':'.join(found)}" if found else ""


def _is_done(folder: Path) -> bool:
    """Tell whether a run is finished, or an encoding made."""
    made = read_json(folder / "encode.json").get("folder")
    return is_finished(folder) or bool(made and manifest.manifest_path(Path(made)).is_file())


def check_here() -> None:
    """Raise ValueError where there is no Slurm."""
    if shutil.which("sbatch") is None:
        raise ValueError(
            "cluster.kind=slurm: no sbatch on this machine; log in to the cluster, or use cluster.kind=local"
        )


def submit_quietly(submit):
    """Return what `submit()` returns, in an environment without another job's shape; ValueError with sbatch's own reason."""
    check_here()
    for name in [n for n in os.environ if n.startswith("SLURM_") and n != "SLURM_CONF"]:
        del os.environ[name]  # a job submitted from inside another one must not inherit its shape
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what sbatch said and raises it as well
            return submit()
    except FailedJobError as error:
        said = [line for line in str(error).splitlines() if "error:" in line] or str(error).splitlines()
        reason = " ".join(line.partition("error:")[2].strip() or line for line in said[-2:])
        raise ValueError(f"sbatch refused the job: {reason}; see the config's cluster.* keys, and sinfo") from None


def script(config: Config, after: str = "") -> str:
    """Return the batch script."""
    made = executor(config, 1, after)
    return made._make_submission_file_text(made._submitit_command_str, "")


def submit(config: Config, after: str = "") -> list[str]:
    """Submit the run and return lines that say how to follow it; ValueError with sbatch's reason when it is refused."""
    run = Path(config.run)
    attempt = next_attempt(run)
    made, plan = executor(config, attempt, after), {"run": str(run), "attempt": attempt}
    submitted = submit_quietly(lambda: made.submit(job.run, plan))
    write_atomically(run / "logs" / "slurm_job.json", json.dumps({"job_id": submitted.job_id, "attempt": attempt}))
    c = config.cluster
    waits = f", {after}" if after else ""
    return [
        f"submitted Slurm job {submitted.job_id}: {c.nodes} nodes x {c.ranks_per_node} ranks{waits}",
        f"  logs:    {shown(run / 'logs')}/{attempt:04d}_rank*.log (from when it starts; a restart opens the next number)",
        f"  batch:   {shown(submitted.paths.stdout)}",
        f"  follow:  {python()} -m cluster.status {shown(run)}",
        f"  stop:    {python()} -m cluster.cancel {shown(run)} (saves first)",
        *_left_out_earlier(run, c.exclude),
    ]


def _left_out_earlier(run: Path, exclude: str) -> list[str]:
    """Return a note on nodes that earlier jobs of this run found bad: a new job does not know of them."""
    bad = {n: why for n, why in read_json(run / "logs" / "excluded.json").items() if n not in exclude.split(",")}
    if not bad:
        return []
    named = "; ".join(f"{node} ({why})" for node, why in bad.items())
    nodes = ",".join([*([exclude] if exclude else []), *bad])
    return [f"  note:    earlier found bad and left out: {named}; if they still are: cluster.exclude='{nodes}'"]


def job_of(run: Path) -> str:
    """Return the id of the Slurm job last submitted for a run, '' if there is none."""
    return read_json(run / "logs" / "slurm_job.json").get("job_id", "")


def state_of(job_id: str) -> str:
    """Return a job's state in Slurm's words, '' when Slurm no longer knows it; OSError when Slurm does not answer."""
    return next(iter(states_of(job_id)), "")


def states_of(job_id: str) -> list[str]:
    """Return the states of a job's elements: one, but for an array; [] when Slurm no longer knows it."""
    done = subprocess.run(
        ["squeue", "--noheader", "--states=all", "--format=%T", "--jobs", job_id], capture_output=True, text=True
    )
    if done.returncode == 0:
        return done.stdout.split()
    if "Invalid job id" in done.stderr:
        return []
    raise OSError(f"squeue does not answer ({done.stderr.strip().splitlines()[-1]}); try again when Slurm is back")


def active_state(run: Path) -> str:
    """Return the state of the run's Slurm job while any of it is pending, running or about to come back; '' otherwise."""
    job_id = job_of(run)
    if not job_id or shutil.which("squeue") is None:
        return ""
    return next((state for state in states_of(job_id) if state not in OVER), "")


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
