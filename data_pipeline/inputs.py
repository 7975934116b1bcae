"""Where samples that are converted come from: a folder of shards, of ours or not, or an EDM2 zip; each checked as it is read."""

import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_pipeline import adopt, index, manifest, npy, order, sources, wds
from data_pipeline.manifest import Manifest
from data_pipeline.npy import Layout


@dataclass
class Input:
    """Samples to convert: shard sizes, a way to read a shard's (key, array, label), and what is known of them."""

    name: str
    sizes: list[int]
    read: Callable[[int], Iterator[tuple[str, np.ndarray, int]]]
    codec: str
    content: object  # plain data that names the samples, by which a restarted job knows its own work
    known: Manifest | None = None  # of a dataset of ours: codec, whitening and classes carry over


def open_shards(folder: Path, codec: str | None) -> Input:
    """Read a folder of shards: through its manifest, or else walked without touching the folder."""
    if (folder / manifest.NAME).exists():
        m = manifest.load(folder)
        files, container = [folder / shard.name for shard in m.shards], m.container

        def rows_of(number: int) -> tuple[np.ndarray, Layout]:
            shard = m.shards[number]
            rows = index.read(folder / shard.index_name, shard.index_sha256, shard.samples, m.sample_bytes, shard.bytes)
            if files[number].stat().st_size != shard.bytes:
                raise ValueError(f"{files[number]} does not have {shard.bytes} bytes as in the manifest; restore it")
            return rows, Layout(m.dtype, m.shape)

        sizes, content = [shard.samples for shard in m.shards], m.digest
    else:
        if codec is None:
            raise ValueError(f"{folder} has no manifest; say which codec made it with --codec")
        m = None
        container, files = adopt.find_shards(folder, unpacking=False)
        walked = [wds.index_shard(file, container) for file in files]
        rows_of, sizes = walked.__getitem__, [len(rows) for rows, _ in walked]
        content = [xxhash.xxh3_64_hexdigest(index.to_bytes(rows)) for rows, _ in walked]

    def read(number: int):
        rows, layout = rows_of(number)
        data = np.memmap(files[number], dtype=np.uint8, mode="r")
        for row in rows:
            payload = data[int(row["offset"]) : int(row["offset"] + row["length"])]
            key = row["key"].decode(errors="surrogateescape")
            if xxhash.xxh3_64_intdigest(payload) != int(row["hash"]):
                raise ValueError(
                    f"{files[number]}: sample {key!r} at offset {int(row['offset'])} fails its checksum; restore the shard"
                )
            yield key, layout.view(payload), int(row["label"])

    return Input(folder.name, sizes, read, m.codec if m else codec, content, m)


def open_zip(path: Path, codec: str | None, samples_per_shard: int, shuffle: bool = True) -> Input:
    """Read an EDM2 zip: .npy arrays or PNG images, labels in dataset.json; zipfile checks each member's CRC.

    Zips come sorted by class: their samples are mixed over the shards, once, unless told otherwise.
    """
    try:
        archive = zipfile.ZipFile(path)
        names = sorted(n for n in archive.namelist() if n.endswith((".npy", *sources.SUFFIXES)))
        labels = {}
        if "dataset.json" in archive.namelist():
            labels = sources.parse_label_json(json.loads(archive.read("dataset.json")))
    except (zipfile.BadZipFile, ValueError, TypeError) as error:
        raise ValueError(f"{path} is no readable zip: {error}; restore it") from None
    if not names:
        raise ValueError(f"{path} has no .npy and no images; is it an EDM2 dataset?")
    arrays = names[0].endswith(".npy")
    numbers = sources.look_up(names, labels, path.name) if labels else [index.NO_LABEL] * len(names)

    sequence = order.permutation(len(names), 0) if shuffle else np.arange(len(names))

    def read(shard: int):
        for i in sequence[shard * samples_per_shard : (shard + 1) * samples_per_shard].tolist():
            try:
                info = archive.getinfo(names[i])
                if info.file_size > manifest.MAX_SAMPLE_BYTES:
                    raise ValueError(f"{info.file_size} bytes are too many")
                content = archive.read(info)
                if arrays:
                    layout, start = npy.parse_header(content)
                    npy.check_values(np.frombuffer(content, np.uint8)[start:], layout)
                    array = layout.view(content[start:])
                else:
                    array = sources.decode_image(content).transpose(2, 0, 1)
            except (ValueError, zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError) as error:
                raise ValueError(f"{path}: {names[i]}: {error}; restore the zip") from None
            yield f"{i:08d}", array, numbers[i]

    sizes = [min(samples_per_shard, len(names) - k) for k in range(0, len(names), samples_per_shard)]
    content = [[names[i], archive.getinfo(names[i]).CRC, numbers[i]] for i in sequence.tolist()]
    return Input(
        path.name, sizes, read, codec or ("sd-vae-ft-mse" if arrays else "pixels"), [samples_per_shard, content]
    )
