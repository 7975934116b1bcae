"""Reconstruction: what comes out is the average one would have tracked, or a refusal."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from trainer import ema_profiles, posthoc, series, snapshots, tensor_file
from trainer.snapshots import Snapshot, file_name

DATA = Path(__file__).parent / "data"
TOY = json.loads((DATA / "posthoc_ema.json").read_text())["toy"]
MODEL = {"family": "edm2", "resolution": 8}


def write_snapshot(run_dir, clock, sigma_rel, tensors, dtype="fp32", life=1, **header):
    """Write one snapshot as the service does."""
    folder = Path(run_dir) / "snapshots"
    folder.mkdir(parents=True, exist_ok=True)
    common = {
        "run": "toy",
        "model": MODEL,
        "data": {"codec": "pixels"},
        "dtype": dtype,
        "buffers": ["freqs"],
        "kind": "ema",
    }
    own = {"clock": clock, "sigma_rel": sigma_rel, "life": life}
    tensors = {"freqs": torch.tensor([1 / 3])} | tensors
    tensors = {k: t if k == "freqs" else t.to(tensor_file.DTYPES[dtype]) for k, t in tensors.items()}
    tensor_file.write(folder / file_name(clock, sigma_rel), common | own | header, tensors)


def toy_tensors(row):
    row = torch.as_tensor(row)
    return {"b": row[:5].reshape(5, 1), "a": row[5:].clone()}


def flat(path):
    stored = load_file(path)
    assert stored["freqs"] == np.float32(1 / 3)
    return np.concatenate([stored["b"].reshape(-1), stored["a"]])


@pytest.fixture
def toy(tmp_path):
    golden = load_file(DATA / "posthoc_ema.safetensors")
    for clock, sigma_rel, row in zip(TOY["snapshot_nimg"], TOY["snapshot_std"], golden["toy.snapshots"]):
        write_snapshot(tmp_path / "run", clock, sigma_rel, toy_tensors(row))
    return tmp_path / "run", golden


def run_cli(*arguments):
    return posthoc.main([str(a) for a in arguments])


def test_matches_the_references_reconstruction(toy, tmp_path, capsys):
    run, golden = toy
    out = tmp_path / "out"
    assert run_cli(run, "--sigma-rel", "0.03,0.075,0.15", "--out", out, "--max-error", 0.2) == 0
    names = [f"phema-0000006144-{s:.5f}.safetensors" for s in (0.03, 0.075, 0.15)]
    assert sorted(p.name for p in out.iterdir()) == names
    got = np.stack([flat(out / n) for n in names])
    assert np.abs(got - golden["toy.reconstructed"]).max() <= 2e-6 * np.abs(golden["toy.reconstructed"]).max()
    assert np.abs(got - golden["toy.true_ema"]).max() <= 1.01 * TOY["max_abs_error_reconstruction"]
    header = snapshots.verify(out / names[1])
    assert (header["kind"], header["clock"], header["sigma_rel"]) == ("posthoc", 6144, 0.075)
    assert len(header["inputs"]) == 24 and sum(i[3] for i in header["inputs"]) == pytest.approx(1)
    assert 0 < header["predicted_error"] < 0.05
    assert "predicted error" in capsys.readouterr().out


def test_small_chunks_change_nothing(toy, tmp_path, monkeypatch):
    run, _ = toy
    plan = posthoc.plan(snapshots.list_snapshots(run), [0.075, 0.1])
    whole, pieces = ([tmp_path / f"{which}{i}.safetensors" for i in range(2)] for which in "wp")
    posthoc.reconstruct(plan, whole)
    monkeypatch.setattr(posthoc, "CHUNK_ELEMENTS", 60)  # two elements at a time
    posthoc.reconstruct(plan, pieces)
    for a, b in zip(whole, pieces):
        np.testing.assert_allclose(flat(a), flat(b), rtol=0, atol=1e-6)


def test_a_tracked_length_comes_back_as_it_was(toy, tmp_path):
    run, golden = toy
    assert run_cli(run, "--sigma-rel", 0.1, "--out", tmp_path / "x.safetensors") == 0
    np.testing.assert_allclose(flat(tmp_path / "x.safetensors"), golden["toy.snapshots"][-1], atol=1e-6)


def test_an_earlier_clock_uses_nothing_later(toy, tmp_path):
    run, golden = toy
    for path in (run / "snapshots").glob("ema-00000061*"):
        path.unlink()
    assert run_cli(run, "--sigma-rel", 0.05, "--at", "4Ki", "--out", tmp_path / "x.safetensors") == 0
    np.testing.assert_allclose(flat(tmp_path / "x.safetensors"), golden["toy.snapshots"][14], atol=1e-6)
    header = snapshots.read_header(tmp_path / "x.safetensors")
    assert header["clock"] == 4096 and max(i[1] for i in header["inputs"]) == 4096


def test_fp16_snapshots_err_as_predicted(tmp_path):
    """The rounding that the plan names is the rounding that results."""
    generator = torch.Generator().manual_seed(0)
    walk = torch.randn(64, 4000, generator=generator).cumsum(0) / 8 + torch.randn(4000, generator=generator)
    averages = {}
    for sigma_rel in (0.05, 0.10):
        gamma, average = ema_profiles.gamma_from_sigma_rel(sigma_rel), torch.zeros(4000)
        for k in range(64):
            average = torch.lerp(walk[k], average, ema_profiles.beta(k + 1, 1, gamma))
            if k % 2:
                averages[k + 1, sigma_rel] = average
    results = {}
    for dtype in ("fp16", "fp32"):
        for (clock, sigma_rel), average in averages.items():
            write_snapshot(tmp_path / dtype, clock, sigma_rel, {"w": average}, dtype=dtype)
        plan = posthoc.plan(snapshots.list_snapshots(tmp_path / dtype), [0.02])
        posthoc.reconstruct(plan, [tmp_path / f"{dtype}.safetensors"], "fp32")
        results[dtype] = load_file(tmp_path / f"{dtype}.safetensors")["w"], plan.rounding[0]
    measured = np.linalg.norm(results["fp16"][0] - results["fp32"][0]) / np.linalg.norm(results["fp32"][0])
    assert measured == pytest.approx(results["fp16"][1], rel=0.3)
    assert results["fp32"][1] < 1e-6


def refusal(capsys, *arguments):
    """Run and return the one line of the refusal."""
    assert run_cli(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_refuses_to_extrapolate(toy, tmp_path, capsys):
    run, _ = toy
    out = tmp_path / "x.safetensors"
    out.write_text("kept")
    assert "0.01 (" in refusal(capsys, run, "--sigma-rel", "0.01", "--out", out)
    assert "predicted error above" in refusal(capsys, run, "--sigma-rel", 0.1, "--at", 7000, "--out", out)
    assert "between 1 and 100" in refusal(capsys, run, "--sigma-rel", 0.1, "--at", 100, "--out", out)
    assert "0.2886" in refusal(capsys, run, "--sigma-rel", 0.3, "--out", out)
    assert out.read_text() == "kept"
    assert "need a folder" in refusal(capsys, run, "--sigma-rel", "0.05,0.1", "--out", out)
    assert "no snapshots" in refusal(capsys, tmp_path / "empty", "--sigma-rel", 0.1, "--out", out)


def test_refuses_mixed_runs_networks_and_damage(toy, tmp_path, capsys):
    run, golden = toy
    out = tmp_path / "x.safetensors"
    row = toy_tensors(golden["toy.snapshots"][0])
    cases = {
        "two runs": {"run": "other"},
        "its model": {"model": MODEL | {"resolution": 16}},
        "its data": {"data": {"codec": "sd"}},
    }
    for expected, header in cases.items():
        write_snapshot(run, 6208, 0.05, row, **header)
        assert expected in refusal(capsys, run, "--sigma-rel", 0.1, "--out", out)
    write_snapshot(run, 6208, 0.05, {"a": row["a"]})
    assert "lacks tensor b" in refusal(capsys, run, "--sigma-rel", 0.1, "--out", out, "--max-error", 1)
    write_snapshot(run, 6208, 0.05, row | {"a": row["a"][1:].clone()})
    assert "another shape" in refusal(capsys, run, "--sigma-rel", 0.1, "--out", out, "--max-error", 1)
    write_snapshot(run, 6208, 0.05, row | {"freqs": torch.tensor([0.4])})
    assert "buffer freqs differs" in refusal(capsys, run, "--sigma-rel", 0.1, "--out", out, "--max-error", 1)
    (run / "snapshots" / file_name(6208, 0.05)).unlink()

    path = run / "snapshots" / file_name(512, 0.05)
    content = bytearray(path.read_bytes())
    content[tensor_file.read_layout(path)[1]["a"].offset + 2] ^= 64
    path.write_bytes(content)
    assert "checksum" in refusal(capsys, run, "--sigma-rel", 0.15, "--out", out, "--max-error", 1)
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_a_full_disk_is_one_line_and_nothing_is_overwritten(toy, tmp_path, capsys, monkeypatch):
    run, _ = toy
    out = tmp_path / "out"
    out.mkdir()
    kept = out / posthoc.file_name(6144, 0.1)
    kept.write_text("kept")
    real, left = tensor_file.TensorFile.write, [3]

    def full(self, name, piece):
        left[0] -= 1
        if not left[0]:
            raise OSError(28, "No space left on device")
        real(self, name, piece)

    monkeypatch.setattr(tensor_file.TensorFile, "write", full)
    said = refusal(capsys, run, "--sigma-rel", "0.08,0.1", "--out", out)
    assert f"{out}: No space left on device; nothing was written" in said
    assert list(out.iterdir()) == [kept] and kept.read_text() == "kept"


def test_refuses_what_is_not_finite(toy, tmp_path, capsys, monkeypatch):
    run, golden = toy
    row = toy_tensors(golden["toy.snapshots"][0])
    row["a"][0] = float("nan")
    with monkeypatch.context() as m:  # the service would not write it
        m.setattr(torch, "isfinite", lambda t: torch.ones_like(t, dtype=torch.bool))
        write_snapshot(run, 512, 0.05, row)
    assert "not finite" in refusal(capsys, run, "--sigma-rel", 0.15, "--out", tmp_path / "x", "--max-error", 1)
    assert not (tmp_path / "x").exists()


def test_an_abandoned_life_stays_out(toy, tmp_path, capsys):
    run, golden = toy
    wrong = toy_tensors(np.full(12, 1e3, np.float32))
    for clock, sigma_rel in zip(TOY["snapshot_nimg"], TOY["snapshot_std"]):
        if clock == 4096:
            shutil.move(run / "snapshots" / file_name(clock, sigma_rel), tmp_path)
            write_snapshot(run, clock, sigma_rel, toy_tensors(golden["toy.snapshots"][14]), life=2)
        if clock > 4096:
            write_snapshot(run, clock, sigma_rel, wrong, life=1)
    assert "abandoned life" in refusal(capsys, run, "--sigma-rel", 0.1, "--at", 6144, "--out", tmp_path / "x")
    assert run_cli(run, "--sigma-rel", 0.05, "--out", tmp_path / "x") == 0
    assert "left out 8 snapshots of an abandoned life" in capsys.readouterr().out
    np.testing.assert_allclose(flat(tmp_path / "x"), golden["toy.snapshots"][14], atol=1e-6)


def test_holes_are_named(toy, tmp_path, capsys):
    run, _ = toy
    for clock in (2048, 2560):
        (run / "snapshots" / file_name(clock, 0.05)).unlink()
    assert run_cli(run, "--sigma-rel", 0.075, "--out", tmp_path / "x") == 0
    assert "hole: no snapshot of sigma_rel 0.050 between 1536 and 3072 images\n" in capsys.readouterr().out


def test_a_hole_names_the_life_that_began_in_it_and_a_life_that_began_earlier_wins(toy, tmp_path, capsys):
    """The header's `life_start` tells of a restart before the new life has written at an earlier clock."""
    run, golden = toy
    row = toy_tensors(golden["toy.snapshots"][-1])
    for path in (run / "snapshots").glob("*"):
        if 2048 <= snapshots.read_header(path)["clock"] <= 2560:
            path.unlink()
    for sigma_rel in (0.05, 0.10):
        write_snapshot(run, 6656, sigma_rel, row, life=2, life_start=2200)
    assert run_cli(run, "--sigma-rel", 0.075, "--out", tmp_path / "x", "--max-error", 1) == 0
    said = capsys.readouterr().out
    assert "left out 14 snapshots of an abandoned life" in said  # 3072 .. 6144: life 2 went back to 2200
    assert "between 1536 and 6656 images (life 2 began at 2200)" in said


