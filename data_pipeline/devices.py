"""Which device a command computes on: `--device`, or the GPU where there is one."""

import os

import torch


def own_device() -> str:
    """Return this rank's GPU (torchrun says which rank it is here), or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def checked(name: str) -> str:
    """Return `name`; ValueError where torch has no such device here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: torch knows no such device; use cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: not tried with this program; use cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no GPU here; use --device cpu, or look at nvidia-smi")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: torch sees {torch.cuda.device_count()} GPUs here, counted from 0; use one of them"
        )
    return name
