"""WebDataset tars as a source: walked strictly, indexed once, then read through the index.

Our tars hold `KEY.npy` ([C, H, W]) and `KEY.cls` per sample, written by the webdataset library with mtime=0, so that they
are byte-reproducible and open with the stock library. Its iterator is not the training path: it takes a damaged header for
the end of an archive, silently. The walker here accepts an archive only to its last zero block. webdataset is imported only
where it writes.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_pipeline import index, manifest, npy
from data_pipeline.reader import Source
from data_pipeline.shard_file import LocalFolder

_BLOCK = 512
_MAX_EXTENDED_HEADER = 2**20
_MAX_JSON = 2**20


@dataclass(frozen=True)
class Member:
    """A file inside a tar: its name, where its content starts, and how long that is."""

    name: str
    offset: int
    size: int


def _octal(field: bytes) -> int:
    if field[:1] in (b"\x80", b"\xff"):  # GNU base-256, for sizes from 8 GiB
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0")[0].strip() or b"0", 8)


def _pax(data: bytes) -> dict[str, str]:
    """Read the records "LENGTH KEY=VALUE\\n" of a PAX header."""
    records = {}
    while data.strip(b"\0"):
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(data):
            raise ValueError("its PAX header is damaged")
        name, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        records[name.decode(errors="replace")] = value.decode(errors="surrogateescape")
        data = data[int(length) :]
    return records


def walk_tar(data, name="tar") -> Iterator[Member]:
    """Yield the regular files of an uncompressed tar, given as a buffer.

    Raises ValueError where any header, padding or end is not as it must be: nothing is ever taken for the end but the end.
    """
    offset, total, extended, end_seen = 0, len(data), {}, False
    while offset < total:
        block = bytes(data[offset : offset + _BLOCK])
        if len(block) < _BLOCK:
            raise ValueError(f"{name} is truncated inside a header at offset {offset}; restore it")
        if block == bytes(_BLOCK):
            if bytes(data[offset:]).strip(b"\0") or total - offset < 2 * _BLOCK:
                raise ValueError(f"{name} has a zeroed header at offset {offset}, or a cut end; restore it")
            end_seen = True
            break
        try:
            claimed = _octal(block[148:156])
            size, kind = _octal(block[124:136]), block[156:157]
            if claimed != sum(block[:148]) + sum(block[156:]) + 8 * 32:
                raise ValueError("its checksum is wrong")
            path = block[:100].split(b"\0")[0]
            if block[257:263] == b"ustar\0" and block[345:346] != b"\0":
                path = block[345:500].split(b"\0")[0] + b"/" + path
            content = offset + _BLOCK
            size = int(extended.get("size", size)) if kind not in b"xgL" else size
            if size < 0 or content + size > total:
                raise ValueError(f"it needs {size} bytes and {total - content} are left")
            if kind in b"xgL" and size > _MAX_EXTENDED_HEADER:
                raise ValueError("its extended header is too large")
            if kind == b"x":
                extended.update(_pax(bytes(data[content : content + size])))
            elif kind == b"L":  # GNU's way to write long names
                extended["path"] = bytes(data[content : content + size]).rstrip(b"\0").decode(errors="surrogateescape")
        except ValueError as error:
            raise ValueError(f"{name} is damaged at offset {offset}: {error}; restore it") from None
        if kind not in (b"x", b"g", b"L"):
            if kind in (b"0", b"\0"):
                yield Member(extended.get("path", path.decode(errors="surrogateescape")), content, size)
            extended = {}
        offset = content + -(-size // _BLOCK) * _BLOCK
    if not end_seen:
        raise ValueError(f"{name} has no end mark after {total} bytes: it is truncated; restore it")


def group_members(members: Iterator[Member], name="tar") -> Iterator[tuple[str, dict[str, Member]]]:
    """Group consecutive members by key as webdataset does: the path up to the first dot of its last part, then the extension."""
    key, group, seen = None, {}, set()
    for member in members:
        match = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", member.name.removeprefix("./"), re.DOTALL)
        if not match:
            continue  # as the stock library skips it; the caller sees what is missing
        if match[1] != key:
            if group:
                yield key, group
            key, group = match[1], {}
            if key in seen:
                raise ValueError(f"{name}: key {key!r} occurs twice; sort the members by key")
            seen.add(key)
        if match[2] in group:
            raise ValueError(f"{name}: member {member.name!r} occurs twice")
        group[match[2]] = member
    if group:
        yield key, group


def index_tar(path) -> tuple[np.ndarray, npy.Layout]:
    """Index a tar of `.npy` (and `.cls`) members, checking every array; return the index and the arrays' layout."""
    path = Path(path)
    rows, layout = [], None
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; restore it")
    data = np.memmap(path, dtype=np.uint8, mode="r")
    for key, group in group_members(walk_tar(data, str(path)), str(path)):
        array = group.get("npy")
        if array is None:
            raise ValueError(
                f"{path}: sample {key!r} has no .npy member (it has {', '.join(group)}); encode images first"
            )
        try:
            found, start = npy.parse_header(data[array.offset : array.offset + array.size])
            layout = layout or found
            if found != layout:
                raise ValueError(f"is {found}, the first sample is {layout}")
            payload = data[array.offset + start : array.offset + array.size]
            npy.check_values(payload, found)
            label = label_of(data, group)
        except ValueError as error:
            raise ValueError(f"{path}: sample {key!r} at offset {array.offset}: {error}") from None
        digest = xxhash.xxh3_64_intdigest(payload)
        rows.append((array.offset + start, len(payload), label, digest, key.encode(errors="surrogateescape")))
    if not rows:
        raise ValueError(f"{path} has no samples; restore it")
    return index.from_rows(rows), layout


