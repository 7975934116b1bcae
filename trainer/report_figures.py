"""The figures of a report: what metrics.jsonl, evaluations.jsonl and sweep.csv of a run say, drawn with matplotlib.

Each function draws on axes that it is given and says whether there was anything to draw. matplotlib is imported by `canvas` alone.
"""

import csv
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from trainer import run_log

WIDTH, HEIGHT, DPI = 7.2, 2.8, 100  # inches; of one panel
FLAT = 1e-3  # what varies less than this share of itself is drawn as a level
CURVES = 7  # clocks at which the loss per logSNR is drawn


class Subject(NamedTuple):
    """A run as figures see it."""

    name: str
    folder: Path
    lines: list[dict]  # all
    lineage: list[dict]  # without what was repeated


def canvas():
    """Return matplotlib's pyplot, drawing to memory; raise ValueError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("matplotlib is not installed; pip install -c constraints.txt '.[report]'") from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update({
        "text.parse_math": False,  # a run may be called $x
        "font.size": 9, "axes.grid": True, "grid.color": "#e5e5e5", "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.2,
    })  # fmt: skip
    from matplotlib import pyplot

    return pyplot


def draw(panels: list[tuple[str, Callable]], *subjects: Subject) -> bytes | None:
    """Return a PNG with a panel below the other for each (title, function of (axis, *subjects)); None where all are empty."""
    pyplot = canvas()
    _, trial = pyplot.subplots()
    full = [(title, panel) for title, panel in panels if panel(trial, *subjects)]
    if full:
        size = (WIDTH, HEIGHT * len(full))
        figure, axes = pyplot.subplots(len(full), 1, figsize=size, squeeze=False, layout="constrained")
        for axis, (title, panel) in zip(axes[:, 0], full, strict=True):
            panel(axis, *subjects)
            _finish(axis, title)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=DPI)
    pyplot.close("all")
    return file.getvalue() if full else None


def _finish(axis, title: str) -> None:
    axis.set_title(title, loc="left")
    if axis.get_legend_handles_labels()[1]:
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    low, high = axis.get_ylim()
    if axis.get_yscale() == "log":
        axis.yaxis.set_major_formatter(_plain)
        axis.yaxis.set_minor_formatter(_plain if high < 10 * low else _nothing)
    elif high - low < FLAT * abs(low):  # rounding is not to look like a movement
        middle = (low + high) / 2
        axis.set_ylim(middle - FLAT * abs(middle), middle + FLAT * abs(middle))


def _plain(value: float, _=None) -> str:
    return f"{value:g}"


def _nothing(value: float, _=None) -> str:
    return ""


def _finite(values: list[float]) -> bool:
    return any(math.isfinite(v) for v in values)


def _log(axis, *lists: list[float]) -> None:
    if any(v > 0 for values in lists for v in values):
        axis.set_yscale("log")


def _clock_axis(axis, *subjects: Subject) -> None:
    axis.set_xlabel("images seen")
    axis.xaxis.set_major_formatter(_size)
    for i, subject in enumerate(subjects):
        for _, clock in run_log.restarts(subject.lines):
            axis.axvline(clock, color=f"C{i}" if len(subjects) > 1 else "#d62728", linestyle=":", linewidth=1)


def _size(value: float, _=None) -> str:
    for unit, word in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{word}"
    return f"{value:g}"


def metric(name: str, log: bool = False) -> Callable:
    """Return a panel of one metric without labels: a line per run."""

    def panel(axis, *subjects: Subject) -> bool:
        found = [(s.name, *run_log.series(s.lineage, name).get("", ([], []))) for s in subjects]
        found = [(name, clocks, values) for name, clocks, values in found if _finite(values)]
        for label, clocks, values in found:
            axis.plot(
                clocks, values, label=label if len(subjects) > 1 else None, marker="." if len(values) < 3 else None
            )
        if log and found:
            _log(axis, *(values for _, _, values in found))
        _clock_axis(axis, *subjects)
        return bool(found)

    return panel


def labelled(name: str, log: bool = False, **wanted: str) -> Callable:
    """Return a panel of one metric of one run, a line per series; `wanted` chooses among labels, which the legend leaves out."""

    def panel(axis, subject: Subject) -> bool:
        drawn = []
        # in one order in every report, so that a bucket keeps its colour
        for key, (clocks, values) in sorted(run_log.series(subject.lineage, name).items()):
            label = run_log.labels(key)
            if _finite(values) and all(label.get(k) == v for k, v in wanted.items()):
                words = [v for k, v in label.items() if k not in wanted]
                axis.plot(clocks, values, label=" ".join(words), marker="." if len(values) < 3 else None)
                drawn.append(values)
        if log:
            _log(axis, *drawn)
        _clock_axis(axis, subject)
        return bool(drawn)

    return panel


def phases(axis, subject: Subject) -> bool:
    """Stack the mean time of a step by phase; communication lies inside of the others and is left out."""
    found = run_log.series(subject.lineage, "evenkeel_phase_seconds")
    found = {run_log.labels(k).get("phase", k): v for k, v in found.items()}
    found.pop("communication", None)
    longest = max((clocks for clocks, _ in found.values()), key=len, default=[])
    stack = {}
    for phase, (clocks, values) in found.items():
        known = dict(zip(clocks, values, strict=True))
        stack[phase] = [max(0.0, known.get(c, 0.0)) if known.get(c, 0.0) == known.get(c, 0.0) else 0.0 for c in longest]
    if not stack:
        return False
    axis.stackplot(longest, stack.values(), labels=stack.keys())
    axis.set_ylabel("seconds")
    _clock_axis(axis, subject)
    return True


def loss_by_logsnr(axis, subject: Subject) -> bool:
    """Draw the denoising loss over logSNR, at some clocks from the beginning to the end."""
    lines = [line for line in subject.lineage if isinstance(line.get("evenkeel_loss_by_logsnr"), dict)]
    chosen = [lines[round(i * (len(lines) - 1) / (CURVES - 1))] for i in range(CURVES)] if lines else []
    chosen = list({line["evenkeel_images_seen"]: line for line in chosen}.values())
    for i, line in enumerate(chosen):
        shares = line.get(
            "evenkeel_samples_by_logsnr_ratio", {}
        )  # in earlier versions an empty bin showed an older value
        found = {k: v for k, v in line["evenkeel_loss_by_logsnr"].items() if shares.get(k, 1.0)}
        points = {float(run_log.labels(k)["logsnr"]): run_log.number(v) for k, v in found.items()}
        colour = canvas().cm.viridis(0.9 * i / max(1, len(chosen) - 1))
        axis.plot(
            sorted(points), [points[x] for x in sorted(points)], color=colour, label=_size(line["evenkeel_images_seen"])
        )
    if chosen:
        _log(axis, [1.0])
        axis.set_xlabel("logSNR = 2 ln(sigma_data / sigma)")
    return bool(chosen)


def heldout(axis, *subjects: Subject) -> bool:
    """Draw the loss that `evaluate --follow` measured of each snapshot, a line per run and EMA length."""
    drawn = 0
    for subject in subjects:
        found = run_log.read_evaluations(subject.folder)
        for sigma_rel in sorted({e["sigma_rel"] for e in found}):
            mine = [e for e in found if e["sigma_rel"] == sigma_rel]
            name = f"{subject.name} " if len(subjects) > 1 else ""
            axis.plot(
                [e["evenkeel_images_seen"] for e in mine],
                [e["mean"] for e in mine],
                label=f"{name}sigma_rel {sigma_rel:.3f}",
            )
            drawn += 1
    if drawn:
        _log(axis, [1.0])
    _clock_axis(axis, *subjects)
    return drawn > 0


def sweep_rows(folder: Path) -> list[dict[str, float]]:
    """Return the rows of RUN/sweep/sweep.csv that are numbers, [] without one."""
    try:
        text = (folder / "sweep" / "sweep.csv").read_text(errors="replace")
    except FileNotFoundError:
        return []
    rows = []
    for row in csv.DictReader(io.StringIO(text)):
        try:
            rows.append({k: float(v) for k, v in row.items()})
        except (TypeError, ValueError):  # a line that was cut off, or edited
            continue
    return [row for row in rows if "sigma_rel" in row]


def sweep(name: str) -> Callable:
    """Return a panel of one metric of the EMA sweeps over the EMA length: a line per run and guidance weight."""

    def panel(axis, *subjects: Subject) -> bool:
        drawn = 0
        for subject in subjects:
            rows = [row for row in sweep_rows(subject.folder) if name in row]
            for guidance in sorted({row.get("guidance", 1.0) for row in rows}):
                mine = sorted((r["sigma_rel"], r[name]) for r in rows if r.get("guidance", 1.0) == guidance)
                label = f"{subject.name} " if len(subjects) > 1 else ""
                axis.plot(*zip(*mine, strict=True), label=f"{label}guidance {guidance:g}", marker=".")
                drawn += 1
        axis.set_xlabel("sigma_rel (EMA length)")
        return drawn > 0

    return panel


def sweeps(*subjects: Subject) -> list[tuple[str, Callable]]:
    """Return a panel for each metric that the runs' sweeps measured."""
    names = dict.fromkeys(key for s in subjects for row in sweep_rows(s.folder)[:1] for key in row)
    return [(f"EMA sweep: {name}", sweep(name)) for name in names if name not in ("sigma_rel", "guidance")]


