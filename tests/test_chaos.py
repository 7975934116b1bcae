"""What happens to a run leaves no trace in what it ends with; the long version is `make chaos`."""

import subprocess
import sys

from tests.gloo import ROOT


def test_a_few_hits_lose_nothing():
    command = [sys.executable, "-m", "tests.chaos", "--hits", "6", "--steps", "16", "--seed", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "6 hits" in done.stdout and "images lost: 0" in done.stdout and "ended like the undisturbed run" in done.stdout
    )
