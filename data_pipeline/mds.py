"""MDS shards (mosaicml-streaming's format, version 2) as a source: walked strictly, indexed once, read through the index.

A shard is: uint32 number of samples n, uint32 offsets [n + 1], a JSON of its columns, then the samples: uint32 sizes of the columns
of variable size, then the columns' bytes, in the order of their names. The library is not needed to read or write it; what is
written here opens with its StreamingDataset. Only shards below 4 GiB exist, as offsets are uint32.
"""

import importlib
import importlib.machinery
import json
import os
import re
import struct
import sys
import types
from pathlib import Path

import numpy as np
import xxhash

from data_pipeline import index, npy
from data_pipeline.index import NO_LABEL
from data_pipeline.unpack import unpack

_MAX_CONFIG = 2**20
_INTEGERS = {"int": "<i8"} | {
    f"{kind}int{bits}": f"<{kind or 'i'}{bits // 8}" for kind in ("", "u") for bits in (8, 16, 32, 64)
}
LABEL_COLUMNS = ("label", "labels", "cls", "class", "y")
KEY_COLUMNS = ("key", "__key__")
# The library's codes of dtypes in arrays of dynamic dtype, and of their shapes' dtypes.
_DTYPE_CODES = {8: "uint8", 18: "float16", 34: "float32"}
_SHAPE_DTYPES = ("<u1", "<u2", "<u4", "<u8")


def parse_array(encoding: str, data) -> tuple[npy.Layout, int]:
    """Read an `ndarray[:DTYPE[:SHAPE]]` column; return its layout and where its values start in it."""
    parts, start = encoding.split(":")[1:], 0
    if len(parts) >= 1:
        dtype = parts[0]
    else:
        dtype, start = _DTYPE_CODES.get(data[0] if len(data) else -1), 1
    if dtype not in _DTYPE_CODES.values():
        raise ValueError(f"is {encoding} of dtype {dtype}; stored samples are {', '.join(_DTYPE_CODES.values())}")
    if len(parts) == 2:
        if not re.fullmatch(r"\d{1,7},\d{1,7},\d{1,7}", parts[1]):
            raise ValueError(f"is {encoding}; samples are [C, H, W]")
        shape = tuple(map(int, parts[1].split(",")))
    else:
        code = data[start] if len(data) > start else 0
        width = np.dtype(_SHAPE_DTYPES[code & 3])
        if code >> 2 != 3 or len(data) < start + 1 + 3 * width.itemsize:
            raise ValueError(f"is {encoding} of {code >> 2} dimensions; samples are [C, H, W]")
        shape = tuple(np.frombuffer(data[start + 1 : start + 1 + 3 * width.itemsize], dtype=width).tolist())
        start += 1 + 3 * width.itemsize
    if not all(0 < n < 2**20 for n in shape):
        raise ValueError(f"has shape {list(shape)}; samples are [C, H, W]")
    layout = npy.Layout(dtype, shape)
    if start + layout.bytes != len(data):
        raise ValueError(f"has {len(data)} bytes; {layout} needs {start + layout.bytes}")
    return layout, start


def _head(data, name: str) -> tuple[np.ndarray, list[str], list[str], list[int | None]]:
    """Read a shard's head: offsets [n + 1], and its columns' names, encodings and fixed sizes."""
    count = int.from_bytes(bytes(data[:4]), "little")
    start = 4 + 4 * (count + 1)
    if len(data) < start or count == 0:
        raise ValueError(f"{name} is truncated, empty or no MDS shard; restore it")
    offsets = np.frombuffer(data[4:start], dtype="<u4").astype(np.int64)
    if (
        offsets[0] < start
        or offsets[0] - start > _MAX_CONFIG
        or (np.diff(offsets) < 0).any()
        or offsets[-1] != len(data)
    ):
        raise ValueError(
            f"{name} has {len(data)} bytes, its offsets end at {offsets[-1]}: truncated or damaged; restore it"
        )
    try:
        config = json.loads(bytes(data[start : int(offsets[0])]))
        names, encodings, sizes = (config[f"column_{what}"] for what in ("names", "encodings", "sizes"))
        if config["format"] != "mds" or config["version"] != 2 or not len(names) == len(encodings) == len(sizes):
            raise ValueError("not MDS version 2")
        strings = all(isinstance(text, str) for text in [*names, *encodings])
        if not strings or not all(size is None or (type(size) is int and 0 < size < 2**32) for size in sizes):
            raise ValueError("bad columns")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{name} has a damaged head ({error!r}); restore it") from None
    return offsets, names, encodings, sizes


