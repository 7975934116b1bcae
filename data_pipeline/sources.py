"""Where images come from: every source is a list of (key, label) and a way to read the i-th image.

Listing is cheap and reading is by number, so that work can be shared among processes and restarted at any shard.

    sklearn:digits      scikit-learn's UCI handwritten digits (1,797 of 8x8, ten classes), inside the package
    FOLDER              images by class (FOLDER/CLASS/NAME.png, classes in sorted order), or all in one folder
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm")
MAX_PIXELS = 2**28  # a decompression bomb has more
NO_LABEL = -1


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


class Folder:
    """A folder of images; class numbers are the ranks of the sub-folders' names, as EDM2 and torchvision do."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.name = folder.name
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not paths:
            raise ValueError(f"{folder} has no images ({', '.join(SUFFIXES)}); give a folder of them, or of classes")
        self.members = [p.relative_to(folder).as_posix() for p in paths]
        self.keys = [f"{i:08d}" for i in range(len(paths))]
        first = [member.partition("/")[0] if "/" in member else None for member in self.members]
        classes = {name: rank for rank, name in enumerate(sorted({c for c in first if c is not None}))}
        self.labels = [NO_LABEL if c is None else classes[c] for c in first]

    def read(self, i: int) -> np.ndarray:
        """Return image i: uint8 [H, W, 3]."""
        return decode_image(self.folder / self.members[i])


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


def open_images(source: str):
    """Open a source of images by its name or path."""
    if source == "sklearn:digits":
        return Digits()
    path = Path(source)
    if path.is_dir():
        return Folder(path)
    raise ValueError(f"source {source} not found; give sklearn:digits or a folder of images")


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
