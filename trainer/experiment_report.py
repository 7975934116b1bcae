"""An experiment as tables and a picture: NAME.csv (every cell), NAME.md (mean, spread, difference to the baseline), NAME.png.

What must not break: a difference is taken seed by seed, and one whose 95 % interval (Student's t) holds 0 is called not resolved.
"""

import csv
import io
import statistics
from pathlib import Path

from data_pipeline.durable import write_atomically

# Student's t, two-sided 95 %, by degrees of freedom
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
NORMAL_95 = 1.96
PANELS_ABREAST = 5
BETTER = {
    "loss": "lower",
    "latent": "lower",
    "fid": "lower",
    "fd_dinov2": "lower",
    "digits": "higher",
    "denoise": "higher",
    "chain": "higher",
}
# what a table by noise level says in a cell, and how; the first is also drawn as a curve
CELLS = {
    "denoise": {"denoised": "{:.2f}", "SSIM": " / {:.3f}", "path": " ({:.2f})", "noisy": ""},
    "chain": {"best": "{:.2f}", "SSIM": " / {:.3f}", "steps": ", K {:.1f}", "told": " ({:.2f})"},
}
CENTRE = 2  # |logsnr| below this is where Hang et al. want a schedule's mass


def curve(metric: str, values: dict) -> list[tuple[str, float]]:
    """Return (place, value) of what a metric says beyond its one figure."""
    if metric == "loss":
        return [(f"{sum(b['logsnr']) / 2:g}", b["loss"]) for b in values["bins"]]
    found = []
    for v in values["levels"] if metric in CELLS else ():
        plain, *others = (key for key in CELLS[metric] if key in v)
        found += [(f"{v['noise']:g}", v[plain])] + [(f"{key} {v['noise']:g}", v[key]) for key in others]
        found += [(f"K{s['steps']} {v['noise']:g}", s["psnr"]) for s in v.get("sweep", ())]
    return found


def figures(rows: list[dict]) -> dict[str, dict[str, dict[int, float]]]:
    """Return metric -> arm -> seed -> value; the loss in the centre of logSNR is a metric of its own."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        if row["at"] == "":
            found.setdefault(row["metric"], {}).setdefault(row["arm"], {})[row["seed"]] = row["value"]
    for arm, seeds in list(found.get("loss", {}).items()):
        for seed in seeds:
            middle = [
                r["value"]
                for r in rows
                if (r["arm"], r["seed"], r["metric"]) == (arm, seed, "loss")
                and r["at"]
                and abs(float(r["at"])) < CENTRE
            ]
            found.setdefault("loss, centre", {}).setdefault(arm, {})[seed] = statistics.mean(middle)
    return found


def difference(values: dict[int, float], baseline: dict[int, float]) -> tuple[float, float, bool]:
    """Return the mean difference over common seeds, half of its 95 % interval, and whether that leaves out 0."""
    each = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    mean = statistics.mean(each)
    if len(each) < 2:
        return mean, float("inf"), False
    half = T_95.get(len(each) - 1, NORMAL_95) * statistics.stdev(each) / len(each) ** 0.5
    return mean, half, abs(mean) > half


def markdown(rows: list[dict], baseline: str) -> str:
    """Return a table: a row per arm, mean +- standard deviation over seeds, and the difference to the baseline."""
    found, facts = figures(rows), {r["arm"]: r for r in rows}
    metrics = [m for m in found if m != "loss, centre"]
    metrics = [n for m in metrics for n in ((m, "loss, centre") if m == "loss" else (m,))]
    heads = ["arm", "parameters", "MFLOP", "images", "seeds"]
    for metric in metrics:
        heads += [f"{metric} ({BETTER[metric.split(',')[0]]} is better)", f"{metric} - {baseline}"]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for arm, row in facts.items():
        seeds = sorted(found[metrics[0]][arm])
        cells = [arm, f"{row['parameters']:,}", f"{row['forward_flops'] / 1e6:.1f}", f"{row['images']:,}"]
        cells.append(", ".join(map(str, seeds)))
        for metric in metrics:
            values = found[metric][arm]
            spread = f" +- {statistics.stdev(values.values()):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values.values()):.4f}{spread}")
            if arm == baseline:
                cells.append("")
                continue
            mean, half, resolved = difference(values, found[metric][baseline])
            interval = f" +- {half:.4f}" if half < float("inf") else ""
            cells.append(f"{mean:+.4f}{interval}" + ("" if resolved else " (not resolved)"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def by_level(rows: list[dict], metric: str) -> str:
    """Return a table of means over seeds: a row per arm, a column per noise level; "" where the metric has none."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["metric"] == metric and row["at"]:
            values.setdefault((row["arm"], row["at"]), []).append(row["value"])
    noises = list(dict.fromkeys(at for _, at in values if " " not in at))
    if metric not in CELLS or not noises:
        return ""
    plain, *_ = CELLS[metric]
    lines = [f"| {metric}, by noise | " + " | ".join(noises) + " |", "| --- |" + " ---: |" * len(noises)]
    for arm in dict.fromkeys(arm for arm, _ in values):
        cells = []
        for noise in noises:
            places = {key: (arm, noise if key == plain else f"{key} {noise}") for key in CELLS[metric]}
            cells.append(
                "".join(CELLS[metric][k].format(statistics.mean(values[p])) for k, p in places.items() if p in values)
            )
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def table(rows: list[dict]) -> str:
    """Return the rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def curves(rows: list[dict]) -> dict[str, dict[str, dict[float, list[float]]]]:
    """Return metric -> arm -> place -> the seeds' values."""
    found: dict[str, dict[str, dict[float, list[float]]]] = {}
    for row in rows:
        if row["at"] and " " not in row["at"]:
            at = found.setdefault(row["metric"], {}).setdefault(row["arm"], {})
            at.setdefault(float(row["at"]), []).append(row["value"])
    return found


