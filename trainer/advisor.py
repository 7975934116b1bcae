"""Advice while a run trains: which EMA length is best so far, by the held-out loss, how it drifts, and which snapshots can go.

Every length sees the same images with the same noise at the same levels, so that their differences are known far better than
their losses: error bars are those of paired differences. A length at a clock is measured once and kept in RUN/posthoc/advice/. What
must not break: a kept measurement names the very snapshots that it was made from.
"""

import argparse
import hashlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline import durable
from trainer import config, heldout, posthoc, snapshot_plan
from trainer.ema_profiles import gamma_from_sigma_rel, parse_range, predicted_error
from trainer.snapshots import abandoned, list_snapshots, load_denoiser, to_come

CANDIDATES = tuple(round(0.02 * 1.25**i, 3) for i in range(12))  # 0.02 .. 0.233, a quarter apart
DATA_IMAGES = 1000
RESAMPLINGS = 200  # of the images, for the range of the best length


def advise(run: Path, options: argparse.Namespace) -> list[str]:
    """Measure what is missing, write RUN/posthoc/advice.json, and return the lines that tell."""
    series = list_snapshots(run)
    lost = abandoned(series)
    usable = [s for s in series if s not in lost and s.clock > 0]
    if not usable:
        raise ValueError(f"{run}: no snapshots yet; ask again after the first (snapshots.every_images)")
    lengths = _carried(usable, options)
    folder = run / "posthoc" / "advice"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            durable.lock(lock)
        except BlockingIOError:
            raise ValueError(f"{run}: another process works out advice for this run; wait for it") from None
        data = heldout.open_of_run(run, options.data, usable[-1].header["data"], options.data_images or DATA_IMAGES)
        told = [
            judge(clock, lengths, measure(folder, usable, clock, lengths, data, options), data.num)
            for clock in _clocks(run, usable, options.drift)
        ]
    found = {"version": 1, "run": run.name, "data": data.name, "images": data.num, "clocks": told}
    durable.write_atomically(run / "posthoc" / "advice.json", json.dumps(found).encode())
    return [*tables(found), *_deletable(run, usable, lengths, options.keep_error)]


def _carried(usable: Sequence, options: argparse.Namespace) -> list[float]:
    """Return the lengths to try: those asked for, or of the candidates all that the snapshots carry."""
    if options.sigma_rel:
        return sorted(parse_range(options.sigma_rel))
    made = posthoc.plan(usable, CANDIDATES)
    errors = np.maximum(made.errors, made.rounding)
    lengths = [s for s, error in zip(CANDIDATES, errors) if error <= options.max_error]
    if not lengths:
        raise ValueError(
            f"{len(usable)} snapshots carry no length to within {100 * options.max_error:g} % yet; ask again later, or raise "
            f"--max-error"
        )
    return lengths


def _clocks(run: Path, usable: Sequence, count: int) -> list[int]:
    """Return `count` earlier clocks that stay the same while the run goes on, with snapshots there, and the newest."""
    clocks, newest = sorted({s.clock for s in usable}), usable[-1].clock
    path = run / "config.yaml"
    duration = config.load(path).duration_images if path.is_file() else newest
    marks = [duration * i / (count + 1) for i in range(1, count + 1)]
    return sorted({min(clocks, key=lambda c: abs(c - mark)) for mark in marks if mark < newest} | {newest})


def measure(folder: Path, usable: Sequence, clock: int, lengths: list[float], data, options) -> np.ndarray:
    """Return held-out losses float64 [lengths, images, bins] of reconstructions at `clock`; NaN where one is not carried there."""
    made = posthoc.plan(usable, lengths, clock)
    losses = np.full((len(lengths), data.num, len(heldout.BIN_EDGES) - 1), np.nan)
    names = [[s.path.name, s.header.get("life"), s.header["checksums"]] for s in made.inputs]
    identity = hashlib.sha256(json.dumps([names, data.digest, data.num, data.seed]).encode()).hexdigest()[:16]
    files = [folder / f"{clock:010d}-{s:.5f}-{identity}.npy" for s in lengths]
    kept = [_kept(file) for file in files]
    good = np.maximum(made.errors, made.rounding) <= options.max_error
    wanted = [i for i in range(len(files)) if kept[i] is None and good[i]]
    if wanted:
        making = folder / ".making"
        shutil.rmtree(making, ignore_errors=True)  # of a process that was killed: the lock is ours
        making.mkdir()
        try:
            paths = [making / f"{i}.safetensors" for i in wanted]
            posthoc.reconstruct(posthoc.plan(usable, [lengths[i] for i in wanted], clock), paths)
            for i, path in zip(wanted, paths):
                network, _ = load_denoiser(path, options.activations, options.device)
                found = heldout.bin_losses(network, data, options.batch, options.device)
                path.unlink()
                durable.write_atomically(files[i], _as_npy(found))
                kept[i] = found
        finally:
            shutil.rmtree(making, ignore_errors=True)
    for i, found in enumerate(kept):
        if found is not None:
            losses[i] = found
    return losses


def _kept(file: Path) -> np.ndarray | None:
    """Return a measurement that was kept; None without one, or where a crash of the machine left half of it."""
    try:
        return np.load(file)
    except (FileNotFoundError, ValueError, EOFError):
        return None


