"""Command: how fast batches are read, against the limit and against the stock libraries.

    python -m data_pipeline.benchmark

fp16 samples [8, 64, 64] (ImageNet-512 latents), batches of 64 collated into torch tensors, from page cache, in one process. The
limit is a random gather from np.memmap into a fresh tensor. Whole epochs of every method lie between epochs of the limit, and its
share of the limit is taken there, round by round: median and quartiles over the rounds, by the clock and by CPU time. So shares can
be trusted on a machine that others use too; absolute numbers move with it.
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
from data_pipeline.command import command_line
from data_pipeline.manifest import Manifest, Shard

SHAPE = (8, 64, 64)
BATCH = 64
PER_SHARD = 1024
SLICE_SECONDS = 0.1
LIMIT, CHECKED, STOCK = "np.memmap, random gather (the limit)", "ours, tar, every sample checked", "stock webdataset"


def make_data(folder: Path, samples: int):
    """Write the same samples as tars, MDS, EDM2 zip and one flat file."""
    rng = np.random.default_rng(0)
    (folder / "tar").mkdir()
    (folder / "library-tar").mkdir()
    with open(folder / "flat.bin", "wb") as flat:
        for shard in range(samples // PER_SHARD):
            arrays = rng.standard_normal((PER_SHARD, *SHAPE), dtype=np.float32).astype(np.float16)
            flat.write(arrays.tobytes())
            first = shard * PER_SHARD
            numbered = [(f"{first + i:08d}", array, (first + i) % 1000) for i, array in enumerate(arrays)]
            wds.write_shard(folder / "tar" / f"shard-{shard:06d}.tar", numbered)
            wds.write_shard(folder / "library-tar" / f"shard-{shard:06d}.tar", numbered, mtime=None)
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
        LIMIT: lambda: memmap_epochs(folder),
        CHECKED: lambda: our_epochs(tar),
        "ours, tar, checked, 2 threads": lambda: our_epochs(tar, threads=2),
        "ours, tar, checked, 4 threads": lambda: our_epochs(tar, threads=4),
        "ours, tar, checked, pread": lambda: our_epochs(tar, access="pread"),
        "ours, tar, unchecked": lambda: our_epochs(tar, checked=False),
        "ours, MDS, every sample checked": lambda: our_epochs(mds),
        "ours, MDS, unchecked": lambda: our_epochs(mds, checked=False),
        STOCK: lambda: stock_webdataset_epochs(folder / "library-tar"),
        "stock webdataset, on our tars": lambda: stock_webdataset_epochs(tar),
        "stock StreamingDataset": lambda: stock_streaming_epochs(mds),
        "EDM2-style zip (fp32), DataLoader": lambda: zip_epochs(folder / "edm2.zip"),
    }


def start_all(folder: Path) -> dict[str, Iterator[int]]:
    """Start every method that runs here; imports and two batches are not measured."""
    running = {}
    for name, start in methods(folder).items():
        batches = start()
        try:
            next(batches), next(batches)
        except (ImportError, ValueError) as error:
            print(f"{name}: does not run here ({type(error).__name__})", file=sys.stderr)
        else:
            running[name] = batches
    return running


def epoch_rates(batches: Iterator[int], samples: int) -> np.ndarray:
    """Read an epoch, or some if they are short; return samples per second and per second of this process's CPU time."""
    wall, cpu, done = time.perf_counter(), time.process_time(), 0
    while done % samples or done == 0 or time.perf_counter() - wall < SLICE_SECONDS:
        done += next(batches)
    return done / np.array([time.perf_counter() - wall, time.process_time() - cpu])


def measure(folder: Path, samples: int, rounds: int) -> dict[str, np.ndarray]:
    """Return per method float64 [rounds, 3]: samples/s, and its share of the limit around it, per second and per CPU second."""
    running = start_all(folder)
    limit = running.pop(LIMIT)
    found: dict[str, list] = {LIMIT: [], **{name: [] for name in running}}
    for turn in range(rounds):
        before = epoch_rates(limit, samples)
        for name, batches in running.items():
            rates, after = epoch_rates(batches, samples), epoch_rates(limit, samples)
            found[name].append([rates[0], *(2 * rates / (before + after))])
            found[LIMIT].append([after[0], *(2 * after / (before + after))])
            before = after
        print(f"round {turn + 1} of {rounds}", file=sys.stderr)
    for batches in [limit, *running.values()]:
        with contextlib.suppress(Exception):
            batches.close()
    return {name: np.array(values) for name, values in found.items()}


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


def spread(values: np.ndarray, digits: int) -> str:
    """Return median and quartiles."""
    low, middle, high = (f"{q:.{digits}f}" for q in np.quantile(values, (0.25, 0.5, 0.75)))
    return f"{middle} ({low} to {high})"


def rows(samples: int = 4096, rounds: int = 9, folder=None) -> list[str]:
    """Return the table as Markdown lines."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="evenkeel-bench-") as temporary:
        made = Path(temporary)
        make_data(made, samples)
        found = measure(made, samples, rounds)
        seconds, mebibytes = first_batch_seconds(made)
    megabytes = np.prod(SHAPE) * 2 / 1e6
    lines = [
        "| one process, fp16 [8, 64, 64], batches of 64 | samples/s | MB/s | of the limit | of the limit, by CPU time |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, values in found.items():
        rate, shares = np.median(values[:, 0]), (spread(values[:, k], 3) for k in (1, 2))
        lines.append(f"| {name} | {rate:,.0f} | {rate * megabytes:,.0f} | {' | '.join(shares)} |")
    lines += ["", "Medians and quartiles over the rounds. By CPU time:"]
    for name in [name for name in found if name.startswith("stock")]:
        lines.append(f"{CHECKED}, is {spread(found[CHECKED][:, 2] / found[name][:, 2], 1)} times {name}.")
    lines += ["", f"First batch of a 1.28 M-sample dataset: {seconds:.2f} s, {mebibytes:.0f} MiB more resident."]
    return lines


@command_line()
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.benchmark", description="How fast batches are read.")
    parser.add_argument(
        "--samples", type=int, default=4096, help=f"a multiple of {PER_SHARD}; 64 KiB each, four times on disk"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where the data is made, instead of the usual temporary folder")
    args = parser.parse_args(argv)
    if args.samples < PER_SHARD or args.samples % PER_SHARD or args.rounds < 1:
        raise ValueError(f"--samples {args.samples} must be a multiple of {PER_SHARD}, --rounds at least 1")
    print("\n".join(rows(args.samples, args.rounds, args.folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
