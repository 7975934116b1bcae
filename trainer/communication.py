"""What ranks send each other per optimizer step: bytes by arithmetic, seconds at a bandwidth. Imports no torch.

Counts what DeepSpeed 0.19.8 really does, and tests/test_communication.py compares: stages 1 and 2 reduce gradients by an
all-reduce (each rank then keeps its part), stage 2 after every micro-batch, stage 1 once. A ring sends 2 (N - 1) / N of an
all-reduce's bytes from each of N ranks and (N - 1) / N of an all-gather's or a reduce-scatter's (Patarasu & Yuan 2009). The small
messages of the step (cut rows, votes) are left out.
"""

from typing import NamedTuple

from trainer import size
from trainer.config import Config, to_dict

RING = {"all-reduce": 2, "reduce-scatter": 1, "all-gather": 1}  # times (N - 1) / N
# stage 3: for the forward and again for the backward. A little less in truth, as the last layers stay for the backward
GATHERS_PER_MICRO_STEP = 2
WEIGHT_BYTES = {"fp32": 4, "bf16": 2}
GRADIENT_BYTES = 4  # sums are fp32 with 16-bit weights too
# bytes/s that one GPU can send: NVLink 4 (450 GB/s, one direction), InfiniBand NDR (400 Gb/s), 100 and 25 Gb/s Ethernet
BANDWIDTHS = {"NVLink": 450e9, "400 Gb/s": 50e9, "100 Gb/s": 12.5e9, "25 Gb/s": 3.125e9}


class Traffic(NamedTuple):
    """One kind of message in a step."""

    what: str
    operation: str  # a key of RING
    payload_bytes: int  # of the whole tensor, once
    times: int  # per optimizer step

    def sent_bytes(self, world: int) -> float:
        """Return what each rank sends in a step."""
        return RING[self.operation] * (world - 1) / world * self.payload_bytes * self.times


def per_step(parameters: int, zero_stage: int, micro_steps: int, weights: str = "fp32") -> list[Traffic]:
    """Return what one optimizer step of `micro_steps` micro-batches moves."""
    gradients, held = GRADIENT_BYTES * parameters, WEIGHT_BYTES[weights] * parameters
    if zero_stage == 3:
        return [
            Traffic("weights", "all-gather", held, GATHERS_PER_MICRO_STEP * micro_steps),
            Traffic("gradients", "reduce-scatter", gradients, micro_steps),
        ]
    reduced = Traffic("gradients", "all-reduce", gradients, micro_steps if zero_stage == 2 else 1)
    return [reduced] if zero_stage == 0 else [reduced, Traffic("updated weights", "all-gather", held, 1)]


def of_config(config: Config) -> list[Traffic]:
    """Return the traffic of a run on the ranks that it asks for, [] for a network whose size needs torch."""
    counted = size.count(to_dict(config)["model"])
    world = num_ranks(config)
    micro_steps = config.global_batch // (world * config.micro_batch)
    e = config.engine
    return per_step(counted.parameters, e.zero_stage, micro_steps, e.weights) if counted and world > 1 else []


def num_ranks(config: Config) -> int:
    """Return how many ranks the config's cluster group asks for."""
    return config.cluster.nodes * config.cluster.ranks_per_node


def lines(config: Config) -> list[str]:
    """Say what a step of the run sends, and how long that takes where nothing overlaps it."""
    world, traffic = num_ranks(config), of_config(config)
    if not traffic:
        return []
    parts = [f"{t.times} x {t.operation} of {t.payload_bytes / 1e9:.3g} GB ({t.what})" for t in traffic]
    sent = sum(t.sent_bytes(world) for t in traffic)
    times = ", ".join(f"{sent / rate:.3g} s at {name}" for name, rate in BANDWIDTHS.items())
    return [
        f"communication per step, ZeRO stage {config.engine.zero_stage}, {world} ranks: {', '.join(parts)}",
        f"each rank sends {sent / 1e9:.3g} GB: {times}, if nothing overlaps; measure: python -m trainer.comm_bench",
    ]
