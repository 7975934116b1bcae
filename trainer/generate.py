"""Draw images from a snapshot or a reconstruction: a grid, or a folder of single images.

What must not break: image i is a function of (network, seed, i, sampler) alone. Its noise is drawn by position, and position
i = n label_dim + c is the n-th image of class c whatever classes, batches, ranks or order are asked for.
"""

import argparse
import copy
import dataclasses
import functools
import io
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from data_pipeline import codecs, latents
from data_pipeline.durable import write_atomically
from data_pipeline.progress import Progress
from models import sampler
from trainer import draws, trained_range
from trainer.compilation import compile_forward
from trainer.snapshots import abandoned, list_snapshots, load_denoiser, read_header

DEFAULT_SIGMA_REL = 0.10  # the wider of the two lengths that EDM2 tracks: nearest to the optimum of unguided sampling
SMALLEST_TILE_PIXELS = 32  # a digit of 8x8 is enlarged to be seen
STREAM = "generate"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How images are drawn; all of it decides what they look like."""

    seed: int = 0
    solver: str = "heun"
    grid: str = "edm"
    levels: tuple[float, ...] = ()  # of a grid from a file, falling
    steps: int = 32
    sigma_min: float = 0.002  # Karras et al. 2022, Table 1
    sigma_max: float = 80.0
    trained_range: float = 0.0  # share of the levels in training beyond each end; 0: the two above are the ends
    churn: float = 0.0
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, math.inf)


class Drawing:
    """A network, perhaps with a guide, ready to draw at any positions."""

    def __init__(self, network, header: dict, settings: Settings, guide=None, device: str = "cpu", codec_weights=None):
        self.network, self.guide, self.settings, self.device = network, guide, settings, device
        self.data = SimpleNamespace(**header["data"])  # what decoding reads of a manifest
        self.codec_weights = codec_weights
        self.shape = (header["model"]["channels"], header["model"]["resolution"], header["model"]["resolution"])
        self.label_dim = header["model"]["label_dim"]
        self.header, self.warned, self.compiled = header, False, False
        if settings.levels:
            self.sigmas = sampler.from_levels(settings.levels, settings.steps)
        else:
            ends = settings.sigma_min, settings.sigma_max
            if settings.trained_range:
                ends = trained_range.trained_range(header, settings.trained_range)
            self.sigmas = sampler.grid(settings.grid, settings.steps, *ends, network.sigma_data)
        self.start = self.sigmas[0].float().item()
        if settings.trained_range:  # data still show through there: N(0, sigma_max^2 + sigma_data^2)
            self.start = math.hypot(self.start, network.sigma_data)
        if settings.solver not in sampler.SOLVERS:
            raise ValueError(f"solver {settings.solver!r}: known are {', '.join(sampler.SOLVERS)}")
        if settings.churn and settings.solver != "heun":
            raise ValueError(f"churn={settings.churn}: only heun has a stochastic form; use --solver heun")

    def with_grid(self, sigmas: Tensor, settings: Settings | None = None) -> "Drawing":
        """Return the same on another grid, and perhaps by another solver."""
        other = copy.copy(self)
        other.sigmas, other.settings = sigmas, settings or self.settings
        return other

    def compile(self) -> None:
        """Compile network and guide: pays for hundreds of images. Batches are then of one size, filled up by repetition."""
        for network in (self.network, self.guide):
            if network is not None and "forward" not in vars(network):
                network.forward = compile_forward(network)
        self.compiled = True

    @functools.cached_property
    def codec(self):
        """Open the codec when pictures are wanted: losses and distances of latents do without its weights."""
        codec = codecs.open_codec(self.data.codec, self.codec_weights, self.device)
        codecs.check_is(codec, self.data)
        return codec

    @torch.no_grad()
    def latents(self, positions: Tensor) -> Tensor:
        """Return samples at training scale, fp32 [N, C, H, W]; of a network without labels position is all there is."""
        s, where = self.settings, positions.to(self.device)
        labels = where % self.label_dim if self.label_dim else None

        def of(network, network_labels):
            return lambda x, sigma: network(x, sigma, network_labels)

        denoise = of(self.network, labels)
        if s.guidance != 1:
            # the same network stands for the unconditional one where it was trained with label dropout
            guide = of(self.guide, labels) if self.guide is not None else of(self.network, None)
            denoise = sampler.guidance(denoise, guide, s.guidance, s.interval)
        x = draws.normal(s.seed, STREAM, where, self.shape) * self.start
        if s.churn:
            churn = {
                "churn": s.churn,
                "normal": lambda step: draws.normal(s.seed, f"{STREAM} churn {step}", where, self.shape),
            }
            return sampler.heun(denoise, x, self.sigmas, **churn)
        return sampler.SOLVERS[s.solver](denoise, x, self.sigmas)

    def decode(self, x: Tensor) -> Tensor:
        """Turn samples at training scale into pictures on the CPU, uint8 [N, 1 or 3, H, W]."""
        return latents.decode(x, self.data, self.codec).cpu()

    def batches(self, positions: Sequence[int], batch: int) -> Iterator[tuple[list[int], Tensor]]:
        """Yield (positions, latents) in batches, with progress; warn once of levels that training never saw."""
        line = (
            None if self.warned else trained_range.warning(self.header, self.sigmas, f"the grid {self.settings.grid}")
        )
        self.warned = True
        if line:
            print(line, file=sys.stderr, flush=True)
        with Progress("drawing", len(positions), "images") as progress:
            for start in range(0, len(positions), batch):
                part = list(positions[start : start + batch])
                filled = part + part[-1:] * (batch - len(part)) if self.compiled else part
                yield part, self.latents(torch.tensor(filled))[: len(part)]
                progress.advance(len(part))


def positions_of(classes: Sequence[int], per_class: int, label_dim: int) -> list[int]:
    """Return positions row by row: `per_class` images of each class; without labels there is one row."""
    if not label_dim:
        return list(range(per_class))
    return [n * label_dim + c for c in classes for n in range(per_class)]


def parse_classes(text: str, label_dim: int) -> list[int]:
    """Read `all`, `3` or `0,1,2`."""
    if text == "all" or not label_dim:
        return list(range(max(label_dim, 1)))
    try:
        classes = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--classes {text}: must be 'all' or numbers such as 0,1,2") from None
    bad = [c for c in classes if not 0 <= c < label_dim]
    if bad:
        raise ValueError(f"--classes {text}: {bad[0]} is no class of this network; they are 0..{label_dim - 1}")
    return classes


def find(path: Path, sigma_rel: float = DEFAULT_SIGMA_REL) -> Path:
    """Return the file itself, or a run's newest snapshot or reconstruction whose length is nearest to `sigma_rel`."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: no such snapshot or run; RUN/snapshots/ holds a run's snapshots")
    series = list_snapshots(path)
    lost = abandoned(series)
    found = [(s.clock, s.sigma_rel, s.path) for s in series if s not in lost]
    newest = max((clock for clock, _, _ in found), default=0)
    for made in sorted((path / "posthoc").glob("*.safetensors")):
        header = read_header(made)
        found.append((header["clock"], header["sigma_rel"], made))
    found = [f for f in found if f[0] == newest] or found
    if not found:
        raise ValueError(f"{path}: has no snapshots yet; wait for the first one or name a snapshot file")
    return min(found, key=lambda f: abs(math.log(f[1] / sigma_rel)))[2]


