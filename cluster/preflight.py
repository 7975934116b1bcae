"""Look at a node before the ranks meet: `python -m cluster.preflight RUN CONTROL HOST`, a process per rank, run by cluster/job.py.

Each rank looks at its own node first (GPU, memory, disk, data), then all meet in a throw-away group with a time limit (clocks,
all-reduce within and between nodes). What each found lies in CONTROL/preflight<rank>.json, for cluster/requeue.py to read: a bad
node is named, left out of the next attempt, and recorded. The only file of cluster/ that imports torch, and only inside a job.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

from cluster.run_directory import read_json, write_atomically
from data_pipeline import manifest
from trainer.config import Config, load

BAD_NODE = 76  # exit status of a rank whose node is not fit, or that waited for one in vain
MEMORY_PER_RANK_BYTES = 1e9  # less, and not even the libraries fit
DISK_BYTES = 1e9
CLOCK_SKEW_SECONDS = 5.0  # log lines, heartbeats and alerts of a run are compared across nodes
BUSY_GPU_SHARE = 0.1  # of a GPU's memory in somebody else's hands
ALL_REDUCE_ELEMENTS = 2**22


def main(argv: list[str] | None = None) -> int:
    """Look at this node, meet the others, write what was found, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cluster.preflight")
    parser.add_argument("run", type=Path)
    parser.add_argument("control", type=Path)
    parser.add_argument("host", help="this node's name as the job knows it")
    a = parser.parse_args(argv)
    rank, config = int(os.environ["RANK"]), load(a.run / "config.yaml")
    record = {"rank": rank, "host": a.host, "problems": [], "met": False, "blames": {}}

    def tell() -> None:
        write_atomically(a.control / f"preflight{rank}.json", json.dumps(record))

    record["problems"] = inspect_node(config)
    tell()
    if not record["problems"]:
        try:
            record["problems"] = meet(config, record)
        except Exception as error:  # gloo and NCCL raise RuntimeErrors of many kinds; whoever did not come is to blame
            missing = [k for k in range(int(os.environ["WORLD_SIZE"])) if not _has_met(a.control, k)]
            reason = str(error).strip().splitlines()[0]
            record["blames"] = {str(k): f"did not answer within {config.cluster.preflight_seconds} s" for k in missing}
            print(f"preflight: no meeting ({reason}); not there: ranks {missing or 'none'}", flush=True)
        record["met"] = True
        tell()
    for problem in record["problems"]:
        print(f"preflight: {a.host}: {problem}", flush=True)
    return BAD_NODE if record["problems"] or record["blames"] else 0


def _has_met(control: Path, rank: int) -> bool:
    found = read_json(control / f"preflight{rank}.json")
    return bool(found) and (not found["problems"] or found["met"])


# ---------------------------------------------------------------------------------------------------------------------
# One node on its own.


