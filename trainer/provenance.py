"""What snapshots and checkpoints say of where they come from: the commit that is running, and the config."""

import json
import subprocess

from trainer.config import ROOT, Config, digest, to_dict


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


def header(config: Config, manifest, origin: dict | None) -> dict:
    """Return what every snapshot of a run says of its network and data; `origin`: which weights the run began with."""
    data = {
        "codec": manifest.codec,
        "codec_hash": manifest.codec_hash,
        "moments": manifest.moments,
        "mean": list(manifest.mean),
        "std": list(manifest.std),
        "shape": list(manifest.shape),
        "label_dim": manifest.label_dim,
        "digest": manifest.digest,
    }
    if config.data.heldout:  # absent where nothing is, so that snapshots of earlier versions stay of one series
        data["heldout"] = config.data.heldout
    came_from = {"origin": origin} if origin else {}  # a series begun by an earlier version stays one
    return came_from | {
        "kind": "ema",
        "model": to_dict(config)["model"],
        "activations": config.engine.activations,
        "noise": to_dict(config)["noise"],
        "data": data,
        "update_interval_images": config.global_batch,
        "config_hash": digest(config),
        "dtype": config.snapshots.dtype,
    }
