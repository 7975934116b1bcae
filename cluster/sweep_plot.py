"""Draw a sweep as a PNG with nothing but Pillow: a panel per metric, a line per guidance weight, the best point marked."""

import math
import os
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 720, 360  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 90, 150, 40, 50
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round values between two others: multiples of 1, 2 or 5 times a power of 10, at most `count`."""
    steps = (m * 10.0**e for e in range(-12, 13) for m in (1, 2, 5))
    step = next(s for s in steps if (high - low) / s <= count)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]


def write(path: Path, title: str, rows: list[dict], metrics: list[tuple[str, str]]) -> None:
    """Write the picture of `rows` ({sigma_rel, guidance, metric: value}); `metrics` are (name, low | high)."""
    image = Image.new("RGB", (WIDTH, HEIGHT * len(metrics)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for i, (metric, better) in enumerate(metrics):
        _panel(draw, font, i * HEIGHT, title, rows, metric, better)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    image.save(beside, "png")
    os.replace(beside, path)


def _panel(draw: ImageDraw.ImageDraw, font, top: int, title: str, rows: list[dict], metric: str, better: str) -> None:
    xs, ys = [r["sigma_rel"] for r in rows], [r[metric] for r in rows]
    (x0, x1), (y0, y1) = _widened(xs), _widened(ys)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return LEFT + across, top + HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    frame = [at(x0, y1), at(x1, y0)]
    for x in ticks(x0, x1, 10):
        draw.line([at(x, y0), at(x, y1)], fill="#e5e5e5")
        draw.text((at(x, y0)[0], at(x, y0)[1] + 6), f"{x:g}", fill="black", font=font, anchor="ma")
    for y in ticks(y0, y1):
        draw.line([at(x0, y), at(x1, y)], fill="#e5e5e5")
        draw.text((LEFT - 8, at(x0, y)[1]), f"{y:g}", fill="black", font=font, anchor="rm")
    draw.rectangle(frame, outline="black")
    draw.text((LEFT, top + 12), f"{metric}, {title}", fill="black", font=font)
    draw.text(
        ((frame[0][0] + frame[1][0]) / 2, top + HEIGHT - 18),
        "sigma_rel (EMA length)",
        fill="black",
        font=font,
        anchor="ma",
    )
    for i, guidance in enumerate(sorted({r["guidance"] for r in rows})):
        colour = COLOURS[i % len(COLOURS)]
        points = [at(r["sigma_rel"], r[metric]) for r in rows if r["guidance"] == guidance]
        draw.line(points, fill=colour, width=2)
        for x, y in points:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        draw.text((WIDTH - RIGHT + 12, top + TOP + 18 * i), f"guidance {guidance:g}", fill=colour, font=font)
    best = (min if better == "low" else max)(rows, key=lambda r: r[metric])
    x, y = at(best["sigma_rel"], best[metric])
    draw.ellipse([x - 8, y - 8, x + 8, y + 8], outline="black", width=2)
    below = top + HEIGHT - BOTTOM - 40
    draw.text(
        (WIDTH - RIGHT + 12, below), f"best {best[metric]:.5g}\nat {best['sigma_rel']:g}", fill="black", font=font
    )


def _widened(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin
