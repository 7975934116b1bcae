"""The options of every command that draws (generate, evaluate, align): which snapshot, which guide, which sampler."""

import argparse
import dataclasses
import json
import math
from pathlib import Path

import torch

from data_pipeline import codecs, devices
from models import sampler
from models.denoiser import ACTIVATIONS
from trainer import config
from trainer.drawing import Drawing, Settings
from trainer.snapshots import abandoned, list_snapshots, load_denoiser, read_header

AUTO = "auto"
DEFAULT_SIGMA_REL = 0.10  # the wider of the two lengths that EDM2 tracks: nearest to the optimum of unguided sampling


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
    parser.add_argument(
        "--codec-decoding",
        default="fp32",
        choices=tuple(codecs.DECODING),
        help="type that the SD-VAE decodes in (default %(default)s); fp16 is faster on GPUs, pixels may move by a few steps of 255",
    )
    parser.add_argument(
        "--device", default=devices.own_device(), help="cpu, cuda, cuda:1 (default: a GPU where there is one)"
    )
    parser.add_argument(
        "--activations",
        default=AUTO,
        choices=(AUTO, *ACTIVATIONS),
        help="auto (default): fp32 on CPUs; on GPUs what the network was trained with, where it tells, else fp32",
    )
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


def activations_of(options: argparse.Namespace, path: Path, header: dict) -> str:
    """Return the type that the options ask for; by themselves on a GPU the one of the network's training.

    Headers say which since it is written there; before, the config of the run directory around the file does.
    """
    if options.activations != AUTO:
        return options.activations
    if torch.device(options.device).type != "cuda":
        return "fp32"
    found = header.get("activations")
    if found is None:
        run = next((p for p in path.resolve().parents if (p / "config.yaml").is_file()), None)
        found = (config.read_yaml(run / "config.yaml").get("engine") or {}).get("activations") if run else None
    return found if found in ACTIVATIONS else "fp32"


def open_drawing(path: Path, options: argparse.Namespace, settings: Settings) -> tuple[Drawing, dict]:
    """Load what the options name; return it with the origin of its images."""
    devices.checked(options.device)
    activations = activations_of(options, path, read_header(path))
    if activations == "fp32":  # as said: torch would let cuDNN convolve in TF32, with the mantissa of fp16
        torch.backends.cudnn.allow_tf32 = False
    network, header = load_denoiser(path, activations, options.device)
    guide, origin = None, {"snapshot": path.name, **_identity(header), **dataclasses.asdict(settings)}
    if activations != "fp32":  # folders of pictures that were begun before it was said go on
        origin["activations"] = activations
    if options.guide not in (None, "self"):
        guide_path = find_snapshot(Path(options.guide), options.guide_sigma_rel)
        guide, guide_header = load_denoiser(guide_path, activations, options.device)
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
    if options.codec_decoding != "fp32":
        origin["codec_decoding"] = options.codec_decoding
    drawing = Drawing(network, header, settings, guide, options.device, options.codec_weights, options.codec_decoding)
    if options.compile:
        drawing.compile()
    return drawing, origin


def _identity(header: dict) -> dict:
    names = ("run", "clock", "sigma_rel", "kind")
    return {n: header.get(n) for n in names} | {"checksum": header["checksums"][min(header["checksums"])]}


def find_snapshot(path: Path, sigma_rel: float = DEFAULT_SIGMA_REL) -> Path:
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