def draw(path: Path, rows: list[dict], baseline: str, plot: str) -> None:
    """Draw a panel per metric, a point per seed, and a panel per curve, the seeds' range shaded; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found, lines = figures(rows), curves(rows)
    panels = len(found) + len(lines)
    columns = min(panels, PANELS_ABREAST)
    shape = -(-panels // columns), columns
    figure, axes = pyplot.subplots(*shape, figsize=(4 * columns, 3.6 * shape[0]), layout="constrained", squeeze=False)
    for empty in axes.flat[panels:]:
        empty.axis("off")
    panels = iter(axes.flat)
    for metric, arms in found.items():
        axis = next(panels)
        for i, (arm, values) in enumerate(arms.items()):
            axis.plot([i] * len(values), list(values.values()), "o", alpha=0.7, label=arm)
        axis.set_xticks(range(len(arms)), list(arms), rotation=45, ha="right", fontsize=8)
        axis.set_title(f"{metric} ({BETTER[metric.split(',')[0]]} is better)", fontsize=9)
    for metric, arms in lines.items():
        axis, base = next(panels), arms[baseline]
        for arm, places in arms.items():
            over = {x: statistics.mean(base[x]) if plot == "ratio" else 1.0 for x in places}
            mean, low, high = ([f(v) / over[x] for x, v in places.items()] for f in (statistics.mean, min, max))
            axis.plot(list(places), mean, ".-", linewidth=1.2, label=arm)
            axis.fill_between(list(places), low, high, alpha=0.2)
        axis.set_xlabel("logsnr" if metric == "loss" else "noise, relative to the data's range", fontsize=8)
        axis.set_title(f"{metric}, over {baseline}'s" if plot == "ratio" else metric, fontsize=9)
        axis.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write(folder: Path, name: str, rows: list[dict], baseline: str, plot: str) -> list[str]:
    """Write the three files and return what to print: the table, and where the files lie."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join([markdown(rows, baseline), *filter(None, (by_level(rows, metric) for metric in CELLS))])
    write_atomically(folder / f"{name}.csv", table(rows).encode())
    write_atomically(folder / f"{name}.md", text.encode())
    files = [f"{name}.csv", f"{name}.md", f"{name}.png"]
    try:
        draw(folder / files[2], rows, baseline, plot)
    except ImportError:
        files[2] = "no plot: pip install matplotlib"
    return [text, f"{folder}: {', '.join(files)}"]
