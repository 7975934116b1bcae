"""Command: how fast batches are read, against the limit and against the stock libraries.

    python -m data_pipeline.benchmark

fp16 samples [8, 64, 64] (ImageNet-512 latents), batches of 64 collated into torch tensors, from page cache, in one process. Every
method runs its epochs in turns with the others, and its best epoch counts: ratios within one table can be trusted, absolute numbers
move with the machine. The limit is a random gather from np.memmap into a fresh tensor.
"""

import argparse
import contextlib
import io
import resource
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from data_pipeline import adopt, convert, manifest, mds, order, wds
from data_pipeline.manifest import Manifest, Shard

SHAPE = (8, 64, 64)
BATCH = 64
PER_SHARD = 1024


def make_data(folder: Path, samples: int):
    """Write the same samples as tars, MDS, EDM2 zip and one flat file."""
    rng = np.random.default_rng(0)
    (folder / "tar").mkdir()
    with open(folder / "flat.bin", "wb") as flat:
        for shard in range(samples // PER_SHARD):
            arrays = rng.standard_normal((PER_SHARD, *SHAPE), dtype=np.float32).astype(np.float16)
            flat.write(arrays.tobytes())
            first = shard * PER_SHARD
            wds.write_shard(
                folder / "tar" / f"shard-{shard:06d}.tar",
                ((f"{first + i:08d}", array, (first + i) % 1000) for i, array in enumerate(arrays)),
            )
    adopt.adopt(folder / "tar", "sd-vae-ft-mse", progress=lambda text: None)
    source = convert.open_shards(folder / "tar", None)
    convert.write_folder(source, folder / "mds", "mds", None)
    convert.write_zip(source, folder / "edm2.zip")


def memmap_epochs(folder: Path) -> Iterator[int]:
    """Gather random rows of one flat file: the limit."""
    flat = np.memmap(folder / "flat.bin", dtype=np.float16, mode="r").reshape(-1, *SHAPE)
    for epoch in range(10**9):
        ids = order.permutation(len(flat), 0, epoch)
        for start in range(0, len(ids), BATCH):
            batch = torch.empty((BATCH, *SHAPE), dtype=torch.float16)
            rows = batch.numpy()
            for i, number in enumerate(ids[start : start + BATCH].tolist()):
                rows[i] = flat[number]
            yield len(batch)


def our_epochs(folder: Path, **options) -> Iterator[int]:
    """Read through the index."""
    with wds.open_source(folder, 0, 10**9, **options) as source:
        for start in range(0, 10**12, BATCH):
            yield len(source.batch(np.arange(start, start + BATCH)).stored)


def stock_webdataset_epochs(folder: Path) -> Iterator[int]:
    """The library's usual pipeline."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    while True:
        pipeline = wds.stock_pipeline(urls, shardshuffle=len(urls)).shuffle(1000).decode().to_tuple("npy", "cls")
        for arrays, _ in pipeline.batched(BATCH):
            yield len(torch.as_tensor(np.asarray(arrays)))


def stock_streaming_epochs(folder: Path) -> Iterator[int]:
    """The library's StreamingDataset under a DataLoader."""
    dataset = mds.stock_dataset(local=str(folder), shuffle=True, batch_size=BATCH, num_canonical_nodes=1)
    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH)
    while True:
        for batch in loader:
            yield len(batch["sample"])


class ZipDataset(torch.utils.data.Dataset):
    """One .npy per member, as EDM2 reads its zips."""

    def __init__(self, path: Path):
        self.zip = zipfile.ZipFile(path)
        self.names = [name for name in self.zip.namelist() if name.endswith(".npy")]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        return np.load(io.BytesIO(self.zip.read(self.names[i])), allow_pickle=False)


def zip_epochs(path: Path) -> Iterator[int]:
    """An EDM2-style zip under a DataLoader."""
    loader = torch.utils.data.DataLoader(ZipDataset(path), batch_size=BATCH, shuffle=True)
    while True:
        for batch in loader:
            yield len(batch)


