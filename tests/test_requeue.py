"""Whether a Slurm job starts again when its disk is full; all else is tested on a real Slurm (tests/test_slurm.py)."""

import json
import os

import pytest

from cluster import endings, requeue
from tests import small_checkout
from tests.small_disk import disk, full  # noqa: F401 - disk is a fixture

SCONTROL = """#!/bin/sh
[ "$1" = show ] && echo "JobId=7 JobState=RUNNING"
[ "$1" = requeue ] && echo "$2" >> "$REQUEUED"
exit 0
"""


@pytest.mark.parametrize(("status", "asked", "again"), [(75, True, True), (1, False, False)])
def test_a_full_disk_keeps_no_preempted_job_down_and_no_crashing_one_going(
    status,
    asked,
    again,
    disk,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("REQUEUED", str(tmp_path / "requeued"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (disk / "config.yaml").write_text(small_checkout.CONFIG)
    control = endings.control_folder(disk, 1)
    control.mkdir(parents=True)
    for rank in range(2):
        ended = {
            "status": status,
            "rank": rank,
            "stage": "train",
            "log": "x",
            "asked": asked,
            "by": "self",
            "time": 1.0,
        }
        (control / f"rank{rank}.json").write_text(json.dumps(ended))
    with full(disk):
        assert requeue.main([str(disk), "--attempt", "1", "--status", str(status)]) == status
    assert (tmp_path / "requeued").exists() == again, capsys.readouterr().out
