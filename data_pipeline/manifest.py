"""What a dataset is: `manifest.json` and one binary index per shard.

The manifest names the codec, shapes, whitening constants, classes and shards; `SHARD.idx` has a row per sample (offset, length,
label, xxh3-64, key), so that random access and verification need no scan. Both are written last and atomically: a folder with a
manifest is complete. Torch-free: the login node reads it. All of it may come from elsewhere, so reads are bounded and checked.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipeline.durable import write_atomically

NAME = "manifest.json"
FORMAT = "evenkeel-dataset"
VERSION = 1
MAX_MANIFEST_BYTES = 256 * 2**20  # a million shards need about 200 MB
MAX_SAMPLE_BYTES = 2**30
DTYPES = ("uint8", "float16", "float32")
CONTAINERS = ("webdataset", "mds")
MOMENTS = ("mean", "mean_std")

# Raw latents of stabilityai/sd-vae-ft-mse over ImageNet-512 (Karras et al. 2024, reference implementation): training data has
# mean 0 and std sigma_data = 0.5 per channel after (raw - mean) / std * sigma_data.
SD_VAE_MEAN = (5.81, 3.25, 0.12, -2.15)
SD_VAE_STD = (4.17, 4.62, 3.71, 3.28)
# EDM2's convention for RGB, x / 127.5 - 1, in the same form with sigma_data = 0.5.
RGB_MEAN = (127.5, 127.5, 127.5)
RGB_STD = (63.75, 63.75, 63.75)


@dataclass(frozen=True)
class Shard:
    """One shard file: its name in the dataset's folder, samples, bytes, xxh3-64 of the file and SHA-256 of its index (hex)."""

    name: str
    samples: int
    bytes: int
    xxh3_64: str
    index_sha256: str

    @property
    def index_name(self) -> str:
        return index_name(self.name)


@dataclass(frozen=True)
class Manifest:
    """A dataset: how its samples are stored, and where."""

    container: str  # webdataset (tar) | mds
    codec: str  # "pixels", "sd-vae-ft-mse", ...: what turns images into what is stored
    codec_hash: str  # of the codec's weights; "" where it has none or they are unknown
    moments: str  # mean: C channels | mean_std: C posterior means, then C posterior standard deviations
    dtype: str
    shape: tuple[int, int, int]  # [C or 2C, H, W] as stored
    label_dim: int  # 0: no labels
    class_counts: tuple[int, ...]  # [label_dim]
    mean: tuple[float, ...]  # [C] of the raw latents (with their posterior's spread), in stored units
    std: tuple[float, ...]
    whitening: str  # published | measured
    shards: tuple[Shard, ...]
    source: str = ""
    fingerprint: str = ""  # of the job that made it
    broken: tuple[str, ...] = field(default=())  # images that could not be read, with the reason

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def shard_sizes(self) -> np.ndarray:
        """Return the number of samples per shard, int64."""
        return np.array([shard.samples for shard in self.shards], dtype=np.int64)

    @property
    def channels(self) -> int:
        """Return the channels that a denoiser sees: half of the stored ones where posterior deviations are stored too."""
        return self.shape[0] // 2 if self.moments == "mean_std" else self.shape[0]

    @property
    def resolution(self) -> int:
        return self.shape[1]

    @property
    def classes_present(self) -> tuple[int, ...]:
        return tuple(label for label, count in enumerate(self.class_counts) if count)

    @property
    def sample_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def digest(self) -> str:
        """Return the SHA-256 (hex) that names this version of the dataset: of everything above and, through it, of every sample."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def index_name(shard_name: str) -> str:
    """Name the index beside a shard: shard-000000.tar -> shard-000000.idx."""
    return shard_name.rpartition(".")[0] + ".idx"


# ---------------------------------------------------------------------------------------------------------------------
# manifest.json


def manifest_path(path) -> Path:
    """Accept a dataset's folder or its manifest file; return the manifest file."""
    path = Path(path)
    return path if path.suffix == ".json" else path / NAME


