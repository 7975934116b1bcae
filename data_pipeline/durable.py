"""Files that are complete or absent, for every room: a reader never sees half of one, also after a power cut.

Torch-free; a maintainer must keep it so, and lean on no more than NFS and Lustre have: fsync of file and folder, rename. Locks
keep people from doing work twice, where a file system has them; nothing may be lost where it has none.
"""

import errno
import fcntl
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


_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # Lustre and NFS mounted so


def lock(file, wait: bool = False, shared: bool = False) -> None:
    """Lock an open file or folder until it is closed; raise BlockingIOError where another has it and we do not `wait`.

    A file system without locks lets everybody in.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
