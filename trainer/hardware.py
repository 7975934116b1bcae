"""What the machine says: memory, NVML's utilisation and power, disk space; and how long the parts of a step take on it."""

import resource
import shutil
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch


class Phases:
    """Times of the parts of a step. On a GPU they are the device's: events are recorded in passing and read at publications."""

    def __init__(self, device: torch.device):
        self.device = device
        self.host: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, name: str):
        """Add the time spent inside to a phase."""
        if self.device.type != "cuda" or name in ("data", "metrics"):  # waited for on the host
            started = time.perf_counter()
            yield
            self.host[name] += time.perf_counter() - started
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.append((name, begin, end))

    def take(self) -> dict[str, float]:
        """Return the seconds by phase since the last call; waits for the device."""
        seconds = dict(self.host)
        if self._events:
            self._events[-1][2].synchronize()
        for name, begin, end in self._events:
            seconds[name] = seconds.get(name, 0.0) + begin.elapsed_time(end) / 1000
        self.host.clear()
        self._events.clear()
        return seconds


def peak_memory(device: torch.device) -> int:
    """Return the bytes this rank has held at most: on its device if it has one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def ran_out_of_memory(error: Exception) -> bool:
    """Say whether it was memory that a library lacked: torch has a class for it, cuBLAS and cuDNN say so in words."""
    words = ("out of memory", "ALLOC_FAILED", "unable to find an engine")
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in words)


def gpu_load(device: torch.device) -> dict[str, float]:
    """Return utilisation and power by metric's name; {} without a GPU, or where NVML or its binding (nvidia-ml-py) is missing."""
    if device.type != "cuda":
        return {}
    try:
        used, milliwatts = torch.cuda.utilization(device), torch.cuda.power_draw(device)
    except (
        Exception
    ):  # without the binding an ImportError, where NVML refuses an error of the binding's own; no reason to stop a run
        return {}
    return {"evenkeel_gpu_utilization_ratio": used / 100, "evenkeel_gpu_power_watts": milliwatts / 1000}


def disk_free(folder: Path) -> int:
    """Return the free bytes of the file system that holds `folder`."""
    return shutil.disk_usage(folder).free
