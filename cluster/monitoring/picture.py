"""Draw a dashboard without Grafana: `python -m cluster.monitoring.picture evenkeel-run --out FILE.png`.

Asks a Prometheus the panels' own queries over the same span, and draws the answers with matplotlib: not Grafana's rendering, but
the same numbers under the same titles and legends. For a README, or where no Grafana is at hand.
"""

import argparse
import io
import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from cluster.monitoring.panels import BOARDS, Board, Panel
from data_pipeline.command import command_line

POINTS = 200  # of a curve
COLUMNS, PANEL_INCHES, DPI = 3, (4.6, 2.2), 70
LEGENDS, LETTERS = 9, 40  # beyond so many curves a legend hides the picture; of a legend's name
COLOURS = 256  # of the file's palette: half the bytes, and nothing to be seen of it
FLAT = 1e-3  # what varies less than this share of itself is drawn as a level, not as its rounding

Series = tuple[str, list[float], list[float]]  # name, seconds since the start, values


def ask(server: str, query: str, start: float, end: float) -> list[dict]:
    """Return the series of a range query."""
    words = {"query": query, "start": start, "end": end, "step": max(1.0, (end - start) / POINTS)}
    with urllib.request.urlopen(f"{server}/api/v1/query_range?{urllib.parse.urlencode(words)}", timeout=30) as answer:
        return json.load(answer)["data"]["result"]


def series_of(panel: Panel, server: str, run: str, start: float, end: float) -> list[Series]:
    """Return a panel's curves."""
    interval, found = f"{max(10, int((end - start) / 50))}s", []
    for query, legend in panel.queries:
        for one in ask(server, query.replace("$run", run).replace("$__rate_interval", interval), start, end):
            times, values = zip(*((float(t) - start, float(v)) for t, v in one["values"]), strict=True)
            found.append((_name(legend, one["metric"]), list(times), list(values)))
    return found


def _name(legend: str, labels: dict[str, str]) -> str:
    for key, value in labels.items():
        legend = legend.replace("{{" + key + "}}", value)
    return legend[:LETTERS]


def draw(board: Board, server: str, run: str, start: float, end: float) -> tuple[bytes, int]:
    """Return (PNG, panels in it) of the panels that have data; (b"", 0) where none has."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"text.parse_math": False, "font.size": 7, "axes.grid": True, "grid.color": "#eeeeee"})
    from matplotlib import pyplot

    panels = [(panel, series_of(panel, server, run, start, end)) for panel in board.panels]
    panels = [(panel, series) for panel, series in panels if series]
    if not panels:
        return b"", 0
    rows = -(-len(panels) // COLUMNS)
    size = (COLUMNS * PANEL_INCHES[0], rows * PANEL_INCHES[1])
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=size, squeeze=False, layout="constrained")
    for axis, (panel, series) in zip(axes.flat, panels, strict=False):
        _draw_panel(axis, panel, series)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    figure.supxlabel("seconds", fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    pyplot.close(figure)
    return _smaller(file), len(panels)


def _draw_panel(axis, panel: Panel, series: list[Series]) -> None:
    for name, times, values in series:
        axis.plot(times, values, linewidth=1, label=name)
    axis.set_title(panel.title, fontsize=8, loc="left")
    if panel.log and any(value > 0 for _, _, values in series for value in values):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(_plain)
        low, high = axis.get_ylim()
        axis.yaxis.set_minor_formatter(_plain if high < 10 * low else _nothing)
    low, high = axis.get_ylim()
    if axis.get_yscale() == "linear" and high - low < FLAT * abs(low):
        axis.set_ylim(low - FLAT * abs(low), high + FLAT * abs(high))
    if len(series) <= LEGENDS:
        axis.legend(fontsize=5.5, loc="best", frameon=False)


def _plain(value: float, _=None) -> str:
    return f"{value:g}"


def _nothing(value: float, _=None) -> str:
    return ""


def _smaller(file: io.BytesIO) -> bytes:
    from PIL import Image

    small = io.BytesIO()
    Image.open(file).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return small.getvalue()


@command_line()
def main(argv: list[str] | None = None) -> int:
    """Draw one dashboard."""
    parser = argparse.ArgumentParser(prog="python -m cluster.monitoring.picture", description=main.__doc__)
    parser.add_argument("board", choices=[board.uid for board in BOARDS])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="(default %(default)s)")
    parser.add_argument("--run", default=".*", help="a run's name, or a regular expression of names (default: all)")
    parser.add_argument("--minutes", type=float, default=60, help="how far back (default %(default)s)")
    options = parser.parse_args(argv)
    board, end = next(board for board in BOARDS if board.uid == options.board), time.time()
    try:
        png, number = draw(board, options.prometheus.rstrip("/"), options.run, end - 60 * options.minutes, end)
    except ImportError:
        raise ValueError("matplotlib is not installed; pip install -c constraints.txt '.[report]'") from None
    except urllib.error.URLError as error:
        raise ValueError(f"--prometheus {options.prometheus}: {error.reason}; start it, or name another") from None
    if not number:
        raise ValueError(f"--run {options.run}: no data in the last {options.minutes:g} minutes; name another run")
    beside = options.out.with_name(f".{options.out.name}.{os.getpid()}")
    beside.write_bytes(png)
    os.replace(beside, options.out)
    print(f"wrote {options.out}: {number} panels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