def _as_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def judge(clock: int, lengths: Sequence[float], losses: np.ndarray, num: int) -> dict:
    """Return what `losses` [lengths, images, bins] say: the best length, its range, and how far each length is from it.

    Distances are shares of the best's loss, with the standard error of the paired difference; overall and per bin.
    """
    there = [i for i in range(len(lengths)) if np.isfinite(losses[i]).all()]
    if not there:
        return {"clock": clock, "best": None, "lengths": []}
    lengths, losses = [lengths[i] for i in there], losses[there]
    overall = losses.mean(2)
    rng = np.random.default_rng(0)
    drawn = [_lowest(lengths, overall[:, rng.integers(0, num, num)].mean(1)) for _ in range(RESAMPLINGS)]
    columns = [overall, *np.moveaxis(losses, 2, 0)]
    excess = [_excess(column) for column in columns]  # [1 + bins][lengths] (share, error)
    best = int(overall.mean(1).argmin())
    return {
        "clock": clock,
        "best": _lowest(lengths, overall.mean(1)),
        "range": [float(q) for q in np.quantile(drawn, (0.16, 0.84))],
        "at_an_end": best in (0, len(lengths) - 1),
        "lengths": [
            {"sigma_rel": s, "loss": float(overall[i].mean()), "excess": [column[i] for column in excess]}
            for i, s in enumerate(lengths)
        ],
    }


def _excess(column: np.ndarray) -> list[tuple[float, float]]:
    """Return (share, standard error) by which each row of [lengths, images] lies above the row with the lowest mean."""
    base = column[column.mean(1).argmin()]
    gap = (column - base) / base.mean()
    return [(float(g.mean()), float(g.std(ddof=1) / len(g) ** 0.5)) for g in gap]


def _lowest(lengths: Sequence[float], values: np.ndarray) -> float:
    """Return where the parabola in ln sigma_rel through the lowest value and its neighbours is lowest; an end stays itself."""
    i = int(values.argmin())
    if not 0 < i < len(lengths) - 1:
        return float(lengths[i])
    x, y = np.log(lengths[i - 1 : i + 2]), values[i - 1 : i + 2]
    a, b, _ = np.polyfit(x - x[1], y, 2)
    return float(np.exp(np.clip(x[1] - b / (2 * a), x[0], x[2]))) if a > 0 else float(lengths[i])


def tables(found: dict) -> list[str]:
    """Return the advice as text."""
    now = found["clocks"][-1]
    if now["best"] is None:
        raise ValueError(f"at {now['clock']} images no length is carried; raise --max-error")
    bins = [f"[{a},{b}]" for a, b in zip(heldout.BIN_EDGES, heldout.BIN_EDGES[1:])]
    lines = [
        f"{found['run']} at {now['clock']:,} images; {found['images']} images of {found['data']}",
        "loss above the best length's, in thousandths of it, +- standard error of the paired difference; then per bin of logSNR",
        f"{'sigma_rel':>9}  {'loss':>8}  {'all bins':>12}" + "".join(f"  {b:>12}" for b in bins),
    ]
    for row in now["lengths"]:
        cells = [f"{1000 * g:.2f}+-{1000 * e:.2f}" if e else "best" for g, e in row["excess"]]
        lines.append(f"{row['sigma_rel']:>9.3f}  {row['loss']:>8.5f}" + "".join(f"  {c:>12}" for c in cells))
    end = "; it is an end of what was tried: name longer or shorter ones with --sigma-rel" if now["at_an_end"] else ""
    lines.append(f"best so far: {_said(now)}{end}")
    drift = [f"{t['clock']:,} images {_said(t)}" for t in found["clocks"] if t["best"] is not None]
    if len(drift) > 1:
        lines.append("drift: " + "; ".join(drift))
    return lines


def _said(one: dict) -> str:
    return f"{one['best']:.3f} (68 %: {one['range'][0]:.3f}..{one['range'][1]:.3f})"


def _deletable(run: Path, usable: Sequence, lengths: Sequence[float], error: float) -> list[str]:
    """Say which snapshots can go while every length that all of them carry to within `error` stays so, now and at the end."""
    clocks, tracked = [s.clock for s in usable], [s.sigma_rel for s in usable]
    targets = [gamma_from_sigma_rel(s) for s in lengths]
    gammas = [gamma_from_sigma_rel(s) for s in tracked]
    wanted = [s for s, e in zip(lengths, predicted_error(clocks, gammas, clocks[-1], targets)) if e <= error]
    if not wanted:
        return [f"deletable: none; no length is carried to within {100 * error:g} % (--keep-error) by all snapshots"]
    try:
        kept, errors = snapshot_plan.needed_until_end(clocks, tracked, wanted, error, to_come(run, clocks[-1]))
    except ValueError as reason:  # with the snapshots to come, even all of them would not do at the end
        return [f"deletable: none; at the end of the run {reason}"]
    gone = [s.path for i, s in enumerate(usable) if i not in set(kept)]
    size = sum(p.stat().st_size for p in gone) / 2**20
    listed = ",".join(f"{s:g}" for s in wanted)
    lines = [
        f"deletable: {len(gone)} of {len(usable)} snapshots, {size:.1f} MiB; sigma_rel {listed} would then err by at most "
        f"{100 * errors.max():.3g} % now and at the end of the run"
    ]
    if gone:
        lines.append(f"  {' '.join(p.name for p in gone)}")
        lines.append(f"  python -m trainer.snapshots {run} --thin {listed} --max-error {error:g} --yes")
    return lines
