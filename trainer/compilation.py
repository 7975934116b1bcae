"""How a network's forward is compiled, by device; one place, so that the benchmark measures what the trainer runs."""

from collections.abc import Callable

import torch

from models import winograd


def compile_forward(module: torch.nn.Module) -> Callable:
    """Return the forward of `module`, one graph compiled for its device; on a CPU, 3x3 convolutions become Winograd's."""
    if next(module.parameters()).device.type != "cpu":
        return torch.compile(module.forward, fullgraph=True)
    winograd.use_(module)
    # the network has chosen each layer's memory format; Inductor would force channels_last on all of them on a CPU
    return torch.compile(module.forward, fullgraph=True, options={"layout_optimization": False, "cpp_wrapper": True})
