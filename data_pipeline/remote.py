"""Bytes from elsewhere: http(s) through the standard library, everything else (s3, gs, memory, ...) through fsspec, imported late.

Nothing waits for ever: a source that brings no byte for `timeout_seconds` raises TimeoutError. Torch-free: the login node reads
manifests through it.
"""

import contextlib
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

CHUNK_BYTES = 2**20
_BLOCK_BYTES = 2**23  # of one request to an object store; each must come within the timeout
_PERMANENT = (400, 401, 403, 404, 405, 410, 451)  # trying again will not help
MAX_PAUSE_SECONDS = 30.0


class Unusable(ValueError):
    """An address that nothing here can read, or a file that is not what was asked for: trying again cannot help."""


def is_url(path) -> bool:
    """Tell a URL from a local path."""
    return "://" in str(path)


def join(url: str, name: str) -> str:
    """Return the URL of a file in a folder."""
    return f"{url.rstrip('/')}/{urllib.parse.quote(name) if is_http(url) else name}"


def is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def read(url: str, timeout_seconds: float) -> Iterator[bytes]:
    """Yield a file's bytes, in pieces. Whatever goes wrong raises; a library that is missing raises Unusable with the remedy."""
    return _read_http(url, timeout_seconds) if is_http(url) else _read_fsspec(url, timeout_seconds)


def _read_http(url: str, timeout_seconds: float) -> Iterator[bytes]:
    with urllib.request.urlopen(url, timeout=timeout_seconds) as response:
        received, length = 0, response.headers.get("Content-Length")
        while chunk := response.read(CHUNK_BYTES):
            received += len(chunk)
            yield chunk
        if length is not None and received != int(length):  # read() in pieces does not say so
            raise OSError(f"the connection was cut after {received} of {length} bytes")


def _read_fsspec(url: str, timeout_seconds: float) -> Iterator[bytes]:
    """Read in a thread of its own: not every file system knows timeouts. A stalled one is left behind; it ends with the process."""
    _import_fsspec(url)
    chunks: queue.Queue = queue.Queue(maxsize=4)
    gone = threading.Event()

    def put(item):
        while not gone.is_set():
            with contextlib.suppress(queue.Full):
                return chunks.put(item, timeout=1)

    def work():
        try:
            import fsspec

            system, path = fsspec.url_to_fs(url, use_listings_cache=False)
            with system.open(path, "rb", block_size=_BLOCK_BYTES) as file:
                while (chunk := file.read(CHUNK_BYTES)) and not gone.is_set():
                    put(chunk)
            put(b"")
        except Exception as error:  # a file system raises what it likes; it is raised again on the other side
            put(error)

    threading.Thread(target=work, name="evenkeel-fetch", daemon=True).start()
    try:
        while True:
            item = chunks.get(timeout=timeout_seconds)
            if isinstance(item, Exception):
                raise item
            if not item:
                return
            yield item
    except queue.Empty:
        raise TimeoutError(f"no byte for {timeout_seconds:g} s") from None
    finally:
        gone.set()


def _import_fsspec(url: str):
    """Import fsspec and the library of the URL's scheme; raise Unusable with the remedy where one is missing."""
    scheme = url.partition("://")[0]
    try:
        import fsspec

        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        remedy = (
            "pip install '.[remote]'" if scheme in ("s3", "s3a") else f"pip install fsspec and what serves {scheme}"
        )
        raise Unusable(f"{url}: {str(error).splitlines()[0]}; install it with: {remedy}") from None
    except ValueError:
        raise ValueError(
            f"{url}: {scheme}:// is unknown; use http, https, s3, gs or another scheme of fsspec"
        ) from None


def is_permanent(error: Exception) -> bool:
    """Say whether trying again cannot help."""
    named = type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError")  # botocore's
    kinds = (FileNotFoundError, PermissionError, Unusable)
    return named or isinstance(error, kinds) or getattr(error, "code", None) in _PERMANENT


def reason(error: Exception) -> str:
    """Say in one line what went wrong."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP status {error.code}"
    text = str(getattr(error, "reason", None) or error) or type(error).__name__
    return " ".join(text.split())


def load(url: str, max_bytes: int, timeout_seconds: float = 10.0, attempts: int = 3) -> bytes:
    """Return a small file's bytes.

    Raises FileNotFoundError, or ValueError in one line where it cannot be had in bounded time.
    """
    for attempt in range(attempts):
        found, latest = bytearray(), time.monotonic() + 6 * timeout_seconds
        try:
            for chunk in read(url, timeout_seconds):
                found += chunk
                if len(found) > max_bytes:
                    raise Unusable(f"it has more than {max_bytes} bytes; is it another file?")
                if time.monotonic() > latest:
                    raise TimeoutError(f"{len(found)} bytes when time was up")
            return bytes(found)
        except Exception as error:  # urllib, sockets and fsspec's file systems each raise their own kinds
            if isinstance(error, FileNotFoundError) or getattr(error, "code", None) in (404, 410):
                raise FileNotFoundError(url) from None
            if is_permanent(error) or attempt == attempts - 1:
                tried = "" if is_permanent(error) else f" in {attempt + 1} attempts"
                raise ValueError(f"{url} cannot be read{tried}: {reason(error)}; is the address right?") from None
            time.sleep(min(1.0, timeout_seconds) * 2**attempt / 4)
    raise AssertionError("unreachable")
