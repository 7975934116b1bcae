"""Speed of sampling: `python -m trainer.benchmark --table sampling [--preset xs] [--batch 32] [--device cuda]`.

Latents by deterministic Heun on EDM's grid, 63 evaluations for 32 steps, weights normalised once. Without guidance, guided by a
network of half the channels, and by the same network without labels: evaluated twice, and once on twice the batch. Without a
preset: a small network. `--decoder` adds rows with decoding (decoding_benchmark.py); the others are without.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from data_pipeline import codecs
from models.denoiser import build
from models.magnitude import use_weights_
from models.prepared import prepare_
from trainer import decoding_benchmark, flops
from trainer.config import to_dict
from trainer.drawing import Drawing, Settings
from trainer.peaks import peak_flops
from trainer.preset_config import compose
from trainer.roofline import synchronize

SMALL = {"resolution": 16, "channels": 4, "label_dim": 10, "model_channels": 32, "channel_mult": [1, 2, 2], "num_blocks": 1,
         "attn_resolutions": [8], "channels_per_head": 32}  # fmt: skip
TWO = "itself without labels"
ONE = f"{TWO}, in one batch"
# way -> what guides, and whether in one batch with what is guided
WAYS = {
    "none": (None, False),
    "half the channels": ("half", False),
    TWO: ("self", False),
    ONE: ("self", True),
}
# Karras et al. 2024 (arXiv 2312.02696): images/s of one A100 in sampling ImageNet-512, decoder included: without guidance, guided
PUBLISHED = {"xs": (8.9, 6.0), "s": (6.4, 4.7), "m": (4.8, 3.8), "l": (3.7, 3.0), "xl": (2.9, 2.5), "xxl": (2.3, 2.0)}
FASTER = 2.0  # the goal: as often the published rate, scaled by the devices' peaks


def measure(
    preset: str | None,
    batch: int,
    steps: int,
    device: str,
    compiled: bool,
    repeats: int,
    overrides: Sequence[str] = (),
    decoder: codecs.Codec | None = None,
) -> list[dict]:
    """Return images/s of each way to guide, the best of `repeats` in alternation, after one for warming up.

    With a decoder, rows of pictures on the host as well (trainer/decoding_benchmark.py).
    """
    model, activations, drawings = _drawings(preset, steps, device, compiled, overrides)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(repeats + 1):
        for way, drawing in drawings.items():
            synchronize(torch.device(device))
            started = time.perf_counter()
            drawing.latents(torch.arange(batch) + batch * repeat)
            synchronize(torch.device(device))
            seconds[way].append(time.perf_counter() - started)

    def row(way: str, rate: float, **more) -> dict:
        kind = WAYS[way][0]
        forwards = (2 * steps - 1) * sum(flops.count(m).forward_flops for m in (model, _guide(model, kind)) if m)
        same = {"preset": preset or "small", "guide": way, "batch": batch, "steps": steps, "compiled": compiled}
        return same | {"images_per_second": rate, "flops_per_second": rate * (forwards + more.pop("decoder_flops", 0)),
                       "one_batch_gains": None, "decoder": None,
                       "goal_images_per_second": _goal(preset, kind is not None, device, activations)} | more  # fmt: skip

    rows = [row(way, batch / min(seconds[way][1:])) for way in WAYS]
    pairs = zip(seconds[TWO][1:], seconds[ONE][1:], strict=True)
    rows[-1]["one_batch_gains"] = statistics.median(two / one for two, one in pairs)
    if decoder is not None:
        cost = decoding_benchmark.decoder_flops(decoder, drawings["none"])
        for way in ("none", "half the channels"):
            for how, rate in decoding_benchmark.rates(drawings[way], decoder, batch, repeats).items():
                rows.append(row(way, rate, decoder=f"{decoder.name}, {how}", decoder_flops=cost))
    return rows


def _drawings(preset: str | None, steps: int, device: str, compiled: bool, overrides: Sequence[str]) -> tuple:
    """Return (config of the network, type of its activations, a drawing for each way to guide)."""
    config = compose(preset, list(overrides), 1, device == "cuda") if preset else None
    model, activations = (to_dict(config)["model"], config.engine.activations) if preset else (SMALL, "fp32")
    networks = {kind: _network(_guide(model, kind), activations, device) for kind in ("self", "half")}
    drawings = {}
    for way, (kind, one_batch) in WAYS.items():
        settings = Settings(steps=steps, guidance=1.0 if kind is None else 1.5)
        guide = networks["half"] if kind == "half" else None
        drawings[way] = Drawing(networks["self"], {"model": model, "data": {}}, settings, guide, device)
        drawings[way].one_batch = one_batch
        if compiled:
            drawings[way].compile()
    return model, activations, drawings


def _guide(model: dict, kind: str | None) -> dict | None:
    if kind == "half":
        return model | {"model_channels": model["model_channels"] // 2}
    return model if kind == "self" else None


def _goal(preset: str | None, guided: bool, device: str, activations: str) -> float | None:
    """Return the images/s to reach on this device, where one is published and the device's peak is known."""
    peak = peak_flops(torch.cuda.get_device_name(), activations) if device == "cuda" else None
    if preset not in PUBLISHED or not peak:
        return None
    return FASTER * PUBLISHED[preset][guided] * peak[1] / peak_flops("A100", "fp16")[1]


