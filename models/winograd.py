"""3x3 convolutions on CPUs by Winograd's F(4x4, 3x3) (Lavin & Gray, arXiv 1509.09308): a quarter of the multiplications.

oneDNN's direct convolution runs at the peak of the core, so that only fewer multiplications make it faster. The price is a
rounding error of about 1e-5 of the largest output instead of 1e-6; it is therefore used where a network is compiled for a CPU,
never on a GPU, and eager mode stays exact. What a maintainer must not break: `conv3x3_backward` is the transpose of `conv3x3`.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_suffix(".cpp")
_LANES = 16  # of the kernel: channels come in multiples of it
# 36 transformed filters are written and read for every 3x3 filter: below this many tiles that costs more than it saves (measured)
_FEWEST_TILES = 16
# by torch's name of what it found; not -march=native, which a shared cache could carry to an older machine
_VECTORS = {"AVX512": ("-mavx512f", "-mfma"), "AVX2": ("-mavx2", "-mfma")}


def use_(module: torch.nn.Module) -> None:
    """Let every layer of `module` that can compute this way; builds the kernel on first use.

    Raise ValueError where there is no C++ compiler, which compilation for a CPU needs anyway.
    """
    _load()
    for layer in module.modules():
        if hasattr(layer, "winograd"):
            layer.winograd = True


def suits(x: Tensor, weight: Tensor) -> bool:
    """Say whether `conv3x3` can take this convolution and is faster: fp32, 3x3, on a CPU, whole 4x4 tiles and enough of them."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or weight.shape[0] % _LANES or weight.shape[1] % _LANES:
        return False
    height, width = x.shape[2:]
    return height % 4 == 0 and width % 4 == 0 and x.shape[0] * height * width // 16 >= _FEWEST_TILES


def conv3x3(x: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Return conv2d(x, scale weight, padding 1), channels_last; `x` is [N, in, H, W], `weight` [out, in, 3, 3], see `suits`."""
    return torch.ops.evenkeel.conv3x3(x, weight, scale)


@functools.cache
def _load() -> None:
    torch.ops.load_library(_build())

    @torch.library.register_fake("evenkeel::conv3x3")
    def _(x, weight, scale):
        shape = (x.shape[0], weight.shape[0], *x.shape[2:])
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    @torch.library.register_fake("evenkeel::conv3x3_backward")
    def _(grad, x, weight, scale):
        return torch.empty_like(x, memory_format=torch.channels_last), torch.empty_like(weight).contiguous()

    def keep(ctx, inputs, output):
        x, weight, ctx.scale = inputs
        ctx.save_for_backward(x, weight)

    def backward(ctx, grad):
        return *torch.ops.evenkeel.conv3x3_backward(grad, *ctx.saved_tensors, ctx.scale), None

    torch.library.register_autograd("evenkeel::conv3x3", backward, setup_context=keep)


def _build() -> Path:
    """Return the built library; built beside and renamed, so that ranks may race and a killed build leaves nothing in the way."""
    from torch.utils import cpp_extension  # imports much that a process without compilation does not need

    compiler = os.environ.get("CXX", "g++")
    vectors = _VECTORS.get(torch.backends.cpu.get_cpu_capability(), ())
    flags = ("-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp", *vectors)
    built_from = [_SOURCE.read_text(), torch.__version__, compiler, *flags]
    key = hashlib.sha256("\n".join(built_from).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "evenkeel"
    library = folder / f"winograd-{key}.so"
    if library.exists():
        return library
    if shutil.which(compiler) is None:
        raise ValueError(
            f"engine.compile on a CPU needs a C++ compiler, and {compiler} is not there: install one or set engine.compile=false"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        out = Path(own, library.name)
        include = [f"-I{path}" for path in cpp_extension.include_paths()]
        link = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu"]
        command = [compiler, *flags, *include, str(_SOURCE), *link, "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        os.replace(out, library)
    return library
