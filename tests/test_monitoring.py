"""Dashboards and rules against the real thing: Grafana's schema, promtool, and a Prometheus that scrapes a real run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml

from cluster.monitoring import dashboards, picture, targets
from cluster.monitoring.panels import BOARDS
from data_pipeline import encode
from tests.gloo import ROOT, Ranks, free_port
from tests.small_checkout import wait_for
from trainer.metrics_table import TABLE

FOLDER = ROOT / "cluster" / "monitoring"
RULES = FOLDER / "rules"
needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="prometheus is not installed (Debian: prometheus)",
)
CHECKED_IN = sorted((FOLDER / "grafana" / "dashboards").glob("*.json"))


# ---------------------------------------------------------------------------------------------------------------------
# Dashboards.


def test_the_checked_in_dashboards_are_what_the_panels_make():
    pytest.importorskip("grafana_foundation_sdk")
    assert {p.stem for p in CHECKED_IN} == {board.uid for board in BOARDS}
    for board in BOARDS:
        text = (FOLDER / "grafana" / "dashboards" / f"{board.uid}.json").read_text()
        assert text == dashboards.render(board), f"{board.uid}: run python -m cluster.monitoring.dashboards"


@pytest.mark.parametrize("path", CHECKED_IN, ids=lambda p: p.stem)
def test_dashboards_follow_grafanas_schema(path):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((ROOT / "tests/data/grafana/dashboard.schema.json").read_text())
    board = json.loads(path.read_text())
    validator = jsonschema.Draft7Validator(schema)
    assert [e.message for e in validator.iter_errors(board)] == []
    assert board.get("id") is None and "${DS_" not in path.read_text(), "such dashboards fail when provisioned"
    assert list(validator.iter_errors({**board, "refresh": 5})), "the schema does find a wrong type"


def test_every_metric_of_the_table_is_on_a_dashboard():
    text = " ".join(query for board in BOARDS for panel in board.panels for query, _ in panel.queries)
    # what a dashboard shows in another form, or only in passing
    elsewhere = {"evenkeel_attempt", "evenkeel_hfu_ratio"}
    assert [m.name for m in TABLE if m.name not in text and m.name not in elsewhere] == []


# ---------------------------------------------------------------------------------------------------------------------
# Rules.


def promtool(*words: str, folder: Path = RULES) -> subprocess.CompletedProcess:
    return subprocess.run(["promtool", *words], cwd=folder, capture_output=True, text=True, timeout=60)


@needs_prometheus
def test_config_and_rules_are_valid():
    for words in (("check", "rules", "evenkeel.yml"), ("check", "config", "../prometheus.yml")):
        done = promtool(*words)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_each_alert_fires_when_it_should_and_is_quiet_when_not():
    done = promtool("test", "rules", "tests.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    alerts = {
        r["alert"]
        for g in yaml.safe_load((RULES / "evenkeel.yml").read_text())["groups"]
        for r in g["rules"]
        if "alert" in r
    }
    outcomes = {(t["promql_expr_test"][0]["expr"].split('"')[1], bool(t["promql_expr_test"][0]["exp_samples"]))
                for t in yaml.safe_load((RULES / "tests.yml").read_text())["tests"]}  # fmt: skip
    assert outcomes == {(alert, fires) for alert in alerts for fires in (True, False)}


@needs_prometheus
def test_a_changed_threshold_is_noticed(tmp_path):
    text, changed = (RULES / "evenkeel.yml").read_text(), {}
    for right, wrong in (("0.7 *", "0.5 *"), (", 600)", ", 6000)"), ("1.5 * quantile", "1.1 * quantile")):
        assert right in text
        *_, changed[right] = re.findall(r"alert: (\w+)", text.partition(right)[0])
        text = text.replace(right, wrong)
    (tmp_path / "evenkeel.yml").write_text(text)
    shutil.copy(RULES / "tests.yml", tmp_path)
    done = promtool("test", "rules", "tests.yml", folder=tmp_path)
    failed = re.findall(r'ALERTS{alertname=\\?"(\w+)', done.stdout + done.stderr)
    assert done.returncode == 1 and set(failed) == set(changed.values()), done.stderr


def test_rules_and_panels_use_no_metric_that_is_not_there():
    known = {m.name for m in TABLE}
    recorded = [r for g in yaml.safe_load((RULES / "evenkeel.yml").read_text())["groups"] for r in g["rules"]]
    for rule in recorded:
        for word in rule["expr"].replace("(", " ").replace("{", " ").replace("[", " ").replace(")", " ").split():
            assert not word.startswith("evenkeel_") or word in known, f"{rule}: {word}"


# ---------------------------------------------------------------------------------------------------------------------
# Targets.


ANNOUNCE = """
import sys, time
from pathlib import Path
from trainer.targets import Target
Target(Path(sys.argv[1]), int(sys.argv[2]), "127.0.0.1:1", {"run": "a", "rank": sys.argv[2]}, every_seconds=0.2)
print("announced", flush=True)
time.sleep(600)
"""


def test_a_rank_that_was_killed_vanishes_and_a_living_one_stays(tmp_path):
    run, out = tmp_path / "runs" / "a", tmp_path / "evenkeel.json"
    ranks = []
    for rank in ("0", "1"):
        command = [sys.executable, "-c", ANNOUNCE, str(run), rank]
        ranks.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
    try:
        assert all(p.stdout.readline() == "announced\n" for p in ranks)
        collect = [str(tmp_path / "runs"), "--out", str(out), "--stale", "600"]
        assert targets.main(collect) == 0
        assert {t["labels"]["rank"] for t in json.loads(out.read_text())} == {"0", "1"}
        ranks[1].send_signal(signal.SIGKILL)
        ranks[1].wait()
        assert (run / "targets" / "rank00001.json").exists(), "SIGKILL leaves the announcement behind"
        for path in (run / "targets").iterdir():
            os.utime(path, (time.time() - 1000,) * 2)
        wait_for(lambda: (run / "targets" / "rank00000.json").stat().st_mtime > time.time() - 500)  # it beats
        assert targets.main(collect) == 0
        assert [t["labels"]["rank"] for t in json.loads(out.read_text())] == ["0"]
        assert [p.name for p in (run / "targets").iterdir()] == ["rank00000.json"]
    finally:
        for p in ranks:
            p.kill()
            p.wait()


def test_rank_0_removes_what_an_earlier_start_left(tmp_path):
    from trainer.targets import Target

    (tmp_path / "targets").mkdir()
    for rank, age in ((7, 1000), (8, 0)):
        path = tmp_path / "targets" / f"rank{rank:05d}.json"
        path.write_text("[]")
        os.utime(path, (time.time() - age,) * 2)
    target = Target(tmp_path, 0, "127.0.0.1:1", {"run": "a", "rank": "0"}, every_seconds=0.05)
    end = time.monotonic() + 120
    while (tmp_path / "targets" / "rank00007.json").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert sorted(p.name for p in (tmp_path / "targets").iterdir()) == ["rank00000.json", "rank00008.json"]
    (tmp_path / "targets" / "rank00000.json").unlink()  # taken for dead while it was suspended
    while not (tmp_path / "targets" / "rank00000.json").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert json.loads((tmp_path / "targets" / "rank00000.json").read_text())[0]["labels"]["rank"] == "0"
    target.withdraw()
    assert [p.name for p in (tmp_path / "targets").iterdir()] == ["rank00008.json"]


@pytest.mark.parametrize(
    "words, said", [(["nowhere", "--out", "a.json"], "no such folder"), ([".", "--out", "a.txt"], ".json")]
)
def test_errors_are_one_line(words, said, capsys):
    assert targets.main(words) == 2
    assert said in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# A real Prometheus under a real run.


class Prometheus:
    """Debian's prometheus on loopback with this repository's configuration, scraping faster."""

    def __init__(self, folder: Path):
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(RULES / "evenkeel.yml")]
        self.targets = folder / "targets" / "evenkeel.json"
        self.targets.parent.mkdir(parents=True)
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.address = f"127.0.0.1:{free_port()}"
        command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}"]
        self.log = open(folder / "log", "wb")
        self.process = subprocess.Popen(
            [*command, f"--web.listen-address={self.address}"], stdout=self.log, stderr=self.log
        )

    def ask(self, path: str, **words) -> dict:
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(words)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)

    def ready(self) -> "Prometheus":
        end = time.monotonic() + 180
        while True:
            try:
                self.ask("query", query="1")
                return self
            except OSError:
                assert time.monotonic() < end, "Prometheus does not answer"
                time.sleep(0.1)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A Prometheus that has watched a run on two ranks from beginning to end."""
    folder = tmp_path_factory.mktemp("watched")
    assert encode.main(["sklearn:digits", str(folder / "digits"), "--codec", "pixels"]) == 0
    (folder / "runs").mkdir()
    prometheus = Prometheus(folder).ready()
    started = time.time()
    words = [
        "global_batch=64",
        "micro_batch=16",
        "model.model_channels=12",
        "model.channels_per_head=12",
        "duration_images=16Mi",
    ]
    words += [
        "metrics.every_images=128",
        "metrics.peak_flops=1e12",
        "snapshots.every_images=512",
        "checkpoints.every_images=1024",
    ]
    words += [f"run={folder / 'runs/watched'}", f"data.path={folder / 'digits'}", "cluster.ranks_per_node=2"]
    ranks = Ranks(2, folder / "logs", str(ROOT / "configs/quickstart.yaml"), *words)
    end = time.monotonic() + 600
    scraped = 0
    while scraped < 12:  # seconds, scrapes
        assert time.monotonic() < end and all(p.poll() is None for p in ranks.processes), ranks.output()
        targets.main([str(folder / "runs"), "--out", str(prometheus.targets)])
        time.sleep(1)
        found = prometheus.ask(
            "query", query="evenkeel_snapshot_stall_seconds and on (run) evenkeel_checkpoint_stall_seconds"
        )
        scraped += bool(found["data"]["result"])
    yield prometheus, started, folder / "runs" / "watched", ranks
    ranks.kill()
    prometheus.stop()