def methods(folder: Path) -> dict[str, Callable[[], Iterator[int]]]:
    """Name what is compared."""
    tar, mds = folder / "tar", folder / "mds"
    return {
        "np.memmap, random gather (the limit)": lambda: memmap_epochs(folder),
        "ours, tar, every sample checked": lambda: our_epochs(tar),
        "ours, tar, checked, 2 threads": lambda: our_epochs(tar, threads=2),
        "ours, tar, checked, 4 threads": lambda: our_epochs(tar, threads=4),
        "ours, tar, checked, pread": lambda: our_epochs(tar, use_mmap=False),
        "ours, tar, unchecked": lambda: our_epochs(tar, checked=False),
        "ours, MDS, every sample checked": lambda: our_epochs(mds),
        "ours, MDS, unchecked": lambda: our_epochs(mds, checked=False),
        "stock webdataset": lambda: stock_webdataset_epochs(tar),
        "stock StreamingDataset": lambda: stock_streaming_epochs(mds),
        "EDM2-style zip (fp32), DataLoader": lambda: zip_epochs(folder / "edm2.zip"),
    }


def measure(folder: Path, samples: int, rounds: int) -> dict[str, float]:
    """Return the best samples/s of every method that runs here; their epochs take turns."""
    best, running = {}, {}
    for name, start in methods(folder).items():
        running[name] = start()
        try:
            next(running[name])  # imports and the first batch are not measured
        except (ImportError, ValueError) as error:
            print(f"{name}: does not run here ({type(error).__name__})", file=sys.stderr)
            del running[name]
    for turn in range(rounds):
        for name, batches in running.items():
            slow = best.get(name, 0.0) < 20_000
            if turn >= 2 and slow:  # their share of the time is large, their spread small
                continue
            for _ in range(1 if slow else 10):
                start, done = time.perf_counter(), 0
                while done < samples:
                    done += next(batches)
                best[name] = max(best.get(name, 0.0), done / (time.perf_counter() - start))
        print(f"round {turn + 1} of {rounds}", file=sys.stderr)
    for batches in running.values():
        with contextlib.suppress(Exception):
            batches.close()
    return best


def resident_mebibytes() -> float:
    """Return what this process has in memory, files that it has mapped included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def first_batch_seconds(folder: Path, shards: int = 1251) -> tuple[float, float]:
    """Return the time from nothing to a first batch of a 1.28 M-sample manifest, and MiB that it took.

    One real shard stands for all of them, by links.
    """
    big = folder / "big"
    big.mkdir()
    m = manifest.load(folder / "tar")
    entry, entries = m.shards[0], []
    for number in range(shards):
        name = f"shard-{number:06d}.tar"
        (big / name).symlink_to(folder / "tar" / entry.name)
        (big / manifest.index_name(name)).symlink_to(folder / "tar" / entry.index_name)
        entries.append(Shard(name, entry.samples, entry.bytes, entry.xxh3_64, entry.index_sha256))
    fields = {name: getattr(m, name) for name in Manifest.__dataclass_fields__} | {"shards": tuple(entries)}
    counts = [0] * m.label_dim
    counts[0] = shards * entry.samples
    manifest.save(Manifest(**fields | {"class_counts": tuple(counts)}), big)
    before, start = resident_mebibytes(), time.perf_counter()
    with wds.open_source(big, 0, 10**9) as source:
        source.batch(np.arange(700_000, 700_000 + BATCH))
        return time.perf_counter() - start, resident_mebibytes() - before


def rows(samples: int = 4096, rounds: int = 6, folder=None) -> list[str]:
    """Return the table as Markdown lines."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="evenkeel-bench-") as temporary:
        made = Path(temporary)
        make_data(made, samples)
        best = measure(made, samples, rounds)
        seconds, mebibytes = first_batch_seconds(made)
    limit = next(iter(best.values()))
    megabytes = np.prod(SHAPE) * 2 / 1e6
    lines = [
        "| one process, fp16 [8, 64, 64], batches of 64 | samples/s | MB/s | of the limit |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, rate in best.items():
        lines.append(f"| {name} | {rate:,.0f} | {rate * megabytes:,.0f} | {rate / limit:.3f} |")
    lines += ["", f"First batch of a 1.28 M-sample dataset: {seconds:.2f} s, {mebibytes:.0f} MiB more resident."]
    return lines


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.benchmark", description="How fast batches are read.")
    parser.add_argument(
        "--samples", type=int, default=4096, help=f"a multiple of {PER_SHARD}; 64 KiB each, four times on disk"
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--folder", type=Path, help="where the data is made, instead of the usual temporary folder")
    args = parser.parse_args(argv)
    try:
        if args.samples < PER_SHARD or args.samples % PER_SHARD or args.rounds < 1:
            raise ValueError(f"--samples {args.samples} must be a multiple of {PER_SHARD}, --rounds at least 1")
        print("\n".join(rows(args.samples, args.rounds, args.folder)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
