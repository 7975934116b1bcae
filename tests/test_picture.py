"""What a terminal shows is the picture: its colours, two pixels a character."""

import re

from PIL import Image

from cluster.picture import HALF_BLOCK, rendered


def test_a_picture_in_the_terminal_has_the_pictures_pixels(tmp_path):
    image = Image.new("RGB", (3, 4))
    colours = [(i * 20, 255 - i * 20, i) for i in range(12)]
    image.putdata(colours)
    image.save(tmp_path / "grid.png")
    lines = rendered(tmp_path / "grid.png", 80, 40).split("\n")
    assert len(lines) == 2 and all(line.count(HALF_BLOCK) == 3 and line.endswith("\x1b[0m") for line in lines)
    seen = [
        tuple(map(int, m))
        for line in lines
        for m in re.findall(r"38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m", line)
    ]
    assert seen == [colours[y * 3 + x] + colours[(y + 1) * 3 + x] for y in (0, 2) for x in range(3)]


def test_it_fits_the_terminal(tmp_path):
    Image.new("L", (410, 342)).save(tmp_path / "grid.png")
    lines = rendered(tmp_path / "grid.png", 60, 20).split("\n")
    assert len(lines) <= 20 and max(line.count(HALF_BLOCK) for line in lines) <= 60