def test_memory_depends_on_neither_network_nor_series(tmp_path):
    import tracemalloc

    big = {f"w{i}": torch.randn(256, 1024) for i in range(8)}  # 8 MiB in all, 1 MiB the largest
    for clock in range(1, 9):
        for sigma_rel in (0.05, 0.10):
            write_snapshot(tmp_path, clock, sigma_rel, big, dtype="fp16")
    plan = posthoc.plan(snapshots.list_snapshots(tmp_path), [0.1, 0.13, 0.15])
    paths = [tmp_path / f"{i}" for i in range(3)]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(posthoc, "CHUNK_ELEMENTS", 2**16)
        blocks = []
        torch_empty = torch.empty
        m.setattr(torch, "empty", lambda *a, **k: blocks.append(torch_empty(*a, **k)) or blocks[-1])
        tracemalloc.start()
        posthoc.reconstruct(plan, paths)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert max(b.numel() for b in blocks) <= 2**16  # torch's share
    assert peak < 5 * 2**20  # Python's share: raw bytes of one chunk and headers


def test_a_fork_and_its_parent_are_one_trajectory_two_strangers_are_not():
    def snapshot(run, parent, clock):
        return Snapshot(Path(f"ema-{clock}.safetensors"), clock, 0.05, {"run": run, "parent": parent})

    series.check_one_run([snapshot("old", "", 1), snapshot("new", "old", 2)])
    with pytest.raises(ValueError, match="two runs share this folder"):
        series.check_one_run([snapshot("old", "", 1), snapshot("new", "", 2)])


