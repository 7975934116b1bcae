"""Show a PNG in a terminal: two pixels a character, upper half in the foreground colour, lower half in the background's."""

import shutil
from pathlib import Path

from PIL import Image

HALF_BLOCK = "▀"


def rendered(path: Path, columns: int, lines: int) -> str:
    """Return the picture as text with 24-bit ANSI colours, at most `columns` wide and `lines` high."""
    with Image.open(path) as image:
        pixels = image.convert("RGB")
    pixels.thumbnail((columns, 2 * lines), Image.Resampling.BOX)
    width, height = pixels.size
    rows = []
    for y in range(0, height - 1, 2):
        cells = []
        for x in range(width):
            upper, lower = pixels.getpixel((x, y)), pixels.getpixel((x, y + 1))
            cells.append("\x1b[38;2;{};{};{};48;2;{};{};{}m".format(*upper, *lower) + HALF_BLOCK)
        rows.append("".join(cells) + "\x1b[0m")
    return "\n".join(rows)


def show(path: Path) -> None:
    """Print the picture as large as the terminal allows."""
    size = shutil.get_terminal_size()
    print(rendered(path, size.columns, max(10, size.lines - 4)))
