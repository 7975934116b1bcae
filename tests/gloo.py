"""Real gloo ranks for tests: `on_ranks(2, function, *args)` calls a function on each, `Ranks` runs the trainer.

The function lives at the top level of a test module and is called in a process of its own with the rank variables set: forked from
a server that has the heavy libraries loaded, since importing them takes a rank five seconds of CPU time.
"""

import contextlib
import functools
import multiprocessing
import os
import pickle
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ["tests.libraries"]
QUIET = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def on_ranks(world: int, function, *args, timeout_seconds: float = 600) -> list:
    """Return what `function(*args)` returns on each rank; raise with the first rank's traceback if one raises."""
    port = free_port()
    context = _server()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(r) for r in range(world)]
        shared = {**os.environ, **QUIET, "WORLD_SIZE": str(world), "MASTER_PORT": str(port)}
        variables = [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world)]
        processes = [
            context.Process(target=_rank, args=(*own, function, args)) for own in zip(variables, files, strict=True)
        ]
        for p in processes:
            p.start()
        try:
            deadline = time.monotonic() + timeout_seconds
            while any(p.exitcode is None for p in processes) and not any(p.exitcode for p in processes):
                assert time.monotonic() < deadline, f"ranks still busy after {timeout_seconds} s"
                time.sleep(0.05)
            time.sleep(0.5 if any(p.exitcode for p in processes) else 0)
        finally:
            for p in processes:
                if p.is_alive():
                    p.kill()
                p.join()
        results = [
            pickle.loads(f.read_bytes()) if f.exists() else (False, f"rank {f.name} left no result") for f in files
        ]
    failures = sorted((value for ok, value in results if not ok), key=lambda text: "left no result" in text)
    assert not failures, failures[0]
    return [value for _, value in results]


def fork(function, *args) -> multiprocessing.Process:
    """Start `function(*args)` in a process of its own, for the test to kill."""
    process = _server().Process(target=function, args=args)
    process.start()
    return process


def free_port() -> int:
    """Return a port on which ranks may meet."""
    from cluster import ranks  # machines with GPUs may lack what it imports

    return ranks.free_port()


@functools.cache
def _server():
    """Return the context whose processes are forked from a server with LIBRARIES loaded, one per test session."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    alone = QUIET | {"PYTHONPATH": str(ROOT)}
    before = {key: os.environ.get(key) for key in alone}
    os.environ.update(alone)  # the libraries read some of it as they are imported
    forkserver.ensure_running()
    for key, value in before.items():
        if value is None:
            del os.environ[key]
        else:
            os.environ[key] = value
    return context


def _rank(environment: dict[str, str], file: Path, function, args) -> None:
    os.environ.clear()  # the server's is that of the first test
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    status = 0
    try:
        result = (True, function(*args))
    except BaseException:
        result, status = (False, f"rank {environment['RANK']}:\n{traceback.format_exc()}"), 1
    beside = file.with_suffix(".writing")
    beside.write_bytes(pickle.dumps(result))
    beside.rename(file)
    os._exit(status)  # a peer may be gone: the process group's destructors would wait for it


class Forked:
    """`python -m MODULE ARGS` from the server of the libraries; looks like a subprocess.Popen."""

    def __init__(self, environment: dict[str, str], log: Path, args: tuple[str, ...], module: str = "trainer.train"):
        self._process = _server().Process(target=_command, args=(environment, log, args, module))
        self._process.start()
        self.module = module
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.module, timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _command(environment: dict[str, str], log: Path, args: tuple[str, ...], module: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = [module.replace(".", "/") + ".py", *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class Ranks:
    """`python -m trainer.train ARGS` on `world` real ranks, each with its own log; `fork`: without the seconds of importing."""

    def __init__(self, world: int, folder: Path, *args: str, fork: bool = True):
        port = free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank{r}-{time.time_ns()}.log" for r in range(world)]
        shared = {**os.environ, "WORLD_SIZE": str(world), "MASTER_PORT": str(port), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        self.processes = []
        for r, log in enumerate(self.logs):
            env = {**shared, "RANK": str(r), "LOCAL_RANK": str(r)}
            log.touch()
            if fork and not Path("/dev/nvidiactl").exists():  # the server's DeepSpeed computes on CPUs
                self.processes.append(Forked(env, log, args))
                continue
            command = [sys.executable, "-m", "trainer.train", *args]
            with open(log, "wb") as out:
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT)
                )

    def wait(self, timeout_seconds: float = 400) -> list[int]:
        """Return the exit statuses; kill what is left after the time limit."""
        deadline = time.monotonic() + timeout_seconds
        try:
            return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]
        finally:
            self.kill()

    def kill(self) -> None:
        for p in self.processes:
            if p.poll() is None:
                p.kill()
            p.wait()

    def output(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in self.logs)
