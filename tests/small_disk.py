"""A real file system of a few megabytes, and a way to fill it: what tests of full disks run on (root only: they mount it)."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """Yield the folder of a megabyte; skip the test where none can be mounted."""
    with mounted(tmp_path / "disk", 2**20) as folder:
        yield folder


@contextlib.contextmanager
def mounted(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Make `folder` a file system of its own while the block runs; skip the test where that cannot be."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "evenkeel-test", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def full(folder: Path, leave_bytes: int = 0):
    """Let the disk be full, but for about `leave_bytes`, while the block runs."""
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\0" * 4096):
            pass
    os.truncate(ballast, max(0, ballast.stat().st_size - leave_bytes))
    yield
    ballast.unlink()
