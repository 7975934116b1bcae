"""Advice: paired differences resolve what losses do not, nothing is measured twice, and a run under way may ask."""

import errno
import json
import os

import numpy as np
import pytest

from data_pipeline import encode, manifest
from tests.test_generate import DATA, write_network
from trainer import advisor, posthoc

LENGTHS = [0.05, 0.0625, 0.08, 0.1, 0.125, 0.16, 0.2]
BEST = 0.11


def losses(spread, images=400, seed=0):
    """Return losses whose mean is a parabola in ln sigma_rel around BEST, with much noise that all lengths share."""
    rng = np.random.default_rng(seed)
    curve = 1 + 0.02 * (np.log(LENGTHS) - np.log(BEST)) ** 2
    shared = rng.normal(0, spread, (1, images, 8))
    return curve[:, None, None] + shared + rng.normal(0, 1e-4, (len(LENGTHS), images, 8))


def test_noise_that_all_lengths_share_does_not_blur_the_differences():
    quiet, loud = (advisor.judge(1, LENGTHS, losses(spread), 400) for spread in (0, 0.5))
    for told in (quiet, loud):
        assert told["best"] == pytest.approx(BEST, rel=0.01)
        assert told["range"][0] <= BEST * 1.002 and told["range"][1] >= BEST * 0.998
        assert told["range"][1] / told["range"][0] < 1.02 and not told["at_an_end"]
    errors = [[e for row in told["lengths"] for _, e in row["excess"]] for told in (quiet, loud)]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)
    assert losses(0.5).mean(2).std() / 400**0.5 > 100 * max(errors[1])  # the losses themselves are known much worse


def test_a_length_that_was_not_carried_is_left_out_and_an_end_is_said():
    found = losses(0)
    found[:4] = np.nan
    told = advisor.judge(1, LENGTHS, found, 400)
    assert [row["sigma_rel"] for row in told["lengths"]] == LENGTHS[4:]
    assert told["at_an_end"] and told["best"] == 0.125
    assert advisor.judge(1, LENGTHS, found * np.nan, 400)["best"] is None


@pytest.fixture
def run(tmp_path):
    assert encode.main(["sklearn:digits", str(tmp_path / "data")]) == 0
    m = manifest.load(tmp_path / "data")
    data = DATA | {k: list(getattr(m, k)) for k in ("mean", "std", "shape")} | {"digest": m.digest, "heldout": 0.1}

    def write(clock):
        for sigma_rel in (0.05, 0.1):
            write_network(tmp_path / "run", clock=clock, sigma_rel=sigma_rel, seed=0, data=data)

    for clock in range(64, 513, 64):
        write(clock)
    lines = ["run: r", "duration_images: 1024", "global_batch: 64", "micro_batch: 64", "snapshots: {every_images: 64}"]
    lines += [f"data: {{path: {tmp_path / 'data'}, codec: pixels, heldout: 0.1}}"]
    lines += ["model: {resolution: 8, channels: 1, label_dim: 10, channel_mult: [1, 2]}"]
    (tmp_path / "run" / "config.yaml").write_text("\n".join(lines))
    return tmp_path / "run", write


def ask(run, *more):
    return posthoc.main([str(run), "--advise", "--data-images", "20", "--sigma-rel", "0.06,0.08,0.1", *map(str, more)])


def test_asked_twice_measured_once_and_a_new_snapshot_costs_one_clock(run, capsys, monkeypatch):
    run, write = run
    assert ask(run, "--keep-error", 0.05) == 0
    said = capsys.readouterr().out
    assert "best so far" in said and "held out" in said and "drift: 256 images" in said
    assert "deletable: " in said and "--thin 0.06,0.08,0.1 --max-error 0.05" in said
    kept = {p: p.stat().st_mtime_ns for p in (run / "posthoc" / "advice").glob("*.npy")}
    assert {int(p.name[:10]) for p in kept} == {256, 512} and len(kept) == 6
    assert not (run / "posthoc" / "advice" / ".making").exists()
    told = json.loads((run / "posthoc" / "advice.json").read_text())
    assert [t["clock"] for t in told["clocks"]] == [256, 512] and len(told["clocks"][1]["lengths"]) == 3

    made = []
    real = advisor.heldout.bin_losses
    monkeypatch.setattr(advisor.heldout, "bin_losses", lambda *a: made.append(1) or real(*a))
    assert ask(run) == 0 and made == []
    write(576)
    assert ask(run) == 0 and len(made) == 3
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


def test_bad_input_is_one_line(run, tmp_path, capsys):
    run, _ = run
    (tmp_path / "empty").mkdir()
    cases = [
        ([tmp_path / "empty"], "no snapshots"),
        ([run, "--out", "x"], "neither --out"),
        ([run, "--data", tmp_path / "nowhere"], "not found"),
        ([run, "--drift", -1], "0 or more"),
        ([run, "--data-images", 1], "at least 2"),
    ]
    for arguments, expected in cases:
        assert posthoc.main([str(arguments[0]), "--advise", *map(str, arguments[1:])]) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1
    assert posthoc.main([str(run)]) == 2 and "--advise" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists() and list((tmp_path / "empty").iterdir()) == []


def test_half_a_measurement_is_made_again_and_locks_are_not_needed(run, capsys, monkeypatch):
    run, _ = run
    assert ask(run, "--drift", 0) == 0
    before = {p: p.read_bytes() for p in (run / "posthoc" / "advice").glob("*.npy")}
    for path, size in zip(before, (0, 100, None)):  # what a machine leaves that lost its power
        os.truncate(path, len(before[path]) if size is None else size)

    def refused(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")  # Lustre, mounted without locks

    monkeypatch.setattr(advisor.durable.fcntl, "flock", refused)
    assert ask(run, "--drift", 0) == 0, capsys.readouterr().err
    assert {p: p.read_bytes() for p in before} == before
