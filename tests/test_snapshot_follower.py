"""Evaluations beside the training: at the lowest priority, caught up at the end, gone with a stop, absent unless asked for."""

import json

import pytest

from tests import small_checkout
from tests.small_checkout import PATIENCE_SECONDS, held, interrupt, submit, wait_for

# looks at nothing, but ends as the real one does: when the run has finished, and later than it
EVALUATE = """
import json, os, pathlib, sys, time
run = pathlib.Path(sys.argv[1])
(run / "evaluations.jsonl").write_text(json.dumps({"argv": sys.argv[2:], "nice": os.nice(0)}))
while json.loads((run / "state.json").read_text() if (run / "state.json").exists() else "{}").get("status") != "finished":
    time.sleep(0.05)
time.sleep(0.5)
(run / "caught_up").touch()
"""


@pytest.fixture
def root(tmp_path):
    root = small_checkout.make(tmp_path)
    (root / "trainer" / "evaluate.py").write_text(EVALUATE)
    yield root
    small_checkout.check_nothing_left(root)


def test_it_runs_at_the_lowest_priority_and_catches_up(root):
    status, _, error = submit(root, "cluster.evaluate_snapshots=true")
    run = root / "runs" / "small"
    assert (status, error) == (0, "") and (run / "caught_up").exists()
    assert json.loads((run / "evaluations.jsonl").read_text()) == {"argv": ["--follow", "--device", "cpu"], "nice": 19}
    assert (run / "logs" / "0001_evaluate.log").exists()


def test_it_goes_with_a_stop_and_is_absent_unless_asked_for(root):
    run = root / "runs" / "small"
    process = held(root, "cluster.evaluate_snapshots=true")
    wait_for((run / "evaluations.jsonl").exists)
    interrupt(process)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130 and not (run / "caught_up").exists()
    (run / "evaluations.jsonl").unlink()
    status, _, _ = submit(root, "cluster.evaluate_snapshots=false")
    assert status == 0 and not (run / "evaluations.jsonl").exists()
