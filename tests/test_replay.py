"""A step that is done again gives the same bits, or the difference is named: a tensor, a logged value, a sample."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline import adopt, wds
from tests.gloo import ROOT, Ranks, free_port
from tests.test_resume import BATCH, OVERRIDES, data, wait_for_clock  # noqa: F401
from trainer import checkpoint, replay, run_log, scratch

SMALL = [*OVERRIDES[1:], f"duration_images={10 * BATCH}", "snapshots.every_images=0"]  # checkpoints at 256, 512, 640


def train(run: Path, world: int, *more: str, path: Path) -> tuple[list[int], str]:
    words = [*SMALL, f"run={run}", f"data.path={path}", f"cluster.ranks_per_node={world}", *more]
    ranks = Ranks(world, run.parent / "logs", str(ROOT / "configs/quickstart.yaml"), *words)
    return ranks.wait(), ranks.output()


def replayed(run: Path, *words, world: int = 1) -> tuple[int, str]:
    """Run the command on real ranks; return its exit status and what rank 0 and all errors said."""
    port = free_port()
    env = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    command = [sys.executable, "-m", "trainer.replay", str(run), *map(str, words)]
    several = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if world > 1 else {}
    processes = []
    for rank in range(world):
        env_ = env | (several | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if several else {})
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=env_, **pipes))
    said = [p.communicate(timeout=300)[0] for p in processes]
    statuses = {p.returncode for p in processes}
    assert len(statuses) == 1, said
    return statuses.pop(), "".join(said)


def listing(run: Path) -> list:
    return sorted((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in [run, *run.rglob("*")])


@pytest.fixture(scope="module")
def original(data, tmp_path_factory) -> Path:  # noqa: F811
    run = tmp_path_factory.mktemp("original") / "run"
    statuses, output = train(run, 2, path=data)
    assert statuses == [0, 0], output
    return run


@pytest.fixture
def run(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "run")


def flip(folder: Path, key: str, bit: int) -> int:
    """Flip a bit of a tensor's middle element in a checkpoint, with checksums that fit; return the element of the whole tensor."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        tensors = load_file(folder / name)
        if key not in tensors:
            continue
        element = tensors[key].numel() // 2
        tensors[key].view(torch.int32)[element] ^= 1 << bit
        save_file(tensors, folder / name)
        entry["xxh3"] = checkpoint.hash_file(folder / name)
        start = next(start for n, start, _ in entry["pieces"] if n == key.split("/", 1)[1])
        (folder / "manifest.json").write_text(json.dumps(checkpoint.seal(manifest)))
        assert checkpoint.verify(folder) == []
        return start + element
    raise AssertionError(key)


