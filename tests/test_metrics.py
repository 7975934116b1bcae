"""What is exported equals the table, on every rank, to Prometheus and to the log alike."""

import json
import re
import socket
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.small_checkout import wait_for
from tests.small_disk import disk, full  # noqa: F401 - disk is a fixture
from trainer import targets
from trainer.config import ROOT
from trainer.metrics import Metrics
from trainer.metrics_table import TABLE, markdown


def scrape(metrics: Metrics):
    text = urllib.request.urlopen(f"http://{metrics.endpoint}/metrics", timeout=60).read().decode()
    return {f.name: f for f in text_string_to_metric_families(text)}


def fill(metrics: Metrics) -> None:
    for i, m in enumerate(TABLE):
        metrics.set(m.name, i + 0.5, **dict.fromkeys(m.labels, "x"))


@pytest.fixture
def ranks(tmp_path):
    both = [Metrics(tmp_path, rank, attempt=3, address="127.0.0.1", port=0) for rank in (0, 1)]
    yield both
    for m in both:
        m.close()


def test_the_endpoints_serve_exactly_the_table(ranks):
    for rank, metrics in enumerate(ranks):
        fill(metrics)
        families = scrape(metrics)
        expected = {m.name.removesuffix("_total"): m for m in TABLE if m.scope == "rank" or rank == 0}
        assert families.keys() == expected.keys()
        for name, m in expected.items():
            samples = [s for s in families[name].samples if not s.name.endswith("_created")]
            assert (families[name].type, families[name].documentation) == (m.type, m.help)
            assert [set(s.labels) for s in samples] == [set(m.labels)] and samples[0].value == TABLE.index(m) + 0.5


def test_the_log_has_the_same_names_and_each_line_its_attempt(ranks, tmp_path):
    fill(ranks[0])
    ranks[0].publish(0)
    ranks[0].set("evenkeel_samples_read_total", 1000)
    ranks[0].publish(0)
    ranks[0].set("evenkeel_loss", float("nan"))
    ranks[0].publish(0)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert set(lines[0]) == {"time", "attempt"} | {m.name for m in TABLE}
    assert lines[2]["evenkeel_loss"] is None, "JSON has no NaN"
    assert lines[0]["attempt"] == 3 and lines[1]["evenkeel_samples_read_total"] == 1000
    assert scrape(ranks[0])["evenkeel_samples_read"].samples[0].value == 1000, "a counter's total is set, not added"
    assert lines[0]["evenkeel_phase_seconds"] == {
        "phase=x": [m.name for m in TABLE].index("evenkeel_phase_seconds") + 0.5
    }


def test_a_series_without_a_value_is_neither_served_nor_logged(ranks, tmp_path):
    for logsnr in ("0", "9"):
        ranks[0].set("evenkeel_loss_by_logsnr", 0.5, logsnr=logsnr)
    ranks[0].forget("evenkeel_loss_by_logsnr", logsnr="9")
    ranks[0].forget("evenkeel_loss_by_logsnr", logsnr="8")  # never had one
    ranks[1].forget("evenkeel_loss_by_logsnr", logsnr="9")  # not this rank's
    ranks[0].publish(0)
    assert [s.labels for s in scrape(ranks[0])["evenkeel_loss_by_logsnr"].samples] == [{"logsnr": "0"}]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["evenkeel_loss_by_logsnr"] == {"logsnr=0": 0.5}


def test_targets_are_announced_on_free_ports_and_withdrawn(tmp_path):
    both = [Metrics(tmp_path, rank, attempt=1, address="127.0.0.1", port=0) for rank in (0, 1)]
    files = sorted((tmp_path / "targets").glob("*.json"))
    targets = [json.loads(f.read_text())[0] for f in files]
    assert [t["labels"]["rank"] for t in targets] == ["0", "1"]
    assert len({t["targets"][0] for t in targets}) == 2
    assert all(t["targets"][0].startswith("127.0.0.1:") for t in targets), "loopback unless told otherwise"
    for m in both:
        m.close()
    assert not list((tmp_path / "targets").iterdir())


