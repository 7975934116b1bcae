"""The arrays inside members: .npy headers read without trust, values checked.

The format is NumPy's NEP 1. Object arrays (pickles), Fortran order and other byte orders are refused.
"""

import ast
import re
from dataclasses import dataclass
from io import BytesIO

import numpy as np

from data_pipeline.manifest import DTYPES

_MAX_HEADER = 1024  # one of ours has 128 bytes
_MAGIC = b"\x93NUMPY"


@dataclass(frozen=True)
class Layout:
    """What every sample of a dataset shares: dtype name and shape [C, H, W]."""

    dtype: str
    shape: tuple[int, int, int]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def view(self, payload: np.ndarray) -> np.ndarray:
        """View a sample's bytes (uint8, any alignment) as its array."""
        return np.frombuffer(payload, dtype=self.dtype).reshape(self.shape)

    def __str__(self):
        return f"{self.dtype} {list(self.shape)}"


def parse_header(data) -> tuple[Layout, int]:
    """Read a .npy member, given as a buffer; return its layout and where its bytes start."""
    head = bytes(data[:12])
    if head[:6] != _MAGIC or len(head) < 12 or head[6:8] not in (b"\x01\x00", b"\x02\x00", b"\x03\x00"):
        raise ValueError("is empty" if not head else "is no .npy array")
    width = 2 if head[6] == 1 else 4
    length, start = int.from_bytes(head[8 : 8 + width], "little"), 8 + width
    text = bytes(data[start : start + min(length, _MAX_HEADER)])
    # A flat dict literal of plain characters, before any parser sees it.
    if len(text) != length or not re.fullmatch(rb"\{[^{}\x00-\x1f\x7f-\xff]*\} *\n?", text):
        raise ValueError("has a damaged .npy header")
    try:
        fields = ast.literal_eval(text.decode().strip())
        dtype, fortran, shape = fields["descr"], fields["fortran_order"], fields["shape"]
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        raise ValueError("has a damaged .npy header") from None
    allowed = {np.dtype(name).str: name for name in DTYPES}
    if not isinstance(dtype, str) or dtype not in allowed:
        raise ValueError(f"has dtype {dtype!r}; stored samples are {', '.join(DTYPES)}")
    if fortran is not False or not isinstance(shape, tuple) or len(shape) != 3:
        raise ValueError(f"has shape {shape!r}, fortran_order {fortran!r}; samples are [C, H, W] in C order")
    if not all(type(n) is int and 0 < n < 2**20 for n in shape):
        raise ValueError(f"has shape {shape!r}; samples are [C, H, W]")
    layout = Layout(allowed[dtype], shape)
    if start + length + layout.bytes != len(data):
        raise ValueError(f"has {len(data)} bytes; {layout} needs {start + length + layout.bytes}")
    return layout, start + length


def check_values(payload, layout: Layout):
    """Refuse NaN and infinity: at packing and indexing, since a checksum costs less than a look at every value on every read."""
    if layout.dtype != "uint8" and not np.isfinite(layout.view(payload)).all():
        raise ValueError("has NaN or infinite values; encode it again")


def to_bytes(array: np.ndarray) -> bytes:
    """Serialise an array as .npy."""
    file = BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return file.getvalue()
