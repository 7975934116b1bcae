"""Which sources are running: the commit that snapshots, checkpoints and metrics name."""

import json
import subprocess

from trainer.config import ROOT


def commit() -> str:
    """Return the commit of the running sources, '' where it can't be known; '+' marks uncommitted changes."""
    recorded = ROOT / "COMMIT.json"  # a copy of the sources in RUN/code
    if recorded.is_file():
        known = json.loads(recorded.read_text())
        return known.get("commit", "") + ("+" if known.get("dirty") else "")
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=10)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # no git on a compute node
        return ""
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") if head.returncode == 0 else ""
