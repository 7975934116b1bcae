"""A real Slurm on this machine: Debian's slurmctld, slurmd and munge as plain processes on loopback, in a temporary folder.

No root, systemd, cgroups or /etc/slurm. Nodes are called 127.0.0.1, 127.0.0.2, ... so that their names resolve. All of
it ends with `stop`, and with the death of the process that called `start`, however it died.

    python -m tests.slurm_machine COMMAND ...    # run a command inside such a cluster
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol", "scancel")
INSTALL = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"

CONF = """\
ClusterName=evenkeel
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# a requeued job may start again when its old credential has expired: 5 s is the least
AuthInfo=socket={state}/run/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={state}/state
SlurmctldPidFile={state}/run/slurmctld.pid
SlurmdPidFile={state}/run/slurmd.%n.pid
SlurmdSpoolDir={state}/spool/%n
SlurmctldLogFile={state}/log/slurmctld.log
SlurmdLogFile={state}/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=2
EpilogMsgTime=0
KillWait={kill_wait}
MinJobAge=600
SlurmdTimeout=10
InactiveLimit=0
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{controller}
PartitionName=train Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime={kill_wait} State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing() -> str:
    """Return why no Slurm can be started here, '' if one can."""
    absent = [p for p in PROGRAMS if shutil.which(p, path=_path()) is None]
    return f"{', '.join(absent)} not installed; {INSTALL}" if absent else ""


def _path() -> str:
    return os.environ.get("PATH", "") + os.pathsep + "/usr/sbin"


class SlurmMachine:
    """A running cluster of `nodes` virtual nodes with `cpus` CPUs each."""

    def __init__(self, nodes: int = 2, cpus: int = 4, kill_wait: int = 10, user_signal: bool = True):
        self.state = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has at most 107 characters
        self.state.chmod(0o755)
        self.nodes = [f"127.0.0.{n}" for n in range(1, nodes + 1)]
        self.port = _free_ports(nodes + 1)
        for name in ("state", "log", "run", *(f"spool/{node}" for node in self.nodes)):
            (self.state / name).mkdir(parents=True)
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        controller = "SlurmctldParameters=preempt_send_user_signal" if user_signal else ""
        text = CONF.format(port=self.port, user=user, state=self.state, kill_wait=kill_wait, controller=controller)
        for n, node in enumerate(self.nodes, 1):
            address = f"NodeHostname=localhost NodeAddr=127.0.0.1 Port={self.port + n}"
            text += f"NodeName={node} {address} CPUs={cpus} RealMemory=8000 State=UNKNOWN\n"
        (self.state / "slurm.conf").write_text(text)
        (self.state / "cgroup.conf").write_text("CgroupAutomount=no\n")
        self.environment = {**os.environ, "SLURM_CONF": str(self.state / "slurm.conf"), "PATH": _path()}

    def start(self) -> "SlurmMachine":
        """Start the daemons and wait until all nodes are idle; RuntimeError with the logs' place when they don't come up."""
        self._guard()
        key = self.state / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        run, log = self.state / "run", self.state / "log"
        self._call("munged", "--force", f"--key-file={key}", f"--socket={run}/munge.socket", f"--pid-file={run}/munged.pid",
                   f"--log-file={log}/munged.log", f"--seed-file={run}/munged.seed")  # fmt: skip
        self._call("slurmctld", "-c", "-i")
        for node in self.nodes:
            self.start_node(node)
        end = time.monotonic() + 120
        while time.monotonic() < end:
            idle = self.call("sinfo", "-h", "-N", "-p", "train", "-t", "idle", "-o", "%N").split()
            if len(idle) == len(self.nodes):
                return self
            time.sleep(0.1)
        raise RuntimeError(f"nodes did not come up; see {self.state}/log")

    def start_node(self, node: str, hide: Path | None = None) -> None:
        """Start (again) the daemon of one node; one that is to `hide` a folder sees an empty disk mounted over it (needs root)."""
        if hide is None:
            self._call("slurmd", "-N", node)
        else:
            self._call(
                "unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$1" && exec slurmd -N "$2"', "sh", str(hide), node
            )

    def restart_node(self, node: str, hide: Path | None = None) -> None:
        """Replace the daemon of an idle node."""
        self.kill_node(node)
        self.start_node(node, hide)
        end = time.monotonic() + 120
        while time.monotonic() < end and node not in self.call("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split():
            time.sleep(0.2)

    def kill_node(self, node: str) -> None:
        """Let a node die: its daemon and every process of its jobs, at once."""
        daemon = int((self.state / "run" / f"slurmd.{node}.pid").read_text())
        doomed = [daemon]
        for path in Path("/proc").glob("[0-9]*"):
            try:
                variables = (path / "environ").read_bytes().split(b"\0")
                words = (path / "cmdline").read_bytes()
            except OSError:
                continue
            ours = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode() in variables
            if ours and (
                f"SLURMD_NODENAME={node}".encode() in variables
                or (b"slurmstepd" in words and _is_below(path.name, daemon))
            ):
                doomed.append(int(path.name))
        for pid in doomed:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def call(self, *command: str) -> str:
        """Run a client command in the cluster; return its output, '' when it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=180)
        return done.stdout if done.returncode == 0 else ""

    def _call(self, *command: str) -> None:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=180)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")

    def _guard(self) -> None:
        """Stop the daemons when this process dies without a word."""
        watch = f'while kill -0 {os.getpid()} 2>/dev/null; do sleep 1; done; cat "$1"/run/*.pid | xargs -r kill -9; rm -rf "$1"'
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.guard = subprocess.Popen(["sh", "-c", watch, "guard", str(self.state)], start_new_session=True, **quiet)

    def stop(self) -> None:
        """Cancel all jobs, end all daemons, remove the folder."""
        jobs = self.call("squeue", "-h", "-o", "%A").split()
        if jobs:
            self.call("scancel", "--full", "--signal=KILL", *jobs)
            self.call("scancel", *jobs)
            end = time.monotonic() + 15
            while time.monotonic() < end and self.call("squeue", "-h").strip():
                time.sleep(0.2)
        pids = [int(p.read_text()) for p in (self.state / "run").glob("*.pid") if p.read_text().strip()]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in pids:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    pass
            time.sleep(1 if number == signal.SIGTERM else 0)
        os.killpg(self.guard.pid, signal.SIGKILL)
        self.guard.wait()
        shutil.rmtree(self.state, ignore_errors=True)

    def __enter__(self) -> "SlurmMachine":
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_) -> None:
        self.stop()


def _is_below(pid: str, ancestor: int) -> bool:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == ancestor
    except OSError:
        return False


def _free_ports(count: int) -> int:
    """Return the first of `count` neighbouring ports that are free."""
    while True:
        first = random.randrange(15_000, 19_000)
        try:
            for port in range(first, first + count):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue


if __name__ == "__main__":
    with SlurmMachine() as machine:
        sys.exit(subprocess.run(sys.argv[1:], env=machine.environment).returncode)
