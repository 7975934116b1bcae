"""The training path's reader: positions -> samples -> checked bytes -> one fresh tensor per batch.

It knows nothing of tars or MDS: an index says where each array lies, whatever the container. It runs in the trainer's process (mmap
or pread, threads, no worker processes, nothing in /dev/shm), checks every sample against the index's xxh3-64, and never shortens a
batch: a bad sample either stops the run with one line or is replaced by a rule that depends on nothing but the data and the
quarantine list. `batch(positions)` is a pure function of its argument; a maintainer must keep it so.

Memory: the batches that were asked for or hinted at (depth + 1), the indices of two windows of shards (50 KB each at 1,024
samples), one or two windows of sample ids (8 bytes each); mapped shards are page cache, which the kernel takes back when it wants.

A batch's memory is used again once nobody holds the batch, and never before. Pinned memory (`pin`) comes from torch's caching
host allocator, which moreover waits for every copy that was issued from it with non_blocking=True (an event per stream), so that a
batch may be dropped right after such a copy was issued. Pageable memory needs no events: CUDA returns from a copy only when
the host's bytes are staged. A ring of our own over pinned memory would have to keep those events itself; don't put one here.
"""

import contextlib
import math
import resource
import sys
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
from data_pipeline.quarantine import BadSample, Quarantine, split
from data_pipeline.shard_file import LocalFolder, OpenShard, choose_access

