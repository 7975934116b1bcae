"""Run every golden check over a directory of vectors that the EDM2 reference made: python -m tests.golden DIR

One line per check with the measured error and its bound; exit 0 when all hold, 1 on any miss, 2 for a directory that
cannot be read. The vectors' JSON files say what they are; nothing here knows a particular configuration or seed.
Bounds are those that the vectors' INDEX.json recommends; where ours is wider, the check says why.
"""

import argparse
import copy
import hashlib
import json
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models import import_edm2, magnitude
from models.denoiser import Denoiser, build

# INDEX.json, "recommended"
OUTPUT, WEIGHT_GRADIENT, TRAINED, SAMPLER, TABLE = 2e-5, 5e-5, 5e-5, 5e-5, 1e-12
GAIN_GRADIENT, GAIN_GRADIENT_OF_LARGEST, GAIN_GRADIENT_VARIANTS = 5e-4, 1e-5, 5e-3
PROJECTION, NORM = 2e-4, 2e-5
# Ours: what is stored in the first step of a trajectory, where rows start at RMS 1 - eps instead of r / (r + eps). It
# is eps |1 / r - 1|, and the weights_rule makes rows as short as r = 0.25 (golden_training.py has the argument).
FIRST_STEP = 4e-4


@dataclass
class Report:
    """The lines of a run and how many of them missed."""

    quiet: bool = False
    misses: int = 0
    checks: int = 0
    lines: list[str] = field(default_factory=list)

    def _line(self, mark: str, text: str) -> None:
        self.lines.append(f"{mark:<9}{text}")
        if not self.quiet:
            print(self.lines[-1], flush=True)

    def check(self, where: str, what: str, error: float, bound: float, note: str = "") -> None:
        """Record one comparison; an error that is not a number misses."""
        self.checks += 1
        good = error <= bound
        self.misses += not good
        text = f"{where:<4} {what:<62} error {error:9.2e}  bound {bound:.1e}"
        self._line("ok" if good else "MISS", f"{text}  {note}".rstrip())

    def close(self, where: str, what: str, got: Tensor, want: Tensor, bound: float, note: str = "") -> None:
        """Record max|got - want| / max|want|."""
        self.check(where, what, distance(got, want), bound, note)

    def worst(self, where: str, what: str, errors: dict[str, float], bound: float, note: str = "") -> None:
        """Record the largest of several errors under one bound, with its name."""
        if not errors:
            return
        name = max(errors, key=lambda key: errors[key] if errors[key] == errors[key] else float("inf"))
        self.check(where, f"{what} ({len(errors)}, worst {name})", errors[name], bound, note)

    def equal(self, where: str, what: str, got, want) -> None:
        """Record an exact comparison as an error of 0 or 1."""
        self.check(where, what, float(got != want), 0.0, "" if got == want else f"got {got!r}, expected {want!r}"[:200])

    def apart(self, where: str, what: str, reason: str) -> None:
        """List a check that is not run, and why."""
        self._line("not ours", f"{where:<4} {what}: {reason}")


def distance(got: Tensor, want: Tensor) -> float:
    """Return max|got - want| / max|want|, or infinity for other shapes."""
    if got.shape != want.shape:
        return float("inf")
    got, want = got.detach().double(), want.detach().double()
    if not want.numel():
        return 0.0
    scale = want.abs().max().item()
    error = (got - want).abs().max().item()
    return error / scale if scale else error


class Vectors:
    """One JSON file of a directory and its tensors, which are read when first asked for."""

    def __init__(self, path: Path):
        self.path, self.name = path, path.name.split("_")[0]
        try:
            self.facts = json.loads(path.read_text())
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: no readable JSON ({error}); copy the directory again") from None
        self._tensors: dict[str, Tensor] | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return the file's tensors by name."""
        if self._tensors is None:
            path = self.path.parent / self.facts.get("file", self.path.with_suffix(".safetensors").name)
            try:
                self._tensors = load_file(path)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: not readable ({error}); copy the directory again") from None
        return self._tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with `prefix`, without it."""
        return {name[len(prefix) :]: value for name, value in self.tensors.items() if name.startswith(prefix)}


# ---------------------------------------------------------------------------------------------------------------------
# The rules of the vectors: weights from a seed, fingerprints of tensors


def weights_by_rule(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Return the reference's state_dict for a seed, by the rule that the JSON files state (`weights_rule`)."""
    state = {}
    for name, shape in shapes.items():
        rng = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
        if name.endswith("freqs"):
            value = 2 * np.pi * rng.standard_normal(shape)
        elif name.endswith("phases"):
            value = 2 * np.pi * rng.uniform(0, 1, shape)
        elif not shape:
            value = 0.5 + 0.25 * rng.standard_normal()
        else:
            value = rng.standard_normal(shape)
            value = value * np.exp(0.3 * rng.standard_normal([shape[0]] + [1] * (len(shape) - 1)))
        state[name] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    return state


