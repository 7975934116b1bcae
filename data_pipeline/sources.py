"""Where images come from: every source is a list of (key, label) and a way to read the i-th image.

Listing is cheap and reading is by number, so that work can be shared among processes and restarted at any shard.

    sklearn:digits      scikit-learn's UCI handwritten digits (1,797 of 8x8, ten classes), inside the package
    FOLDER              images by class (FOLDER/CLASS/NAME.png, classes in sorted order), or all in one folder
    FILE.tar            a tar of images by class, or one WebDataset shard (KEY.jpg with KEY.cls or KEY.json)
    FOLDER of .tar      WebDataset shards, in the order of their names
    FILE.zip            images, labels from its dataset.json where there is one (EDM2's layout)
"""

import csv
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline import wds
from data_pipeline.index import NO_LABEL

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm")
MAX_PIXELS = 2**28  # a decompression bomb has more
MAX_IMAGE_BYTES = 2**30


class BrokenImage(ValueError):
    """An image that cannot be decoded; the message says why."""


@dataclass
class Digits:
    """scikit-learn's digits: grey 8x8, values 0 .. 16 scaled to 0 .. 255."""

    name = "sklearn:digits"

    def __post_init__(self):
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ValueError("sklearn:digits needs scikit-learn; install it with: pip install scikit-learn") from None
        found = load_digits()
        self.images = np.rint(found.images * (255 / 16)).astype(np.uint8)
        self.labels = found.target.tolist()
        self.keys = [f"{i:06d}" for i in range(len(self.labels))]

    def read(self, i: int) -> np.ndarray:
        """Return image i: uint8 [8, 8, 1]."""
        return self.images[i][:, :, None]


class Files:
    """Images that have names: `members` are told apart by them, and labelled by their first folder unless told otherwise."""

    def __init__(self, name: str, members: list[str], own_labels: dict[str, int] | None, labels: Path | None):
        if not members:
            raise ValueError(f"{name} has no images ({', '.join(SUFFIXES)}); give a folder, tar or zip of them")
        self.name, self.members = name, members
        self.keys = [f"{i:08d}" for i in range(len(members))]
        own_labels = read_labels(labels) if labels else own_labels
        self.labels = look_up(members, own_labels, name) if own_labels else label_by_folder(members)


def label_by_folder(members: list[str]) -> list[int]:
    """Number classes by the rank of the first folder's name, as EDM2 and torchvision do; no folder is no label."""
    first = [member.partition("/")[0] if "/" in member else None for member in members]
    classes = {name: rank for rank, name in enumerate(sorted({c for c in first if c is not None}))}
    return [NO_LABEL if c is None else classes[c] for c in first]


def look_up(members: list[str], labels: dict[str, int], name: str) -> list[int]:
    """Find each member's label by its path or, failing that, by its file name."""
    found = [labels.get(member, labels.get(member.rpartition("/")[2])) for member in members]
    missing = [member for member, label in zip(members, found) if label is None]
    if missing:
        raise ValueError(f"{name}: {len(missing)} images have no label, the first is {missing[0]}; label all or none")
    return found