def _columns(data, start: int, end: int, sizes: list[int | None]) -> list[tuple[int, int]]:
    """Return where each column of a sample lies, as (start, end)."""
    variable = sum(size is None for size in sizes)
    found = np.frombuffer(data[start : min(end, start + 4 * variable)], dtype=np.uint8).tobytes()
    if len(found) != 4 * variable:
        raise ValueError("its column sizes are cut off")
    lengths = iter(struct.unpack(f"<{variable}I", found))
    places, place = [], start + 4 * variable
    for size in sizes:
        length = next(lengths) if size is None else size
        places.append((place, place + length))
        place += length
    if place != end:
        raise ValueError(f"its columns have {place - start} bytes, its offsets say {end - start}")
    return places


def index_mds(path) -> tuple[np.ndarray, npy.Layout]:
    """Index an MDS shard with one array column (and a label column), checking every array; return index and layout."""
    path, rows, layout = Path(path), [], None
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; restore it")
    data = np.memmap(path, dtype=np.uint8, mode="r")
    offsets, names, encodings, sizes = _head(data, str(path))
    arrays = [k for k, encoding in enumerate(encodings) if encoding.split(":")[0] == "ndarray"]
    if len(arrays) != 1:
        raise ValueError(
            f"{path} has {len(arrays)} ndarray columns ({', '.join(names)}); it must have one: the samples"
        )
    label_column = next((k for k, n in enumerate(names) if n in LABEL_COLUMNS and encodings[k] in _INTEGERS), None)
    key_column = next((k for k, n in enumerate(names) if n in KEY_COLUMNS and encodings[k] == "str"), None)
    for number, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist())):
        try:
            places = _columns(data, start, end, sizes)
            first, last = places[arrays[0]]
            found, skip = parse_array(encodings[arrays[0]], data[first:last])
            layout = layout or found
            if found != layout:
                raise ValueError(f"is {found}, the first sample is {layout}")
            payload = data[first + skip : last]
            npy.check_values(payload, found)
            label = NO_LABEL
            if label_column is not None:
                label = int(
                    np.frombuffer(data[slice(*places[label_column])], dtype=_INTEGERS[encodings[label_column]])[0]
                )
                if not 0 <= label < 10**9:
                    raise ValueError(f"its label {label} is no class number")
            key = f"{number:08d}".encode() if key_column is None else bytes(data[slice(*places[key_column])])
        except ValueError as error:
            raise ValueError(f"{path}: sample {number} at offset {start}: {error}") from None
        rows.append((first + skip, len(payload), label, xxhash.xxh3_64_intdigest(payload), key))
    return index.from_rows(rows), layout


# ---------------------------------------------------------------------------------------------------------------------
# index.json, which names the shards


def list_shards(folder: Path, unpacking: bool = True) -> list[Path]:
    """Return the shards that index.json names, in its order; those that are there compressed only are unpacked now, or refused."""
    path = folder / "index.json"
    plain_name = re.compile(r"[\w.-]+\.mds(\.\w+)?")
    try:
        shards = json.loads(path.read_bytes())["shards"]
        files = [(shard["raw_data"], shard.get("zip_data")) for shard in shards]
        names = [name for pair in files for name in (file["basename"] for file in pair if file)]
        sizes = [(raw.get("bytes", 0), dict(raw.get("hashes") or {})) for raw, _ in files]
        if not all(type(size) is int for size, _ in sizes):
            raise ValueError("a size is no integer")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is no index of MDS shards; restore it") from None
    if not names or not all(isinstance(n, str) and plain_name.fullmatch(n) for n in names):
        raise ValueError(f"{path} names no shards, or some in other folders; give a folder of .mds files")
    for (raw, packed), (size, hashes) in zip(files, sizes):
        target = folder / raw["basename"]
        if packed and not target.exists():
            if not unpacking:
                raise ValueError(
                    f"{target} is there compressed only; unpack it with: python -m data_pipeline.adopt {folder}"
                )
            unpack(folder / packed["basename"], target, size, hashes)
    return [folder / raw["basename"] for raw, _ in files]


