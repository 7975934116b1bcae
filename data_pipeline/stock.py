"""The stock iterators of webdataset and mosaicml-streaming behind our interface, with guards, for sources that only they can read.

Slower (benchmark.py) and, left alone, prone to end early, hang, or hand out flipped bytes. So here every sample is checked against
the index, an epoch must have the manifest's number of samples, and a read that brings nothing for `timeout_seconds` is an error.
Manifest and indices lie in a local folder; `shards` says where the library finds the shards (URLs or pipes for webdataset, a remote
for streaming). Every rank walks the same webdataset stream and keeps its own positions: correct on any layout, at a cost.
"""

import queue
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import xxhash

from data_pipeline import index, manifest, mds, npy, order, wds
from data_pipeline.latents import LatentBatch
from data_pipeline.manifest import Manifest


class Stalled(ValueError):
    """A library that brought nothing in time."""


class Watched:
    """Iterate in a thread of its own, a few items ahead, and never wait for longer than `timeout_seconds`."""

    def __init__(self, start: Callable[[], Iterator], timeout_seconds: float, ahead: int = 64):
        self.items: queue.Queue = queue.Queue(maxsize=ahead)
        self.timeout_seconds = timeout_seconds
        self.closed = threading.Event()
        threading.Thread(target=self._work, args=(start,), name="evenkeel-stock", daemon=True).start()

    def _work(self, start):
        try:
            for item in start():
                if not self._put(item):
                    return
            self._put(StopIteration("the stream ended"))
        except Exception as error:  # whatever the library raises is raised again where the batch is asked for
            self._put(error)

    def _put(self, item) -> bool:
        while not self.closed.is_set():
            try:
                self.items.put(item, timeout=0.2)
                return True
            except queue.Full:
                pass
        return False

    def next(self):
        """Return the next item; raise what the thread raised, or Stalled."""
        try:
            item = self.items.get(timeout=self.timeout_seconds)
        except queue.Empty:
            raise Stalled(
                f"the stock reader brought nothing for {self.timeout_seconds:g} s; is the source reachable?"
            ) from None
        if isinstance(item, Exception):
            raise ValueError(
                f"the stock reader failed: {type(item).__name__}: {str(item).splitlines()[0] if str(item) else ''}"
            )
        return item

    def close(self):
        self.closed.set()