def test_names_follow_the_convention():
    for m in TABLE:
        assert (
            re.fullmatch(r"evenkeel_[a-z_]+", m.name) and m.type in ("gauge", "counter") and m.scope in ("run", "rank")
        )
        assert m.name.endswith("_total") == (m.type == "counter") and m.help and m.unit


def test_the_document_is_generated_from_the_table():
    assert (ROOT / "docs/metrics.md").read_text() == markdown()


def test_lines_that_a_full_disk_refused_are_written_whole_when_it_has_space_again(disk, capsys):  # noqa: F811
    metrics = Metrics(disk, 0, attempt=1, address="127.0.0.1", port=0)
    for i in range(60):  # as long as the line of a network with as many layers, and longer than any buffer
        for layer in range(8):
            metrics.set(
                "evenkeel_gain", 1 / (i + 1), layer=f"a layer of a name as long as names of layers are {i} {layer}"
            )
    metrics.publish(1)
    with full(disk, leave_bytes=10_000):
        for clock in (2, 3, 4):
            metrics.set("evenkeel_images_seen", clock)
            metrics.publish(clock)
    metrics.set("evenkeel_images_seen", 5)
    metrics.publish(5)
    with full(disk):
        metrics.set("evenkeel_images_seen", 6)
        metrics.publish(6)
        metrics.close()  # the run is saved by now: no error
    lines = [json.loads(line) for line in (disk / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("evenkeel_images_seen") for line in lines] == [None, 2, 3, 4, 5]
    assert "lacks its last 1 lines" in capsys.readouterr().err


def test_the_heart_goes_on_beating_after_a_full_disk(disk, monkeypatch):  # noqa: F811
    """Its announcement is lost on a full disk, as to one that was suspended, and written again when there is space."""
    beats, real = [], targets.write_atomically

    def write(*arguments):
        beats.append("tried")
        real(*arguments)
        beats.append("written")

    announced = targets.Target(disk, 0, "127.0.0.1:1", {}, every_seconds=0.05)
    monkeypatch.setattr(targets, "write_atomically", write)
    with full(disk):
        announced.path.rename(disk / "away")  # frees nothing
        wait_for(lambda: len(beats) > 2)
        assert not announced.path.exists() and set(beats) == {"tried"}
    wait_for(announced.path.is_file)
    announced.withdraw()


def test_a_port_that_is_taken_costs_no_training_and_a_wrong_one_is_a_line(tmp_path, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        metrics = Metrics(tmp_path, 0, attempt=1, address="127.0.0.1", port=port)
        assert f"{port} is taken" in capsys.readouterr().err and scrape(metrics) == {}
        announced = json.loads((tmp_path / "targets/rank00000.json").read_text())[0]["targets"]
        assert announced == [metrics.endpoint] and metrics.endpoint != f"127.0.0.1:{port}"
        metrics.close()
    for address, port in (("127.0.0.1", 70_000), ("192.0.2.1", 0), ("no.such.host.invalid", 0)):
        with pytest.raises(ValueError, match=f"metrics.address={address}, port {port}: .*"):
            Metrics(tmp_path, 0, attempt=1, address=address, port=port)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of tensorboard's own
def test_a_tracker_in_trouble_costs_no_training(disk, capsys):  # noqa: F811
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from trainer.trackers import TensorBoard

    metrics = Metrics(disk, 0, attempt=1, address="127.0.0.1", port=0, trackers=[TensorBoard(disk, 0)])

    def publish(clock):
        for layer in range(300):  # more than fits into the file's last page
            metrics.set("evenkeel_gain", clock, layer=f"layer {layer}")
        metrics.set("evenkeel_images_seen", clock)
        metrics.publish(clock)

    publish(1)
    with full(disk):
        publish(2)
        wait_for(lambda: publish(3) or "TensorBoard is behind: [Errno 28]" in capsys.readouterr().err)
    publish(4)
    publish(5)
    metrics.close()
    found = EventAccumulator(str(disk / "tensorboard"))
    found.Reload()
    assert [e.step for e in found.Scalars("images_seen")][-1] == 5
