"""Remote datasets: shards fetched whole into a bounded local cache that several jobs and ranks of a node share.

A file gets its name only when its size and
hash are the manifest's, so a cache never holds half a shard; one process fetches a file and the others wait for it. Nothing waits
for ever: a transfer that brings no byte for `timeout_seconds` is given up, and tried again with growing pauses.
"""

import contextlib
import hashlib
import json
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from data_pipeline import durable, manifest, remote
from data_pipeline.manifest import Manifest


def expand(folder) -> Path:
    """Return a folder with ~ and $VARIABLES of this machine filled in; ValueError for a variable that is not set here."""
    text = os.path.expandvars(os.path.expanduser(folder))
    if missing := re.findall(r"\$\{?\w+\}?", text):
        raise ValueError(
            f"cache folder {folder}: {missing[0]} is not set on this machine; name a folder, such as /tmp/evenkeel"
        )
    return Path(text)


class GivenUp(OSError):
    """A file that could not be fetched."""


class Cache:
    """A remote dataset's files, on local disk when asked for. Thread-safe, and safe among processes of one machine."""

    def __init__(
        self,
        url: str,
        folder,
        max_bytes: int = 64 * 2**30,
        timeout_seconds: float = 30.0,
        attempts: int = 6,
        pause_seconds: float = 1.0,
        threads: int = 4,
    ):
        self.url = url.rstrip("/")
        # Datasets in one cache folder must not meet.
        self.folder = expand(folder) / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.max_bytes, self.timeout_seconds = max_bytes, timeout_seconds
        self.attempts, self.pause_seconds = attempts, pause_seconds
        self.expected: dict[str, tuple[int | None, str]] = {}
        self.fetched_bytes, self.retries, self.evicted, self.hits = 0, 0, 0, 0
        self._closed = threading.Event()
        self._ahead = ThreadPoolExecutor(threads, thread_name_prefix="evenkeel-fetch")
        self._asked: set[str] = set()
        (self.folder / ".locks").mkdir(parents=True, exist_ok=True)

    def load_manifest(self) -> Manifest:
        """Fetch the manifest (anew every time: it is what names the dataset's version) and expect its files."""
        target = self.folder / manifest.NAME
        try:
            with self._alone(manifest.NAME):
                self._fetch(manifest.NAME, target)
                m = manifest.load(target)
        except GivenUp as error:
            raise ValueError(str(error)) from None
        for shard in m.shards:
            self.expected[shard.name] = (shard.bytes, shard.xxh3_64)
            self.expected[shard.index_name] = (None, shard.index_sha256)
        return m

    def locate(self, name: str, refetch: bool = False) -> Path:
        """Return the local path of a file, fetching it if it is not there, or if the copy here has gone bad."""
        target = self.folder / name
        size, _ = self.expected[name]
        with self._alone(name):
            there = target.stat().st_size if target.exists() else None
            if there is None or refetch or (size is not None and there != size):
                target.unlink(missing_ok=True)
                self._fetch(name, target)
            else:
                self.hits += 1
            os.utime(target)  # what was used last is evicted last
        return target

    def counters(self) -> dict[str, int]:
        """Return totals since opening: cache_hits (files found here), fetched_bytes, fetch_retries."""
        return {"cache_hits": self.hits, "fetched_bytes": self.fetched_bytes, "fetch_retries": self.retries}

    def ahead(self, names: list[str]):
        """Fetch files in the background; errors show when the file is asked for."""
        for name in names:
            if name not in self._asked:
                self._asked.add(name)
                self._ahead.submit(self._locate_quietly, name)

    def _locate_quietly(self, name: str):
        if not self._closed.is_set():
            with contextlib.suppress(OSError, ValueError):
                self.locate(name)

    def close(self):
        """Stop fetching."""
        self._closed.set()
        self._ahead.shutdown(wait=True, cancel_futures=True)

    # -- one file -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _alone(self, name: str):
        """Let one thread of one process at a file; the lock goes with the process, also after SIGKILL."""
        descriptor = os.open(self.folder / ".locks" / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            durable.lock(descriptor, wait=True)
            yield
        finally:
            os.close(descriptor)

    def _fetch(self, name: str, target: Path):
        """Fetch a file, checked, under its final name; try again where that may help."""
        temporary = self.folder / f".{os.getpid()}.{threading.get_ident()}.{name}.tmp"
        url = remote.join(self.url, name)
        try:
            self._reserve(name, temporary)
            self._fetch_patiently(url, name, temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def _fetch_patiently(self, url: str, name: str, temporary: Path):
        for attempt in range(self.attempts):
            try:
                return self._fetch_once(url, name, temporary)
            except Exception as error:  # urllib, sockets and fsspec's file systems each raise their own kinds
                permanent = remote.is_permanent(error)
                if permanent or attempt == self.attempts - 1 or self._closed.is_set():
                    tried = "" if permanent else f" in {attempt + 1} attempts"
                    raise GivenUp(f"{url} cannot be fetched{tried}: {remote.reason(error)}") from None
                self.retries += 1
                self._closed.wait(min(remote.MAX_PAUSE_SECONDS, self.pause_seconds * 2**attempt))

    def _fetch_once(self, url: str, name: str, temporary: Path):
        size, digest = self.expected.get(name, (None, ""))
        # The manifest's hashes: xxh3-64 of shards, SHA-256 of indices.
        state, limit = xxhash.xxh3_64() if size is not None else hashlib.sha256(), size or manifest.MAX_MANIFEST_BYTES
        received, latest = 0, time.monotonic() + self.timeout_seconds + limit / 2**16  # 64 KiB/s at the very least
        with open(temporary, "wb") as file:
            for chunk in remote.read(url, self.timeout_seconds):
                file.write(chunk)
                state.update(chunk)
                received += len(chunk)
                if received > limit:
                    raise OSError(f"more than {limit} bytes")
                if time.monotonic() > latest or self._closed.is_set():
                    raise TimeoutError(f"{received} of {limit} bytes when time was up")
        if size is not None and received != size:
            raise OSError(f"{received} bytes, the manifest says {size}")
        if digest and state.hexdigest() != digest:
            raise OSError("its hash is not the manifest's")
        if name == manifest.NAME:
            manifest.parse(json.loads(temporary.read_bytes()))
        self.fetched_bytes += received

    def _reserve(self, name: str, temporary: Path):
        """Make room for a file, counting those that are on their way, and claim it by an empty temporary file.

        The files that were used longest ago go. One that is open stays readable to those who have it open.
        """
        with self._alone("room"):
            files, total = [], self.expected.get(name, (0, ""))[0] or 0
            for path in self.folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    pid, _, rest = path.name.lstrip(".").partition(".")
                    if path.suffix == ".tmp" and pid.isdigit():
                        if not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
                            path.unlink()  # of a process that was killed
                        else:
                            total += self.expected.get(rest.partition(".")[2].removesuffix(".tmp"), (0, ""))[0] or 0
                    elif (self.expected.get(path.name) or (None,))[0] is not None:
                        status = path.stat()
                        files.append((status.st_mtime_ns, status.st_size, path))
            total += sum(size for _, size, _ in files)
            for _, size, path in sorted(files):
                if total <= self.max_bytes:
                    break
                path.unlink(missing_ok=True)
                self._asked.discard(path.name)
                self.evicted += 1
                total -= size
            temporary.touch()