def test_a_model_key_that_came_later_has_its_default_in_older_snapshots():
    def snapshot(clock, **model):
        header = {"run": "run", "data": {}, "buffers": [], "model": {"resolution": 8, **model}}
        return Snapshot(Path(f"{clock}"), clock, 0.05, header)

    series.check_one_run([snapshot(1), snapshot(2, prediction="edm")])
    with pytest.raises(ValueError, match="its model is not that of"):
        series.check_one_run([snapshot(1), snapshot(2, prediction="v")])


def test_what_rounding_would_drown_is_refused(tmp_path, capsys):
    for clock in range(64, 2049, 64):
        for row, sigma_rel in enumerate((0.05, 0.051, 0.052)):  # so close that only large differences tell them apart
            write_snapshot(tmp_path, clock, sigma_rel, {"w": torch.full((3,), 1.0 + row / 7)}, "fp16")
    out = tmp_path / "out.safetensors"
    error = refusal(capsys, tmp_path, "--sigma-rel", 0.03, "--out", out)
    assert "rounding of fp16 snapshots" in error and not out.exists()
    assert posthoc.main([str(tmp_path), "--sigma-rel", "0.051", "--out", str(out)]) == 0


def test_a_run_whose_folder_was_renamed_is_one_run_still(tmp_path, capsys):
    def write(folder, clock, run, life, start):
        for sigma_rel in (0.05, 0.1):
            write_snapshot(folder, clock, sigma_rel, {"w": torch.ones(3)}, life=life, run=run, life_start=start)

    out = ("--sigma-rel", 0.08, "--out", tmp_path / "out.safetensors")
    renamed = [(64, "a", 1, 0), (128, "a", 1, 0), (192, "b", 2, 128), (256, "b", 3, 192), (320, "c", 4, 256)]
    for one in renamed:
        write(tmp_path / "renamed", *one)
    assert run_cli(tmp_path / "renamed", *out, "--max-error", 1) == 0, capsys.readouterr().err
    for i, stranger in enumerate([(320, "c", 1, 0), (320, "c", 4, 0), (320, "c", 3, 256)]):
        for one in (*renamed[:-1], stranger):
            write(tmp_path / f"strangers{i}", *one)
        assert "two runs share this folder" in refusal(capsys, tmp_path / f"strangers{i}", *out)
