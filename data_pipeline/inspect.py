"""Command: look at a dataset: what its manifest says, and a grid of decoded samples.

python -m data_pipeline.inspect data/digits --png digits.png
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np

from data_pipeline import manifest
from data_pipeline.command import command_line
from data_pipeline.manifest import Manifest


def describe(m: Manifest) -> str:
    """Say in a few lines what a dataset is."""
    counts = np.array(m.class_counts)
    classes = f"{len(m.classes_present)} of {m.label_dim} classes present" if m.label_dim else "no labels"
    if m.label_dim:
        classes += f", {counts[counts > 0].min()} to {counts.max()} samples each"
    constants = ", ".join(f"{mean:.4g} / {std:.4g}" for mean, std in zip(m.mean, m.std))
    lines = [
        f"samples     {m.num_samples} in {len(m.shards)} {m.container} shards, {sum(s.bytes for s in m.shards):,} bytes",
        f"stored      {m.dtype} {list(m.shape)}, {m.moments}, codec {m.codec} {m.codec_hash[:12]}".rstrip(),
        f"classes     {classes}",
        f"mean / std  {constants} ({m.whitening})",
        f"source      {m.source}" + (f"; {len(m.broken)} broken images left out" if m.broken else ""),
        f"digest      {m.digest}",
    ]
    return "\n".join(lines)


def draw_grid(path, count: int, columns: int, seed: int, weights=None, false_colour: bool = False):
    """Return the first samples of a shuffled epoch as one picture, row after row, and their labels."""
    import torch
    from PIL import Image

    from data_pipeline import codecs, latents, wds

    with wds.open_source(path, seed, window=10**9) as source:
        m = source.manifest
        count = min(count, m.num_samples)
        batch = source.batch(np.arange(count))
        x = latents.whiten(batch.stored, m)
        if false_colour:  # three channels as they are, two standard deviations to either side
            pictures = ((x[:, : 3 if x.shape[1] >= 3 else 1] * 0.5 + 0.5) * 255).clamp(0, 255).to(torch.uint8)
        else:
            pictures = latents.decode(x, m, codecs.open_codec(m.codec, weights))
    height, width = pictures.shape[2:]
    if pictures.shape[1] == 1:
        pictures = pictures.expand(-1, 3, -1, -1)
    columns = min(columns, count)
    grid = np.zeros((-(-count // columns) * height, columns * width, 3), dtype=np.uint8)
    for i, picture in enumerate(pictures.permute(0, 2, 3, 1).numpy()):
        top, left = i // columns * height, i % columns * width
        grid[top : top + height, left : left + width] = picture
    enlarge = max(1, 32 // height)  # digits of 8x8 are too small to see
    return Image.fromarray(grid.repeat(enlarge, axis=0).repeat(enlarge, axis=1)), batch.labels.tolist()


@command_line()
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.inspect", description="Look at a dataset.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--png", type=Path, help="write a grid of samples to this file")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="which samples: the first ones of this seed's order")
    parser.add_argument("--codec-weights", help="local weights of the codec")
    parser.add_argument(
        "--false-colour", action="store_true", help="draw three channels as they are, without the codec"
    )
    args = parser.parse_args(argv)
    if args.count < 1 or args.columns < 1:
        raise ValueError(f"--count {args.count} and --columns {args.columns} must be at least 1")
    print(describe(manifest.load(args.folder)))
    if args.png:
        picture, labels = draw_grid(
            args.folder, args.count, args.columns, args.seed, args.codec_weights, args.false_colour
        )
        temporary = args.png.with_name(f".{args.png.name}.{os.getpid()}.tmp")
        picture.save(temporary, "png")
        os.replace(temporary, args.png)
        for start in range(0, len(labels), args.columns):
            print("labels     ", *labels[start : start + args.columns])
        print(f"wrote {args.png}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
