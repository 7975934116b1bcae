"""What makes a run on GPUs repeat itself bit for bit: `engine.deterministic: true`.

On CPUs it does so anyway. What must not break: `fix_environment` comes before anything starts CUDA, cuBLAS or NCCL, which read
their variables once. A variable that the user has set is left as it is.
"""

import os
from pathlib import Path

import torch

from trainer.compilation import keep_cache


def fix_environment(folder: Path, rank: int) -> None:
    """Choose deterministic algorithms in torch, cuDNN, cuBLAS, NCCL and Inductor; keep what the compiler chooses in `folder`.

    Each rank has a cache of its own, so that a run that continues takes the kernels that this very rank had measured and chosen.
    """
    if torch.cuda.is_initialized():
        raise RuntimeError("CUDA was started before engine.deterministic could take effect")
    keep_cache(folder, rank)
    for key, value in {
        # https://docs.nvidia.com/cuda/cublas/#results-reproducibility: eight buffers of 4 MiB per stream
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        # one algorithm, or NCCL picks ring, tree or NVLS by message size and what it measured: another order of the sums
        "NCCL_ALGO": "Ring",
    }.items():
        os.environ.setdefault(key, value)
    torch.backends.cudnn.benchmark = False  # it measures, and picks another algorithm on another day
    torch.use_deterministic_algorithms(True)
    # fills fresh memory with NaN, for programs that read what they have not written; costs time on every allocation
    torch.utils.deterministic.fill_uninitialized_memory = False
