"""Command: check a dataset against its manifest, byte for byte, and say which shard is bad.

    python -m data_pipeline.verify data/img512

Every shard's size and hash, every index, every sample's bytes, label, key and values, and the counts. Exit status 0: all is
well; 1: something is bad, and every bad shard was named; 2: there is no dataset to check.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from data_pipeline import index, manifest, wds
from data_pipeline.command import command_line
from data_pipeline.manifest import Manifest, Shard
from data_pipeline.progress import Progress


def check_shard(folder: Path, m: Manifest, shard: Shard, quick: bool = False) -> np.ndarray:
    """Check one shard and its index; return the labels. Raise ValueError or OSError where anything is not as it must be."""
    path = folder / shard.name
    size = path.stat().st_size
    if size != shard.bytes:
        raise ValueError(f"{size} bytes, the manifest says {shard.bytes}")
    rows = index.read(folder / shard.index_name, shard.index_sha256, shard.samples, m.sample_bytes, shard.bytes)
    if quick:
        return rows["label"]
    digest = wds.hash_file(path)
    # What the file holds, walked anew: a file that was bad when the manifest was made is found too.
    found, layout = wds.index_shard(path, m.container)
    if (layout.dtype, tuple(layout.shape)) != (m.dtype, m.shape):
        raise ValueError(f"samples are {layout}, the manifest says {m.dtype} {list(m.shape)}")
    if len(found) != len(rows):
        raise ValueError(f"{len(found)} samples, the index says {len(rows)}")
    for name in ("offset", "length", "label", "hash", "key"):
        bad = np.flatnonzero(found[name] != rows[name])
        if len(bad):
            raise ValueError(
                f"the {name} of {len(bad)} samples differs from the index; the first is {rows['key'][bad[0]].decode()!r}"
            )
    if digest != shard.xxh3_64:
        raise ValueError("all samples are well, but some other byte of the file has changed")
    return rows["label"]


def verify(path, quick: bool = False) -> list[tuple[str, str]]:
    """Check a dataset; return (shard, what is wrong with it) for every bad one.

    Raises ValueError where the manifest itself cannot be read.
    """
    m = manifest.load(path)
    folder = manifest.manifest_path(path).parent
    bad, counts = [], np.zeros(m.label_dim, dtype=np.int64)
    with Progress("verify", sum(shard.bytes for shard in m.shards), "bytes") as progress:
        for shard in m.shards:
            try:
                labels = check_shard(folder, m, shard, quick)
                if m.label_dim and (labels.min() < 0 or labels.max() >= m.label_dim):
                    raise ValueError(f"labels {labels.min()} .. {labels.max()} do not fit label_dim {m.label_dim}")
                counts += np.bincount(labels[labels >= 0], minlength=m.label_dim)[: m.label_dim]
            except (ValueError, OSError) as error:
                bad.append((shard.name, str(error)))
            progress.advance(shard.bytes)
    if not bad and tuple(counts.tolist()) != m.class_counts:
        bad.append((manifest.NAME, "class_counts are not those of the shards"))
    return bad


@command_line()
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.verify", description="Check a dataset against its manifest."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="file sizes and indices only")
    args = parser.parse_args(argv)
    m = manifest.load(args.folder)
    bad = verify(args.folder, args.quick)
    for name, reason in bad:
        print(f"bad: {name}: {reason}")
    if bad:
        print(f"{len(bad)} of {len(m.shards)} shards are bad; restore them, or encode them again")
        return 1
    print(
        f"{args.folder} is well: {m.num_samples} samples in {len(m.shards)} shards, {m.codec}, digest {m.digest[:16]}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
