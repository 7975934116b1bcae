"""The table says what the run directories say."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import status
from tests.small_checkout import wait_for


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "x"
    (run / "checkpoints" / "0000002048").mkdir(parents=True)
    (run / "checkpoints" / "0000002048" / "manifest.json").touch()
    (run / "config.yaml").touch()
    return run


def tell(run, **state):
    (run / "state.json").write_text(json.dumps({"host": socket.gethostname(), **state}))


def table(capsys, *words):
    assert status.main(list(words)) == 0
    head, *rows = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    return [dict(zip(head, cells, strict=True)) for cells in rows]


def test_table(run, capsys):
    (cells,) = table(capsys)
    assert cells["run"] == "runs/x" and cells["state"] == "not started"
    trainer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)  # trainer.train"])
    wait_for(lambda: b"trainer.train" in Path(f"/proc/{trainer.pid}/cmdline").read_bytes())
    tell(run, status="running", clock=3072, duration=4096, attempt=2, pid=trainer.pid, last_error="")
    (run / "metrics.jsonl").write_text('{"evenkeel_images_per_second": 1200.4, "evenkeel_eta_seconds": 65}\n')
    (cells,) = table(capsys, "runs/x")
    trainer.kill()
    trainer.wait()
    want = {
        "state": "running",
        "clock": "3Ki/4Ki",
        "images/s": "1,200",
        "left": "1m05s",
        "saved at": "2Ki",
        "attempt": "2",
    }
    assert {k: cells[k] for k in want} == want


def test_a_run_whose_trainer_died_is_not_called_running(run, capsys):
    tell(run, status="running", clock=1, pid=2**22 + 1)
    assert table(capsys)[0]["state"] == "gone"


def test_no_run(run, capsys):
    assert status.main(["runs/y"]) == 2
    assert "no run directory" in capsys.readouterr().err
