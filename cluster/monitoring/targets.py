"""Keep the living targets of all runs in one file for Prometheus: `python -m cluster.monitoring.targets runs --out FILE`.

Each rank announces itself in RUN/targets/ and touches the file as long as its process lives (trainer/targets.py). What has not been
touched for a minute is left out, and removed: so a run that was killed with SIGKILL vanishes from Prometheus.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from cluster.run_directory import write_atomically
from data_pipeline.command import command_line

STALE_SECONDS = 60.0


def living(folders: list[Path], stale_seconds: float = STALE_SECONDS, remove: bool = True) -> list[dict]:
    """Return the targets of the runs in (or that are) `folders` whose heart beats; remove the announcements of the others."""
    found, now = [], time.time()
    for folder in folders:
        for path in sorted([*folder.glob("targets/rank*.json"), *folder.glob("*/targets/rank*.json")]):
            try:
                if now - path.stat().st_mtime <= stale_seconds:
                    found += json.loads(path.read_text())
                elif remove:
                    path.unlink()
            except (OSError, ValueError):  # withdrawn while we looked, or in a folder that is not ours to change
                continue
    return found


@command_line()
def main(argv: list[str] | None = None) -> int:
    """Write the file, once or for ever; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cluster.monitoring.targets", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="folders of runs, or runs")
    parser.add_argument("--out", type=Path, required=True, help="file that prometheus.yml's file_sd_configs names")
    parser.add_argument("--every", type=float, default=0, help="go on, every so many seconds")
    parser.add_argument("--stale", type=float, default=STALE_SECONDS, help="seconds without a heartbeat (default: 60)")
    parser.add_argument("--keep", action="store_true", help="remove nothing from the runs")
    options = parser.parse_args(argv)
    for folder in options.folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; name one that holds runs, such as runs/")
    if options.out.suffix not in (".json", ".yml", ".yaml"):
        raise ValueError(f"--out {options.out}: Prometheus reads files ending in .json; name it so")
    before = None
    while True:
        targets = living(options.folders, options.stale, not options.keep)
        if targets != before:  # rewriting it makes Prometheus read it anew
            write_atomically(options.out, json.dumps(targets, indent=1))
            print(f"{len(targets)} targets in {options.out}", flush=True)
            before = targets
        if not options.every:
            return 0
        time.sleep(options.every)


if __name__ == "__main__":
    sys.exit(main())
