"""Compressed MDS shards -> the plain ones beside them, once: what StreamingDataset does with a local copy.

fp16 latents shrink by 8 % only, so nothing here writes compressed shards; others do. gzip and bzip2 are Python's own; zstd, brotli
and snappy need their library, which comes with mosaicml-streaming and is named where it is missing.
"""

import bz2
import gzip
import importlib
from pathlib import Path

import xxhash

from data_pipeline import durable

# suffix of the file as the library names it: (module, package of PyPI)
_LIBRARIES = {"zstd": ("zstd", "zstd"), "br": ("brotli", "brotli"), "snappy": ("snappy", "python-snappy")}


def unpack(packed: Path, target: Path, num_bytes: int, hashes: dict[str, str]):
    """Decompress a shard durably and atomically; what comes out must have the size and, where known, the hash of the index.

    Raises ValueError, in one line, where it has not, or where a library is missing.
    """
    if num_bytes >= 2**32:
        raise ValueError(f"{target} would have {num_bytes} bytes; MDS shards are below 4 GiB: is index.json damaged?")
    try:
        with open(packed, "rb") as file:
            content = _decompress(packed, file, num_bytes + 1)
    except ValueError:
        raise
    except FileNotFoundError:
        raise ValueError(f"neither {target} nor {packed.name} beside it is there; restore one of them") from None
    except Exception as error:  # zlib, zstd, brotli and snappy raise errors of their own on damaged data
        raise ValueError(f"{packed} cannot be decompressed ({type(error).__name__}: {error}); restore it") from None
    if len(content) != num_bytes:
        raise ValueError(f"{packed} holds {len(content)} bytes, index.json says {num_bytes}; restore it")
    if hashes.get("xxh3_64") not in (None, xxhash.xxh3_64_hexdigest(content)):
        raise ValueError(f"{packed} does not hold what index.json says (xxh3_64); restore it")
    durable.write_atomically(target, content)


def _decompress(packed: Path, file, limit: int) -> bytes:
    suffix = packed.suffix.removeprefix(".")
    if suffix in ("gz", "bz2"):
        return (gzip if suffix == "gz" else bz2).open(file, "rb").read(limit)
    if suffix not in _LIBRARIES:
        raise ValueError(f"{packed} is compressed by {suffix!r}; known are gz, bz2, {', '.join(_LIBRARIES)}")
    module, package = _LIBRARIES[suffix]
    try:
        library = importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{packed} needs {package} to be read; install it with: pip install {package}") from None
    return library.decompress(file.read())
