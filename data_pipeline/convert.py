"""Command: the same samples in another container, verified on the way.

    python -m data_pipeline.convert edm2-imagenet-512.zip data/img512 --format webdataset
    python -m data_pipeline.convert data/img512 data/img512-mds --format mds
    python -m data_pipeline.convert data/img512 img512.zip --format edm2-zip

Shard boundaries are kept, so that both containers give the same order and the same stream. Every sample is checked against its hash
when it is read; what was written is read back before it gets its name. Lossless: an EDM2 zip holds float32 (fp16 fits exactly), PNG
for pixels; `--dtype float16` rounds, and says so by its name. A job that was killed goes on at the first missing shard (a zip is
one file and starts over).
"""

import argparse
import hashlib
import io
import json
import os
import sys
import zipfile
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import xxhash

from data_pipeline import durable, index, manifest, mds, npy, records, wds
from data_pipeline.command import command_line
from data_pipeline.inputs import Input, open_shards, open_zip
from data_pipeline.manifest import Manifest, Shard
from data_pipeline.measure import Statistics
from data_pipeline.npy import Layout
from data_pipeline.progress import Progress

FORMATS = ("webdataset", "mds", "edm2-zip")


def _read_alike(
    source: Input, number: int, dtype: str | None, first: tuple | None
) -> list[tuple[str, np.ndarray, int]]:
    """Read a shard's samples; refuse those that differ from the first sample in layout or in having a label."""
    samples = [(key, array.astype(dtype or array.dtype), label) for key, array, label in source.read(number)]
    for key, array, label in samples:
        found = (Layout(str(array.dtype), array.shape), label != index.NO_LABEL)
        first = first or found
        if found != first:
            words = [f"{layout} {'with' if labelled else 'without'} label" for layout, labelled in (found, first)]
            raise ValueError(f"{source.name}: sample {key} is {words[0]}, the first is {words[1]}; they must be alike")
    return samples


def _write_shard(folder: Path, name: str, container: str, samples, layout: Layout, labelled: bool) -> Shard:
    """Write one shard and its index, and read it back before it gets its name."""
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    try:
        if container == "webdataset":
            wds.write_shard(temporary, samples)
        else:
            mds.write_shard(temporary, samples, layout, labelled)
        rows, _ = wds.index_shard(temporary, container)
        if rows["hash"].tolist() != [xxhash.xxh3_64_intdigest(np.ascontiguousarray(array)) for _, array, _ in samples]:
            raise ValueError(f"{folder / name} does not read back as written; is the disk well?")
        sha256 = index.write(folder / manifest.index_name(name), rows)
        shard = Shard(name, len(rows), temporary.stat().st_size, wds.hash_file(temporary), sha256)
        os.replace(temporary, folder / name)
        durable.sync_folder(folder)
    finally:
        temporary.unlink(missing_ok=True)
    return shard


def _convert_shard(
    source: Input, number: int, folder: Path, container: str, dtype: str | None, first: tuple | None
) -> dict:
    """Make one shard; return its record."""
    samples = _read_alike(source, number, dtype, first)
    _, array, label = samples[0]
    first = first or (Layout(str(array.dtype), array.shape), label != index.NO_LABEL)
    name = f"shard-{number:06d}.tar" if container == "webdataset" else f"shard.{number:05d}.mds"
    shard = _write_shard(folder, name, container, samples, *first)
    statistics = Statistics()
    for _, array, label in samples:
        statistics.add(array, label)
    made = {"dtype": first[0].dtype, "shape": list(first[0].shape), "labelled": first[1]}
    return asdict(shard) | made | {"statistics": statistics.to_json()}


def write_folder(
    source: Input, folder: Path, container: str, dtype: str | None, label_dim: int | None = None
) -> Manifest:
    """Write the shards and indices that are missing and, last, the manifest."""
    settings = [source.name, source.codec, container, dtype, label_dim, source.content]
    fingerprint = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    if (folder / manifest.NAME).exists():
        found = manifest.load(folder)
        if found.fingerprint != fingerprint:
            raise ValueError(f"{folder} holds a dataset already; delete it or name another folder")
        records.clear(folder)  # of a job that was killed at its very end
        return found
    records.start(folder)
    known, first = [], None
    with Progress("convert", sum(source.sizes), "samples") as progress:
        for number in range(len(source.sizes)):
            record = records.read(folder, number, fingerprint)
            if record is None:
                record = _convert_shard(source, number, folder, container, dtype, first)
                records.write(folder, number, fingerprint, record)
            first = (Layout(record["dtype"], tuple(record["shape"])), record["labelled"])
            known.append(record)
            progress.advance(record["samples"])
    made = _manifest(source, known, container, label_dim, fingerprint)
    if container == "mds":
        durable.write_atomically(folder / "index.json", mds.index_json(made.shards, *first))
    manifest.save(made, folder)
    records.clear(folder)
    return made


