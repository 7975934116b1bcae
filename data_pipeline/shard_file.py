"""A shard on local disk, open for reading, and the folder it lies in.

Maps are of whole files whose size was checked: a file that shrinks while it is mapped kills the process (SIGBUS), so shards are
replaced by renaming, never written in place. On file systems that may lose files under a reader, use pread.
"""

import mmap
import os
from pathlib import Path

import numpy as np

from data_pipeline import index


class LocalFolder:
    """Where shards lie: a local folder. `fetch.Cache` is the other kind."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def locate(self, name: str, refetch: bool = False) -> Path:
        """Return the local path of a file of the dataset; `refetch` asks for a fresh copy, which only a cache has."""
        return self.folder / name

    def ahead(self, names: list[str]):
        """Hint that files will be wanted soon: they are here."""

    def close(self):
        """Let go of nothing."""


class OpenShard:
    """A shard that is open for reading: its bytes, and its index as Python lists, which are quicker to look up than arrays."""

    descriptor = -1

    def __init__(self, path: Path, index_path: Path, shard, sample_bytes: int, use_mmap: bool):
        rows = index.read(index_path, shard.index_sha256, shard.samples, sample_bytes, shard.bytes)
        self.offsets, self.hashes, self.labels = rows["offset"].tolist(), rows["hash"].tolist(), rows["label"].tolist()
        self.keys = rows["key"]
        self.view = None
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        size = os.fstat(self.descriptor).st_size
        if size != shard.bytes:
            raise ValueError(
                f"shard {path} has {size} bytes, its manifest says {shard.bytes}; restore it or encode again"
            )
        if use_mmap:
            self.view = np.frombuffer(mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ), dtype=np.uint8)
            os.close(self.descriptor)  # the map has its own
            self.descriptor = -1

    def read_into(self, target: np.ndarray, offset: int):
        """Copy `target.nbytes` bytes at `offset` into a contiguous uint8 array."""
        if self.view is not None:
            target[:] = self.view[offset : offset + target.nbytes]
            return
        done, left = 0, memoryview(target)
        while done < target.nbytes:
            count = os.preadv(self.descriptor, [left[done:]], offset + done)
            if count == 0:
                raise ValueError(f"a shard of {offset + done} bytes was longer when it was opened; restore it")
            done += count

    def __del__(self):  # of the last batch in flight that uses it: only then may the file go
        if self.descriptor >= 0:
            os.close(self.descriptor)
