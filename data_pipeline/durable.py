"""Files that are complete or absent, for every room: a reader never sees half of one, also after a power cut.

Torch-free; a maintainer must keep it so, and lean on no more than NFS and Lustre have: fsync of file and folder, rename, no locks.
"""

import os
import socket
import threading
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> Path:
    """Write beside, fsync, rename, fsync the folder; return `path`. Of hosts and threads that write at once, one wins whole."""
    beside = path.with_name(f".{path.name}.{socket.gethostname()}.{threading.get_native_id()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:  # half a file would take the space that may be missing
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return path


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
