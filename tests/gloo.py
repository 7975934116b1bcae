"""Run a function on N real gloo ranks: `results = on_ranks(2, function, *args)`, one result per rank.

The function lives at the top level of a test module and is called in a fresh process with the rank variables set.
"""

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from pathlib import Path


def on_ranks(world: int, function, *args, timeout_seconds: float = 180) -> list:
    """Return what `function(*args)` returns on each rank; raise with the first rank's traceback if one raises."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(r) for r in range(world)]
        processes = [
            context.Process(target=_rank, args=(r, world, port, files[r], function, args)) for r in range(world)
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


def _rank(rank: int, world: int, port: int, file: Path, function, args) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
    )
    import torch

    torch.set_num_threads(1)
    status = 0
    try:
        result = (True, function(*args))
    except BaseException:
        result, status = (False, f"rank {rank}:\n{traceback.format_exc()}"), 1
    beside = file.with_suffix(".writing")
    beside.write_bytes(pickle.dumps(result))
    beside.rename(file)
    os._exit(status)  # a peer may be gone: the process group's destructors would wait for it