def _manifest(source: Input, known: list[dict], container: str, label_dim: int | None, fingerprint: str) -> Manifest:
    """Assemble the manifest from the shards' records; what the source's own manifest knows carries over."""
    statistics = Statistics()
    for record in known:
        statistics.merge(Statistics.from_json(record["statistics"]))
    shards = [Shard(**{f.name: record[f.name] for f in fields(Shard)}) for record in known]
    layout = Layout(known[0]["dtype"], tuple(known[0]["shape"]))
    common = {"layout": layout, "shards": shards, "container": container, "source": source.name}
    made = statistics.manifest(
        codec=source.codec, codec_hash="", label_dim=label_dim, fingerprint=fingerprint, **common
    )
    if m := source.known:
        names = ("codec_hash", "moments", "label_dim", "class_counts", "mean", "std", "whitening", "broken")
        made = replace(made, **{name: getattr(m, name) for name in names})
    return made


def _png(array: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    pixels = array.transpose(1, 2, 0)
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels).save(file, "png", compress_level=1)
    return file.getvalue()


def write_zip(source: Input, path: Path) -> int:
    """Write EDM2's layout: stored (not deflated) members, dataset.json; return the number of samples."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    labels, hashes = [], {}
    try:
        with (
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
            Progress("convert", sum(source.sizes), "samples") as progress,
        ):
            for shard in range(len(source.sizes)):
                for _, array, label in source.read(shard):
                    i = len(hashes)
                    if array.dtype == np.uint8:
                        name, content = f"{i // 1000:05d}/img{i:08d}.png", _png(array)
                    else:
                        name = f"{i // 1000:05d}/img-mean-std-{i:08d}.npy"
                        content = npy.to_bytes(array.astype(np.float32))
                    # A fixed time: the same samples make the same bytes.
                    archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)
                    hashes[name] = xxhash.xxh3_64_intdigest(content)
                    labels.append([name, label])
                    progress.advance()
            labelled = all(label != index.NO_LABEL for _, label in labels)
            content = json.dumps({"labels": labels if labelled else None})
            archive.writestr(zipfile.ZipInfo("dataset.json", (1980, 1, 1, 0, 0, 0)), content)
        with zipfile.ZipFile(temporary) as archive:
            for name, digest in hashes.items():
                if xxhash.xxh3_64_intdigest(archive.read(name)) != digest:
                    raise ValueError(f"{path}: {name} does not read back as written; is the disk well?")
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(hashes)


@command_line()
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.convert", description="Convert between containers.")
    parser.add_argument("source", type=Path, help="a folder of shards, or an EDM2 zip")
    parser.add_argument("target", type=Path, help="a folder, or a .zip")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--codec", help="what made the samples, where the source has no manifest")
    parser.add_argument("--dtype", choices=("float16", "float32"), help="store latents in this; float16 rounds")
    parser.add_argument(
        "--samples-per-shard", type=int, default=1024, help="when reading a zip; shards keep their sizes"
    )
    parser.add_argument("--label-dim", type=int, help="number of classes, where the source does not show all of them")
    parser.add_argument("--keep-order", action="store_true", help="do not mix a zip's samples over the shards")
    args = parser.parse_args(argv)
    if args.samples_per_shard < 1:
        raise ValueError(f"--samples-per-shard {args.samples_per_shard} must be at least 1")
    if args.source.is_file():
        source = open_zip(args.source, args.codec, args.samples_per_shard, not args.keep_order)
    elif args.source.is_dir():
        source = open_shards(args.source, args.codec)
    else:
        raise ValueError(f"{args.source} not found; give a folder of shards or an EDM2 zip")
    if args.format == "edm2-zip":
        if args.dtype == "float16":
            raise ValueError("--dtype float16 does not go with edm2-zip, which holds float32; leave it out")
        print(f"{args.target}: {write_zip(source, args.target)} samples")
    else:
        made = write_folder(source, args.target, args.format, args.dtype, args.label_dim)
        print(f"{args.target}: {made.num_samples} samples {made.dtype} {list(made.shape)} in {len(made.shards)} shards")
    return 0


if __name__ == "__main__":
    sys.exit(main())
