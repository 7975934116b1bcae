"""One HTML file of a run, or of several beside each other: `python -m trainer.report RUN [RUN2 ...]`.

Needs no server, no network and no GPU: pictures and styles lie inside the file, and its policy (Content-Security-Policy) lets a
browser load nothing else. The PNGs lie beside it too. Works on a run that is under way and on one that failed. What must not break:
every text that comes from a run is escaped.
"""

import argparse
import base64
import html
import io
import json
import os
import sys
import time
from pathlib import Path

import yaml

from data_pipeline.command import command_line
from data_pipeline.durable import write_atomically
from trainer import report_figures, run_log
from trainer.report_figures import SHARED, SINGLE, Subject, draw, sweeps
from trainer.state import read as read_state

GRIDS, GRID_PIXELS = 8, 640  # of a run, at most; the longer side inside the report
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1500px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: .5em 0 } th, td { text-align: left; padding: .15em 1.2em .15em 0; vertical-align: top }
th { font-weight: 600 } h2 { margin-top: 2em; border-bottom: 1px solid #ccc } figure { margin: 0 0 1em } figcaption { color: #666 }
img { max-width: 100% } pre { background: #f6f6f6; padding: 1em; overflow: auto } .error { color: #b00020 }
.beside { display: flex; gap: 1.5em; align-items: flex-start; overflow-x: auto } .beside > * { flex: 1 1 0; min-width: 20em }
.grids { display: flex; flex-wrap: wrap; gap: 1em } .grids img { max-width: 320px; image-rendering: pixelated }
"""


def open_run(folder: Path) -> Subject:
    """Read a run; raise ValueError for a folder that is none, and for a run that has logged nothing yet."""
    if not folder.is_dir() or not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder}: no run directory (no config.yaml in it); name a folder such as runs/quickstart")
    lines = run_log.read(folder)
    if not lines:
        raise ValueError(
            f"{folder}: nothing in metrics.jsonl yet; wait for the first publication (metrics.every_images)"
        )
    return Subject(folder.resolve().name, folder, lines, run_log.lineage(lines))


def told_apart(subjects: list[Subject]) -> list[Subject]:
    """Return the runs with names that differ: those of one name in several places are called by their paths."""
    names = [s.name for s in subjects]
    return [s if names.count(s.name) == 1 else s._replace(name=str(s.folder)) for s in subjects]


# ---------------------------------------------------------------------------------------------------------------------
# What stands in words.


def _escape(value) -> str:
    return html.escape(str(value))


def facts(subject: Subject) -> dict[str, str]:
    """Return what a run is, where it stands and what it has cost, in words."""
    state, last, spent = _state(subject.folder), subject.lines[-1], run_log.cost(subject.lines)
    info, clock, duration = run_log.info(last), last["evenkeel_images_seen"], last.get("evenkeel_duration_images")
    begun = ", ".join(f"start {attempt} by {clock:,}" for attempt, clock in run_log.restarts(subject.lines))
    peaks = {run_log.labels(key).get("peak") for key in last.get("evenkeel_mfu_ratio", {})} - {"metrics.peak_flops"}
    devices = "GPU-hours" if peaks or "evenkeel_gpu_power_watts" in last else "rank-hours"
    return {
        "status": state.get("status", "unknown"),
        "last error": state.get("last_error", ""),
        "images seen": f"{clock:,} of {duration:,} ({clock / duration:.1%})" if duration else f"{clock:,}",
        "epochs": f"{run_log.number(last.get('evenkeel_epoch_ratio')):.2f}",
        "loss": f"{run_log.number(last.get('evenkeel_loss')):.5f}",
        "last line": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(last["time"])) if "time" in last else "",
        "restarts": begun or "none",
        "commit": info.get("commit", ""),
        "config hash": info.get("config", ""),
        "ranks": info.get("world", ""),
        "cost so far": f"{spent.rank_seconds / 3600:,.2f} {devices} ({spent.seconds / 3600:,.2f} h by the clock, without start-up)",
        "images trained on": f"{spent.images:,.0f}, of these {spent.repeated:,.0f} again after restarts",
        "model FLOPs": f"{spent.flops:.3g}",
    }


def _state(folder: Path) -> dict:
    try:
        return read_state(folder)
    except ValueError:  # damaged: the report has other things to say
        return {"status": "state.json is not readable"}


def flat_config(folder: Path) -> dict[str, str]:
    """Return the composed config as {dotted key: value}; a damaged file says so."""
    try:
        plain = yaml.safe_load((folder / "config.yaml").read_text(errors="replace"))
    except yaml.YAMLError:
        return {"config.yaml": "not readable"}
    found: dict[str, str] = {}

    def walk(value, key: str) -> None:
        if isinstance(value, dict) and value:
            for name, one in value.items():
                walk(one, f"{key}.{name}" if key else str(name))
        else:
            found[key] = json.dumps(value, default=str)

    walk(plain, "")
    return found


def table(names: list[str], rows: dict[str, list[str]]) -> str:
    """Return an HTML table with a column per run; rows that are empty everywhere are left out."""
    head = "".join(f"<th>{_escape(name)}</th>" for name in names)
    body = ""
    for key, cells in rows.items():
        if any(cells):
            mark = ' class="error"' if key == "last error" else ""
            body += f"<tr><th>{_escape(key)}</th>" + "".join(f"<td{mark}>{_escape(c)}</td>" for c in cells) + "</tr>\n"
    return f"<table><tr><th></th>{head}</tr>\n{body}</table>\n"


# ---------------------------------------------------------------------------------------------------------------------
# Pictures.


def _image(png: bytes, alt: str, kind: str = "png") -> str:
    return f'<img alt="{_escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(png).decode()}">'


def grids(subject: Subject) -> list[tuple[str, bytes]]:
    """Return (caption, PNG) of the run's grids of samples over time: some from first to last, made smaller."""
    found = sorted((subject.folder / "samples").glob("grid-*.png"))
    lengths = {p.stem.rpartition("-")[2] for p in found}
    one = [p for p in found if p.stem.endswith(f"-{max(lengths)}")] if lengths else []  # of the longest average
    chosen = [one[round(i * (len(one) - 1) / (GRIDS - 1))] for i in range(GRIDS)] if one else []
    others = [p for p in sorted((subject.folder / "samples").glob("*.png")) if p not in found]
    pictures = []
    for path in [*dict.fromkeys(chosen), *others[:2]]:
        words = path.stem.split("-")
        named = path in found and len(words) == 3 and words[1].isdigit()
        caption = f"{int(words[1]):,} images, sigma_rel {words[2]}" if named else path.name
        if png := _smaller(path):
            pictures.append((caption, png))
    return pictures


def _smaller(path: Path) -> bytes | None:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.thumbnail((GRID_PIXELS, GRID_PIXELS))
            file = io.BytesIO()
            image.convert("RGB").save(file, "png")
            return file.getvalue()
    except (OSError, ValueError):  # cut off, or no picture at all
        return None


class Pictures:
    """Figures drawn on demand; each is also written to `folder` as a PNG."""

    def __init__(self, folder: Path):
        self.folder, self.written = folder, []

    def figure(self, name: str, alt: str, panels, *subjects: Subject) -> str:
        """Return the figure as HTML, "" where there is nothing to show."""
        png = draw(list(panels), *subjects)
        if png is None:
            return ""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / f"{name}.png", png)
        self.written.append(self.folder / f"{name}.png")
        return f"<figure>{_image(png, alt)}</figure>\n"


# ---------------------------------------------------------------------------------------------------------------------
# The page.


def page(subjects: list[Subject], pictures: Pictures) -> str:
    """Return the report as one HTML text."""
    names = [s.name for s in subjects]
    title = f"evenkeel: {', '.join(names)}"
    told = [facts(s) for s in subjects]
    parts = [f"<h1>{_escape(title)}</h1>\n", table(names, {key: [f[key] for f in told] for key in told[0]})]
    if any(run_log.restarts(s.lines) for s in subjects):
        parts.append("<p>Dotted lines: the run was started again, and that start's first line.</p>\n")
    for name, alt, panels in [*SHARED, ("sweep", "EMA sweep", sweeps(*subjects))]:
        if figure := pictures.figure(name, alt, panels, *subjects):
            parts.append(f"<h2>{_escape(alt)}</h2>\n{figure}")
    for name, alt, panels in SINGLE:
        cells = [
            _cell(s, pictures.figure(_file(name, i, subjects), f"{alt}, {s.name}", panels, s))
            for i, s in enumerate(subjects)
        ]
        if any(cells):
            parts.append(f'<h2>{_escape(alt)}</h2>\n<div class="beside">{"".join(cells)}</div>\n')
    cells = [_cell(s, _grids(s)) for s in subjects]
    if any(cells):
        parts.append(f'<h2>Samples</h2>\n<div class="beside">{"".join(cells)}</div>\n')
    parts.append(_configuration(subjects))
    made = f"<p>Made {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())} by python -m trainer.report.</p>\n"
    head = f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
    head += '<link rel="icon" href="data:,">\n'  # or a browser asks for one
    head += (
        f'<meta name="viewport" content="width=device-width">\n<title>{_escape(title)}</title>\n<style>{STYLE}</style>'
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{"".join(parts)}{made}</body>\n</html>\n'
    )


def _file(name: str, i: int, subjects: list[Subject]) -> str:
    return name if len(subjects) == 1 else f"{name}-{i + 1}"


def _cell(subject: Subject, content: str) -> str:
    return f"<div><h3>{_escape(subject.name)}</h3>{content}</div>" if content else ""


def _grids(subject: Subject) -> str:
    figures = "".join(
        f"<figure>{_image(png, caption)}<figcaption>{_escape(caption)}</figcaption></figure>"
        for caption, png in grids(subject)
    )
    return f'<div class="grids">{figures}</div>' if figures else ""


def _configuration(subjects: list[Subject]) -> str:
    configs = [flat_config(s.folder) for s in subjects]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    rows = {key: [config.get(key, "-") for config in configs] for key in keys}
    names = [s.name for s in subjects]
    differ = {key: cells for key, cells in rows.items() if len(set(cells)) > 1}
    told = f"<p>Where they differ:</p>\n{table(names, differ)}" if differ else ""
    return f"<h2>Configuration</h2>\n{told}<details><summary>all keys</summary>\n{table(names, rows)}</details>\n"


@command_line()
def main(argv=None) -> int:
    """Write one HTML file of a run, or of several beside each other."""
    parser = argparse.ArgumentParser(prog="python -m trainer.report", description=main.__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    parser.add_argument(
        "--out", type=Path, help="FILE.html (default RUN/report.html; of several runs, report.html beside the first)"
    )
    options = parser.parse_args(argv)
    several = len(options.runs) > 1
    out = options.out or (options.runs[0].resolve().parent if several else options.runs[0]) / "report.html"
    if out.suffix != ".html":
        raise ValueError(f"--out {out}: must be a file name that ends in .html")
    report_figures.canvas()
    subjects = told_apart([open_run(folder) for folder in options.runs])
    pictures = Pictures(out.with_suffix(""))
    text = page(subjects, pictures)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, text.encode(errors="replace"))
    print(
        f"wrote {out} ({len(text) / 2**20:.1f} MiB) and {len(pictures.written)} PNGs in {os.path.relpath(pictures.folder)}/"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
