"""The file of snapshots and reconstructions: safetensors with one metadata key, "evenkeel", that holds a JSON header.

Written in a stream under a hidden name, then checksummed, fsynced and renamed: a file with its final name is whole. What must not
break: the header's length never changes after the first byte of data (the checksums are filled into reserved space), and offsets
follow the order of the layout, as the safetensors readers demand.
"""

import contextlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from data_pipeline.durable import sync_folder

FORMAT_VERSION = 1
KEY = "evenkeel"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}
_FROM_CODE = {code: dtype for dtype, code in _CODES.items()}
_LONGEST_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


class Span(NamedTuple):
    """Where a tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # from the start of the file, bytes
    num_bytes: int


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the little-endian bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


class TensorFile:
    """Write a file in the order of its layout; use as a context: leaving it normally commits, an exception leaves no trace."""

    def __init__(
        self, path: str | os.PathLike, header: dict, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ):
        self.path = Path(path)
        # wide elements first, so that every tensor is aligned whatever its neighbours' types
        self.layout = dict(sorted(layout.items(), key=lambda item: -item[1][0].itemsize))
        self._beside = self.path.with_name(f".{self.path.name}.{os.getpid()}.writing")
        own = ("checksums", "digest")  # of the file that a header may have been taken from
        self._header = {k: v for k, v in header.items() if k not in own} | {"format_version": FORMAT_VERSION}
        self._hashes = {name: xxhash.xxh3_64() for name in self.layout}
        self._left = {name: torch.Size(shape).numel() for name, (_, shape) in self.layout.items()}
        self._file = open(self._beside, "wb")
        try:
            self._file.write(self._encoded_header(reserve=True))
        except BaseException:  # longer than the buffer, and no space: no context has begun yet that would clean up
            self._discard()
            raise

    def _encoded_header(self, reserve: bool = False) -> bytes:
        checksums = {name: "0" * 16 if reserve else h.hexdigest() for name, h in self._hashes.items()}
        entries: dict = {}
        offset = 0
        for name, (dtype, shape) in self.layout.items():
            end = offset + torch.Size(shape).numel() * dtype.itemsize
            entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        header = self._header | {"checksums": checksums}
        header["digest"] = "0" * 16 if reserve else _digest(header, entries)
        entries = {"__metadata__": {KEY: json.dumps(header)}} | entries
        encoded = json.dumps(entries, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # data starts aligned
        return struct.pack("<Q", len(encoded)) + encoded

    def write(self, name: str, piece: Tensor) -> None:
        """Append the next elements of tensor `name`, cast to its dtype; tensors come in the order of `layout`.

        Raise ValueError where a value is not finite or has no place in the dtype.
        """
        assert next(n for n, left in self._left.items() if left) == name, f"{name} written out of order"
        dtype = self.layout[name][0]
        stored = piece.detach().to("cpu", dtype).contiguous()
        # NaN passes through aminmax, and what is beyond the range is so at an end: cheaper than isfinite of all
        if dtype.is_floating_point and not torch.isfinite(torch.stack(piece.detach().aminmax()).to("cpu", dtype)).all():
            raise ValueError(
                f"{self.path.name}: {name} holds values that are not finite in {_CODES[dtype]}; the weights are lost, or beyond "
                f"its range: then write fp32"
            )
        data = as_bytes(stored)
        self._left[name] -= stored.numel()
        self._hashes[name].update(data)
        self._file.write(data)

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                assert not any(self._left.values()), f"{self.path}: tensors not written whole: {self._left}"
                self._file.seek(0)
                self._file.write(self._encoded_header())
                self._file.flush()
                os.fsync(self._file.fileno())
                os.replace(self._beside, self.path)
                sync_folder(self.path.parent)
        finally:
            self._discard()

    def _discard(self) -> None:
        with contextlib.suppress(OSError):  # a full disk raised above already; closing would raise it once more
            self._file.close()
        self._beside.unlink(missing_ok=True)


def _digest(header: dict, entries: dict) -> str:
    """Return the checksum of all that is not tensors: one flipped bit in a clock or a length would pass unseen."""
    plain = json.loads(json.dumps([header, entries]))  # as it is read back: lists for tuples, text for keys
    return xxhash.xxh3_64_hexdigest(json.dumps(plain, sort_keys=True).encode())


def write(path: str | os.PathLike, header: dict, tensors: Mapping[str, Tensor]) -> None:
    """Write whole tensors, each in its own dtype, atomically."""
    with TensorFile(path, header, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}) as file:
        for name in file.layout:
            if tensors[name].numel():
                file.write(name, tensors[name])


def read_layout(path: str | os.PathLike) -> tuple[dict, dict[str, Span]]:
    """Return the header and where each tensor lies; reads the first kilobytes only. Raise ValueError for any other kind of file."""
    path = Path(path)
    size = path.stat().st_size
    try:
        with open(path, "rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            if length > min(size - 8, _LONGEST_HEADER_BYTES):
                raise ValueError("header longer than the file")
            entries = json.loads(f.read(length))
        metadata = entries.pop("__metadata__", {})
        start = 8 + length
        spans = {}
        for name, entry in entries.items():
            first, last = entry["data_offsets"]
            spans[name] = Span(_FROM_CODE[entry["dtype"]], tuple(entry["shape"]), start + first, last - first)
            if last - first != torch.Size(entry["shape"]).numel() * spans[name].dtype.itemsize:
                raise ValueError(f"{name} has another shape than bytes")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no readable safetensors file ({error}); it is damaged or of another kind") from None
    if size != max((s.offset + s.num_bytes for s in spans.values()), default=start):
        raise ValueError(f"{path}: {size} bytes long, its header says otherwise; it is cut off, write or copy it again")
    if KEY not in metadata:
        raise ValueError(
            f"{path}: safetensors without an evenkeel header; only files written by evenkeel say which network they hold"
        )
    try:
        header = json.loads(metadata[KEY])
        told, newer = header.pop("digest", ""), header["format_version"] > FORMAT_VERSION
        dict(header["checksums"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its header is damaged ({error}); copy the file again") from None
    if newer:
        raise ValueError(
            f"{path}: format version {header['format_version']} is newer than this program's {FORMAT_VERSION}; update evenkeel"
        )
    if told and told != _digest(header, entries):  # files of earlier versions have none
        raise ValueError(f"{path}: its header differs from its checksum; the file is damaged, copy it again")
    return header, spans


def read_header(path: str | os.PathLike) -> dict:
    """Return the header of a snapshot or reconstruction; cheap."""
    return read_layout(path)[0]


def iterate_tensors(path: str | os.PathLike) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) as stored, one at a time; raise ValueError where one differs from its checksum."""
    header, spans = read_layout(path)
    with open(path, "rb") as f:
        for name, span in spans.items():
            f.seek(span.offset)
            content = bytearray(f.read(span.num_bytes))
            if xxhash.xxh3_64_hexdigest(content) != header["checksums"].get(name):
                raise ValueError(f"{path}: tensor {name} differs from its checksum; the file is damaged, copy it again")
            flat = torch.frombuffer(content, dtype=span.dtype) if content else torch.empty(0, dtype=span.dtype)
            yield name, flat.reshape(span.shape)


def verify(path: str | os.PathLike) -> dict:
    """Read everything, compare every checksum, return the header; raise ValueError naming the first damaged tensor."""
    for _ in iterate_tensors(path):
        pass
    return read_header(path)