def weight_of(folder: Path, number: int) -> str:
    """Return a large weight in the middle of the network."""
    names = [
        n
        for e in json.loads((folder / "manifest.json").read_text())["files"].values()
        for n, _, c in e["pieces"]
        if c > 500
    ]
    return names[len(names) // 2 + number]


@pytest.mark.slow
def test_a_sound_run_agrees_bit_by_bit_and_is_only_read(original):
    before = listing(original)
    status, said = replayed(original, "--at", 320, "--through", world=2)
    assert status == 0 and "all the same" in said, said
    assert re.search(r"checkpoint at 512: [1-9]\d\d tensors agree, compared bit by bit", said), said
    assert len(re.findall(r"at \d+: [1-9]\d+ logged values agree, compared bit by bit", said)) == 4, said
    assert listing(original) == before
    logged = next(line for line in run_log.read(original) if line["evenkeel_images_seen"] == 320)
    shown = re.search(r"the step to 320: loss (\S+), gradient norm ([\d.]+); largest .*'\d+' at position (\d+)", said)
    assert float(shown[1]) == pytest.approx(logged["evenkeel_loss"], rel=1e-4)
    assert float(shown[2]) == pytest.approx(logged["evenkeel_gradient_norm"], rel=1e-4) and 256 <= int(shown[3]) < 320


@pytest.mark.slow
@pytest.mark.parametrize("kind, bit", [("master", 0), ("ema_0.050", 3)])
def test_one_flipped_bit_is_found_and_its_tensor_named(kind, bit, run):
    later = run / "checkpoints" / "0000000512"
    name = weight_of(later, 0)
    element = flip(later, f"{kind}/{name}", bit)
    status, said = replayed(run, "--at", 512, world=2)
    assert status == 1 and "1 finding\n" in said, said
    found = re.search(
        r"first tensor that differs: (\S+) \((\S+)\): 1 of \d+ elements differ, the first is element (\d+)", said
    )
    assert found and found.groups() == (name, kind, str(element)), said


@pytest.mark.slow
def test_a_flipped_bit_before_the_steps_shows_in_what_was_logged_after_it(run):
    earlier = run / "checkpoints" / "0000000256"
    flip(earlier, f"master/{weight_of(earlier, 0)}", 21)
    status, said = replayed(run, "--at", 320, world=2)
    assert status == 1 and re.search(r"at 320: \d+ of \d+ logged values differ", said), said


@pytest.mark.slow
def test_steps_around_a_restart_agree_too(data, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    words = [*SMALL, f"run={run}", f"data.path={data}", "cluster.ranks_per_node=1", "metrics.every_images=128"]
    ranks = Ranks(1, tmp_path / "logs", str(ROOT / "configs/quickstart.yaml"), *words, fork=False)
    wait_for_clock(run, 256, ranks)
    ranks.processes[0].send_signal(signal.SIGTERM)
    assert ranks.wait() == [75], ranks.output()
    ranks = Ranks(1, tmp_path / "logs", str(ROOT / "configs/quickstart.yaml"), *words)
    assert ranks.wait() == [0], ranks.output()
    assert {line["attempt"] for line in run_log.lineage(run_log.read(run))} == {1, 2}
    for folder in checkpoint.list_checkpoints(run)[:-1]:  # so that the steps of both starts are done again
        shutil.rmtree(folder)
    status, said = replayed(run, "--at", 640)
    assert status == 0 and "from the beginning to 640" in said and "all the same" in said, said
    assert len(re.findall("agree, compared bit by bit", said)) == 6, said


@pytest.mark.slow
def test_a_single_process_compares_within_a_tolerance_and_says_so(run):
    status, said = replayed(run, "--at", 512)
    assert status == 0 and "tensors agree, compared within" in said and "bit by bit" not in said, said
    later = run / "checkpoints" / "0000000512"
    name = weight_of(later, 1)
    flip(later, f"master/{name}", 29)
    status, said = replayed(run, "--at", 512)
    assert status == 1 and f"first tensor that differs: {name} (master)" in said, said


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_the_sample_of_a_nonfinite_step_is_named(policy, tmp_path):
    folder, bad = tmp_path / "data", "00000217"
    folder.mkdir()
    images = np.random.default_rng(0).normal(size=(640, 1, 8, 8)).astype(np.float32)
    shard = folder / "shard-000000.tar"
    wds.write_shard(shard, [(f"{k:08d}", image, k % 10) for k, image in enumerate(images)])
    adopt.adopt(folder, "pixels", progress=lambda text: None)
    content = bytearray(shard.read_bytes())  # damaged afterwards, and read unchecked
    place = content.find(images[int(bad)].tobytes())
    content[place + 100 : place + 104] = np.float32(np.nan).tobytes()
    shard.write_bytes(content)
    run = tmp_path / "run"
    statuses, output = train(run, 1, f"optimizer.nonfinite={policy}", "data.verify=false", path=folder)
    assert statuses == [1 if policy == "stop" else 0], output
    if policy == "stop":
        clock = int(re.search(r"in the step before clock (\d+)", output)[1])
    else:
        clock = next(x["evenkeel_images_seen"] for x in run_log.read(run) if x["evenkeel_nonfinite_steps_total"])
    status, said = replayed(run, "--at", clock)
    assert status == 1 and f"the step to {clock} is not finite: first gradient" in said, said
    assert re.findall(r"loss of (\S+ '\d+') at position", said) == [f"shard-000000.tar '{bad}'"], said
    assert "what is stored of it is not finite" in said
    other = clock - BATCH if clock > BATCH else clock + BATCH
    assert replayed(run, "--at", other)[0] == 0


@pytest.mark.parametrize(
    "at, said",
    [("0", "has done steps"), ("1Gi", "has done steps"), ("soon", "soon"), ("128", "no run directory")],
)
def test_errors_are_one_line(at, said, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    if said != "no run directory":
        (folder / "config.yaml").write_text(
            "{run: x, duration_images: 128, global_batch: 64, micro_batch: 64, data: {path: x}}"
        )
    assert replay.main([str(folder), "--at", at]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert list(folder.glob("*")) == list(folder.glob("config.yaml"))


def test_steps_are_not_done_again_from_what_the_run_went_back_behind(tmp_path):
    original, copy = tmp_path / "run", tmp_path / "scratch" / "run"
    copy.parent.mkdir()
    for clock, life, start in ((20, 1, 0), (30, 1, 0), (40, 2, 20)):
        folder = original / f"checkpoints/{clock:010d}"
        folder.mkdir(parents=True)
        manifest = {"clock": clock, "life": life, "header": {"life_start": start}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    scratch.prepare(original, copy, 35)
    assert [int(p.name) for p in checkpoint.list_checkpoints(copy)] == [20], "30 was abandoned by the life that made 40"
