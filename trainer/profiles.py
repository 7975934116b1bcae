"""Traces on demand: `touch RUN/profile` while a run trains, and rank 0 writes torch.profiler's trace of its next steps.

RUN/profile may hold what to trace: rank numbers ("0 3") or "all". Nothing is sent to the processes: a file works the same under
Slurm, torchrun and locally, and no signal of NCCL's, Slurm's or ours is in its way. It is looked at every two seconds.
Written: RUN/profiles/<clock>-rank<r>.json (chrome://tracing, Perfetto), on GPUs also .memory.pickle (pytorch.org/memory_viz).
"""

import os
import time
from pathlib import Path

import torch

STEPS = 3  # that a trace holds
LOOK_SECONDS = 2.0


class Profiles:
    """Call `step` at the end of each step."""

    def __init__(self, run: Path, rank: int, device: torch.device, at_images: int = 0):
        self.run, self.rank, self.device, self.at_images = run, rank, device, at_images
        self.seen = self._requested()  # a request from before this start was for another one
        self.looked = time.monotonic()
        self.profiler: torch.profiler.profile | None = None
        self.begun, self.left = 0, 0

    def _requested(self) -> float:
        try:
            return (self.run / "profile").stat().st_mtime
        except OSError:
            return 0.0

    def _wanted(self, clock_before: int, clock: int) -> bool:
        if self.rank == 0 and clock_before < self.at_images <= clock:
            return True
        if time.monotonic() - self.looked < LOOK_SECONDS:
            return False
        self.looked, asked = time.monotonic(), self._requested()
        if asked <= self.seen:
            return False
        self.seen = asked
        try:
            words = (self.run / "profile").read_text().split()
        except OSError:  # removed meanwhile
            return False
        return words == ["all"] or str(self.rank) in (words or ["0"])

    def step(self, clock_before: int, clock: int) -> None:
        """Begin a trace where one is asked for, and end it some steps later."""
        if self.profiler is None:
            if self._wanted(clock_before, clock):
                self._begin(clock)
            return
        self.left -= 1
        if not self.left:
            self.close()

    def _begin(self, clock: int) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=100_000)
        self.begun, self.left = clock, STEPS
        self.profiler = torch.profiler.profile(activities=activities)
        self.profiler.start()

    def close(self) -> None:
        """End a trace that is under way and write it."""
        if self.profiler is None:
            return
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        path = self.run / "profiles" / f"{self.begun:010d}-rank{self.rank}.json"
        try:
            path.parent.mkdir(exist_ok=True)
            beside = path.with_name(f".{path.name}")
            profiler.export_chrome_trace(str(beside))
            os.replace(beside, path)
            if self.device.type == "cuda":
                torch.cuda.memory._dump_snapshot(str(path.with_suffix(".memory.pickle")))
        except OSError as error:  # a full disk: a trace is no reason to stop a run
            print(f"warning: no trace written: {error}", flush=True)
            return
        finally:
            if self.device.type == "cuda":  # or the history would cost time in every later step
                torch.cuda.memory._record_memory_history(enabled=None)
        print(f"trace of {STEPS} steps: {path}", flush=True)
