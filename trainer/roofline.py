"""What a training step must cost at least: FLOPs and bytes of every operation, counted on meta tensors, over the rates of a device.

Matrix work (convolutions, products, attention) takes the longer of its arithmetic and its operands' way through memory, operation
by operation; elementwise work is counted apart, in bytes as if nothing were fused: a compiler can bring it down to almost none.
"""

import time
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from models.denoiser import build
from trainer.loss import denoising_loss
from trainer.peaks import peak_bandwidth, peak_flops

# what launches nothing: views, and what only asks about shapes
FREE = ("view", "reshape", "expand", "permute", "transpose", "t.", "slice", "select", "unsqueeze", "squeeze", "detach", "alias",
         "empty", "split", "unbind", "as_strided", "unfold", "is_same_size", "sym_")  # fmt: skip

# of one pass over memory with two averages: the gradients' norm, then w, g, m, v and the averages read, all but g written
OPTIMIZER_BYTES = 4 + 24 + 20


@dataclass
class Work:
    """What a part of a step does."""

    flops: int = 0  # 2 per multiply-accumulate
    matrix_bytes: int = 0
    elementwise_bytes: int = 0
    kernels: int = 0  # without any fusion

    def __post_init__(self):
        self.operations: list[tuple[int, int]] = []  # (FLOPs, bytes) of each piece of matrix work

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Return the least time of the matrix work, elementwise work being fused away."""
        return sum(max(f / flops_per_second, b / bytes_per_second) for f, b in self.operations)


class _Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").removeprefix("_")
        if func.is_view or name.startswith(FREE):
            return out
        tensors = _tensors((args, kwargs or {}, out))
        size = sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
        self.work.kernels += 1
        if func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
            self.work.flops += flops
            self.work.matrix_bytes += size
            self.work.operations.append((flops, size))
        else:
            self.work.elementwise_bytes += size
        return out


def _tensors(tree):
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


def count(model: dict, activations: str, micro_batch: int) -> dict[str, Work]:
    """Return the work of forward and backward of one micro-batch, with the loss, by part."""
    with torch.device("meta"):
        # masks of dropout are drawn by position, on the device: not counted
        denoiser = build(model | {"dropout": 0.0}, activations).train()
        x = torch.empty(micro_batch, denoiser.channels, denoiser.resolution, denoiser.resolution)
        labels, sigma = torch.zeros(micro_batch, dtype=torch.int64), torch.empty(micro_batch)
        with _Counter() as forward:
            losses = denoising_loss(denoiser, x, labels, sigma, x)[0].sum()
        with _Counter() as backward:
            losses.backward()
    return {"forward": forward.work, "backward": backward.work}


@dataclass(frozen=True)
class Rates:
    """What a device reached just now, and what its data sheet says (0: not in the table, trainer/peaks.py)."""

    flops_per_second: float
    bytes_per_second: float
    peak_name: str
    peak_flops: float
    peak_bytes_per_second: float


def measure(device: torch.device, activations: str) -> Rates:
    """Time a matrix product in the type of the activations, and a copy in memory."""
    on_gpu = device.type == "cuda"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[activations]
    n, elements = (8192, 2**30) if on_gpu else (1024, 2**26)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    matrix = 2 * n**3 / _best_seconds(lambda: a @ b, device)
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() * 4 / _best_seconds(lambda: target.copy_(source), device)  # read and written
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    peak = peak_flops(name, activations)
    if peak is None:
        peak = (f"{name}, a {n}^3 product in {activations}, measured", matrix)
    return Rates(matrix, copy, peak[0], peak[1], peak_bandwidth(name) or copy)


def _best_seconds(function, device: torch.device, repeats: int = 5) -> float:
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def synchronize(device: torch.device) -> None:
    """Wait for the device, where it is another one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
