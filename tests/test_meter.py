"""A real run on two ranks exports what the table says, no more and no less, and goes on counting after a resume."""

import json
import signal
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from data_pipeline import encode
from tests.gloo import ROOT, Ranks, on_ranks
from trainer.metrics_table import TABLE

BATCH, STEPS = 64, 16
OVERRIDES = [
    f"global_batch={BATCH}",
    "micro_batch=16",
    "model.model_channels=12",
    "model.channels_per_head=12",
    "snapshots.every_images=256",
    "checkpoints.every_images=256",
    f"metrics.every_images={2 * BATCH}",
    "metrics.peak_flops=1e12",
    "metrics.tensorboard=true",
    f"metrics.profile_at_images={4 * BATCH}",
]
# this run has attention, clipping, snapshots, checkpoints and a named peak: only these may be missing
ABSENT = {m.name for m in TABLE if m.present.startswith(("GPU", "network with ODE"))}


class Scrapes(threading.Thread):
    """Scrapes every target of a run until it ends; keeps the last answer of each rank for every metric."""

    def __init__(self, run: Path):
        super().__init__(daemon=True)
        self.run_folder, self.last, self.ports, self.ended = run, {}, set(), False
        self.start()

    def run(self):
        while not self.ended:
            for path in (self.run_folder / "targets").glob("rank*.json"):
                try:
                    target = json.loads(path.read_text())[0]
                    text = urllib.request.urlopen(f"http://{target['targets'][0]}/metrics", timeout=30).read().decode()
                except (OSError, ValueError):  # it was on its way out
                    continue
                self.ports.add(target["targets"][0])
                families = {f.name: f for f in text_string_to_metric_families(text)}
                self.last.setdefault(target["labels"]["rank"], {}).update(families)
            time.sleep(0.05)

    def end(self):
        self.ended = True
        self.join()


def train(run: Path, data: Path, images: int, world: int = 2) -> Scrapes:
    scrapes = Scrapes(run)
    wanted = [f"run={run}", f"data.path={data}", f"cluster.ranks_per_node={world}", f"duration_images={images}"]
    ranks = Ranks(world, run / "logs", str(ROOT / "configs/quickstart.yaml"), *OVERRIDES, *wanted)
    assert ranks.wait() == [0] * world, ranks.output()
    scrapes.end()
    return scrapes


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    assert encode.main(["sklearn:digits", str(folder), "--codec", "pixels"]) == 0
    return folder


