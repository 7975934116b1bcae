"""Training speed of presets: `python -m trainer.benchmark --preset xs,s,xl --micro-batch auto [--device cpu|cuda] [--json]`.

The real step on one device (trainer/timed_loop.py), no accumulation, so that the optimizer weighs most. Each measurement runs in a
process of its own: memory that was used up is gone with it. Beside the times stands what they must be at least
(trainer/roofline.py). Several loops are measured at the same micro-batch, in alternation.
"""

import argparse
import importlib.util
import json
import os
import signal
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

from trainer import child, micro_batch_search, roofline, timed_loop
from trainer.config import ROOT
from trainer.engine import device
from trainer.preset_config import compose
from trainer.preset_table import tables

LOOPS = ("deepspeed", "bare")
MARK = "benchmark result: "  # before the line of JSON that a measurement prints


def in_own_process(options: argparse.Namespace, preset: str, loop: str, micro_batch: int) -> dict | None:
    """Return a measurement, None where memory did not suffice; ValueError for what the user got wrong."""
    command = [sys.executable, "-m", "trainer.benchmark", "--preset", preset, "--micro-batch", str(micro_batch)]
    command += ["--device", options.device, "--steps", str(options.steps), "--loop", loop, "--here"]
    command += ["--profile", options.profile] if options.profile else []
    known = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if options.device == "cpu":
        known["CUDA_VISIBLE_DEVICES"] = ""
    done = child.run([*command, *options.overrides], cwd=ROOT, env=known)
    if done.returncode == 2:
        told = [line for line in done.stderr.splitlines() if line.startswith("error: ")] or [done.stderr.strip()]
        raise ValueError(told[-1].removeprefix("error: "))
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stderr[-4000:]}")
    result = json.loads(next(line for line in done.stdout.splitlines() if line.startswith(MARK)).removeprefix(MARK))
    rate = f"{result['images_per_second']:.4g} images/s" if result else "out of memory"
    print(f"{preset}, {loop}, micro-batch {micro_batch}: {rate}", file=sys.stderr, flush=True)
    return {"preset": preset} | result if result else None


def best(options: argparse.Namespace, preset: str, loop: str) -> dict:
    """Return the fastest measurement of a preset: at the micro-batch that is asked for, or of all powers of 2 that fit."""

    def measure(micro_batch: int) -> dict | None:
        return in_own_process(options, preset, loop, micro_batch)

    if options.micro_batch != "auto":
        result = measure(int(options.micro_batch))
        if result is None:
            raise ValueError(
                f"--micro-batch {options.micro_batch}: preset {preset} ran out of memory; use a smaller one or auto"
            )
        return result
    on_gpu = options.device == "cuda"
    memory = micro_batch_search.memory(on_gpu)

    def should_fit(micro_batch: int) -> bool:
        return micro_batch_search.fits(compose(preset, options.overrides, micro_batch, on_gpu), memory)

    found = micro_batch_search.search(measure, should_fit, on_gpu)
    if not found:
        raise ValueError(f"--preset {preset}: not even one image fits this device's memory; choose a smaller preset")
    tried = {r["micro_batch"]: r["images_per_second"] for r in found}
    return max(found, key=lambda r: r["images_per_second"]) | {"tried": tried}


def compare(options: argparse.Namespace, preset: str) -> list[dict]:
    """Return a row for each loop, all at the first one's micro-batch; the others' say how much slower they are."""
    loops = options.loop.split(",")
    rows = [best(options, preset, loops[0])]
    for loop in loops[1:]:
        row = in_own_process(options, preset, loop, rows[0]["micro_batch"])
        rows.append(
            row or {"preset": preset, "loop": loop, "micro_batch": rows[0]["micro_batch"], "out_of_memory": True}
        )
    return alternate(rows, options.rounds, lambda r: in_own_process(options, preset, r["loop"], r["micro_batch"]))


def alternate(rows: list[dict], rounds: int, measure) -> list[dict]:
    """Measure the rows again and again, in turn, until there are `rounds` of each; return the median ones and their ratios.

    "slower" is the median over rounds of the first row's images/s divided by this row's of the same round.
    """
    every = [[r] for r in rows]
    for _ in range(rounds - 1):
        for row in every:
            if "images_per_second" in row[0] and (again := measure(row[0])):
                row.append(again)
    result = []
    for row in every:
        if "images_per_second" not in row[0]:
            result.append(row[0])
            continue
        rates = [r["images_per_second"] for r in row]
        middle = dict(row[rates.index(statistics.median_low(rates))])
        middle |= {"rounds": rates} | ({"tried": row[0]["tried"]} if "tried" in row[0] else {})
        if len(every) > 1:
            ratios = [a["images_per_second"] / rate for a, rate in zip(every[0], rates, strict=False)]
            middle |= {"slower": statistics.median(ratios), "slower_than": every[0][0]["loop"]}
        result.append(middle)
    return result


def run(options: argparse.Namespace) -> int:
    """Measure what the options ask for and print it."""
    from rich.console import Console

    try:
        _check(options)
        presets = options.preset.split(",")
        if options.here:
            return _here(options)
        for preset in presets:  # what is wrong is told before anything runs
            compose(preset, options.overrides, 1, options.device == "cuda")
        results = []
        for preset in presets:
            with Console(stderr=True).status(f"measuring {preset} ..."):
                results += compare(options, preset)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps({"training": results, "torch": torch.__version__, "date": str(date.today())}))
        return 0
    for table in tables(results):
        Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0


def _here(options: argparse.Namespace) -> int:
    """Measure once, in this process, and print the line that the other one reads."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # temporary folders are removed on the way out
    config = compose(options.preset, options.overrides, int(options.micro_batch), options.device == "cuda")
    if options.device == "cpu":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    name = f"{options.preset}-{options.loop}-{options.micro_batch}.json"
    try:
        rates = roofline.measure(device(), config.engine.activations)
        loop = timed_loop.Loop(config, options.loop == "bare")
        result = timed_loop.measure(
            loop, rates, options.steps, Path(options.profile, name) if options.profile else None
        )
        loop.close()
    except RuntimeError as error:  # torch.OutOfMemoryError is one; libraries that find no room say so in words
        if not any(words in str(error) for words in ("out of memory", "ALLOC_FAILED")):
            raise
        result = None
    print(MARK + json.dumps(result))
    return 0


def _check(options: argparse.Namespace) -> None:
    """Fill in what depends on the machine; ValueError for what it cannot do, OSError where nothing can be written."""
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; use --device cpu, or look at nvidia-smi")
    deepspeed = importlib.util.find_spec("deepspeed") is not None
    options.loop = options.loop or ("deepspeed" if deepspeed else "bare")
    loops = options.loop.split(",")
    if not set(loops) <= set(LOOPS) or len(set(loops)) < len(loops):
        raise ValueError(f"--loop {options.loop}: must be one of {', '.join(LOOPS)}, or both with a comma between them")
    if "deepspeed" in loops and not deepspeed:
        raise ValueError(f"--loop {options.loop}: deepspeed is not installed; use --loop bare")
    if options.micro_batch != "auto" and not (options.micro_batch.isdecimal() and int(options.micro_batch)):
        raise ValueError(f"--micro-batch {options.micro_batch}: must be a number of images from 1, or auto")
    for name in ("steps", "rounds"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: must be at least 1")
    if options.profile:
        Path(options.profile).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.profile).close()
