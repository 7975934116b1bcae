"""How a network's forward is compiled, by device; one place, so that the benchmark measures what the trainer runs."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from models import winograd
from trainer import draws
from trainer.config import Config
from trainer.model_keys import compiles


def wanted(config: Config, on_gpu: bool) -> bool:
    """Say whether the network of a run is compiled: where the config says so, and by itself on GPUs where that is one graph."""
    if config.engine.compile != "auto":
        return config.engine.compile == "true"
    return on_gpu and compiles(config.model) and (config.engine.zero_stage < 3 or config.model.family == "edm2")


def time_algorithms(config: Config) -> None:
    """Let cuDNN time its algorithms for each of a run's few shapes and keep the fastest, unless the run must repeat itself."""
    if not config.engine.deterministic:
        torch.backends.cudnn.benchmark = True


def keep_cache(folder: Path, rank: int) -> None:
    """Keep what compilers make in the run directory, by rank, so that a restart takes its first step soon; before any compilation.

    A variable that the user has set is left as it is.
    """
    cache = folder / "compile_cache" / f"rank{rank:05d}"
    for key, value in {
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
    }.items():
        os.environ.setdefault(key, value)


def _name_streams() -> None:
    # the checksum of a stream's name is a constant to a graph: the compiler cannot look into zlib, and masks are drawn inside
    torch.compiler.assume_constant_result(draws.stream_number)


def compile_forward(module: torch.nn.Module, cuda_graphs: bool = False, dynamic: bool | None = None) -> Callable:
    """Return the forward of `module`, one graph compiled for its device; on a CPU, 3x3 convolutions become Winograd's.

    `dynamic=False` is for who comes with a few shapes and wants a graph for each; else a second one makes the graph general.
    """
    _name_streams()
    if next(module.parameters()).device.type == "cpu":
        winograd.use_(module)
        # the network has chosen each layer's memory format; Inductor would force channels_last on all of them on a CPU.
        # Its C++ calls, a little faster, do not know attention that is recomputed (torch 2.13)
        recomputed = any(getattr(m, "activation_checkpointing", False) for m in module.modules())
        options = {"layout_optimization": False, "cpp_wrapper": not recomputed}
        return torch.compile(module.forward, fullgraph=True, dynamic=dynamic, options=options)
    # its choice of memory formats gave such networks wrong gradients on a CPU (docs/LOG.md): not trusted on a GPU either
    options = {"layout_optimization": not any(isinstance(m, torch.nn.Conv2d) for m in module.modules())}
    if cuda_graphs:
        return _captured(module, options)
    return torch.compile(module.forward, fullgraph=True, dynamic=dynamic, options=options)


def _captured(module: torch.nn.Module, options: dict) -> Callable:
    """Return the forward that replays CUDA graphs; nothing that a replay overwrites is left in anyone's hands."""
    compiled = torch.compile(module.forward, fullgraph=True, options=options | {"triton.cudagraphs": True})
    for p in module.parameters():  # before DeepSpeed's own hooks see them, and before they are accumulated
        p.register_hook(lambda gradient: gradient.clone())

    def forward(*args, **kwargs):
        torch.compiler.cudagraph_mark_step_begin()
        found = compiled(*args, **kwargs)
        return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, found)

    return forward


def compile_function(function: Callable) -> Callable:
    """Return `function` as one graph, for the shapes that it is called with."""
    _name_streams()
    return torch.compile(function, fullgraph=True, dynamic=False)
