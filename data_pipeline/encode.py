"""Command: images -> shards of stored samples and a manifest.

    python -m data_pipeline.encode sklearn:digits data/digits --codec pixels
    python -m data_pipeline.encode imagenet/train data/img512 --codec sd-vae-ft-mse --codec-weights DIR --resolution 512

Shard k holds the k-th piece of the source's list, and is renamed into place when it is complete, with a small record
beside it; the manifest comes last. So a killed job starts again at the first missing shard, several jobs share the work
(`--part 2/8`), and a folder with a manifest is complete.
"""

import argparse
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline import durable, index, manifest, order, records, sources
from data_pipeline.command import command_line
from data_pipeline.manifest import Shard
from data_pipeline.measure import Statistics
from data_pipeline.npy import Layout
from data_pipeline.progress import Progress
from data_pipeline.sources import BrokenImage

MICRO_BATCH = 16  # images through the codec at once


@dataclass
class Job:
    """Everything that decides what comes out."""

    images: object
    codec: object
    samples_per_shard: int
    resolution: int | None
    on_broken: str
    label_dim: int | None
    shuffle: bool = False  # over the whole source, once

    def __post_init__(self):
        # Sources come sorted by class; shards of one class each would make every window of the training order one-sided.
        count = len(self.images.keys)
        self.order = order.permutation(count, 0) if self.shuffle else np.arange(count)

    @property
    def num_shards(self) -> int:
        return -(-len(self.images.keys) // self.samples_per_shard)

    def numbers(self, shard: int) -> list[int]:
        """Return the images of a shard."""
        return self.order[shard * self.samples_per_shard : (shard + 1) * self.samples_per_shard].tolist()

    @property
    def fingerprint(self) -> str:
        """Return a hash of the source's list and the settings, by which a restarted job knows its own work."""
        listing = [getattr(self.images, "members", self.images.keys), self.images.labels]
        settings = [self.images.name, self.codec.name, self.codec.hash, getattr(self.codec, "dtype", "uint8")]
        settings += [self.samples_per_shard, self.resolution, self.on_broken, self.label_dim]
        settings += ["shuffled"] * self.shuffle
        return hashlib.sha256(json.dumps([settings, listing]).encode()).hexdigest()


def read_images(job: Job, shard: int, broken: list[str]):
    """Yield (key, label, uint8 [C, H, W]) of a shard's readable images; note the others in `broken`, or stop at the first."""
    for i in job.numbers(shard):
        name = getattr(job.images, "members", job.images.keys)[i]
        try:
            image = job.images.read(i)
        except BrokenImage as error:
            if job.on_broken == "stop":
                raise ValueError(
                    f"image {name} is broken ({error}); repair it, or leave such out with --on-broken skip"
                ) from None
            broken.append(f"{name}: {error}")
            continue
        if job.resolution:
            image = sources.centre_crop(image, job.resolution)
        if image.shape[0] % job.codec.factor or image.shape[1] % job.codec.factor:
            raise ValueError(
                f"image {name} is {image.shape[1]}x{image.shape[0]}, no multiple of {job.codec.factor}; set --resolution"
            )
        yield job.images.keys[i], job.images.labels[i], np.ascontiguousarray(image.transpose(2, 0, 1))


def encode_images(job: Job, images):
    """Turn (key, label, image) into (key, stored array, label), a micro-batch of equal shapes at a time."""
    import torch

    def flush(held):
        stored = job.codec.encode(torch.from_numpy(np.stack([image for _, _, image in held])))
        for (key, label, _), array in zip(held, stored, strict=True):
            if array.dtype != np.uint8 and not np.isfinite(array).all():
                raise ValueError(f"image {key}: the codec made NaN or infinity; store float32, or repair the image")
            yield key, array, label

    held = []
    for item in images:
        if held and (len(held) == MICRO_BATCH or held[0][2].shape != item[2].shape):
            yield from flush(held)
            held = []
        held.append(item)
    if held:
        yield from flush(held)


def write_shard(job: Job, number: int, folder: Path, progress: Progress):
    """Make one shard, its index and its record, each complete or absent."""
    from data_pipeline import wds

    final = folder / f"shard-{number:06d}.tar"
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    statistics, broken, shapes = Statistics(), [], set()

    def counted():
        for key, array, label in encode_images(job, read_images(job, number, broken)):
            shapes.add((str(array.dtype), array.shape))
            if len(shapes) > 1:
                raise ValueError(
                    f"image {key} becomes {array.shape}, others {min(shapes)[1]}; make them alike with --resolution"
                )
            statistics.add(array, label)
            progress.advance()
            yield key, array, label

    try:
        wds.write_shard(temporary, counted())
        if not shapes:
            temporary.unlink()
            record = {"samples": 0}
        else:
            rows, layout = wds.index_tar(temporary)  # read back: what the index says is what is on disk
            sha256 = index.write(folder / manifest.index_name(final.name), rows)
            record = {"samples": len(rows), "bytes": temporary.stat().st_size, "xxh3_64": wds.hash_file(temporary)}
            record |= {"name": final.name, "index_sha256": sha256, "dtype": layout.dtype, "shape": list(layout.shape)}
            os.replace(temporary, final)
            durable.sync_folder(folder)
    finally:
        temporary.unlink(missing_ok=True)
    progress.advance(len(broken))
    record |= {"broken": broken, "statistics": statistics.to_json()}
    records.write(folder, number, job.fingerprint, record)


def assemble(job: Job, folder: Path) -> manifest.Manifest | None:
    """Write the manifest if every shard is there; drop the records."""
    known = [records.read(folder, number, job.fingerprint) for number in range(job.num_shards)]
    if any(record is None for record in known):
        return None
    statistics = Statistics()
    full = [record for record in known if record["samples"]]
    if not full:
        raise ValueError(f"no image of {job.images.name} could be read; the first: {known[0]['broken'][0]}")
    for record in full:
        statistics.merge(Statistics.from_json(record["statistics"]))
    layouts = {(record["dtype"], tuple(record["shape"])) for record in full}
    if len(layouts) > 1:
        raise ValueError(f"the images become samples of {len(layouts)} shapes; make them alike with --resolution")
    made = statistics.manifest(
        codec=job.codec.name,
        codec_hash=job.codec.hash,
        layout=Layout(*layouts.pop()),
        shards=[Shard(r["name"], r["samples"], r["bytes"], r["xxh3_64"], r["index_sha256"]) for r in full],
        container="webdataset",
        label_dim=job.label_dim,
        source=job.images.name,
        fingerprint=job.fingerprint,
        broken=tuple(line for record in known for line in record["broken"]),
    )
    manifest.save(made, folder)
    records.clear(folder)  # another part may finish at the same moment: it has written the same manifest
    return made


def encode(job: Job, folder: Path, part: tuple[int, int] = (0, 1)) -> manifest.Manifest | None:
    """Make what is missing of this part's shards; return the manifest once all parts are there."""
    if (folder / manifest.NAME).exists():
        found = manifest.load(folder)
        if found.fingerprint != job.fingerprint:
            raise ValueError(
                f"{folder} holds another dataset (of {found.source}, {found.codec}); delete it or name another folder"
            )
        print(f"{folder} is up to date: {found.num_samples} samples in {len(found.shards)} shards")
        return found
    records.start(folder)
    mine = range(part[0], job.num_shards, part[1])
    todo = [number for number in mine if records.read(folder, number, job.fingerprint) is None]
    if len(todo) < len(mine):
        print(f"{len(mine) - len(todo)} of {len(mine)} shards are there; making the others")
    with Progress("encode", sum(len(job.numbers(number)) for number in todo), "images") as progress:
        for number in todo:
            write_shard(job, number, folder, progress)
    made = assemble(job, folder)
    if made is None:
        print(f"part {part[0]}/{part[1]} is done; the last part to finish writes the manifest")
    else:
        print(
            f"{folder}: {made.num_samples} samples {made.dtype} {list(made.shape)} in {len(made.shards)} shards, {made.codec}"
        )
        if made.broken:
            print(f"{len(made.broken)} images were broken and left out; they are listed in {folder / manifest.NAME}")
    return made


def plan(source: str, labels: Path | None, codec: str, weights: str | None, samples_per_shard: int) -> dict[str, int]:
    """Return how many images and shards there will be; ValueError for what a job would stumble over at once.

    For whoever shares the work out to machines that have what a codec needs, such as a GPU.
    """
    from data_pipeline import codecs

    if codec not in codecs.NAMES:
        raise ValueError(f"codec {codec!r} is none of {', '.join(codecs.NAMES)}")
    if weights and not Path(weights).exists():
        raise ValueError(f"--codec-weights {weights}: is not there")
    images = len(sources.open_images(source, labels).keys)
    return {"images": images, "shards": -(-images // samples_per_shard)}


def _part(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part; write 0/8 to 7/8")
    return int(number), int(count)


@command_line("the same command goes on from here")
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.encode", description="Turn images into shards.")
    parser.add_argument(
        "source", help="sklearn:digits, or images: a folder by class, a tar, WebDataset shards, an EDM2 zip"
    )
    parser.add_argument("folder", type=Path, help="where the shards go")
    parser.add_argument("--codec", default="pixels", help="pixels, sd-vae-ft-mse, taesd or tinyae4")
    parser.add_argument("--codec-weights", help="local weights of the codec")
    parser.add_argument("--device", help="where the codec runs: cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--dtype", default="float16", choices=("float16", "float32"), help="of stored latents")
    parser.add_argument("--resolution", type=int, help="crop and resize images to this, as EDM2 does")
    parser.add_argument("--samples-per-shard", type=int, default=1024)
    parser.add_argument("--labels", type=Path, help="JSON or CSV of names and labels, instead of the source's own")
    parser.add_argument("--label-dim", type=int, help="number of classes, where the source does not show all of them")
    parser.add_argument(
        "--on-broken", default="stop", choices=("stop", "skip"), help="what to do with unreadable images"
    )
    parser.add_argument("--keep-order", action="store_true", help="do not mix the source's images over the shards")
    parser.add_argument(
        "--plan", action="store_true", help="print as JSON how many images and shards it will be; make nothing"
    )
    parser.add_argument("--part", type=_part, default=(0, 1), help="I/N: make every N-th shard, for a job array")
    args = parser.parse_args(argv)
    from data_pipeline import codecs, devices

    if args.samples_per_shard < 1:
        raise ValueError(f"--samples-per-shard {args.samples_per_shard} must be at least 1")
    if args.plan:
        print(json.dumps(plan(args.source, args.labels, args.codec, args.codec_weights, args.samples_per_shard)))
        return 0
    device = devices.checked(args.device) if args.device else devices.own_device()
    codec = codecs.open_codec(args.codec, args.codec_weights, device, args.dtype)
    images = sources.open_images(args.source, args.labels)
    shuffle = not args.keep_order and not isinstance(images, sources.Digits)  # those are mixed as they come
    settings = args.samples_per_shard, args.resolution, args.on_broken, args.label_dim
    encode(Job(images, codec, *settings, shuffle), args.folder, args.part)
    return 0


if __name__ == "__main__":
    sys.exit(main())
