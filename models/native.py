"""C++ beside its Python: builds FILE.cpp once per machine into a shared library of torch operators, and loads it.

Used where a network is compiled for a CPU. What a maintainer must not break: ranks may race, and a killed build must leave nothing
in the way of the next, so a library is built beside its place and renamed.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

# by torch's name of what it found; not -march=native, which a shared cache could carry to an older machine
_VECTORS = {"AVX512": ("-mavx512f", "-mfma"), "AVX2": ("-mavx2", "-mfma")}


@functools.cache
def load(source: Path) -> None:
    """Load the operators that `source` defines, building them first where this machine has not; ValueError without a compiler."""
    torch.ops.load_library(_build(source))


def _build(source: Path) -> Path:
    from torch.utils import cpp_extension  # imports much that a process without compilation does not need

    compiler = os.environ.get("CXX", "g++")
    vectors = _VECTORS.get(torch.backends.cpu.get_cpu_capability(), ())
    # no errno and no traps: else a loop with a square root is not vectorised
    flags = ("-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", *vectors)
    built_from = [source.read_text(), torch.__version__, compiler, *flags]
    key = hashlib.sha256("\n".join(built_from).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "evenkeel"
    library = folder / f"{source.stem}-{key}.so"
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
        command = [compiler, *flags, *include, str(source), *link, "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        os.replace(out, library)
    return library