def _network(model: dict, activations: str, device: str) -> torch.nn.Module:
    torch.manual_seed(0)
    network = build(model, activations).eval().requires_grad_(False)
    use_weights_(network)
    for p in network.parameters():
        if p.shape == (1,):
            p.fill_(0.3)  # gains are 0 at the start, and zeros would make the work easier than it is
    network = network.to(device)
    prepare_(network, network.activations)
    return network


def table(rows: list[dict], device: str) -> Table:
    """Lay the rates out."""
    goal = f"goal: {FASTER:g}x the published rate of an A100 (decoder included), scaled by the devices' peaks"
    caption = f"{goal}; torch {torch.__version__}"
    out = Table(title=f"sampling, Heun, {rows[0]['steps']} steps, {device}", caption=caption)
    for column in (
        "network",
        "guide",
        "decoder",
        "compiled",
        "batch",
        "images/s",
        "of two evaluations",
        "TFLOP/s",
        "goal, images/s",
    ):
        out.add_column(column, justify="left" if column in ("network", "guide", "decoder") else "right")
    for r in rows:
        goal = f"{r['goal_images_per_second']:.1f}" if r["goal_images_per_second"] else ""
        gains = f"{r['one_batch_gains']:.3g}x" if r["one_batch_gains"] else ""
        out.add_row(r["preset"], r["guide"], r["decoder"] or "without", str(r["compiled"]).lower(), str(r["batch"]),
                    f"{r['images_per_second']:.4g}", gains, f"{r['flops_per_second'] / 1e12:.4g}", goal)  # fmt: skip
    return out


def run(options: argparse.Namespace) -> int:
    """Measure what the options ask for and print it; --compiled is for GPUs, or for those who wait."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; use --device cpu, or look at nvidia-smi")
    if options.batch < 1 or options.steps < 1:
        raise ValueError(f"--batch {options.batch} --steps {options.steps}: both must be at least 1")
    rows, repeats = [], min(options.steps, 3)
    decoder = decoding_benchmark.opened(options.decoder, device) if options.decoder else None
    for preset in options.preset.split(",") if options.preset else [None]:
        for compiled in (False, True) if options.compiled else (False,):
            rows += measure(preset, options.batch, 32, device, compiled, repeats, options.overrides, decoder)
    if options.json:
        print(json.dumps({"sampling": rows, "torch": torch.__version__, "device": device}))
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(table(rows, device))
    return 0
