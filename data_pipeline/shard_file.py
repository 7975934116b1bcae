"""A shard on local disk, open for reading, and the folder it lies in.

A file that shrinks while it is mapped kills its reader (SIGBUS), so its size is asked for before every sample: 0.2 us. What is left
is the microsecond between the question and the copy. On file systems of a network, where pages may vanish in other ways too
(a stale handle, a server that does not answer), samples are read with pread, which reports an error instead.
"""

import mmap
import os
import re
from pathlib import Path

import numpy as np

from data_pipeline import index

# Types in /proc/self/mountinfo whose pages come over a network, or from a process (fuse.*).
_NETWORKS = r"nfs|nfs4|lustre|gpfs|beegfs|ceph|glusterfs|cifs|smb3|smbfs|afs|9p|orangefs|pvfs2|wekafs|panfs|ocfs2|gfs2|fuse(\..*)?"


class LocalFolder:
    """Where shards lie: a local folder. `fetch.Cache` is the other kind."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def locate(self, name: str, refetch: bool = False) -> Path:
        """Return the local path of a file of the dataset; `refetch` asks for a fresh copy, which only a cache has."""
        return self.folder / name

    def counters(self) -> dict[str, int]:
        """Return nothing: there is no cache to count."""
        return {}

    def ahead(self, names: list[str]):
        """Hint that files will be wanted soon: they are here."""

    def close(self):
        """Let go of nothing."""


def choose_access(access: str, folder: Path) -> str:
    """Return mmap or pread; `auto` is pread where the folder lies on a file system of a network."""
    if access not in ("auto", "mmap", "pread"):
        raise ValueError(f"access {access!r} is none of auto, mmap, pread")
    if access != "auto":
        return access
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    except OSError:  # not Linux
        return "mmap"
    return "pread" if re.fullmatch(_NETWORKS, file_system(folder, mounts)) else "mmap"


def file_system(folder: Path, mounts: str) -> str:
    """Return the type of the file system that holds a folder, by the text of /proc/self/mountinfo (man 5 proc)."""
    path, longest, kind = os.path.join(os.path.realpath(folder), ""), "", ""
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) < 5:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        # Of two at the same point, the later one lies on top.
        if path.startswith(os.path.join(point, "")) and len(point) >= len(longest):
            longest, kind = point, after.split(" ")[0]
    return kind


class OpenShard:
    """A shard that is open for reading: its bytes, and its index as memory views, which look up quicker than arrays."""

    descriptor = -1

    def __init__(self, path: Path, index_path: Path, shard, sample_bytes: int, access: str):
        rows = index.read(index_path, shard.index_sha256, shard.samples, sample_bytes, shard.bytes)
        self.offsets, self.hashes, self.labels = (memoryview(rows[name]) for name in ("offset", "hash", "label"))
        self.keys = rows["key"]
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        size = os.fstat(self.descriptor).st_size
        if size != shard.bytes:
            raise ValueError(
                f"shard {path} has {size} bytes, its manifest says {shard.bytes}; restore it or encode again"
            )
        make = _mapped if access == "mmap" else _read
        # (a contiguous uint8 array [sample_bytes], offset): copy a sample
        self.read_into = make(self.descriptor, shard.bytes, sample_bytes)

    def __del__(self):  # of the last batch in flight that uses it: only then may the file go
        if self.descriptor >= 0:
            os.close(self.descriptor)


# Functions in closures, since attributes would cost a tenth of a sample's time.


def _mapped(descriptor: int, size: int, sample_bytes: int):
    view = np.frombuffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    seek, end = os.lseek, os.SEEK_END

    def read_into(target: np.ndarray, offset: int):
        if seek(descriptor, 0, end) != size:  # a third of fstat's time
            raise _shrank(size, seek(descriptor, 0, end))
        target[:] = view[offset : offset + sample_bytes]

    return read_into


def _read(descriptor: int, size: int, sample_bytes: int):
    def read_into(target: np.ndarray, offset: int):
        done = os.preadv(descriptor, (target,), offset)
        while done < sample_bytes:
            count = os.preadv(descriptor, (target[done:],), offset + done)
            if count == 0:
                raise _shrank(size, offset + done)
            done += count

    return read_into


def _shrank(size: int, found: int) -> ValueError:
    return ValueError(f"a shard of {size} bytes has {found} since it was opened; restore it")