def read_labels(path: Path) -> dict[str, int]:
    """Read labels from JSON ({"labels": [[name, label], ...]} as EDM2's, or {name: label}) or CSV (name,label)."""
    try:
        text = path.read_text()
        if path.suffix == ".csv":
            rows = [row for row in csv.reader(io.StringIO(text)) if row]
            if rows and not rows[0][1].strip().isdigit() and rows[0][1].strip().lower() in ("label", "class"):
                rows = rows[1:]
            return number_classes({name.strip(): label.strip() for name, label in rows})
        return parse_label_json(json.loads(text))
    except (ValueError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; write name,label lines or EDM2's dataset.json") from None


def parse_label_json(content) -> dict[str, int]:
    """Turn decoded JSON into {name: label}."""
    pairs = content["labels"] if isinstance(content, dict) and "labels" in content else content
    return number_classes(dict(pairs or {}))


def number_classes(labels: dict) -> dict[str, int]:
    """Keep integers; number class names by their rank."""
    values = set(labels.values())
    if all(isinstance(v, int) or (isinstance(v, str) and v.isdigit()) for v in values):
        return {name: int(label) for name, label in labels.items()}
    ranks = {label: rank for rank, label in enumerate(sorted(map(str, values)))}
    return {name: ranks[str(label)] for name, label in labels.items()}


class Folder(Files):
    """A folder of images."""

    def __init__(self, folder: Path, labels: Path | None = None):
        self.folder = folder
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        own = folder / "dataset.json"
        own_labels = parse_label_json(json.loads(own.read_text())) if own.exists() else None
        super().__init__(folder.name, [p.relative_to(folder).as_posix() for p in paths], own_labels, labels)

    def read(self, i: int) -> np.ndarray:
        """Return image i: uint8 [H, W, 3]."""
        return decode_image(self.folder / self.members[i])


class Tars(Files):
    """Tars of images: labelled by WebDataset's .cls or .json members, else by folder."""

    def __init__(self, name: str, tars: list[Path], labels: Path | None = None):
        members, self.places, own_labels = [], [], {}
        self.maps = [np.memmap(tar, dtype=np.uint8, mode="r") for tar in tars]
        for number, (tar, data) in enumerate(zip(tars, self.maps)):
            for _, group in wds.group_members(wds.walk_tar(data, str(tar)), str(tar)):
                pictures = [m for extension, m in group.items() if f".{extension.lower()}" in SUFFIXES]
                for member in pictures[:1]:
                    unique = member.name.removeprefix("./") if len(tars) == 1 else f"{tar.name}:{member.name}"
                    members.append(unique)
                    self.places.append((number, member.offset, member.size))
                    label = wds.label_of(data, group)
                    if label != NO_LABEL:
                        own_labels[unique] = label
        super().__init__(name, members, own_labels, labels)

    def read(self, i: int) -> np.ndarray:
        """Return image i: uint8 [H, W, 3]."""
        tar, offset, size = self.places[i]
        return decode_image(bytes(self.maps[tar][offset : offset + size]))


class Zip(Files):
    """A zip of images, as EDM2's dataset tool writes."""

    def __init__(self, path: Path, labels: Path | None = None):
        try:
            self.zip = zipfile.ZipFile(path)
            names = sorted(n for n in self.zip.namelist() if n.lower().endswith(SUFFIXES))
            own_labels = None
            if "dataset.json" in self.zip.namelist():
                own_labels = parse_label_json(json.loads(self.zip.read("dataset.json")))
        except (zipfile.BadZipFile, ValueError, TypeError) as error:
            raise ValueError(f"{path} is no readable zip: {error}; restore it") from None
        super().__init__(path.name, names, own_labels, labels)

    def read(self, i: int) -> np.ndarray:
        """Return image i: uint8 [H, W, 3]."""
        info = self.zip.getinfo(self.members[i])
        if info.file_size > MAX_IMAGE_BYTES:
            raise BrokenImage(f"{info.file_size} bytes are too many")
        try:
            return decode_image(self.zip.read(info))
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
            raise BrokenImage(f"{type(error).__name__}: {error}") from None


def decode_image(file) -> np.ndarray:
    """Decode a path or bytes to uint8 [H, W, 3]; raise BrokenImage where that fails."""
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BrokenImage(f"{image.width}x{image.height} pixels are too many")
            return np.asarray(image.convert("RGB"))
    except BrokenImage:
        raise
    except (
        Exception
    ) as error:  # decoders raise whatever they like on damaged files: OSError, SyntaxError, struct.error, ...
        raise BrokenImage(f"{type(error).__name__}: {error}") from None


def open_images(source: str, labels: Path | None = None):
    """Open a source of images by its name or path; `labels` is a JSON or CSV file that replaces the source's own."""
    if source == "sklearn:digits":
        return Digits()
    path = Path(source)
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        return Tars(path.name, tars, labels) if tars else Folder(path, labels)
    if path.is_file() and path.suffix == ".zip":
        return Zip(path, labels)
    if path.is_file() and path.suffix == ".tar":
        return Tars(path.name, [path], labels)
    raise ValueError(f"source {source} not found; give sklearn:digits, a folder, a .tar or a .zip of images")


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Crop and resize [H, W, C] to [size, size, C] as EDM2's ImageNet does (the ADM recipe: Dhariwal & Nichol 2021).

    Halve by box averaging while the short side is at least twice the size, resize by bicubic interpolation, crop the centre.
    """
    picture = Image.fromarray(image.squeeze(-1) if image.shape[2] == 1 else image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    cropped = np.asarray(picture.crop((left, top, left + size, top + size)))
    return cropped.reshape(size, size, image.shape[2])