# of all runs together, then of each run: (file name, alternative text, panels)
SHARED = (
    ("loss", "Loss", (("Loss with uncertainty", metric("evenkeel_loss")),
                      ("Denoising loss", metric("evenkeel_denoising_loss", log=True)),
                      ("Gradient norm", metric("evenkeel_gradient_norm", log=True)))),
    ("throughput", "Throughput", (("Images per second", metric("evenkeel_images_per_second")),
                                  ("Model FLOP/s", metric("evenkeel_flops_per_second")))),
    ("heldout", "Loss of the snapshots", (("Loss of the snapshots (evaluate --follow)", heldout),)),
)  # fmt: skip
SINGLE = (
    ("logsnr", "Loss per logSNR", (("Denoising loss over logSNR, by images seen", loss_by_logsnr),)),
    ("magnitudes", "Magnitudes", (
        ("Activations, mean over layers", labelled("evenkeel_activation_magnitude", statistic="mean")),
        ("Activations, max over layers", labelled("evenkeel_activation_magnitude", statistic="max")),
        ("Weights, mean over layers", labelled("evenkeel_weight_magnitude", statistic="mean")),
        ("Weights, max over layers", labelled("evenkeel_weight_magnitude", statistic="max")),
        ("Relative size of updates", labelled("evenkeel_update_ratio", log=True)))),
    ("phases", "Time of a step", (("Time of a step by phase", phases),)),
)  # fmt: skip