def grid_image(images: Tensor, columns: int) -> Image.Image:
    """Lay out uint8 [N, 1 or 3, H, W] row by row with a thin gap, small images enlarged."""
    scale = max(1, SMALLEST_TILE_PIXELS // images.shape[-1])
    tiles = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3).permute(0, 2, 3, 1).numpy()
    count, height, width, channels = tiles.shape
    gap, rows = 2, -(-count // columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 64, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = tile
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)


def png_bytes(image: Image.Image, origin: dict | None = None) -> bytes:
    """Encode; `origin` goes into the file as text, so that a picture tells what made it."""
    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    if origin:
        info.add_text("evenkeel", json.dumps(origin))
    image.save(buffer, "png", pnginfo=info)
    return buffer.getvalue()


def write_folder(
    drawing: Drawing, positions: Sequence[int], out: Path, batch: int, origin: dict, part: tuple[int, int]
):
    """Write one PNG per image into `out`, leaving out those that are there; `part` = (rank, world) shares them out.

    Raises ValueError where the folder holds images of another origin.
    """
    out.mkdir(parents=True, exist_ok=True)
    record = out / "origin.json"
    if record.exists() and json.loads(record.read_text()) != origin:
        raise ValueError(f"{out}: holds images of another network, seed or sampler; choose another folder")
    write_atomically(record, json.dumps(origin).encode())

    def file(position: int) -> Path:
        return out / (
            f"{position:08d}-{position % drawing.label_dim}.png" if drawing.label_dim else f"{position:08d}.png"
        )

    # shared out before looking: ranks look at different times
    missing = [p for p in positions[part[0] :: part[1]] if not file(p).exists()]

    def write(where: list[int], x: Tensor) -> None:
        pictures = drawing.decode(x).permute(0, 2, 3, 1).numpy()
        for position, picture in zip(where, pictures, strict=True):
            image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
            write_atomically(file(position), png_bytes(image))

    with ThreadPoolExecutor(1, thread_name_prefix="evenkeel-decode") as beside:  # while the next batch is drawn
        written = None
        for where, x in drawing.batches(missing, batch):
            if written is not None:
                written.result()  # one batch behind, no more: they hold memory
            written = beside.submit(write, where, x)
        if written is not None:
            written.result()
    return len(missing)


