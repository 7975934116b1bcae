"""What snapshots cost and buy: the published plan's figures, and nothing removed that is needed."""

import numpy as np
import pytest

from tests.test_posthoc import write_snapshot
from trainer import ema_profiles, posthoc, snapshot_plan, snapshots

MI = 2**20
WANTED = ema_profiles.parse_range("0.05:0.15:0.05")


def test_the_published_plan():
    (line, *others) = snapshot_plan.price(1280 * MI, 8 * MI, [0.05, 0.10], "fp16", 2_238_571_594)
    assert "160 snapshots x 2 x 2.24 GB = 716 GB" in line
    assert "error at most 0.48 % for sigma_rel in [0.015, 0.25]" in line and "fp16 rounding 0.8 %" in line
    assert len(others) == 2 and all("instead" in o and "x 3 x" in o for o in others)


def test_what_more_lengths_and_fewer_snapshots_do():
    def span(count, *tracked):
        return snapshot_plan.carried(*snapshot_plan.series(range(1, count + 1), tracked), "fp16")[0]

    assert span(8, 0.05, 0.10)[0] > span(32, 0.05, 0.10)[0] > span(160, 0.05, 0.10)[0]
    assert span(160, 0.015, 0.05, 0.25)[1] > span(160, 0.05, 0.10)[1]
    assert snapshot_plan.price(10, 0, [0.05], "fp16", 1)[0].startswith("no snapshots")
    assert snapshot_plan.clocks_of(100, 40) == [40, 80, 100] and snapshot_plan.clocks_of(80, 40) == [40, 80]


def test_needed_snapshots_suffice_and_none_is_idle():
    clocks, tracked = np.repeat(np.arange(1, 65), 2), np.tile([0.05, 0.10], 64)
    kept, errors = snapshot_plan.needed(clocks, tracked, WANTED, 0.01)
    assert len(kept) < 64 and errors.max() <= 0.01
    gammas = [ema_profiles.gamma_from_sigma_rel(s) for s in tracked[kept]]
    targets = [ema_profiles.gamma_from_sigma_rel(s) for s in WANTED]
    assert ema_profiles.predicted_error(clocks[kept], gammas, 64, targets).max() <= 0.01
    for one in kept:
        if clocks[one] < 64:
            fewer = [i for i in kept if i != one]
            g = [ema_profiles.gamma_from_sigma_rel(s) for s in tracked[fewer]]
            assert ema_profiles.predicted_error(clocks[fewer], g, 64, targets).max() > 0.01
    assert len(snapshot_plan.needed(clocks, tracked, WANTED, 0.05)[0]) < len(kept)
    with pytest.raises(ValueError, match="raise --max-error"):
        snapshot_plan.needed(clocks, tracked, [0.01], 0.01)


def test_what_a_running_run_may_lose_it_does_not_miss_at_its_end():
    every, lengths = np.arange(1, 65), [0.05, 0.10]
    t, s = np.repeat(every, 2), np.tile(lengths, 64)
    here = t <= 24
    coming = list(zip(t[~here].tolist(), s[~here].tolist()))
    kept, errors = snapshot_plan.needed_until_end(t[here], s[here], WANTED, 0.01, coming)
    gammas, targets = ([ema_profiles.gamma_from_sigma_rel(v) for v in values] for values in (s, WANTED))
    at_the_end = [*kept, *np.flatnonzero(~here)]
    for indices, clock in ((kept, 24), (at_the_end, 64)):
        found = ema_profiles.predicted_error(t[indices], np.array(gammas)[indices], clock, targets)
        assert found.max() <= 0.01 and (found <= errors + 1e-12).all()
    assert len(kept) < here.sum()
    # from now on only the short length is tracked: the wider one is carried now, and cannot be at the end
    coming = [(clock, 0.05) for clock in range(25, 29)]
    assert snapshot_plan.needed(t[here], s[here], [0.12], 0.05)[1].max() <= 0.05
    with pytest.raises(ValueError, match="raise --max-error"):
        snapshot_plan.needed_until_end(t[here], s[here], [0.12], 0.05, coming)


def test_thinning_says_first_and_keeps_what_it_promised(tmp_path, capsys):
    import torch

    for clock in range(64, 64 * 25, 64):
        for sigma_rel in (0.05, 0.10):
            write_snapshot(tmp_path, clock, sigma_rel, {"w": torch.randn(8)})
    options = [str(tmp_path), "--thin", "0.05:0.15:0.05", "--max-error", "0.02"]
    assert snapshots.main(options) == 0
    said = capsys.readouterr().out
    assert "nothing removed" in said and len(snapshots.list_snapshots(tmp_path)) == 48
    assert snapshots.main([*options, "--yes"]) == 0
    left = snapshots.list_snapshots(tmp_path)
    assert 2 < len(left) < 30 and f"{len(left)} of 48 snapshots are needed" in said
    made = posthoc.plan(left, WANTED)
    assert made.errors.max() <= 0.02 and made.target == 1536
    assert snapshots.main([str(tmp_path), "--thin", "0.01"]) == 2
    assert "raise --max-error" in capsys.readouterr().err
    assert snapshots.list_snapshots(tmp_path) == left


def test_a_config_is_priced(capsys):
    assert snapshots.main(["configs/quickstart.yaml"]) == 0
    said = capsys.readouterr().out
    assert "tracking 0.05, 0.1: " in said and "MB" in said
    assert snapshots.main(["configs/nowhere.yaml"]) == 2