def inspect_node(config: Config) -> list[str]:
    """Return what is wrong with this node, in words; [] when nothing is."""
    found = [*_memory(), *_data(config)]
    if int(os.environ["LOCAL_RANK"]) == 0:
        found += _disk(Path(config.run))
    if config.cluster.gpus_per_node:
        found += _gpu(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    return found


def _memory() -> list[str]:
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    available = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    need = MEMORY_PER_RANK_BYTES * int(os.environ["LOCAL_WORLD_SIZE"])
    if available is not None and available < need:
        return [f"{available / 1e9:.1f} GB of memory available, {need / 1e9:.1f} GB needed at least"]
    return []


def _disk(run: Path) -> list[str]:
    try:
        probe = run / f".preflight.{os.environ['RANK']}"
        with open(probe, "wb") as f:
            f.write(b"\0" * 2**20)
            f.flush()
            os.fsync(f.fileno())
        probe.unlink()
    except OSError as error:
        return [f"{run} cannot be written here: {error.strerror}"]
    free = shutil.disk_usage(run).free
    return (
        [f"{free / 1e9:.1f} GB free at {run}, {DISK_BYTES / 1e9:.0f} GB needed at least"] if free < DISK_BYTES else []
    )


def _data(config: Config) -> list[str]:
    """Read the manifest and both ends of one shard; each rank takes another one."""
    path = Path(config.data.path)
    if "://" not in config.data.path and not manifest.manifest_path(path).is_file() and any(path.glob("*.tar")):
        return []  # tars that others wrote have no manifest yet
    try:
        found = manifest.load(config.data.path)
        if "://" in config.data.path:
            return []
        shard = found.shards[int(os.environ["RANK"]) % len(found.shards)]
        with open(path / shard.name, "rb") as f:
            f.read(1)
            f.seek(-1, os.SEEK_END)
            if len(f.read(1)) != 1 or f.tell() != shard.bytes:
                return [f"{path / shard.name} has {f.tell()} bytes here, {shard.bytes} by its manifest"]
    except OSError as error:
        return [f"{error.filename or path} cannot be read here: {error.strerror}"]
    except ValueError as error:
        return [f"data: {error}"]
    return []


def _gpu(local_rank: int, local_world: int) -> list[str]:
    import torch

    if torch.cuda.device_count() < local_world:
        return [f"{torch.cuda.device_count()} GPUs visible, {local_world} needed"]
    try:
        device = torch.device("cuda", local_rank)
        free, total = torch.cuda.mem_get_info(device)
        # sums of ones are exact in every format, so a wrong element is a broken device and nothing else
        product = torch.ones(1024, 1024, device=device) @ torch.ones(1024, 1024, device=device)
        wrong = int((product != 1024).sum())
    except RuntimeError as error:
        return [f"GPU {local_rank}: {str(error).splitlines()[0]}"]
    problems = [f"GPU {local_rank}: {wrong} elements of a product are wrong"] if wrong else []
    if free < (1 - BUSY_GPU_SHARE) * total:
        problems.append(
            f"GPU {local_rank}: {free / 1e9:.1f} of {total / 1e9:.1f} GB free; another process holds the rest"
        )
    return problems + _ecc(local_rank)


def _ecc(local_rank: int) -> list[str]:
    query = [
        "nvidia-smi",
        "--query-gpu=ecc.errors.uncorrected.volatile.total",
        "--format=csv,noheader",
        f"--id={local_rank}",
    ]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return []  # no such tool here: the product above was the test
    return [f"GPU {local_rank}: {said} uncorrected memory errors"] if said.isdigit() and int(said) else []


# ---------------------------------------------------------------------------------------------------------------------
# All nodes together.


def meet(config: Config, record: dict) -> list[str]:
    """Compare clocks and add numbers up with all ranks; return what is wrong with this node."""
    import torch
    import torch.distributed as dist

    rank, world, local_world = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    limit = timedelta(seconds=config.cluster.preflight_seconds)
    gpu = config.cluster.gpus_per_node > 0
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # not the trainer's port, which must be free when it comes
    address = f"tcp://{os.environ['MASTER_ADDR']}:{int(os.environ['MASTER_PORT']) + 1}"
    dist.init_process_group("nccl" if gpu else "gloo", init_method=address, rank=rank, world_size=world, timeout=limit)
    try:
        everyone = dist.new_group(backend="gloo", timeout=limit)
        dist.barrier(everyone)
        clocks = [0.0] * world
        dist.all_gather_object(clocks, time.time(), group=everyone)
        problems = skew(clocks, rank)
        node = rank // local_world
        groups = {
            "within the node": [range(n * local_world, (n + 1) * local_world) for n in range(world // local_world)],
            "between nodes": [range(k, world, local_world) for k in range(local_world)],
        }
        for name, members in groups.items():
            made = [dist.new_group(list(m), timeout=limit) for m in members]  # every rank takes part in making each
            mine = made[node if name == "within the node" else rank % local_world]
            problems += _all_reduce(name, mine, gpu, record)
        dist.barrier(everyone)
        return problems
    finally:
        with contextlib.suppress(Exception):  # a group that is broken cannot be left in good order either
            dist.destroy_process_group()


def skew(clocks: list[float], rank: int) -> list[str]:
    """Return a problem where this rank's clock is off by more than CLOCK_SKEW_SECONDS from the median."""
    off = clocks[rank] - statistics.median(clocks)
    return [f"its clock is off by {off:+.1f} s"] if abs(off) > CLOCK_SKEW_SECONDS else []


def _all_reduce(name: str, group, gpu: bool, record: dict) -> list[str]:
    import torch
    import torch.distributed as dist

    size = dist.get_world_size(group)
    if size == 1:
        return []
    ones = torch.ones(ALL_REDUCE_ELEMENTS, device="cuda" if gpu else "cpu")
    started = time.perf_counter()
    dist.all_reduce(ones, group=group)
    wrong = int((ones != size).sum())  # also waits for the device
    record[f"all-reduce {name}, GB/s"] = round(4 * ALL_REDUCE_ELEMENTS / 1e9 / (time.perf_counter() - started), 3)
    return [f"an all-reduce {name} got {wrong} elements wrong"] if wrong else []


# ---------------------------------------------------------------------------------------------------------------------
# What the batch script reads afterwards (no torch from here).


def bad_nodes(control: Path, hosts_of_ranks: list[str]) -> dict[str, str]:
    """Return {node: reason} by the ranks' records; a rank without a record is bad where others waited for it in vain."""
    records = [read_json(control / f"preflight{k}.json") for k in range(len(hosts_of_ranks))]
    bad = {r["host"]: r["problems"][0] for r in records if r and r["problems"]}
    for r in records:
        for k, reason in (r or {}).get("blames", {}).items():
            bad.setdefault(hosts_of_ranks[int(k)], reason)
    return bad


if __name__ == "__main__":
    sys.exit(main())