def load(path) -> Manifest:
    """Read and check a manifest: of a folder, a file, or a URL of either (http, s3, gs, ...), which is read in bounded time.

    Raises ValueError, in one line, where it is absent or not one of ours.
    """
    from data_pipeline import remote

    if remote.is_url(path):
        path = str(path) if str(path).endswith(".json") else remote.join(str(path), NAME)
        remedy = f"upload {NAME} and the .idx files with the shards; python -m data_pipeline.adopt makes them"
        read = functools.partial(remote.load, path, MAX_MANIFEST_BYTES)
    else:
        path = manifest_path(path)
        remedy = f"make the dataset with: python -m data_pipeline.encode SRC {path.parent}"
        read = functools.partial(_read_file, path)
    try:
        return parse(json.loads(read()))
    except FileNotFoundError:
        raise ValueError(f"{path} not found; {remedy}") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); was it copied completely?") from None
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def _read_file(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_MANIFEST_BYTES:
        raise ValueError(f"it has {size} bytes; a manifest has at most {MAX_MANIFEST_BYTES}; is it another file?")
    return path.read_bytes()


def parse(content) -> Manifest:
    """Turn decoded JSON into a checked Manifest."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'no "format": "{FORMAT}" in it; it is not a manifest of evenkeel')
    if content.get("version") != VERSION:
        raise ValueError(
            f"version {content.get('version')!r} is not {VERSION}; use the evenkeel that wrote it, or encode again"
        )
    try:
        values = {f.name: content[f.name] for f in dataclasses.fields(Manifest)}
        values["shards"] = tuple(
            Shard(**{f.name: shard[f.name] for f in dataclasses.fields(Shard)}) for shard in values["shards"]
        )
        for name in ("shape", "class_counts", "mean", "std", "broken"):
            values[name] = tuple(values[name])
    except KeyError as error:
        raise ValueError(f"key {error} is missing; encode again") from None
    except TypeError:
        raise ValueError("an entry has the wrong JSON type; encode again") from None
    manifest = Manifest(**values)
    _check(manifest)
    if content.get("digest") != manifest.digest:
        raise ValueError("the digest does not match the content; it was edited or damaged: restore it or encode again")
    return manifest


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _check(m: Manifest):
    def require(condition, what):
        if not condition:
            raise ValueError(f"{what}; encode again")

    for name in ("codec", "codec_hash", "source", "fingerprint"):
        require(isinstance(getattr(m, name), str), f"{name} {getattr(m, name)!r} is no string")
    require(m.container in CONTAINERS, f"container {m.container!r} is none of {', '.join(CONTAINERS)}")
    require(m.moments in MOMENTS, f"moments {m.moments!r} is none of {', '.join(MOMENTS)}")
    require(m.dtype in DTYPES, f"dtype {m.dtype!r} is none of {', '.join(DTYPES)}")
    require(
        len(m.shape) == 3 and all(_is_count(n) and 0 < n < 2**20 for n in m.shape), f"shape {m.shape} is not [C, H, W]"
    )
    require(m.sample_bytes <= MAX_SAMPLE_BYTES, f"shape {m.shape} has more than {MAX_SAMPLE_BYTES} bytes")
    require(
        m.moments == "mean" or m.shape[0] % 2 == 0,
        f"shape {m.shape} has an odd channel count, but moments are mean_std",
    )
    require(_is_count(m.label_dim), f"label_dim {m.label_dim!r} is no count")
    require(
        len(m.class_counts) == m.label_dim and all(map(_is_count, m.class_counts)),
        "class_counts does not fit label_dim",
    )
    for name in ("mean", "std"):
        values = getattr(m, name)
        numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e30 for x in values)
        require(numbers and len(values) == m.channels, f"{name} is not {m.channels} finite numbers")
    require(all(x > 0 for x in m.std), f"std {m.std} is not positive")
    require(len(m.shards) > 0, "no shards")
    for s in m.shards:
        # A plain name: a manifest from elsewhere must not make us read outside the dataset's folder.
        plain = isinstance(s.name, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+=@,{}-]*\.[A-Za-z0-9]+", s.name)
        require(plain, f"shard name {s.name!r} is not a plain file name")
        require(
            _is_count(s.samples) and s.samples > 0 and _is_count(s.bytes),
            f"shard {s.name} has a bad sample or byte count",
        )
        hashes = (isinstance(h, str) and re.fullmatch(r"[0-9a-f]+", h) for h in (s.xxh3_64, s.index_sha256))
        require(all(hashes), f"shard {s.name} has a bad hash")
    require(len({s.name for s in m.shards}) == len(m.shards), "two shards have the same name")
    require(
        not m.label_dim or sum(m.class_counts) == m.num_samples, "class_counts does not sum to the number of samples"
    )


def save(manifest: Manifest, folder) -> Path:
    """Write FOLDER/manifest.json durably and atomically."""
    _check(manifest)
    content = {"format": FORMAT, "version": VERSION, "digest": manifest.digest, **dataclasses.asdict(manifest)}
    return write_atomically(Path(folder) / NAME, (json.dumps(content, indent=1) + "\n").encode())


def check_fits(m: Manifest, codec: str, channels: int, resolution: int, label_dim: int):
    """Refuse a dataset that a model cannot be trained on, in one line."""
    if m.codec != codec:
        raise ValueError(
            f"data.codec={codec}, but the dataset was made with {m.codec}; set data.codec or use another dataset"
        )
    if m.channels != channels:
        raise ValueError(
            f"model.channels={channels}, but the dataset has {m.channels}; set model.channels={m.channels}"
        )
    if m.shape[1:] != (resolution, resolution):
        raise ValueError(
            f"model.resolution={resolution}, but the dataset's samples are {m.shape[1]}x{m.shape[2]}; "
            f"set model.resolution={m.shape[1]} or encode with --resolution"
        )
    if label_dim and m.label_dim != label_dim:
        raise ValueError(
            f"model.label_dim={label_dim}, but the dataset has label_dim {m.label_dim}; "
            f"set model.label_dim={m.label_dim}, or 0 to train without labels"
        )
