"""Small real datasets for the tests of the data pipeline: tars written by the product, damaged by the test."""

import numpy as np

from data_pipeline import adopt, wds

SHAPE = (8, 4, 4)
SHARDS = (13, 7, 10)


def make_samples(sizes=SHARDS, shape=SHAPE, dtype="float16", seed=0):
    """Return per shard a list of (key, array, label)."""
    rng = np.random.default_rng(seed)
    shards, number = [], 0
    for size in sizes:
        samples = []
        for _ in range(size):
            samples.append((f"{number:08d}", (rng.standard_normal(shape) * 50 + 100).astype(dtype), number % 5))
            number += 1
        shards.append(samples)
    return shards


def make_tars(folder, **options):
    """Write shards without a manifest, as someone else would; return the samples in order."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = make_samples(**options)
    for number, samples in enumerate(shards):
        wds.write_shard(folder / f"shard-{number:06d}.tar", samples)
    return [sample for shard in shards for sample in shard]


def make_dataset(folder, codec="sd-vae-ft-mse", **options):
    """Write shards, indices and manifest; return the samples in order."""
    samples = make_tars(folder, **options)
    adopt.adopt(folder, codec, progress=lambda text: None)
    return samples