class StockSource:
    """What both have in common: the manifest, the indices, checks and counters."""

    def __init__(self, folder, seed: int, window: int, timeout_seconds: float):
        self.manifest: Manifest = manifest.load(folder)
        self.seed, self.window, self.timeout_seconds = seed, window, timeout_seconds
        self.sizes, self.num_samples = self.manifest.shard_sizes, self.manifest.num_samples
        m, folder = self.manifest, manifest.manifest_path(folder).parent
        self.rows = [
            index.read(folder / s.index_name, s.index_sha256, s.samples, m.sample_bytes, s.bytes) for s in m.shards
        ]
        self._counters = {"samples": 0, "bytes": 0, "checksum_failures": 0}

    def collate(self, positions: np.ndarray, samples: list[tuple[np.ndarray, int]]) -> LatentBatch:
        """Put (bytes, label) samples into a batch."""
        m = self.manifest
        stored = torch.empty((len(samples), *m.shape), dtype=getattr(torch, m.dtype))
        rows = stored.numpy().reshape(len(samples), -1).view(np.uint8)
        for row, (payload, _) in zip(rows, samples):
            row[:] = payload
        self._counters["samples"] += len(samples)
        self._counters["bytes"] += stored.nbytes
        return LatentBatch(torch.from_numpy(positions.copy()), stored, torch.tensor([label for _, label in samples]))

    def check(self, payload: np.ndarray, digest: int, name: str):
        """Refuse bytes that are not the index's."""
        if payload.nbytes != self.manifest.sample_bytes or xxhash.xxh3_64_intdigest(payload) != digest:
            self._counters["checksum_failures"] += 1
            raise ValueError(f"sample {name} fails its checksum; restore its shard")

    def prefetch(self, positions):
        """Do nothing: the libraries read ahead by themselves."""

    def counters(self) -> dict:
        """Return totals since opening."""
        return dict(self._counters)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class StockWebDataset(StockSource):
    """webdataset's pipeline: shards permuted and samples shuffled in its buffer, anew in every epoch, the same on every rank.

    A stream has no random access: positions must rise, and starting late means reading up to there.
    """

    def __init__(
        self, folder, seed: int, shards: list[str] | None = None, buffer: int = 1000, timeout_seconds: float = 120.0
    ):
        super().__init__(folder, seed, 1, timeout_seconds)
        folder = manifest.manifest_path(folder).parent
        self.urls = shards or [str(Path(folder) / shard.name) for shard in self.manifest.shards]
        self.buffer = buffer
        self.expected = {bytes(row["key"]): (int(row["hash"]), int(row["label"])) for rows in self.rows for row in rows}
        if len(self.expected) != self.manifest.num_samples:
            raise ValueError(
                "keys repeat among the shards, so that the stock reader is of no use; read through the index"
            )
        self.position = 0
        self.watched = Watched(self._stream, timeout_seconds)

    def _epoch(self, epoch: int) -> Iterator[dict]:
        urls = [self.urls[i] for i in order.permutation(len(self.urls), self.seed, epoch)]
        # Our own generator: the library's repeats the same order in every epoch when it is given a seed.
        return iter(wds.stock_pipeline(urls).shuffle(self.buffer, rng=random.Random(self.seed * 1_000_003 + epoch)))

    def _stream(self):
        epoch = 0
        while True:
            seen: set[bytes] = set()
            for sample in self._epoch(epoch):
                key = sample["__key__"].encode(errors="surrogateescape")
                if key not in self.expected or key in seen or "npy" not in sample:
                    raise ValueError(
                        f"sample {key.decode(errors='replace')!r} is unknown, incomplete or came twice in an epoch"
                    )
                seen.add(key)
                yield key, sample["npy"]
            if len(seen) != self.manifest.num_samples:
                raise ValueError(
                    f"epoch {epoch} ended after {len(seen)} of {self.manifest.num_samples} samples: a shard is damaged or cut off; "
                    "find it with: python -m data_pipeline.verify"
                )
            epoch += 1

    def batch(self, positions) -> LatentBatch:
        """Return the samples at positions, int64 [N], which must be beyond all that were asked for before."""
        positions = np.ascontiguousarray(positions, dtype=np.int64)
        if len(positions) and (positions[0] < self.position or (np.diff(positions) <= 0).any()):
            raise ValueError(
                f"position {positions.min()} lies behind {self.position}; the stock reader of tars cannot go back"
            )
        samples = []
        for position in positions.tolist():
            while self.position <= position:
                key, member = self.watched.next()
                self.position += 1
            _, start = npy.parse_header(member)
            payload = np.frombuffer(member, dtype=np.uint8)[start:]
            digest, label = self.expected[key]
            self.check(payload, digest, repr(key.decode(errors="replace")))
            samples.append((payload, label))
        return self.collate(positions, samples)

    def close(self):
        self.watched.close()


class StockStreaming(StockSource):
    """mosaicml-streaming's random access, in our order: the same stream as read through the index."""

    def __init__(
        self, folder, seed: int, window: int, remote: str | None = None, timeout_seconds: float = 120.0, **options
    ):
        super().__init__(folder, seed, window, timeout_seconds)
        local = str(manifest.manifest_path(folder).parent) if remote is None else options.pop("local")
        self.dataset = mds.stock_dataset(local=local, remote=remote, batch_size=1, **options)
        if len(self.dataset) != self.manifest.num_samples:
            raise ValueError(
                f"the library sees {len(self.dataset)} samples, the manifest says {self.manifest.num_samples}"
            )
        self.ends = np.cumsum(self.sizes)
        self.wanted: queue.Queue = queue.Queue()
        self.watched = Watched(self._answer, timeout_seconds)

    def _answer(self):
        while (number := self.wanted.get()) is not None:
            arrays = [value for value in self.dataset[number].values() if isinstance(value, np.ndarray)]
            yield arrays[0]

    def batch(self, positions) -> LatentBatch:
        """Return the samples at positions, int64 [N]."""
        positions = np.ascontiguousarray(positions, dtype=np.int64)
        ids = order.sample_at(self.seed, positions, self.sizes, self.window).tolist()
        for number in ids:
            self.wanted.put(number)
        samples = []
        for number in ids:
            shard = int(np.searchsorted(self.ends, number, side="right"))
            row = self.rows[shard][number - int(self.ends[shard] - self.sizes[shard])]
            payload = np.ascontiguousarray(self.watched.next()).reshape(-1).view(np.uint8)
            self.check(payload, int(row["hash"]), f"{number} of shard {self.manifest.shards[shard].name}")
            samples.append((payload, int(row["label"])))
        return self.collate(positions, samples)

    def close(self):
        self.wanted.put(None)
        self.watched.close()


def open_stock(path, seed: int, window: int) -> StockSource:
    """Open a dataset folder through its library's own iterator: webdataset for tars, mosaicml-streaming for MDS."""
    if manifest.load(path).container == "mds":
        return StockStreaming(path, seed, window)
    return StockWebDataset(path, seed)
