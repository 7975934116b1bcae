"""The training path's reader: positions -> samples -> checked bytes -> one fresh tensor per batch.

It knows nothing of tars or MDS: an index says where each array lies, whatever the container. It runs in the trainer's process (mmap
or pread, threads, no worker processes, nothing in /dev/shm), checks every sample against the index's xxh3-64, and never shortens a
batch: a bad sample either stops the run with one line or is replaced by a rule that depends on nothing but the data and the
quarantine list. `batch(positions)` is a pure function of its argument; a maintainer must keep it so.

Memory: the batches that were asked for or hinted at (depth + 1), the indices of `max_open` shards (0.2 MB each at 1,024 samples),
one or two windows of sample ids (8 bytes each); mapped shards are page cache, which the kernel takes back when it wants.
"""

import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import xxhash

from data_pipeline import order
from data_pipeline.latents import LatentBatch
from data_pipeline.manifest import Manifest
from data_pipeline.shard_file import LocalFolder, OpenShard

_TORCH = {"uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32}


class BadSample(ValueError):
    """One sample that is not what the index says; every other error is about the whole shard."""


def _split(sizes: np.ndarray, heldout: float, part: str) -> tuple[np.ndarray | None, np.ndarray]:
    """Return the sample ids of one part of a dataset, ascending (None: all of them), and how many of them each shard has."""
    if heldout == 0 and part == "train":
        return None, sizes
    chosen = order.held_out(int(sizes.sum()), heldout) == (part == "heldout")
    before = np.concatenate([[0], np.cumsum(chosen)])
    ends = np.cumsum(sizes)
    return np.flatnonzero(chosen), before[ends] - before[ends - sizes]


class Source:
    """A dataset to train on, or (`part`) the share `heldout` of it that training never sees.

    Thread-safe; see the module's head for its laws.
    """

    def __init__(
        self,
        manifest: Manifest,
        files,
        seed: int,
        window: int,
        *,
        on_bad: str = "stop",
        max_bad: int | None = None,
        checked: bool = True,
        use_mmap: bool = True,
        pin: bool = False,
        threads: int = 1,
        depth: int = 2,
        max_open: int = 256,
        heldout: float = 0.0,
        part: str = "train",
    ):
        if part not in ("train", "heldout"):
            raise ValueError(f"part {part!r} is none of train, heldout")
        if on_bad not in ("stop", "replace"):
            raise ValueError(f"on_bad {on_bad!r} is none of stop, replace")
        self.manifest, self.files, self.seed, self.window = manifest, files, seed, window
        self.on_bad, self.checked, self.use_mmap, self.pin = on_bad, checked, use_mmap, pin
        # Past one sample in ten thousand the data is no longer what the manifest names.
        self.max_bad = max(1, manifest.num_samples // 10_000) if max_bad is None else max_bad
        self._sizes = manifest.shard_sizes
        self._ends = np.cumsum(self._sizes)
        self._members, self._member_sizes = _split(self._sizes, heldout, part)
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._max_open = max_open
        self._lock = threading.Lock()  # of counters, quarantine and pending batches; never held while reading
        self._opening = threading.Lock()
        self._bad_shards: set[int] = set()
        self._bad_samples: set[int] = set()
        self._depth = depth
        self._pending: OrderedDict[bytes, Future] = OrderedDict()
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="evenkeel-prefetch")
        self._copiers = ThreadPoolExecutor(threads, thread_name_prefix="evenkeel-copy") if threads > 1 else None
        self._threads = threads
        self._counters = dict.fromkeys(("samples", "bytes", "wait_seconds", "checksum_failures", "replaced"), 0)

    # -- what the trainer calls ---------------------------------------------------------------------------------------

    def batch(self, positions) -> LatentBatch:
        """Return the samples at global positions, int64 [N].

        Raises ValueError, naming shard, key and offset, where data is bad and the policy is to stop or its limit is passed.
        """
        positions = np.ascontiguousarray(positions, dtype=np.int64)
        start = time.perf_counter()
        with self._lock:
            future = self._pending.pop(positions.tobytes(), None)
        result = self._read(positions) if future is None else future.result()
        with self._lock:
            self._counters["wait_seconds"] += time.perf_counter() - start
            self._counters["samples"] += len(positions)
            self._counters["bytes"] += result.stored.nbytes
        return result

    def prefetch(self, positions):
        """Hint that `batch(positions)` comes soon; more than `depth` hints drop the oldest."""
        positions = np.array(positions, dtype=np.int64)  # a copy: the caller may reuse its own
        with self._lock:
            key = positions.tobytes()
            if key not in self._pending:
                self._pending[key] = self._ahead.submit(self._read, positions)
            while len(self._pending) > self._depth:
                self._pending.popitem(last=False)[1].cancel()

    def counters(self) -> dict:
        """Return totals since opening: samples, bytes, wait_seconds, checksum_failures, replaced, quarantined_{samples,shards}."""
        with self._lock:
            return {
                **self._counters,
                "quarantined_samples": len(self._bad_samples),
                "quarantined_shards": len(self._bad_shards),
            }

    def state(self) -> dict:
        """Return the quarantine list, for a checkpoint: a resumed run must make the same replacements."""
        with self._lock:
            return {"version": 1, "shards": sorted(self._bad_shards), "samples": sorted(self._bad_samples)}

    def load_state(self, state: dict):
        """Take over a quarantine list, or several ranks' lists one after another."""
        with self._lock:
            self._bad_shards.update(int(s) for s in state["shards"])
            self._bad_samples.update(int(s) for s in state["samples"])

    def close(self):
        """Stop the threads and let go of the files."""
        self._ahead.shutdown(wait=True, cancel_futures=True)
        if self._copiers:
            self._copiers.shutdown(wait=True)
        with self._lock:
            self._pending.clear()
            self._open.clear()
        self.files.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # -- reading ------------------------------------------------------------------------------------------------------

    def sample_ids(self, positions) -> np.ndarray:
        """Return the sample ids at positions, before any replacement."""
        ids = order.sample_at(self.seed, positions, self._member_sizes, self.window)
        return ids if self._members is None else self._members[ids]

    @property
    def num_samples(self) -> int:
        """Return the samples in an epoch: those of this part of the dataset."""
        return int(self._member_sizes.sum())

    def _read(self, positions: np.ndarray) -> LatentBatch:
        m = self.manifest
        stored = torch.empty((len(positions), *m.shape), dtype=_TORCH[m.dtype], pin_memory=self.pin)
        rows = stored.numpy().reshape(len(positions), -1).view(np.uint8)
        labels = np.empty(len(positions), dtype=np.int64)
        ids = self.sample_ids(positions).tolist()
        if len(positions):
            self.files.ahead(self._names_ahead(int(positions.max())))
        if self._copiers is None:
            self._copy(ids, rows, labels)
        else:
            cuts = np.linspace(0, len(ids), self._threads + 1).astype(int).tolist()
            parts = [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
            for done in [self._copiers.submit(self._copy, ids[part], rows[part], labels[part]) for part in parts]:
                done.result()
        return LatentBatch(torch.from_numpy(positions.copy()), stored, torch.from_numpy(labels))

    def _names_ahead(self, position: int) -> list[str]:
        if isinstance(self.files, LocalFolder):
            return []
        shards = order.shards_ahead(self.seed, position, self._member_sizes, self.window)
        entries = [self.manifest.shards[shard] for shard in shards]
        return [name for entry in entries for name in (entry.index_name, entry.name)]

    def _copy(self, ids: list[int], rows: np.ndarray, labels: np.ndarray):
        digest, checked = xxhash.xxh3_64_intdigest, self.checked
        ends = self._ends
        shards = np.searchsorted(ends, ids, side="right")
        numbers = (np.asarray(ids) - (ends - self._sizes)[shards]).tolist()
        for i, (shard, number) in enumerate(zip(shards.tolist(), numbers)):
            opened, row = self._open.get(shard), rows[i]
            if opened is not None and shard not in self._bad_shards and ids[i] not in self._bad_samples:
                try:
                    opened.read_into(row, opened.offsets[number])
                    good = not checked or digest(row) == opened.hashes[number]
                except (OSError, ValueError):
                    good = False
                if good:
                    labels[i] = opened.labels[number]
                    continue
            labels[i] = self._copy_carefully(ids[i], row)

    def _copy_carefully(self, sample: int, row: np.ndarray) -> int:
        """Read one sample off the fast path: open its shard, look twice at damage, quarantine and replace; return its label."""
        wanted = sample
        for _ in range(self.manifest.num_samples):
            shard, number = self._place(sample)
            if shard not in self._bad_shards and sample not in self._bad_samples:
                try:
                    label = self._read_one(shard, number, row)
                except (ValueError, OSError) as error:
                    self._quarantine(shard, sample, error)
                else:
                    if sample != wanted:
                        with self._lock:
                            self._counters["replaced"] += 1
                    return label
            sample = self._substitute(shard, number, sample)
        raise ValueError("every sample of the dataset is in quarantine; restore the shards")

    def _place(self, sample: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        return shard, sample - int(self._ends[shard] - self._sizes[shard])

    def _substitute(self, shard: int, number: int, sample: int) -> int:
        """Name what replaces a bad sample: the next one, or the same row of the next shard when all of its shard is bad.

        Where that belongs to the other part of the dataset, the next one that does not.
        """
        if shard not in self._bad_shards:
            found = (sample + 1) % self.manifest.num_samples
        else:
            shard = (shard + 1) % len(self._sizes)
            found = int(self._ends[shard] - self._sizes[shard]) + number % int(self._sizes[shard])
        if self._members is None:
            return found
        return int(self._members[np.searchsorted(self._members, found) % len(self._members)])

    def _read_one(self, shard: int, number: int, row: np.ndarray) -> int:
        opened = self._get(shard)
        for attempt in range(2):
            opened.read_into(row, opened.offsets[number])
            if not self.checked or xxhash.xxh3_64_intdigest(row) == opened.hashes[number]:
                return opened.labels[number]
            if attempt == 0:  # a second look through a fresh file (a fresh copy where the source is remote)
                with self._opening:
                    self._open.pop(shard, None)
                opened = self._get(shard, refetch=True)
        with self._lock:
            self._counters["checksum_failures"] += 1
        name, key = self.manifest.shards[shard].name, opened.keys[number].decode(errors="replace")
        raise BadSample(
            f"shard {name}: sample {key!r} at offset {opened.offsets[number]} fails its checksum; "
            "restore the shard, or set on_bad=replace"
        )

    def _get(self, shard: int, refetch: bool = False) -> OpenShard:
        """Open a shard, or find it open; the least recently opened ones are closed past a bound."""
        with self._opening:
            opened = self._open.get(shard)
            for attempt in range(3):
                if opened is not None:
                    break
                try:
                    opened = self._open_now(shard, refetch and attempt == 0)
                except FileNotFoundError:  # evicted by another rank between being located and being opened?
                    if attempt == 2:
                        raise
            self._open[shard] = opened
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)
            return opened

    def _open_now(self, shard: int, refetch: bool) -> OpenShard:
        entry = self.manifest.shards[shard]
        path = self.files.locate(entry.name, refetch)
        index_path = self.files.locate(entry.index_name)
        return OpenShard(path, index_path, entry, self.manifest.sample_bytes, self.use_mmap)

    def _quarantine(self, shard: int, sample: int, error: Exception):
        """Note bad data; raise when the policy or its limit says stop."""
        message = str(error)
        if isinstance(error, OSError):
            message = f"shard {self.manifest.shards[shard].name}: {error}; restore it or set on_bad=replace"
        with self._lock:
            if self.on_bad == "stop":
                raise ValueError(message) from None
            if isinstance(error, BadSample):
                self._bad_samples.add(sample)
            else:
                self._bad_shards.add(shard)
            bad = len(self._bad_samples) + sum(int(self._sizes[s]) for s in self._bad_shards)
            if bad > self.max_bad:
                raise ValueError(
                    f"{bad} samples are bad, more than max_bad={self.max_bad}; the last: {message}"
                ) from None
