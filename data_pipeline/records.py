"""What a job that makes shards knows of those it has finished: one small record each, until the manifest comes.

A record is written after its shard has its name, and counts only for the very same job: same source, same settings. So a job that
was killed at any time starts again at the first missing shard, and jobs may share the work.
"""

import json
import shutil
from pathlib import Path

from data_pipeline import durable, manifest

FOLDER = ".encoding"  # of `convert` too; the name is that of the first command that had one


def _path(folder: Path, number: int) -> Path:
    return folder / FOLDER / f"{number:06d}.json"


def write(folder: Path, number: int, fingerprint: str, record: dict):
    """Note that a shard is finished."""
    durable.write_atomically(_path(folder, number), json.dumps(record | {"fingerprint": fingerprint}).encode())


def read(folder: Path, number: int, fingerprint: str) -> dict | None:
    """Return the record of a shard that this very job has finished before, if it has."""
    try:
        record = json.loads(_path(folder, number).read_bytes())
        if record["fingerprint"] != fingerprint:
            return None
        if record["samples"]:
            index = folder / manifest.index_name(record["name"])
            if (folder / record["name"]).stat().st_size != record["bytes"] or not index.exists():
                return None
        return record
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent, or from a job that was killed: made again


def start(folder: Path):
    """Make the folder of shards, and that of their records."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)


def clear(folder: Path):
    """Drop the records, and what jobs that were killed have left. Another job of the same work may do so at the same moment."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
