"""The background service that writes EMA snapshots while training goes on.

Every rank has a writer with one thread. The ranks' threads send their pieces, already cast, to rank 0 over a gloo group of their
own; rank 0 assembles and writes. What must not break: nothing in a thread touches the default process group, and a disk without
space loses none: they wait in memory, checkpoints wait for them, and when that memory is used up the training waits, then ends.
"""

import contextlib
import errno
import json
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trainer import tensor_file
from trainer.host_copies import copy_to_host
from trainer.state import is_full, tell

MAX_PENDING = 4  # jobs not yet assembled: beyond these, `submit` waits (two snapshots of two lengths)
MAX_UNWRITTEN = 4  # assembled snapshots kept in memory while the disk is full: with as many, `submit` waits
RETRY_SECONDS, AWAITED_RETRY_SECONDS = 10.0, 1.0  # to write what a full disk refused; sooner when somebody waits for it
PATIENCE_SECONDS = 60.0  # how long `close` goes on trying


class Piece(NamedTuple):
    """What one rank holds of a tensor: elements [start, start + host.numel()) of the flattened whole."""

    name: str
    shape: tuple[int, ...]
    start: int
    host: Tensor  # 1-D, on the CPU, not written to again by the caller


class _Job(NamedTuple):
    clock: int
    sigma_rel: float
    pieces: list[Piece]
    buffers: dict[str, Tensor]


def file_name(clock: int, sigma_rel: float) -> str:
    """Return a snapshot's name."""
    return f"ema-{clock:010d}-{sigma_rel:.3f}.safetensors"


