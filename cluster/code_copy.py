"""The sources travel with the job: a copy of the checkout in RUN/code, with its commit and what was not committed.

A checkout is copied as it stands, uncommitted edits included; one without .git by its known folders. COMMIT.json says which it
was. The copy appears under its name complete or not at all.
"""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

ROOMS = ("models", "data_pipeline", "trainer", "cluster", "configs", "tests", "docs", ".ci")
# A file that git neither tracks nor ignores is copied when it may be source; a forgotten data set is not.
UNTRACKED_LIMIT_BYTES = 1_000_000


def copy_code(root: Path, target: Path) -> dict:
    """Copy the checkout at `root` to `target` and return what its COMMIT.json records."""
    record = describe(root)
    temporary = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    for name in record.pop("files"):
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        _copy(root / name, temporary / name)
    (temporary / "UNCOMMITTED.diff").write_bytes(record.pop("diff"))
    (temporary / "COMMIT.json").write_text(json.dumps(record, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    return record


def _copy(source: Path, target: Path) -> None:
    """Copy a file with the permissions that a new one gets here: others of a group may read a run, if not its author's checkout."""
    shutil.copyfile(source, target)
    if os.access(source, os.X_OK):
        mode = target.stat().st_mode
        target.chmod(mode | (mode & 0o444) >> 2)


def describe(root: Path) -> dict:
    """Return commit, dirty, untracked, left_out, files (relative paths to copy) and diff (bytes) of a checkout."""
    names, others = _names(root), _names(root, "--others", "--exclude-standard")
    if "cluster/submit.py" not in [*names, *others]:  # no git here, or a repository around us that does not know us
        return _describe_folder(root)
    commit = (_git(root, "rev-parse", "HEAD") or b"").decode().strip()
    diff = _git(root, "diff", "--binary", "HEAD", "--", ".") or b"" if commit else b""
    untracked, left_out = [], []
    for name in others:
        path = root / name
        small = path.is_file() and path.stat().st_size <= UNTRACKED_LIMIT_BYTES
        (untracked if small and (name.split("/")[0] in ROOMS or "/" not in name) else left_out).append(name)
    return {
        "commit": commit,
        "dirty": bool(diff or untracked or not commit),
        "untracked": untracked,
        "left_out": left_out[:100],
        "copied_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "files": [n for n in [*names, *untracked] if (root / n).is_file()],
        "diff": diff,
    }


def _describe_folder(root: Path) -> dict:
    files = [p.name for p in root.iterdir() if p.is_file() and p.stat().st_size <= UNTRACKED_LIMIT_BYTES]
    for room in ROOMS:
        for path in sorted((root / room).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
                files.append(str(path.relative_to(root)))
    record = {"commit": "", "dirty": False, "untracked": [], "left_out": []}
    diff = b""
    if (root / "COMMIT.json").is_file():  # the checkout is itself the copy inside a run
        record.update(json.loads((root / "COMMIT.json").read_text()))
        diff = (root / "UNCOMMITTED.diff").read_bytes() if (root / "UNCOMMITTED.diff").is_file() else b""
    record.update(copied_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"), files=files, diff=diff)
    return record


def _names(root: Path, *options: str) -> list[str]:
    return sorted(filter(None, (_git(root, "ls-files", "-z", *options) or b"").decode().split("\0")))


def _git(root: Path, *arguments: str) -> bytes | None:
    """Return git's output, or None where there is no git, no repository, or an error."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
