"""The binary index beside each shard: where every sample's array lies, its label and its xxh3-64.

Layout: magic (8 bytes), version uint32, key width uint32, rows uint64, then the rows; little endian throughout. Offset and length
cover the array's bytes only, without container or .npy header: reading a sample is one copy, for tars and MDS files alike.
"""

import hashlib
import struct
from pathlib import Path

import numpy as np

from data_pipeline.durable import write_atomically
from data_pipeline.manifest import MAX_SAMPLE_BYTES

MAGIC = b"EVKLINDX"
VERSION = 1
_HEAD = struct.Struct("<8sIIQ")
MAX_KEY_BYTES = 1024
NO_LABEL = -1


def row_type(key_bytes: int) -> np.dtype:
    """Return the dtype of one row."""
    return np.dtype([("offset", "<u8"), ("length", "<u8"), ("label", "<i8"), ("hash", "<u8"), ("key", f"S{key_bytes}")])


def from_rows(rows: list[tuple]) -> np.ndarray:
    """Build an index from (offset, length, label, hash, key: bytes) tuples."""
    longest = max((len(row[4]) for row in rows), default=1)
    if longest > MAX_KEY_BYTES:
        raise ValueError(f"a key has {longest} bytes; keys have at most {MAX_KEY_BYTES}; rename the members")
    return np.array(rows, dtype=row_type(max(8, -(-longest // 8) * 8)))


def to_bytes(index: np.ndarray) -> bytes:
    """Serialise an index."""
    return _HEAD.pack(MAGIC, VERSION, index.dtype["key"].itemsize, len(index)) + index.tobytes()


def write(path: Path, index: np.ndarray) -> str:
    """Write an index atomically; return its SHA-256 (hex)."""
    data = to_bytes(index)
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()


def read(path: Path, sha256: str, samples: int, sample_bytes: int, shard_bytes: int) -> np.ndarray:
    """Read the index of a shard and check it against the manifest.

    Raises ValueError where it is damaged, of another version, or points outside the shard.
    """
    largest = _HEAD.size + samples * row_type(MAX_KEY_BYTES).itemsize
    with open(path, "rb") as file:
        data = file.read(largest + 1)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(
            f"index {path} does not match the manifest; it is damaged or of another dataset: restore or encode again"
        )
    return parse(path, data, samples, sample_bytes, shard_bytes)


def parse(path: Path, data: bytes, samples: int, sample_bytes: int, shard_bytes: int) -> np.ndarray:
    """Turn the bytes of an index into rows, trusting nothing."""
    if len(data) < _HEAD.size:
        raise ValueError(f"index {path} has {len(data)} bytes; it is truncated: restore it or encode again")
    magic, version, key_bytes, rows = _HEAD.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise ValueError(f"index {path} is no evenkeel index of version {VERSION}; encode again")
    if (
        not 0 < key_bytes <= MAX_KEY_BYTES
        or rows != samples
        or len(data) != _HEAD.size + rows * row_type(key_bytes).itemsize
    ):
        raise ValueError(
            f"index {path} has {rows} rows in {len(data)} bytes; the manifest says {samples} samples: encode again"
        )
    index = np.frombuffer(data, dtype=row_type(key_bytes), offset=_HEAD.size)
    if (index["length"] != sample_bytes).any() or sample_bytes > MAX_SAMPLE_BYTES:
        raise ValueError(f"index {path} has samples that are not {sample_bytes} bytes long; encode again")
    if (index["offset"] > max(0, shard_bytes - sample_bytes)).any() or sample_bytes > shard_bytes:
        raise ValueError(f"index {path} points outside its shard of {shard_bytes} bytes; encode again")
    return index
