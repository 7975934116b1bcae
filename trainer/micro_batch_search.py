"""The fastest micro-batch: powers of 2 are measured until they no longer fit, or no longer gain."""

from collections.abc import Callable
from pathlib import Path

import torch

from trainer import size
from trainer.config import Config, to_dict

LARGEST = 1024
GAIN = 1.02  # a device that is full: what gains less than this ends the search


def fits(config: Config, memory_bytes: float) -> bool:
    """Say whether a step should fit in memory: two copies of what the backward needs, and 32 bytes a parameter."""
    counted = size.count(to_dict(config)["model"])
    element = 4 if config.engine.activations == "fp32" else 2
    return 2 * element * counted.saved_elements * config.micro_batch + 32 * counted.parameters < memory_bytes


def memory(on_gpu: bool) -> float:
    """Return the bytes of the GPU, or half of what the machine has free: a CPU's memory is everyone's."""
    if on_gpu:
        return torch.cuda.get_device_properties(0).total_memory
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 0.5 * next(1024 * float(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def search(measure: Callable[[int], dict | None], should_fit: Callable[[int], bool], on_gpu: bool) -> list[dict]:
    """Return the measurements of the micro-batches that fit; `measure` returns None where memory did not suffice.

    It goes up until one does not fit or gains next to nothing: on a CPU from 1, trying nothing that might not fit; on a GPU, where
    every size is compiled anew, from half of the largest that should fit.
    """
    micro_batch, largest, found = 1, LARGEST, []
    while on_gpu and micro_batch < LARGEST and should_fit(4 * micro_batch):
        micro_batch *= 2
    while 1 <= micro_batch <= largest and (on_gpu or should_fit(micro_batch)):
        result = measure(micro_batch)
        if result is None:
            largest = micro_batch // 2
            if not found:
                micro_batch //= 2
            continue
        found.append(result)
        if len(found) > 1 and found[-1]["images_per_second"] < GAIN * found[-2]["images_per_second"]:
            break
        micro_batch *= 2
    return found