def reference_shapes(model: dict) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the reference's state_dict for a network."""
    with torch.device("meta"):
        state = build(model).state_dict()
    return {name: tuple(import_edm2.to_reference(name, value).shape) for name, value in state.items()}


def network(config: dict, seed: int, activations: str = "fp32") -> Denoiser:
    """Build the network of a golden file and fill it by the rule; rows are as the rule makes them, not normalised."""
    model = import_edm2.model_of({key: value for key, value in config.items() if key != "use_fp16"})
    denoiser = build(model, activations)
    state = weights_by_rule(reference_shapes(model), seed)
    denoiser.load_state_dict({name: import_edm2.from_reference(name, value) for name, value in state.items()})
    return denoiser


def in_use(denoiser: torch.nn.Module) -> torch.nn.Module:
    """Return a copy as it is used for inference."""
    result = copy.deepcopy(denoiser).eval()
    magnitude.use_weights_(result)
    return result


def fingerprint(name: str, tensor: Tensor) -> tuple[float, float]:
    """Return (l2, proj) of a tensor in the reference's layout, by `proj_rule`."""
    flat = tensor.detach().double().reshape(-1).numpy()
    direction = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(flat.size)
    return float(np.linalg.norm(flat)), float(np.dot(flat, direction))


def fingerprint_errors(wanted: dict[str, dict], got: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the errors of l2 and of proj by name, both relative to l2."""
    norms, projections = {}, {}
    for name, facts in wanted.items():
        if name not in got:
            norms[name] = projections[name] = float("inf")
            continue
        l2, proj = fingerprint(name, got[name])
        scale = max(abs(facts["l2"]), 1e-30)
        norms[name], projections[name] = abs(l2 - facts["l2"]) / scale, abs(proj - facts["proj"]) / scale
    return norms, projections


# ---------------------------------------------------------------------------------------------------------------------
# The command


def checks() -> dict:
    """Return what checks each family of files, by the first part of the file's name."""
    from tests import golden_network, golden_primitives, golden_tables, golden_training

    return {
        "g0": golden_primitives.primitives,
        "ga": golden_network.denoiser,
        "gb": golden_network.gradients,
        "gc": golden_training.trajectory,
        "gd": golden_tables.averages,
        "ge": golden_tables.sampling,
        "gf": golden_tables.schedules,
        "gg": golden_network.variants,
        "gh": golden_network.preset,
        "gi": golden_network.snapshot,
    }


def open_directory(path: Path) -> list[Vectors]:
    """Return the directory's files in order; raise ValueError where it is no directory of golden vectors."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory; give one that holds golden vectors (INDEX.json, g*.json)")
    found = [Vectors(file) for file in sorted(path.glob("g*_*.json"))]
    if not found:
        raise ValueError(f"{path}: holds no golden vectors (g*_*.json); give the directory that holds them")
    return found


def check_index(path: Path, report: Report) -> None:
    """Compare the files with the sizes and hashes of INDEX.json, where there is one."""
    index = path / "INDEX.json"
    if not index.is_file():
        return
    try:
        listed = json.loads(index.read_text())["files"]
        hashes = {name: facts["sha256"] for name, facts in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: no readable index ({error}); copy the directory again") from None
    wrong = [
        name
        for name, digest in hashes.items()
        if not (path / name).is_file() or hashlib.sha256((path / name).read_bytes()).hexdigest() != digest
    ]
    report.check("", f"INDEX.json: {len(hashes)} files whole", float(len(wrong)), 0.0, " ".join(wrong))


def run(path: Path, only: set[str] | None = None, quiet: bool = False) -> Report:
    """Run the checks over a directory, or those of the families in `only`; raise ValueError where it cannot be read."""
    report = Report(quiet)
    families = checks()
    torch.set_num_threads(1)
    files = open_directory(path)
    if only is None:
        check_index(path, report)
    for file in files:
        family = file.name[:2]
        if only is not None and family not in only:
            continue
        if family not in families:
            report.apart(file.name, file.path.name, "no rule for files of this kind is known here")
            continue
        try:
            families[family](file, report)
        except KeyError as missing:
            raise ValueError(f"{file.path}: lacks {missing}, which files of its kind have; copy it again") from None
    return report


def main(argv=None) -> int:
    """Compare this program with golden vectors of the EDM2 reference."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=main.__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", default="", help="families to run, such as ga,gc (all by default)")
    options = parser.parse_args(argv)
    try:
        report = run(options.directory, set(options.only.split(",")) if options.only else None)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{report.checks} checks, {report.misses} missed")
    return 1 if report.misses else 0


if __name__ == "__main__":
    sys.exit(main())
