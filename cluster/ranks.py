"""Which of how many: a task's rank and neighbours, from submitit's environment.

Imports no torch. Outside of cluster/ nobody reads a SLURM_* variable: the trainer gets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR
and MASTER_PORT, the names that torchrun uses, so it runs under torchrun by hand as well.
"""

import contextlib
import os
import random
import socket
from dataclasses import dataclass

from submitit import JobEnvironment

# Below Linux's ephemeral ports (32768-60999), where a client's socket could sit on the port by chance.
FIRST_PORT, NUM_PORTS = 20_000, 12_000


@dataclass(frozen=True)
class Place:
    """Where one task stands in its job."""

    kind: str  # local | slurm
    job_id: str
    rank: int
    world: int
    local_rank: int
    local_world: int
    node: int
    hosts: tuple[str, ...]
    restarts: int  # how often Slurm has requeued this job; always 0 for a local one

    @property
    def host(self) -> str:
        """Return the name of this task's node as the job knows it."""
        return self.hosts[self.node] if self.node < len(self.hosts) else self.hosts[0]


def place() -> Place:
    """Read this task's place from the environment that submitit's executor made; RuntimeError outside of a job."""
    job = JobEnvironment()
    return Place(
        kind=job.name(),
        job_id=job.job_id,
        rank=job.global_rank,
        world=job.num_tasks,
        local_rank=job.local_rank,
        local_world=max(1, job.num_tasks // job.num_nodes),
        node=job.node,
        hosts=tuple(job.hostnames),
        restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    )


def port_of(job_id: str, restarts: int) -> int:
    """Return a port all ranks of a Slurm job agree on without talking; another one after each restart, as the old may linger."""
    number = int("".join(c for c in job_id if c.isdigit()) or 0)
    return FIRST_PORT + (number * 31 + restarts * 1009) % NUM_PORTS


def free_port() -> int:
    """Return a TCP port of this machine that nobody listens on, and that nobody is given by chance until the ranks meet on it."""
    for port in random.SystemRandom().sample(range(FIRST_PORT, FIRST_PORT + NUM_PORTS), 100):
        with socket.socket() as s, contextlib.suppress(OSError):  # taken: the next
            s.bind(("", port))
            return port
    raise RuntimeError(f"no free TCP port found from {FIRST_PORT} to {FIRST_PORT + NUM_PORTS}")


def environment(place: Place, master_port: int, cpus_per_rank: int) -> dict[str, str]:
    """Return the variables that tell a trainer process its rank and where the ranks meet."""
    variables = {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_world),
        "MASTER_ADDR": "127.0.0.1" if place.kind == "local" else place.hosts[0],
        "MASTER_PORT": str(master_port),
        "OMP_NUM_THREADS": str(cpus_per_rank),
        "EVENKEEL_REQUEUES": str(place.restarts),
    }
    if place.kind == "local":
        variables["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return variables