@needs_prometheus
@pytest.mark.slow
def test_every_panel_has_data_and_its_legends_labels_exist(watched):
    prometheus, started, _, _ = watched
    shown, absent = 0, {"a GPU", "ODE blocks", "an alert"}
    for board in BOARDS:
        for panel in board.panels:
            for query, legend in panel.queries:
                query = query.replace("$run", ".*").replace("$__rate_interval", "10s")
                answer = prometheus.ask("query_range", query=query, start=started, end=time.time(), step=1)
                series = answer["data"]["result"]
                assert answer["status"] == "success"
                assert series or panel.needs in absent, f"{board.title}, {panel.title}: {query} is empty"
                shown += bool(series)
                for one in series:
                    named = {word.split("}}")[0] for word in legend.split("{{")[1:]}
                    assert named <= set(one["metric"]), f"{board.title}, {panel.title}: {legend} for {one['metric']}"
    assert shown > 60


@needs_prometheus
@pytest.mark.slow
def test_a_dashboard_is_drawn_without_grafana(watched, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    prometheus, started, run, _ = watched
    words = ["--prometheus", f"http://{prometheus.address}", "--minutes", str((time.time() - started) / 60)]
    for board in BOARDS:
        assert picture.main([board.uid, "--out", str(tmp_path / f"{board.uid}.png"), "--run", run.name, *words]) == 0
        drawn = int(capsys.readouterr().out.split()[-2])
        assert (
            drawn >= sum(not panel.needs for panel in board.panels)
            and (tmp_path / f"{board.uid}.png").stat().st_size < 200_000
        )
    assert picture.main(["evenkeel-run", "--out", str(tmp_path / "none.png"), "--run", "nobody", *words]) == 2
    assert "no data" in capsys.readouterr().err and not (tmp_path / "none.png").exists()


def test_a_prometheus_that_does_not_answer_is_one_line(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert picture.main(["evenkeel-run", "--out", str(tmp_path / "a.png"), "--prometheus", "http://127.0.0.1:9"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --prometheus http://127.0.0.1:9: ") and error.count("\n") == 1


@needs_prometheus
@pytest.mark.slow
def test_rules_evaluate_and_a_killed_run_is_seen_and_then_forgotten(watched):
    prometheus, _, run, ranks = watched
    groups = prometheus.ask("rules")["data"]["groups"]
    assert [r["name"] for g in groups for r in g["rules"] if r["health"] != "ok"] == []
    assert prometheus.ask("query", query="evenkeel:seconds_since_step")["data"]["result"]
    up = prometheus.ask("query", query="up == 1")["data"]["result"]
    assert sorted(s["metric"]["instance"] for s in up) == ["watched/0", "watched/1"], "the same names after a restart"
    ranks.kill()  # SIGKILL: nobody withdraws anything

    def becomes(query: str, count: int, seconds: float = 180):
        end = time.monotonic() + seconds
        while len(prometheus.ask("query", query=query)["data"]["result"]) != count:
            assert time.monotonic() < end, query
            time.sleep(0.3)

    becomes("up == 0", 2)
    assert len(list((run / "targets").iterdir())) == 2
    time.sleep(2)
    targets.main([str(run.parent), "--out", str(prometheus.targets), "--stale", "2"])
    becomes("up", 0)
