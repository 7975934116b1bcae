"""Draw images from a snapshot or a reconstruction: a grid, or a folder of single images."""

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from data_pipeline.command import command_line
from data_pipeline.durable import write_atomically
from trainer.drawing import Drawing, positions_of
from trainer.drawing_options import add_drawing_options, find_snapshot, open_drawing, settings_of
from trainer.overlap import overlapped

SMALLEST_TILE_PIXELS = 32  # a digit of 8x8 is enlarged to be seen


def parse_classes(text: str, label_dim: int) -> list[int]:
    """Read `all`, `3` or `0,1,2`."""
    if text == "all" or not label_dim:
        return list(range(max(label_dim, 1)))
    try:
        classes = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--classes {text}: must be 'all' or numbers such as 0,1,2") from None
    bad = [c for c in classes if not 0 <= c < label_dim]
    if bad:
        raise ValueError(f"--classes {text}: {bad[0]} is no class of this network; they are 0..{label_dim - 1}")
    return classes


def grid_image(images: Tensor, columns: int) -> Image.Image:
    """Lay out uint8 [N, 1 or 3, H, W] row by row with a thin gap, small images enlarged."""
    scale = max(1, SMALLEST_TILE_PIXELS // images.shape[-1])
    tiles = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3).permute(0, 2, 3, 1).numpy()
    count, height, width, channels = tiles.shape
    gap, rows = 2, -(-count // columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 64, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = tile
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)


def png_bytes(image: Image.Image, origin: dict | None = None) -> bytes:
    """Encode; `origin` goes into the file as text, so that a picture tells what made it."""
    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    if origin:
        info.add_text("evenkeel", json.dumps(origin))
    image.save(buffer, "png", pnginfo=info)
    return buffer.getvalue()


def write_folder(
    drawing: Drawing, positions: Sequence[int], out: Path, batch: int, origin: dict, part: tuple[int, int]
):
    """Write one PNG per image into `out`, leaving out those that are there; `part` = (rank, world) shares them out.

    Raises ValueError where the folder holds images of another origin.
    """
    out.mkdir(parents=True, exist_ok=True)
    record = out / "origin.json"
    if record.exists() and json.loads(record.read_text()) != origin:
        raise ValueError(
            f"{out}: holds images of another network, seed, sampler or type of activations; choose another folder"
        )
    write_atomically(record, json.dumps(origin).encode())

    def file(position: int) -> Path:
        return out / (
            f"{position:08d}-{position % drawing.label_dim}.png" if drawing.label_dim else f"{position:08d}.png"
        )

    # shared out before looking: ranks look at different times
    missing = [p for p in positions[part[0] :: part[1]] if not file(p).exists()]

    def write(where: list[int], x: Tensor) -> None:
        pictures = drawing.decode(x).permute(0, 2, 3, 1).numpy()
        for position, picture in zip(where, pictures, strict=True):
            image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
            write_atomically(file(position), png_bytes(image))

    for _ in overlapped(write, drawing.batches(missing, batch)):
        pass
    return len(missing)


@command_line()
def main(argv=None) -> int:
    """Draw images from a snapshot: a PNG grid with a row per class, or (--out FOLDER) one file each."""
    parser = argparse.ArgumentParser(prog="python -m trainer.generate", description=main.__doc__)
    parser.add_argument("snapshot", type=Path, help="snapshot, reconstruction or run directory")
    parser.add_argument("--out", type=Path, required=True, help="FILE.png for a grid, else a folder")
    parser.add_argument("--classes", default="all", help="all (default), or numbers such as 0,1,2")
    parser.add_argument("--per-class", type=int, default=8)
    add_drawing_options(parser)
    options = parser.parse_args(argv)
    if options.per_class < 1:
        raise ValueError(f"--per-class {options.per_class}: must be at least 1")
    settings, path = settings_of(options), find_snapshot(options.snapshot, options.sigma_rel)
    drawing, origin = open_drawing(path, options, settings)
    _ = drawing.codec  # a missing one is told before anything is drawn
    classes = parse_classes(options.classes, drawing.label_dim)
    positions = positions_of(classes, options.per_class, drawing.label_dim)
    part = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them
    if options.out.suffix.lower() != ".png":
        count = write_folder(drawing, positions, options.out, options.batch, origin, part)
        print(f"wrote {count} images to {options.out} ({path.name})")
    elif part[0] == 0:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        parts = [pictures for _, pictures in drawing.decoded(positions, options.batch)]
        write_atomically(options.out, png_bytes(grid_image(torch.cat(parts), options.per_class), origin))
        print(f"wrote {options.out}: {len(classes)} rows of {options.per_class} from {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
