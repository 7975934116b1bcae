"""What each task of a job runs: the trainer as a child process, whose end becomes the task's.

The child is never left behind: it gets our signals, our parent's and submitter's death (as SIGTERM, so that it saves), and the
kernel tells it of our own. How each rank stands is written to the attempt's control folder, for cluster/endings.py to read.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from cluster import ranks, snapshot_follower
from cluster.endings import FINISHED, INTERRUPTED, KILLED, START_AGAIN, asked_status, control_folder, translate
from cluster.run_directory import heed_umask, is_alive, read_json, write_atomically
from trainer.config import load

POLL_SECONDS = 0.1
WATCH_SECONDS = 0.5  # how often files of other tasks are looked at
RESEND_SECONDS = 1.0  # a signal that met the interpreter while it started may be lost
# What the others get when one rank has ended badly (the role srun's --kill-on-bad-exit plays on Slurm). After an orderly stop
# they have passed the same barrier and only have to take down the interpreter.
GRACE_SECONDS = {START_AGAIN: 60.0, INTERRUPTED: 60.0}
CRASH_GRACE_SECONDS = 5.0
ENCODING_SILENCE_SECONDS = 600.0
HEARTBEAT_SECONDS = 30.0
LAST_WORD_SECONDS = 10.0  # to write how a rank ended: others decide by it whether to start again


def run(plan: dict) -> int:
    """Run one task by `plan` (run, attempt; locally master_port, submitter) and return its exit status; on Slurm, exit with it."""
    task = Task(plan)
    task.listen()
    status = task.work()
    if task.place.kind == "slurm":
        sys.exit(status)  # srun and the batch script after it go by the exit status
    return status


class Task:
    """One rank's child processes, from the first to the last."""

    def __init__(self, plan: dict):
        self.plan, self.place, self.config = plan, ranks.place(), load(Path(plan["run"]) / "config.yaml")
        self.run, self.local = Path(plan["run"]), self.place.kind == "local"
        heed_umask(self.config.cluster)
        self.attempt = plan["attempt"] + self.place.restarts
        self.control = control_folder(self.run, self.attempt)
        self.log = self.run / "logs" / f"{self.attempt:04d}_rank{self.place.rank}.log"
        self.parent = os.getppid()
        self.wanted = 0  # the signal we were asked to stop with
        self.forwarded: set[int] = set()
        self.bad_peer: tuple[int, int, float] | None = None  # rank, status, until when to wait
        self.watched_at = 0.0
        self.record = {"rank": self.place.rank, "pid": os.getpid(), "host": self.place.host, "log": str(self.log)}

    def listen(self) -> None:
        """Note the signals that ask for a stop, in place of submitit's handlers (one of which ignores SIGTERM)."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._note)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _note(self, number, frame) -> None:
        self.wanted = number

    def work(self) -> int:
        """Encode if need be, look at the node if asked to, train, draw; return the task's exit status."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        status = self.encode()
        if status == FINISHED and self.config.cluster.preflight:
            status = self.preflight()
        if status == FINISHED:
            status = self.train()
        if status == FINISHED and self.place.rank == 0:
            status = self.finish()
        by = "peer" if self.bad_peer and status == KILLED else "self"
        self.write(status=status, by=by, asked=bool(self.wanted))
        return status

    def write(self, **changes) -> None:
        """Tell the others how this rank stands."""
        self.record.update(changes, time=time.time())
        until = time.monotonic() + (LAST_WORD_SECONDS if self.record.get("status") is not None else 0)
        while True:
            try:
                write_atomically(self.control / f"rank{self.place.rank}.json", json.dumps(self.record))
                return
            except (
                OSError
            ) as error:  # a full disk: the trainer goes on, and so must its task; only the end is worth a wait
                if time.monotonic() >= until:
                    print(f"job: rank {self.place.rank} cannot tell how it stands: {error}", flush=True)
                    return
            time.sleep(WATCH_SECONDS)

    # -----------------------------------------------------------------------------------------------------------------
    # The stages.

    def encode(self) -> int:
        """Let rank 0 make the dataset where there is none yet, and the others wait for it; return an exit status."""
        data = self.config.data
        self.write(stage="encode" if data.encode_from else "train", status=None)
        if not data.encode_from:
            return FINISHED
        if self.place.rank != 0:
            return self._await_encoding()
        if (Path(data.path) / "manifest.json").is_file():  # written last: with it the dataset is complete
            return FINISHED
        self.say(f"encoding {data.encode_from} into {data.path}")
        command = ["-m", "data_pipeline.encode", data.encode_from, data.path, "--codec", data.codec]
        return self.supervise(command)

    def _await_encoding(self) -> int:
        path, seen, since = self.control / "rank0.json", None, time.monotonic()
        while True:
            zero = read_json(path)
            if zero.get("status") or zero.get("stage") not in (None, "encode"):
                return zero.get("status") or FINISHED
            if zero.get("time") != seen:
                seen, since = zero.get("time"), time.monotonic()
            if time.monotonic() - since > ENCODING_SILENCE_SECONDS or (
                self.local and zero and not is_alive(zero["pid"])
            ):
                self.say(f"rank 0 says nothing any more while encoding; its log: {zero.get('log')}")
                return 1
            self.watch()
            if self.wanted:
                return asked_status(self.wanted)
            time.sleep(WATCH_SECONDS)

    def preflight(self) -> int:
        """Look whether this node is fit for the run; return an exit status."""
        self.write(stage="preflight")
        return self.supervise(["-m", "cluster.preflight", str(self.run), str(self.control), self.place.host])

    def train(self) -> int:
        """Run the trainer and return its exit status."""
        self.write(stage="train")
        beside = self.config.cluster.evaluate_snapshots and self.place.rank == 0
        follower = (
            snapshot_follower.start(self.run, self.attempt, self.environment(), die_with_parent) if beside else None
        )
        status = self.supervise(["-m", "trainer.train", str(self.run / "config.yaml")], train=True)
        if follower is not None and not snapshot_follower.end(follower, status == FINISHED, lambda: self.wanted):
            self.say(f"left some snapshots unevaluated; go on with: python -m trainer.evaluate {self.run} --follow")
        return status

    def finish(self) -> int:
        """Reconstruct one more EMA length and draw a grid with it, where the config asks for that."""
        cluster = self.config.cluster
        snapshot, grid = finish_files(self.config)
        if not cluster.finish_sigma_rel or grid.is_file():
            return FINISHED
        self.write(stage="finish")
        sigma_rel, per_class = str(cluster.finish_sigma_rel), str(cluster.finish_images_per_class)
        status = self.supervise(
            ["-m", "trainer.posthoc", str(self.run), "--sigma-rel", sigma_rel, "--out", str(snapshot)]
        )
        if status == FINISHED:
            draw = [
                "-m",
                "trainer.generate",
                str(snapshot),
                "--classes",
                "all",
                "--per-class",
                per_class,
                "--out",
                str(grid),
            ]
            status = self.supervise(draw)
        return status

    # -----------------------------------------------------------------------------------------------------------------
    # One child.

    def supervise(self, arguments: list[str], train: bool = False) -> int:
        """Run Python with these arguments in RUN/code until it ends, pass signals on, and translate how it ended."""
        if self.wanted:
            return asked_status(self.wanted)
        with open(self.log, "a", buffering=1) as log:
            child = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self.run / "code",
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_before_trainer if train else die_with_parent,
            )
        sent_at, heartbeat = 0.0, time.monotonic()
        while child.poll() is None:
            time.sleep(POLL_SECONDS)
            now = time.monotonic()
            self.watch()
            if self.wanted and (self.wanted not in self.forwarded or now - sent_at > RESEND_SECONDS):
                child.send_signal(self.wanted if train else signal.SIGTERM)
                self.forwarded.add(self.wanted)
                sent_at = now
            if self.bad_peer and now > self.bad_peer[2]:
                rank, status, _ = self.bad_peer
                self.say(f"killed, because rank {rank} ended with status {status}")
                child.kill()
            if now - heartbeat > HEARTBEAT_SECONDS:
                self.write()
                heartbeat = now
        return translate(child.returncode, self.wanted)

    def environment(self) -> dict[str, str]:
        """Return the child's environment."""
        port = self.plan.get("master_port") or ranks.port_of(self.place.job_id, self.place.restarts)
        variables = ranks.environment(self.place, port, self.config.cluster.cpus_per_rank)
        variables["EVENKEEL_PREFLIGHT_FAILURES"] = str(len(read_json(self.run / "logs" / "excluded.json")))
        chosen = {name: str(value) for name, value in self.config.cluster.environment.items()}
        return {**os.environ, **variables, **chosen, "PYTHONPATH": str(self.run / "code"), "PYTHONUNBUFFERED": "1"}

    def watch(self) -> None:
        """Look whether others want us to stop, are gone, or have ended badly; only local jobs have nobody else to do that."""
        if not self.local or time.monotonic() - self.watched_at < WATCH_SECONDS:
            return
        self.watched_at = time.monotonic()
        if not self.wanted:
            asked = read_json(self.control / "stop.json").get("signal")
            if asked:
                self.wanted = signal.Signals[asked]
            elif os.getppid() != self.parent or not is_alive(self.plan["submitter"]):
                self.say("the submitting process is gone: saving, then leaving")
                self.wanted = signal.SIGTERM
        if not self.bad_peer:
            self.bad_peer = self._find_bad_peer()

    def _find_bad_peer(self) -> tuple[int, int, float] | None:
        for rank in range(self.place.world):
            peer = read_json(self.control / f"rank{rank}.json")
            status = peer.get("status")
            if rank == self.place.rank or not peer or status == FINISHED:
                continue
            if status is None and is_alive(peer["pid"]):
                continue
            if status is None:  # its last word may have come between the two looks
                status = read_json(self.control / f"rank{rank}.json").get("status")
            status = KILLED if status is None else status
            if status == FINISHED:
                continue
            return rank, status, time.monotonic() + GRACE_SECONDS.get(status, CRASH_GRACE_SECONDS)
        return None

    def say(self, text: str) -> None:
        """Add a line of our own to the rank's log."""
        with contextlib.suppress(OSError), open(self.log, "a") as log:  # a full disk must not stop what it tells about
            print(f"job: {text}", file=log)


def finish_files(config) -> tuple[Path, Path]:
    """Return where the reconstruction and the grid that follow a run lie."""
    name = f"phema-{config.duration_images:010d}-{config.cluster.finish_sigma_rel:.5f}.safetensors"
    return Path(config.run) / "posthoc" / name, Path(config.run) / "samples" / "grid.png"


def die_with_parent() -> None:
    """Have the kernel send SIGTERM to this process, just forked, when its parent dies (Linux: PR_SET_PDEATHSIG is 1)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _before_trainer() -> None:
    """Let the interpreter start deaf to SIGINT, which it may answer with status 1; the trainer itself listens to it."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
