"""A task's place comes out right of both environments, and the trainer gets it in torchrun's words."""

import socket

import pytest

from cluster import ranks


def test_local(monkeypatch):
    variables = {"JOB_ID": 123, "NTASKS": 4, "JOB_NUM_NODES": 1, "NODEID": 0, "GLOBALID": 3, "LOCALID": 3}
    for name, value in variables.items():
        monkeypatch.setenv(f"SUBMITIT_LOCAL_{name}", str(value))
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    place = ranks.place()
    assert (place.kind, place.job_id, place.rank, place.world, place.local_rank, place.restarts) == (
        "local",
        "123",
        3,
        4,
        3,
        0,
    )
    assert ranks.environment(place, 4242, 2) == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "4242", "OMP_NUM_THREADS": "2", "EVENKEEL_REQUEUES": "0", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip


def test_slurm(monkeypatch):
    variables = {"JOB_ID": 77, "NTASKS": 16, "JOB_NUM_NODES": 2, "NODEID": 1, "PROCID": 9, "LOCALID": 1}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[007,011]")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    place = ranks.place()
    assert (place.kind, place.rank, place.world, place.local_rank, place.local_world) == ("slurm", 9, 16, 1, 8)
    assert (place.hosts, place.host, place.restarts) == (("gpu007", "gpu011"), "gpu011", 2)
    variables = ranks.environment(place, 4242, 7)
    assert variables["MASTER_ADDR"] == "gpu007" and "GLOO_SOCKET_IFNAME" not in variables


def test_outside_of_a_job(monkeypatch):
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    with pytest.raises(RuntimeError):
        ranks.place()


def test_ports():
    assert ranks.port_of("12", 0) == ranks.port_of("12", 0) != ranks.port_of("12", 1)
    assert all(
        20_000 <= ranks.port_of(f"{job}_3", restarts) < 32_000 for job in range(1, 99_999, 997) for restarts in range(4)
    )
    with socket.socket() as s:
        s.bind(("127.0.0.1", ranks.free_port()))
