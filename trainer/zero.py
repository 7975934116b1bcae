"""ZeRO without DeepSpeed: what it is told, and the check that what it made of the network is what we took it for.

What must not break: `gradient_clipping` stays written out, for DeepSpeed 0.19.3 and later clip at 1.0 unless told; and no start
skips the check, for a layout misread trains other tensors than it names.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from trainer.config import Config
from trainer.fragments import Fragment

# gradients that are reduced in one message: 128 MiB of fp32, some ten of them for EDM2-S
BUCKET_ELEMENTS = 2**25


def settings(config: Config, num_parameters: int, micro_steps: int, overlaps: bool) -> dict:
    """Return DeepSpeed's config for a run whose network has `num_parameters`; `overlaps` where there is something to overlap.

    Overlapping, DeepSpeed waits for the whole device after every backward: a GPU that is alone has better to do.
    """
    zero = {
        "stage": config.engine.zero_stage,
        "round_robin_gradients": False,  # with it, `_hp_mapping` points at other tensors
        "overlap_comm": config.engine.overlap and overlaps,
        # DeepSpeed's default is one bucket of 2 GB, which would hold most networks whole and overlap nothing
        "reduce_bucket_size": min(num_parameters, BUCKET_ELEMENTS),
    }
    if config.engine.zero_stage in (1, 2):
        zero["compute_grad_norm"] = False  # with it, DeepSpeed drops a step with a non-finite gradient in silence
    if config.engine.zero_stage == 3:
        # one flat partition, so that one step of Adam sees all of this rank's fragments
        zero["sub_group_size"] = 2**62
        # tensors below a thousandth of the network (gains, the ends) stay whole on each rank: memory that nobody misses
        zero["stage3_param_persistence_threshold"] = min(100_000, num_parameters // 1000)
        # DeepSpeed would keep a network of up to 1e9 parameters whole from its first gathering on, and save nothing
        zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = num_parameters // 8
        zero["stage3_prefetch_bucket_size"] = num_parameters // 16
    sixteen_bit = {}
    if config.engine.weights != "fp32":  # gradients are summed, over micro-batches and over ranks, in fp32
        sixteen_bit = {
            "bf16": {"enabled": True, "check_grad_overflow": False},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    return sixteen_bit | {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": 0.0,
        "steps_per_print": 1_000_000_000,
        "zero_optimization": zero,
        "checkpoint": {"tag_validation": "Fail"},
        # it would wait for the device before every forward and after every backward, to print a rate that nobody reads
        "timers": {"throughput": {"enabled": False}},
    }


def check_values(fragments: Sequence[Fragment], module: torch.nn.Module, stage: int) -> None:
    """Assert that each fragment holds what the module's parameter of its name has there."""
    parameters = dict(module.named_parameters())
    for f in fragments:
        p, begin = parameters[f.name].detach(), f.start
        if stage == 3:
            p, begin = parameters[f.name].ds_tensor, 0
        copy = p.reshape(-1)[begin : begin + f.master.numel()]
        assert torch.equal(f.master.to(copy.dtype), copy), f"{f.name}: the master found is not this parameter's"


def check_coverage(fragments: Sequence[Fragment], shapes: dict[str, tuple[int, ...]]) -> None:
    """Assert that the fragments of all ranks cover every element of every tensor once; collective."""
    mine = [(f.name, f.start, f.master.numel()) for f in fragments]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    pieces = {name: [] for name in shapes}
    for name, start, n in sorted(piece for part in everyone for piece in part):
        pieces[name].append((start, n))
    for name, found in pieces.items():
        total = math.prod(shapes[name])
        ends = [0] + [start + n for start, n in found]
        assert [start for start, _ in found] + [total] == ends, f"{name}: {found} do not cover {total} elements once"
