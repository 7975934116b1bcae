"""Command: index shards that someone else wrote (WebDataset tars of .npy, MDS), once, in place.

    python -m data_pipeline.adopt data/latents --codec sd-vae-ft-mse

Nothing is copied: an index goes beside each shard, and a manifest. (Compressed MDS shards are unpacked beside themselves.)
`wds.open_source` does the same on first use.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path

import numpy as np

from data_pipeline import durable, index, manifest, mds, wds
from data_pipeline.command import command_line
from data_pipeline.manifest import Manifest
from data_pipeline.measure import Statistics


@contextlib.contextmanager
def alone(folder: Path):
    """Let one process of this machine in at a time; the lock goes with the process, also after SIGKILL."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}") from None
    try:
        durable.lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def find_shards(folder: Path, unpacking: bool = True) -> tuple[str, list[Path]]:
    """Return the container and the shards of a folder, in their order; compressed MDS shards are unpacked, or refused."""
    if (folder / "index.json").exists():
        return "mds", mds.list_shards(folder, unpacking)
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise ValueError(f"{folder} has no .tar files and no MDS index.json; give the folder that holds the shards")
    return "webdataset", tars


def adopt(
    path, codec: str | None, label_dim: int | None = None, progress=lambda text: print(text, file=sys.stderr)
) -> Manifest:
    """Index a folder of foreign shards and write its manifest, unless another process was quicker.

    `label_dim` is the number of classes where the shards do not show all of them.
    """
    folder = Path(path)
    if codec is None:
        raise ValueError(f"{folder} has shards and no manifest; say which codec made them: data.codec, or --codec")
    with alone(folder):
        if (folder / manifest.NAME).exists():
            return manifest.load(folder)
        container, files = find_shards(folder)
        shards, statistics, layout = [], Statistics(), None
        for number, file in enumerate(files, 1):
            rows, found = wds.index_shard(file, container)
            layout = layout or found
            if found != layout:
                raise ValueError(
                    f"{file} holds {found}, {files[0].name} holds {layout}; put them in folders of their own"
                )
            data = np.memmap(file, dtype=np.uint8, mode="r")
            of_shard = Statistics()
            for row in rows:
                start = int(row["offset"])
                of_shard.add(layout.view(data[start : start + int(row["length"])]), int(row["label"]))
            statistics.merge(of_shard)
            digest = index.write(folder / manifest.index_name(file.name), rows)
            shards.append(manifest.Shard(file.name, len(rows), file.stat().st_size, wds.hash_file(file), digest))
            progress(f"indexed {file.name} ({number}/{len(files)}): {len(rows)} samples")
        common = {"codec": codec, "codec_hash": "", "layout": layout, "label_dim": label_dim}
        made = statistics.manifest(shards=shards, container=container, source=folder.name, **common)
        manifest.save(made, folder)
        return made


@command_line()
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.adopt", description="Index foreign shards in place.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--codec", required=True, help="what made the samples: pixels, sd-vae-ft-mse, ...")
    parser.add_argument("--label-dim", type=int, help="number of classes, where the shards do not show all of them")
    args = parser.parse_args(argv)
    made = adopt(args.folder, args.codec, args.label_dim)
    print(
        f"{args.folder}: {made.num_samples} samples {made.dtype} {list(made.shape)} in {len(made.shards)} {made.container} shards"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