def add_drawing_options(parser: argparse.ArgumentParser) -> None:
    """Add what decides how images are drawn; `evaluate` takes the same options."""
    defaults = Settings()
    parser.add_argument("--sigma-rel", type=float, default=DEFAULT_SIGMA_REL, help="of a RUN: the nearest is taken")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--solver", default=defaults.solver, help=", ".join(sampler.SOLVERS))
    parser.add_argument(
        "--grid", default=defaults.grid, help="edm, cosine, ays-..., fastddpm-..., FILE.json of trainer.align"
    )
    parser.add_argument("--steps", type=int, help=f"default {defaults.steps}, or what the grid's file was made for")
    parser.add_argument("--sigma-min", type=float, default=defaults.sigma_min)
    parser.add_argument("--sigma-max", type=float, default=defaults.sigma_max)
    parser.add_argument(
        "--trained-range",
        type=float,
        nargs="?",
        const=1e-4,
        default=defaults.trained_range,
        metavar="SHARE",
        help="instead: the levels of training but for this share at each end (1e-4), begun at N(0, sigma^2 + sigma_data^2)",
    )
    parser.add_argument("--churn", type=float, default=defaults.churn, help="S_churn of EDM; 0: deterministic")
    parser.add_argument("--guidance", type=float, default=defaults.guidance, help="weight; 1: none")
    parser.add_argument("--guide", help="guiding snapshot or run, or 'self' (this network without labels)")
    parser.add_argument("--guide-sigma-rel", type=float, default=DEFAULT_SIGMA_REL)
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="sigmas")
    parser.add_argument("--batch", type=int, default=64, help="images at once; does not change them")
    parser.add_argument("--codec-weights", type=Path, help="of the codec that the snapshot names, where it has some")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--activations", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument(
        "--compile", action="store_true", help="the network: takes a minute or more, pays for hundreds of images"
    )


def settings_of(options: argparse.Namespace) -> Settings:
    """Return the settings that the options ask for; raise ValueError where they contradict each other."""
    if (options.guidance != 1) != (options.guide is not None):
        raise ValueError(
            f"--guidance {options.guidance:g} with --guide {options.guide}: guidance needs a weight other than 1 and a guide; "
            f"add --guide SNAPSHOT, or --guide self where labels were dropped in training"
        )
    if not 0 <= options.trained_range < 0.5:
        raise ValueError(f"--trained-range {options.trained_range:g}: must be a share below 0.5; try 1e-4")
    if options.trained_range and (options.grid not in ("edm", "cosine") or _states_range(options)):
        raise ValueError(
            f"--trained-range with --grid {options.grid}, --sigma-min {options.sigma_min:g}, --sigma-max {options.sigma_max:g}: "
            f"sets the range of the grids edm and cosine by itself; leave the others out"
        )
    if options.batch < 1:
        raise ValueError(f"--batch {options.batch}: must be at least 1")
    names = {f.name for f in dataclasses.fields(Settings)} - {"interval", "levels", "steps"}
    levels = _read_grid(Path(options.grid)) if options.grid.endswith(".json") else ()
    steps = options.steps if options.steps is not None else len(levels) - 1 if levels else Settings.steps
    interval = tuple(options.guidance_interval or Settings.interval)
    return Settings(**{n: getattr(options, n) for n in names}, levels=levels, steps=steps, interval=interval)


