"""What a run will need and cost, said before it is submitted: GPU memory, disk, GPU-hours, published quality.

Torch-free, from the arithmetic of trainer/size.py. Every line names what it assumes; a figure of the paper is marked as such.
"""

import os
import shutil
from pathlib import Path

from trainer.config import Config, to_dict
from trainer.peaks import MEMORY_BYTES, peak_flops
from trainer.size import TRAINING_FORWARDS, Size, bytes_per_parameter, count
from trainer.snapshot_plan import clocks_of, price

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# what CUDA, NCCL and cuDNN hold before the first tensor
CONTEXT_BYTES = 1.5e9
# gradients of activations and workspaces at the peak of backward, over what is kept for it; an assumption, not a measurement
BACKWARD_OVERHEAD = 1.2
# FID, its sigma_rel, FD_DINOv2, its sigma_rel; without guidance (Karras et al. 2024, arXiv 2312.02696, Tables 2 and 6)
PUBLISHED = {
    (64, 128): ("EDM2-XS", 3.53, 0.135, 103.39, 0.200),
    (64, 192): ("EDM2-S", 2.56, 0.130, 68.64, 0.190),
    (64, 256): ("EDM2-M", 2.25, 0.100, 58.44, 0.155),
    (64, 320): ("EDM2-L", 2.06, 0.085, 52.25, 0.155),
    (64, 384): ("EDM2-XL", 1.96, 0.085, 45.96, 0.155),
    (64, 448): ("EDM2-XXL", 1.91, 0.070, 42.84, 0.150),
}


def forecast(config: Config) -> list[str]:
    """Return the lines that `submit.py --dry-run` prints below the config."""
    size = count(to_dict(config)["model"])
    if size is None:
        how = f"python -m trainer.flops on this config counts model.family={config.model.family}"
        return [f"size:      not known without building the network; {how}"]
    world = config.cluster.nodes * config.cluster.ranks_per_node
    lines = [
        f"network:   {size.parameters / 1e6:,.1f} M parameters, {size.forward_flops / 1e9:,.1f} GFLOP per forward (2 per "
        f"multiply-accumulate), {TRAINING_FORWARDS * size.forward_flops / 1e9:,.1f} per training image",
        f"memory:    {_memory(config, size, world)}",
        f"compute:   {_compute(config, size, world)}",
    ]
    lines += [f"snapshots: {line}" for line in _snapshots(config, size)]
    lines.append(f"disk:      {_disk(config, size)}")
    return lines + [f"published: {line}" for line in _published(config)]


def rank_bytes(config: Config, size: Size, world: int) -> dict[str, float]:
    """Return the bytes that one rank is expected to hold, by kind."""
    held = bytes_per_parameter(len(config.ema.sigma_rel), config.engine.weights)
    held = held[str(config.engine.zero_stage)]
    width = ELEMENT_BYTES[config.engine.activations]
    kept = size.block_elements if config.engine.activation_checkpointing else size.saved_elements
    # 16-bit copies of fp32 weights: kept from step to step (engine.prepare_weights), or by autograd for the backward
    casts = width if width < 4 and config.engine.weights == "fp32" else 0
    return {
        "weights and optimizer": size.parameters * (held["replicated"] + held["sharded"] / world),
        "16-bit weights": size.parameters * casts,
        "activations": BACKWARD_OVERHEAD * config.micro_batch * kept * width,
        "context": CONTEXT_BYTES if config.cluster.gpus_per_node else 0.0,
    }


def _memory(config: Config, size: Size, world: int) -> str:
    parts = rank_bytes(config, size, world)
    there = (
        next((size for name, size in MEMORY_BYTES if name in config.cluster.gpu), 0)
        if config.cluster.gpus_per_node
        else 0
    )
    verdict = " - DOES NOT FIT" if there and sum(parts.values()) > there else ""
    named = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in parts.items() if value)
    return (
        f"{sum(parts.values()) / 1e9:.3g} GB per rank ({named}; ZeRO stage {config.engine.zero_stage}, {world} ranks, "
        f"micro_batch {config.micro_batch}, {config.engine.activations} activations)"
        + (f" of the {there / 1e9:g} GB of one {config.cluster.gpu}{verdict}" if there else "")
    )