class SnapshotWriter:
    """Gather and write snapshots in the background; one per rank, submitted to in the same order on every rank.

    For metrics, all of rank 0: `written`, `retried` (attempts that a full disk refused), `unwritten` (assembled, waiting for
    space), `queue_bytes` (host memory of what is not on disk).
    """

    def __init__(self, run_dir, header: dict, rank: int, world: int, group, timeout_seconds: float = 600.0):
        self.folder, self.header = Path(run_dir) / "snapshots", dict(header)
        self.rank, self.world, self.group = rank, world, group
        self.timeout = timedelta(seconds=timeout_seconds)
        self.dtype = tensor_file.DTYPES[header["dtype"]]
        self.written = self.retried = 0
        self._jobs: deque[_Job] = deque()
        self._unwritten: deque[tuple[Path, dict, dict[str, Tensor]]] = deque()
        self._changed, self._error = threading.Condition(), None
        self._busy, self._closing, self._deadline, self._awaited = False, False, 0.0, 0
        if rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".*.writing"):
                with contextlib.suppress(OSError):  # gone already, or held by a file server
                    left.unlink()  # of a life that was killed while it wrote
        self._thread = threading.Thread(target=self._work, name="snapshots", daemon=True)
        self._thread.start()

    @property
    def unwritten(self) -> int:
        """Count snapshots that wait in memory for disk space."""
        return len(self._unwritten)

    @property
    def queue_bytes(self) -> int:
        """Count the host memory of snapshots that are not on disk yet."""
        with self._changed:
            waiting = [t for _, _, tensors in self._unwritten for t in tensors.values()]
            return sum(t.nbytes for t in waiting) + sum(p.host.nbytes for job in self._jobs for p in job.pieces)

    def pieces(self, fragments: Iterable, average: Iterable[Tensor]) -> list[Piece]:
        """Copy an average's tensors, one per fragment, to host memory; MAX_PENDING + 2 such copies are there at most."""
        owned = list(zip(fragments, average, strict=False))  # at stage 0 only rank 0 owns the fragments
        hosts = copy_to_host([t for _, t in owned], self.dtype)
        return [Piece(f.name, f.shape, f.start, host) for (f, _), host in zip(owned, hosts, strict=True)]

    def submit(
        self,
        clock: int,
        sigma_rel: float,
        tensors: Iterable,
        buffers: Mapping[str, Tensor],
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        """Hand over this rank's (name, shape, start, host) pieces; returns at once unless the queue is full.

        `buffers` are kept in fp32 and used on rank 0 only. Raises what the thread has raised before, and OSError where a full disk
        keeps the queue full for `patience_seconds`.
        """
        job = _Job(int(clock), float(sigma_rel), [Piece(*t) for t in tensors], dict(buffers))
        with self._changed:
            self._changed.wait_for(lambda: self._error or len(self._jobs) < MAX_PENDING)
            self._awaited += 1
            if not self._changed.wait_for(
                lambda: self._error or len(self._unwritten) < MAX_UNWRITTEN, timeout=patience_seconds
            ):
                names = ", ".join(path.name for path, _, _ in self._unwritten)
                raise OSError(errno.ENOSPC, f"no space for {names}; they are made again when the run is resumed")
            self._awaited -= 1
            self._raise()
            self._jobs.append(job)
            self._changed.notify_all()

    def wait(self) -> None:
        """Return when everything submitted is on disk or, for lack of space, kept in memory; raise what the thread raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or not (self._jobs or self._busy))
            self._raise()

    def wait_durable(self, patience_seconds: float = PATIENCE_SECONDS) -> None:
        """Return when everything submitted is on disk; raise OSError where a full disk refuses it for `patience_seconds`."""
        refused_since = None
        with self._changed:
            self._awaited += 1
            self._changed.notify_all()
            while not self._changed.wait_for(
                lambda: self._error or not (self._jobs or self._busy or self._unwritten), timeout=1.0
            ):
                refused = self._unwritten and not self._busy  # tried, and waiting for the next try
                refused_since = (refused_since or time.monotonic()) if refused else None
                if refused_since is not None and time.monotonic() - refused_since > patience_seconds:
                    self._awaited -= 1
                    raise OSError(errno.ENOSPC, f"{len(self._unwritten)} snapshots wait for space on the disk")
            self._awaited -= 1
            self._raise()

    def close(self, patience_seconds: float = PATIENCE_SECONDS) -> None:
        """Write what is left and end the thread; raise OSError for snapshots that still find no space after `patience_seconds`."""
        with self._changed:
            self._deadline, self._closing = time.monotonic() + patience_seconds, True
            self._changed.notify_all()
        self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            job = None  # while there is none, nothing is held
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                retry = AWAITED_RETRY_SECONDS if self._closing or self._awaited else RETRY_SECONDS
                pause = retry if self._unwritten else None
                self._changed.wait_for(lambda: self._jobs or self._closing and not self._unwritten, timeout=pause)
                if self._error or (self._closing and not self._jobs and not self._unwritten):
                    return
                job = self._jobs.popleft() if self._jobs else None
                self._busy = True
                self._changed.notify_all()
            try:
                if job is not None:
                    self._gather(job)
                self._write()
            except BaseException as error:  # kept for the training thread: `submit`, `wait` and `close` raise it there
                with self._changed:
                    self._error, self._busy = error, False
                    self._changed.notify_all()
                return

    # -- between ranks

    def _gather(self, job: _Job) -> None:
        """Send this rank's pieces to rank 0, or assemble there what all ranks hold."""
        listing = [(p.name, list(p.shape), p.start, p.host.numel()) for p in job.pieces]
        if self.rank != 0:
            message = json.dumps([job.clock, job.sigma_rel, listing]).encode()
            self._send(torch.tensor([len(message)]))
            self._send(torch.frombuffer(bytearray(message), dtype=torch.uint8))
            for piece in job.pieces:
                self._send(piece.host.to(self.dtype).view(torch.uint8))
            return
        whole: dict[str, Tensor] = {}
        covered: dict[str, int] = {}

        def part(name, shape, start, count):
            if name not in whole:
                whole[name] = torch.empty(shape, dtype=self.dtype)
            covered[name] = covered.get(name, 0) + count
            return whole[name].view(-1)[start : start + count]

        for piece, entry in zip(job.pieces, listing, strict=True):
            part(*entry).copy_(piece.host)
        for source in range(1, self.world):
            (length,) = self._receive(torch.empty(1, dtype=torch.int64), source).tolist()
            clock, sigma_rel, entries = json.loads(
                self._receive(torch.empty(length, dtype=torch.uint8), source).numpy().tobytes()
            )
            assert (clock, sigma_rel) == (job.clock, job.sigma_rel), (
                f"rank {source} sends another snapshot than rank 0 writes"
            )
            for entry in entries:
                self._receive(part(*entry).view(torch.uint8), source)
        partial = [name for name, tensor in whole.items() if covered[name] != tensor.numel()]
        assert not partial, f"the ranks' pieces do not cover {partial[0]} exactly once"
        buffers = {name: b.detach().to("cpu", torch.float32) for name, b in job.buffers.items()}
        header = (
            {"kind": "ema"} | self.header | {"clock": job.clock, "sigma_rel": job.sigma_rel, "buffers": sorted(buffers)}
        )
        with self._changed:
            self._unwritten.append((self.folder / file_name(job.clock, job.sigma_rel), header, buffers | whole))

    def _send(self, tensor: Tensor) -> None:
        dist.isend(tensor, group=self.group, group_dst=0).wait(self.timeout)

    def _receive(self, tensor: Tensor, source: int) -> Tensor:
        dist.irecv(tensor, group=self.group, group_src=source).wait(self.timeout)
        return tensor

    # -- to the disk

    def _write(self) -> None:
        """Write assembled snapshots, oldest first; keep them when there is no space."""
        while self._unwritten:
            path, header, tensors = self._unwritten[0]
            try:
                tensor_file.write(path, header, tensors)
                self.written += 1
            except OSError as error:
                if not is_full(error):
                    raise
                self.retried += 1
                if self._closing and time.monotonic() > self._deadline:
                    names = ", ".join(p.name for p, _, _ in self._unwritten)
                    raise OSError(error.errno, f"no space for {names}; free some and resume") from None
                if self.retried == 1:
                    tell(f"warning: no space for {path}: it waits in memory")
                return
            with self._changed:
                self._unwritten.popleft()
                self._changed.notify_all()