def columns(layout: npy.Layout, labelled: bool) -> dict[str, str]:
    """Name the columns that we write."""
    made = {"key": "str", "label": "int", "sample": f"ndarray:{layout.dtype}:{','.join(map(str, layout.shape))}"}
    return made if labelled else {name: encoding for name, encoding in made.items() if name != "label"}


def _config(layout: npy.Layout, labelled: bool, size_limit: int | None) -> dict:
    fixed = {"key": None, "label": 8, "sample": layout.bytes}
    chosen = columns(layout, labelled)
    return {
        "column_encodings": list(chosen.values()),
        "column_names": list(chosen),
        "column_sizes": [fixed[name] for name in chosen],
        "compression": None,
        "format": "mds",
        "hashes": ["xxh3_64"],
        "size_limit": size_limit,
        "version": 2,
    }


def write_shard(path: Path, samples, layout: npy.Layout, labelled: bool) -> None:
    """Write (key, array, label) samples as one MDS shard; the caller gives a temporary path and renames it."""
    encoded = []
    for key, array, label in samples:
        name = key.encode()
        number = struct.pack("<q", label) if labelled else b""
        encoded.append(struct.pack("<I", len(name)) + name + number + np.ascontiguousarray(array).tobytes())
    config = json.dumps(_config(layout, labelled, None), sort_keys=True).encode()
    start = 4 + 4 * (len(encoded) + 1) + len(config)
    offsets = np.cumsum([start, *map(len, encoded)])
    if offsets[-1] >= 2**32:
        raise ValueError(
            f"an MDS shard has at most 4 GiB, this one would have {offsets[-1]} bytes; use fewer samples per shard"
        )
    with open(path, "wb") as file:
        file.write(struct.pack("<I", len(encoded)) + offsets.astype("<u4").tobytes() + config)
        file.writelines(encoded)
        file.flush()
        os.fsync(file.fileno())


def index_json(shards, layout: npy.Layout, labelled: bool) -> bytes:
    """Return the index.json of manifest.Shard entries, as the library writes it."""
    entries = []
    for shard in shards:
        file = {"basename": shard.name, "bytes": shard.bytes, "hashes": {"xxh3_64": shard.xxh3_64}}
        entries.append(_config(layout, labelled, None) | {"raw_data": file, "samples": shard.samples, "zip_data": None})
    return json.dumps({"shards": entries, "version": 2}, sort_keys=True).encode()


def library():
    """Import mosaicml-streaming; raise ValueError, one line, where it is not installed or does not import.

    It imports torchvision for data sets that are not ours, and torchvision's wheel does not import beside a CPU build of torch:
    stand-ins take its place during the import, and only then.
    """
    try:
        return importlib.import_module("streaming")
    except ImportError as error:
        if error.name == "streaming":
            raise ValueError("mosaicml-streaming is not installed; install it with: pip install '.[mds]'") from None
    except (
        Exception
    ):  # torchvision beside a CPU build of torch: RuntimeError, "operator torchvision::nms does not exist"
        pass
    for name in [n for n in sys.modules if n.split(".")[0] in ("streaming", "torchvision")]:
        del sys.modules[name]  # what the failed import left
    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    standins = {name: types.ModuleType(name) for name in names}
    for name, module in standins.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    standins["torchvision.datasets"].VisionDataset = type("VisionDataset", (), {})
    standins["torchvision.transforms.functional"].to_tensor = None
    sys.modules.update(standins)
    try:
        return importlib.import_module("streaming")
    except Exception as error:
        raise ValueError(f"mosaicml-streaming does not import here ({error}); read through the index") from None
    finally:
        for name in names:
            sys.modules.pop(name, None)


def stock_dataset(**options):
    """Open MDS shards with the library's own StreamingDataset."""
    return library().StreamingDataset(**options)