@pytest.fixture(scope="module")
def first(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    return run, train(run, data, STEPS * BATCH)


def test_the_endpoints_of_a_run_serve_the_table(first):
    _, scrapes = first
    assert len(scrapes.ports) == 2, "each rank has its own port"
    for rank, families in scrapes.last.items():
        expected = {m.name.removesuffix("_total") for m in TABLE if rank == "0" or m.scope == "rank"}
        assert set(families) == expected - ABSENT
        for m in TABLE:
            for sample in getattr(families.get(m.name.removesuffix("_total")), "samples", []):
                assert set(sample.labels) == set(m.labels), m.name


def test_the_log_of_a_run_has_the_tables_names_the_clock_and_the_attempt(first):
    run, _ = first
    found = lines(run)
    assert set(found[-1]) == {"time", "attempt"} | {m.name for m in TABLE} - ABSENT
    assert [line["evenkeel_images_seen"] for line in found] == [i * 2 * BATCH for i in range(1, STEPS // 2 + 1)]
    assert {line["attempt"] for line in found} == {1}
    for m in TABLE:
        assert isinstance(found[-1].get(m.name, {}), dict) or not m.labels, f"{m.name} has labels"


def test_figures_agree_with_each_other(first):
    line = lines(first[0])[-1]
    per_image = line["evenkeel_model_flops_per_image"]
    assert line["evenkeel_flops_per_second"] == pytest.approx(line["evenkeel_images_per_second"] * per_image)
    assert line["evenkeel_rank_flops_per_second"] == pytest.approx(line["evenkeel_flops_per_second"] / 2)
    mfu = line["evenkeel_mfu_ratio"]["peak=metrics.peak_flops"]
    assert mfu == pytest.approx(line["evenkeel_rank_flops_per_second"] / 1e12)
    phases = line["evenkeel_phase_seconds"]
    assert set(phases) == {
        f"phase={p}"
        for p in ["data", "forward", "backward", "communication", "optimizer", "snapshot", "checkpoint", "metrics"]
    }
    # over the whole run: a busy machine may take a hundredth of a second anywhere
    inside = sum(sum(line["evenkeel_phase_seconds"].values()) for line in lines(first[0]))
    inside -= sum(line["evenkeel_phase_seconds"]["phase=communication"] for line in lines(first[0]))
    assert 0.5 < inside / sum(line["evenkeel_step_seconds"] for line in lines(first[0])) < 1.3
    assert phases["phase=communication"] > 0
    assert line["evenkeel_samples_read_total"] == STEPS * BATCH / 2, "each rank reads its half"
    assert all(value == pytest.approx(1, abs=2e-4) for value in line["evenkeel_layer_weight_rms"].values())
    assert 0 < line["evenkeel_checkpoint_timestamp_seconds"] <= line["time"]
    assert line["evenkeel_snapshots_left_bytes"] == 0 and line["evenkeel_disk_free_bytes"] > 0


def test_tensorboard_gets_the_same_numbers(first):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(first[0] / "tensorboard"))
    events.Reload()
    found = lines(first[0])
    loss = events.Scalars("loss")
    assert [e.step for e in loss] == [line["evenkeel_images_seen"] for line in found]
    assert [e.value for e in loss] == pytest.approx([line["evenkeel_loss"] for line in found])
    assert events.Scalars("mfu_ratio/peak=metrics.peak_flops")


def test_a_trace_is_written_where_the_config_asks_for_one(first):
    traces = list((first[0] / "profiles").glob("*"))
    assert [p.name for p in traces] == [f"{4 * BATCH:010d}-rank0.json"]
    names = {event.get("name", "") for event in json.loads(traces[0].read_text())["traceEvents"]}
    assert any("conv" in name for name in names) and "Optimizer.step#Adam.step" in names


def timed_windows() -> list[tuple[float, float]]:
    import deepspeed.comm
    import torch

    from tests.test_engine import BATCH, build, config_of
    from trainer.engine import Engine, start_process_group

    start_process_group()
    config = config_of(engine__zero_stage=1, micro_batch=BATCH // 2)
    engine, windows = Engine(config, build(config)), []
    for _ in range(4):
        engine.time_collectives(True)
        began = time.perf_counter()
        for _ in range(5):
            deepspeed.comm.all_reduce(torch.ones(1000))
        windows.append((engine.time_collectives(False), time.perf_counter() - began))
        deepspeed.comm.all_reduce(torch.ones(1000))  # outside of a window: not counted
    engine.close()
    return windows


def test_communication_is_that_of_one_window_and_does_not_add_up():
    for windows in on_ranks(2, timed_windows):
        assert all(0 < seconds <= wall for seconds, wall in windows), windows


def test_counters_go_on_after_a_resume_on_another_number_of_ranks(first, data):
    run, _ = first
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        config.replace(f"duration_images: {STEPS * BATCH}", f"duration_images: {2 * STEPS * BATCH}")
    )
    before, written = lines(run)[-1], len(lines(run))
    train(run, data, 2 * STEPS * BATCH, world=1)
    after = lines(run)[written:]
    assert after[-1]["evenkeel_samples_read_total"] == 2 * STEPS * BATCH, "one rank goes on from the sum of both"
    assert after[-1]["evenkeel_bytes_read_total"] == 2 * STEPS * BATCH * 64
    assert after[-1]["evenkeel_snapshots_written_total"] >= before["evenkeel_snapshots_written_total"] > 0
    assert (after[0]["attempt"], after[0]["evenkeel_attempt"], after[0]["evenkeel_restarts_total"]) == (2, 2, 1)
    assert after[0]["evenkeel_samples_read_total"] > before["evenkeel_samples_read_total"]


@pytest.mark.slow
def test_a_rank_in_a_collective_that_hangs_still_answers_and_shows_since_when(data, tmp_path):
    run = tmp_path / "run"
    words = [f"run={run}", f"data.path={data}", "cluster.ranks_per_node=2", "duration_images=64Ki"]
    ranks = Ranks(
        2, run / "logs", str(ROOT / "configs/quickstart.yaml"), *OVERRIDES[:4], "metrics.every_images=64", *words
    )
    try:
        end = time.monotonic() + 300
        while not (run / "metrics.jsonl").is_file() or len(lines(run)) < 3:
            assert time.monotonic() < end and all(p.poll() is None for p in ranks.processes), ranks.output()
            time.sleep(0.1)
        ranks.processes[1].send_signal(signal.SIGSTOP)
        time.sleep(4)
        target = json.loads((run / "targets/rank00000.json").read_text())[0]["targets"][0]
        told = []
        for _ in range(2):
            text = urllib.request.urlopen(f"http://{target}/metrics", timeout=60).read().decode()
            samples = {s.name: s.value for f in text_string_to_metric_families(text) for s in f.samples if not s.labels}
            told.append((samples["evenkeel_rank_clock_images"], samples["evenkeel_last_step_timestamp_seconds"]))
            time.sleep(1)
        assert told[0] == told[1] and told[0][0] > 0 and 2 < time.time() - told[0][1] < 60
        assert all(p.poll() is None for p in ranks.processes)
    finally:
        ranks.kill()