_TORCH = {"uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32}
_SPARE_DESCRIPTORS = 256  # left for sockets, logs, checkpoints


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
        access: str = "auto",
        pin: bool = False,
        threads: int = 1,
        depth: int = 2,
        max_open: int | None = None,
        heldout: float = 0.0,
        part: str = "train",
    ):
        if pin and not torch.cuda.is_available():
            raise ValueError("pin=True needs a CUDA device, and torch sees none; leave it out")
        self.manifest, self.files, self.seed, self.window = manifest, files, seed, window
        self.checked, self.access, self.pin = checked, choose_access(access, files.folder), pin
        self._sizes = manifest.shard_sizes
        self._ends = np.cumsum(self._sizes)
        self._starts = self._ends - self._sizes
        members, self._member_sizes = split(self._sizes, heldout, part)
        names = [shard.name for shard in manifest.shards]
        self.quarantine = Quarantine(names, self._sizes, members, on_bad, max_bad)
        self._members = members
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        # Two windows, or a shard would be opened anew for every sample.
        self._max_open = _descriptors_for(min(2 * window, len(names))) if max_open is None else max_open
        self._lock = threading.Lock()  # of counters and pending batches; never held while reading
        self._opening = threading.Lock()
        self._depth = depth
        self._pending: OrderedDict[bytes, Future] = OrderedDict()
        self._buffers: list[np.ndarray] = []
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
            future = self._pending.pop(positions.tobytes(), None) if self._pending else None
        result = self._read(positions) if future is None else future.result()
        with self._lock:
            self._counters["wait_seconds"] += time.perf_counter() - start
            self._counters["samples"] += len(positions)
            self._counters["bytes"] += result.stored.nbytes
        return result

    def prefetch(self, positions):
        """Hint that a batch will be asked for: it is read in the background. At most `depth` hints are kept, the newest."""
        positions = np.array(positions, dtype=np.int64)  # a copy: the caller may reuse its own
        with self._lock:
            key = positions.tobytes()
            if key not in self._pending:
                self._pending[key] = self._ahead.submit(self._read, positions)
            while len(self._pending) > self._depth:
                self._pending.popitem(last=False)[1].cancel()

    @property
    def num_samples(self) -> int:
        """Return the samples in an epoch: those of this part of the dataset."""
        return int(self._member_sizes.sum())

    def counters(self) -> dict:
        """Return totals since opening: samples, bytes, wait_seconds, checksum_failures, replaced, and the files' own.

        quarantined_{samples,shards} are not totals but the length of the quarantine list.
        """
        with self._lock:
            bad = {
                "quarantined_samples": len(self.quarantine.samples),
                "quarantined_shards": len(self.quarantine.shards),
            }
            return self._counters | bad | self.files.counters()

    def state(self) -> dict:
        """Return the quarantine list, for a checkpoint: a resumed run must make the same replacements."""
        return self.quarantine.state()

    def load_state(self, state: dict):
        """Take over a quarantine list, or several ranks' lists one after another."""
        if self.quarantine.add(state):
            with self._lock:  # what was read ahead under the old list is read again
                while self._pending:
                    self._pending.popitem()[1].cancel()

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

    def name(self, position: int) -> str:
        """Return which sample is at a position, before any replacement, by shard and key."""
        sample = int(self.sample_ids([position])[0])
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        key = self._get(shard).keys[sample - int(self._starts[shard])].decode(errors="replace")
        return f"{self.manifest.shards[shard].name} {key!r}"

    def _read(self, positions: np.ndarray) -> LatentBatch:
        m = self.manifest
        stored = self._empty((len(positions), *m.shape), _TORCH[m.dtype])
        rows = stored.numpy().reshape(len(positions), -1).view(np.uint8)
        labels = np.empty(len(positions), dtype=np.int64)
        ids = self.sample_ids(positions)
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

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return memory for a batch: pinned, or the bytes of an earlier batch that nobody holds any more.

        Memory fresh from the kernel costs its page faults, up to as much as the copy into it.
        """
        if self.pin:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        num_bytes = math.prod(shape) * dtype.itemsize
        with self._lock:
            for buffer in self._buffers:
                # Tensors over an array, and views of them, hold the array; three references are the list's, the loop's, the call's.
                if buffer.nbytes == num_bytes and sys.getrefcount(buffer) == 3:
                    break
            else:
                buffer = np.empty(num_bytes, dtype=np.uint8)
                self._buffers = [*self._buffers[-self._depth - 1 :], buffer]
            return torch.from_numpy(buffer).view(dtype).view(shape)

    def _names_ahead(self, position: int) -> list[str]:
        if isinstance(self.files, LocalFolder):
            return []
        shards = order.shards_ahead(self.seed, position, self._member_sizes, self.window)
        entries = [self.manifest.shards[shard] for shard in shards]
        return [name for entry in entries for name in (entry.index_name, entry.name)]

    def _copy(self, ids: np.ndarray, rows: np.ndarray, labels: np.ndarray):
        """Fill rows and labels. This loop costs about 1 us a sample beside copy and hash: keep it short."""
        digest, checked, find, suspicious = (
            xxhash.xxh3_64_intdigest,
            self.checked,
            self._open.get,
            not self.quarantine.empty,
        )
        shards = np.searchsorted(self._ends, ids, side="right")
        numbers = (ids - self._starts[shards]).tolist()
        found = []
        for row, shard, number in zip(rows, shards.tolist(), numbers):
            opened = find(shard)
            if opened is not None and not suspicious:
                try:
                    opened.read_into(row, opened.offsets[number])
                except (OSError, ValueError):
                    pass  # looked into below
                else:
                    if not checked or digest(row) == opened.hashes[number]:
                        found.append(opened.labels[number])
                        continue
            found.append(self._copy_carefully(shard, number, row))
        labels[:] = found

    def _copy_carefully(self, shard: int, number: int, row: np.ndarray) -> int:
        """Read one sample off the fast path: open its shard, look twice at damage, quarantine and replace; return its label."""
        quarantine = self.quarantine
        sample = wanted = int(self._starts[shard]) + number
        for _ in range(self.manifest.num_samples):
            shard = int(np.searchsorted(self._ends, sample, side="right"))
            if not quarantine.holds(shard, sample):
                try:
                    label = self._read_one(shard, sample - int(self._starts[shard]), row)
                except (ValueError, OSError) as error:
                    quarantine.note(shard, sample, error)
                else:
                    if sample != wanted:
                        with self._lock:
                            self._counters["replaced"] += 1
                    return label
            sample = quarantine.substitute(shard, sample)
        raise ValueError("every sample of the dataset is in quarantine; restore the shards")

    def _read_one(self, shard: int, number: int, row: np.ndarray) -> int:
        opened, offset = self._get(shard), None
        for attempt in range(2):
            offset = opened.offsets[number]
            try:
                opened.read_into(row, offset)
                if not self.checked or xxhash.xxh3_64_intdigest(row) == opened.hashes[number]:
                    return opened.labels[number]
            except (ValueError, OSError):
                if attempt:
                    raise
            if attempt == 0:  # a second look through a fresh file (a fresh copy where the source is remote)
                with self._opening:
                    self._open.pop(shard, None)
                opened = self._get(shard, refetch=True)
        with self._lock:
            self._counters["checksum_failures"] += 1
        name, key = self.manifest.shards[shard].name, opened.keys[number].decode(errors="replace")
        raise BadSample(
            f"shard {name}: sample {key!r} at offset {offset} fails its checksum; "
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
        return OpenShard(path, index_path, entry, self.manifest.sample_bytes, self.access)


def _descriptors_for(shards: int) -> int:
    """Return how many of `shards` may be open at once, after asking for as many descriptors as that takes: two for each."""
    wanted = 2 * shards + _SPARE_DESCRIPTORS  # one is the map's own
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return max(1, shards)
    with contextlib.suppress(ValueError, OSError):  # not allowed here: fewer are open at once, and opened more often
        raised = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, raised), hard))
        soft = max(soft, raised)
    return max(1, min(shards, (soft - _SPARE_DESCRIPTORS) // 2))