def gpu_hours(config: Config, size: Size) -> float | None:
    """Return the GPU-hours of the whole run at `cluster.expected_mfu` of the named GPU's peak, None for a GPU not in the table."""
    c = config.cluster
    peak = peak_flops(c.gpu, config.engine.activations)
    if peak is None:
        return None
    return TRAINING_FORWARDS * size.forward_flops * config.duration_images / (c.expected_mfu * peak[1]) / 3600


def _compute(config: Config, size: Size, world: int) -> str:
    total = TRAINING_FORWARDS * size.forward_flops * config.duration_images
    hours = gpu_hours(config, size)
    text = f"{total / 1e21:.3g} ZFLOP"
    if not config.cluster.gpus_per_node:
        return text
    if hours is None:
        return f"{text}; no peak is known for cluster.gpu={config.cluster.gpu}"
    wall = hours / world / 24
    return (
        f"{text}: {hours:,.0f} GPU-hours, {wall:.3g} days on {world} x {config.cluster.gpu} at an MFU of "
        f"{config.cluster.expected_mfu:g} (assumed: cluster.expected_mfu)"
    )


def snapshot_bytes(config: Config, size: Size) -> int:
    """Return the bytes of one snapshot of one EMA length."""
    return size.parameters * ELEMENT_BYTES[config.snapshots.dtype]


def _snapshots(config: Config, size: Size) -> list[str]:
    s = config.snapshots
    return price(config.duration_images, s.every_images, config.ema.sigma_rel, s.dtype, snapshot_bytes(config, size))


def disk_bytes(config: Config, size: Size) -> int:
    """Return the bytes that the run directory will grow to: snapshots, and the checkpoints kept at once."""
    snapshots = len(clocks_of(config.duration_images, config.snapshots.every_images)) * len(config.ema.sigma_rel)
    c = config.checkpoints
    kept = c.keep_last + 1 + (config.duration_images // c.keep_every_images if c.keep_every_images else 0)
    # masters, two moments, averages, all fp32; one checkpoint more than are kept is there while it is written
    each = size.parameters * 4 * (3 + len(config.ema.sigma_rel))
    return snapshots * snapshot_bytes(config, size) + kept * each


def free_bytes(folder: Path) -> int:
    """Return what is free for this user on the file system where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _disk(config: Config, size: Size) -> str:
    need, free = disk_bytes(config, size), free_bytes(Path(config.run))
    short = " - NOT ENOUGH" if need > free else ""
    return f"{gigabytes(need)} of snapshots and checkpoints; {gigabytes(free)} free at {os.path.dirname(config.run)}{short}"


def gigabytes(count: float) -> str:
    """Return bytes as 0.123 GB, 12.3 GB or 12,345 GB."""
    return f"{count / 1e9:,.0f} GB" if count >= 1e11 else f"{count / 1e9:.3g} GB"


def shortages(config: Config) -> list[str]:
    """Return warnings where the run will not fit on its disk or its GPUs; quotas are not seen here."""
    size, lines = count(to_dict(config)["model"]), []
    if size is None:
        return []
    world = config.cluster.nodes * config.cluster.ranks_per_node
    if " - NOT ENOUGH" in (disk := _disk(config, size)):
        lines.append(
            f"warning: disk: {disk}; a full disk stops snapshots and checkpoints, not the training: free some, or set "
            "snapshots.every_images, snapshots.dtype or checkpoints.keep_last"
        )
    if " - DOES NOT FIT" in (memory := _memory(config, size, world)):
        lines.append(
            f"warning: memory: {memory}; lower micro_batch, set engine.activation_checkpointing=true, or raise engine.zero_stage"
        )
    return lines


def _published(config: Config) -> list[str]:
    m = config.model
    row = PUBLISHED.get((m.resolution, m.model_channels))
    standard = (m.channels, m.label_dim, list(m.channel_mult), m.num_blocks) == (4, 1000, [1, 2, 3, 4], 3)
    if row is None or not standard or m.family != "edm2":
        return []
    name, fid, fid_length, dino, dino_length = row
    return [
        f"{name} on ImageNet-512 reached FID {fid} at sigma_rel {fid_length:.3f} and FD_DINOv2 {dino} at {dino_length:.3f}, "
        "without guidance, in its published schedule (Karras et al. 2024, Tables 2 and 6)"
    ]