def _read_grid(path: Path) -> tuple[float, ...]:
    """Return the levels in a file of trainer.align; raise ValueError for another one."""
    try:
        found = json.loads(path.read_text())
        if found["version"] != 1:
            raise ValueError(f"version {found['version']} is newer than this program")
        return tuple(float(s) for s in found["sigmas"])
    except FileNotFoundError:
        raise ValueError(f"--grid {path}: no such file; make one with: python -m trainer.align") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--grid {path}: no grid of trainer.align ({error})") from None


def _states_range(options: argparse.Namespace) -> bool:
    return (options.sigma_min, options.sigma_max) != (Settings.sigma_min, Settings.sigma_max)


def open_drawing(path: Path, options: argparse.Namespace, settings: Settings) -> tuple[Drawing, dict]:
    """Load what the options name; return it with the origin of its images."""
    network, header = load_denoiser(path, options.activations, options.device)
    guide, origin = None, {"snapshot": path.name, **_identity(header), **dataclasses.asdict(settings)}
    if options.guide not in (None, "self"):
        guide_path = find(Path(options.guide), options.guide_sigma_rel)
        guide, guide_header = load_denoiser(guide_path, options.activations, options.device)
        for key in ("channels", "resolution"):
            if guide_header["model"][key] != header["model"][key]:
                raise ValueError(
                    f"--guide {guide_path}: its {key} differs from that of {path}; guide with a like network"
                )
        for key in ("codec", "mean", "std"):
            if guide_header["data"].get(key) != header["data"].get(key):
                raise ValueError(
                    f"--guide {guide_path}: was trained on data of another {key} than {path}; guide with a like network"
                )
        origin["guide"] = {"snapshot": guide_path.name, **_identity(guide_header)}
    elif options.guide == "self":
        origin["guide"] = "self"
    levels = origin.pop("levels")
    if levels:
        origin["levels"] = list(levels)
    if not settings.trained_range:
        del origin["trained_range"]  # folders of pictures that were begun before it existed go on
    origin["interval"] = [str(v) for v in settings.interval]  # JSON has no infinity
    drawing = Drawing(network, header, settings, guide, options.device, options.codec_weights)
    if options.compile:
        drawing.compile()
    return drawing, origin


def _identity(header: dict) -> dict:
    names = ("run", "clock", "sigma_rel", "kind")
    return {n: header.get(n) for n in names} | {"checksum": header["checksums"][min(header["checksums"])]}


def main(argv=None) -> int:
    """Draw images from a snapshot: a PNG grid with a row per class, or (--out FOLDER) one file each."""
    parser = argparse.ArgumentParser(prog="python -m trainer.generate", description=main.__doc__)
    parser.add_argument("snapshot", type=Path, help="snapshot, reconstruction or run directory")
    parser.add_argument("--out", type=Path, required=True, help="FILE.png for a grid, else a folder")
    parser.add_argument("--classes", default="all", help="all (default), or numbers such as 0,1,2")
    parser.add_argument("--per-class", type=int, default=8)
    add_drawing_options(parser)
    options = parser.parse_args(argv)
    try:
        if options.per_class < 1:
            raise ValueError(f"--per-class {options.per_class}: must be at least 1")
        settings, path = settings_of(options), find(options.snapshot, options.sigma_rel)
        drawing, origin = open_drawing(path, options, settings)
        _ = drawing.codec  # a missing one is told before anything is drawn
        classes = parse_classes(options.classes, drawing.label_dim)
        positions = positions_of(classes, options.per_class, drawing.label_dim)
        part = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them
        if options.out.suffix.lower() != ".png":
            count = write_folder(drawing, positions, options.out, options.batch, origin, part)
            print(f"wrote {count} images to {options.out} ({path.name})")
        elif part[0] == 0:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            parts = [drawing.decode(x) for _, x in drawing.batches(positions, options.batch)]
            write_atomically(options.out, png_bytes(grid_image(torch.cat(parts), options.per_class), origin))
            print(f"wrote {options.out}: {len(classes)} rows of {options.per_class} from {path.name}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