def index_shard(path, container: str) -> tuple[np.ndarray, npy.Layout]:
    """Index a shard of either container."""
    if container == "mds":
        from data_pipeline import mds

        return mds.index_mds(path)
    return index_tar(path)


def label_of(data, group: dict[str, Member]) -> int:
    """Read a sample's class number from its .cls member, or from "label" in its .json; -1 where it has neither."""
    if "cls" in group:
        member = group["cls"]
        text = bytes(data[member.offset : member.offset + min(member.size, 32)])
        if not re.fullmatch(rb"\s*\d{1,9}\s*", text):
            raise ValueError(f"its label {text[:20]!r} is no class number")
        return int(text)
    if "json" in group and group["json"].size <= _MAX_JSON:
        member = group["json"]
        try:
            content = json.loads(bytes(data[member.offset : member.offset + member.size]))
        except (ValueError, RecursionError):
            raise ValueError("its .json member is no JSON") from None
        label = content.get("label") if isinstance(content, dict) else None
        if type(label) is int and 0 <= label < 10**9:
            return label
    return index.NO_LABEL


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_shard(path: Path, samples, mtime: float | None = 0) -> None:
    """Write (key, array, label) samples as one tar, byte-reproducibly; the caller gives a temporary path and renames it.

    `mtime` None is the library's own choice, the time of writing.
    """
    import webdataset

    with open(path, "wb") as file:
        # mtime=0: the library's float timestamps cost a PAX header of 1 KiB per member, and no two tars are alike.
        with webdataset.TarWriter(file, mtime=mtime) as writer:
            for key, array, label in samples:
                sample = {"__key__": key, "npy": npy.to_bytes(array)}
                if label != index.NO_LABEL:
                    sample["cls"] = str(int(label)).encode()
                writer.write(sample)
        file.flush()
        os.fsync(file.fileno())


def stock_pipeline(urls: list[str], **options):
    """Open tars with the library's own WebDataset: every rank sees all of them."""
    import webdataset

    return webdataset.WebDataset(urls, **({"shardshuffle": False, "nodesplitter": lambda source: source} | options))


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def open_source(
    path, seed: int, window: int, *, codec: str | None = None, cache: dict | None = None, stage: bool = False, **options
) -> Source:
    """Open a dataset (tars or MDS; a folder, or a URL of http, s3, gs, ...) for training; see `reader.Source` for the options.

    Shards that someone else wrote have no manifest: they are indexed now, once, by one process, as latents of `codec`. `cache` has
    `fetch.Cache`'s options for a URL: folder, max_bytes, timeout_seconds, ... A folder that is to `stage` is read like a URL: its
    shards are copied to the cache, on a disk of this machine's own, when they are first needed.
    """
    if "://" in str(path):
        return _open_remote(str(path), seed, window, cache or {}, options)
    folder = Path(path)
    if (
        folder.is_dir()
        and not (folder / manifest.NAME).exists()
        and (any(folder.glob("*.tar")) or any(folder.glob("*.mds")) or (folder / "index.json").exists())
    ):
        from data_pipeline.adopt import adopt

        adopt(folder, codec)
    if stage:
        return _open_remote(
            f"file://{manifest.manifest_path(folder.absolute()).parent}", seed, window, cache or {}, options
        )
    found = manifest.load(path)
    return Source(found, LocalFolder(manifest.manifest_path(path).parent), seed, window, **options)


def _open_remote(url: str, seed: int, window: int, cache: dict, options: dict) -> Source:
    from data_pipeline.fetch import Cache

    files = Cache(url, **({"folder": "~/.cache/evenkeel"} | cache))
    try:
        found = files.load_manifest()
        largest = sorted((shard.bytes for shard in found.shards), reverse=True)
        needed = sum(largest[: 2 * window])  # the window that is read and the one that is fetched
        if files.max_bytes < needed:
            raise ValueError(
                f"a cache of {files.max_bytes} bytes is too small for two windows of {window} shards, {needed} bytes; "
                "make the cache larger or the window smaller"
            )
        return Source(found, files, seed, window, **options)
    except BaseException:
        files.close()
        raise


def hash_file(path) -> str:
    """Return the xxh3-64 (hex) of a file."""
    state = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            state.update(block)
    return state.hexdigest()
