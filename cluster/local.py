"""Run a job on this machine through submitit's local executor, in a session of its own.

The terminal's Ctrl-C must reach the submitter only: submitit's controller would die of it and kill the tasks before they saved. So
a stop is asked for by a file that every task looks at (`control`/stop.json), which also reaches tasks that are still starting.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import submitit

from cluster import endings, job, ranks
from cluster.run_directory import is_alive, read_json, write_atomically
from trainer.config import Config

FOREVER_MINUTES = 10 * 366 * 24 * 60  # the executor kills a job after its time-out; a local run has none


class Executor(submitit.LocalExecutor):
    """submitit's local executor with the job in its own session, in RUN/code, with the GPUs left visible as they are."""

    def __init__(self, folder: Path, code: Path, tasks: int):
        super().__init__(folder)
        self.code = code
        self.update_parameters(tasks_per_node=tasks, timeout_min=FOREVER_MINUTES)

    def _submit_command(self, command: str) -> submitit.LocalJob:
        tasks = self.parameters["tasks_per_node"]
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.code),
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_NTASKS": str(tasks),
            "SUBMITIT_LOCAL_COMMAND": command,
            "SUBMITIT_LOCAL_TIMEOUT_S": str(60 * FOREVER_MINUTES),
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "0",
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_WITH_SHELL": "",
            "SUBMITIT_STDERR_TO_STDOUT": "1",
        }
        with open(self.folder / "controller.log", "a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "submitit.local._local", str(self.folder)],
                cwd=self.code,
                env=environment,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return submitit.LocalJob(self.folder, str(process.pid), list(range(tasks)), process)


class Attempt:
    """One start of a run on this machine."""

    def __init__(self, config: Config, number: int):
        self.run, self.number = Path(config.run), number
        self.world = config.cluster.ranks_per_node
        self.folder = endings.control_folder(self.run, number)
        executor = Executor(self.folder, self.run / "code", self.world)
        plan = {
            "run": str(self.run),
            "attempt": number,
            "master_port": ranks.free_port(),
            "submitter": os.getpid(),
        }
        self.job = executor.submit(job.run, plan)
        self.session = int(self.job.job_id)

    def ranks(self) -> list[dict]:
        """Return what each rank last wrote of itself, {} for one that has not yet."""
        return [read_json(self.folder / f"rank{k}.json") for k in range(self.world)]

    def running(self) -> bool:
        """Tell whether the job, or any task of it, still lives."""
        if not self.job.done():
            return True
        return any(r and r.get("status") is None and is_alive(r["pid"]) for r in self.ranks())

    def stop(self, number: signal.Signals) -> None:
        """Ask all ranks to save and leave, as if this signal had come."""
        try:
            write_atomically(self.folder / "stop.json", json.dumps({"signal": number.name, "time": time.time()}))
        except OSError:  # a full disk: then the tasks that are there already get the signal itself
            for rank in self.ranks():
                if rank and rank.get("status") is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(rank["pid"], number)

    def kill(self) -> None:
        """End every process of the job's session at once."""
        try:
            os.killpg(self.session, signal.SIGKILL)
        except ProcessLookupError:
            pass  # all gone

    def outcome(self) -> endings.Outcome:
        """Return how the attempt ended, once nothing of it runs."""
        return endings.read_outcome(
            self.folder, [self._submitit_log(k) for k in range(self.world)], silent_are_guilty=True
        )

    def _submitit_log(self, rank: int) -> Path:
        """Return where a task's output before its trainer started went."""
        return self.job.paths.folder / f"{self.job.job_id}_{rank}_log.out"
