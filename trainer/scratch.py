"""The temporary folder that a replay works in (trainer/replay.py): it may read the run and write only here."""

import dataclasses
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from trainer import checkpoint
from trainer.config import Config, load


def folder_of(original: Path, at: int) -> Path:
    """Return the temporary folder of this replay: the same one for all ranks of a machine, and of no other replay."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    words = [
        original,
        at,
        os.getpid() if alone else (os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")),
        os.getuid(),
    ]
    name = hashlib.sha256(repr(words).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"evenkeel-replay-{name}" / original.name


def prepare(original: Path, scratch: Path, at: int) -> None:
    """Make the temporary folder: the checkpoints before `at` as links, what the compiler chose as a copy."""
    scratch.parent.mkdir(mode=0o700, exist_ok=True)
    if scratch.parent.stat().st_uid != os.getuid():
        raise ValueError(f"{scratch.parent}: belongs to somebody else; set TMPDIR to another folder")
    (scratch / "checkpoints").mkdir(parents=True, exist_ok=True)
    found = checkpoint.list_checkpoints(original)
    lost = checkpoint.abandoned(found)  # what the run went back behind leads elsewhere
    for path in found:
        if int(path.name) < at and path not in lost:
            try:
                (scratch / "checkpoints" / path.name).symlink_to(path)
            except FileExistsError:  # another rank of this machine was first
                pass
    rank = f"rank{int(os.environ.get('RANK', '0')):05d}"
    if (kept := original / "compile_cache" / rank).is_dir():
        shutil.copytree(kept, scratch / "compile_cache" / rank, dirs_exist_ok=True)


def open_config(original: Path, scratch: Path) -> Config:
    """Return the run's config, writing nowhere but to `scratch`."""
    if not (original / "config.yaml").is_file():
        raise ValueError(f"{original}: no run directory (no config.yaml in it); name a folder such as runs/quickstart")
    config = load(original / "config.yaml")
    quiet = {"address": "127.0.0.1", "port": 0, "tensorboard": False, "wandb": "", "profile_at_images": 0}
    return dataclasses.replace(
        config,
        run=str(scratch),
        metrics=dataclasses.replace(config.metrics, **quiet),
        data=dataclasses.replace(config.data, audit=""),
        engine=dataclasses.replace(config.engine, hang_seconds=0),
    )
