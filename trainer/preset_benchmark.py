"""Training speed of presets: `python -m trainer.benchmark --preset xs,s,xl --micro-batch auto [--device cpu|cuda] [--json]`.

The real step on one device (trainer/timed_loop.py), without accumulation unless global_batch= asks for it, so that the optimizer
weighs most. Each measurement runs in a process of its own: memory that was used up is gone with it. Beside the times stands what
they must be at least (trainer/roofline.py). Several loops are measured at the same micro-batch, in alternation; `--reference
FOLDER` adds EDM2's reference from the user's clone (trainer/reference_loop.py).
"""

import argparse
import copy
import functools
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

from trainer import child, hardware, micro_batch_search, reference_loop, roofline, timed_loop
from trainer.config import ROOT, Config
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
    command += ["--reference", options.reference] if loop == "reference" else []
    known = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if options.device == "cpu":
        known["CUDA_VISIBLE_DEVICES"] = ""
    done = child.run([*command, *options.overrides], cwd=ROOT, env=known)
    if done.returncode == 2:
        told = [line for line in done.stderr.splitlines() if line.startswith("error: ")] or [done.stderr.strip()]
        raise ValueError(told[-1].removeprefix("error: "))
    printed = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode == -signal.SIGKILL:
        printed = [MARK + "null"]  # what the kernel does where a machine's memory runs out
    if not printed:  # one that ran out of memory may leave badly after it has said so
        raise RuntimeError(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stderr[-4000:]}")
    result = json.loads(printed[0].removeprefix(MARK))
    rate = f"{result['images_per_second']:.4g} images/s" if result else "out of memory"
    print(f"{preset}, {loop}, micro-batch {micro_batch}: {rate}", file=sys.stderr, flush=True)
    return {"preset": preset} | result if result else None


def best(options: argparse.Namespace, preset: str, loop: str, measure) -> dict | None:
    """Return the fastest `measure(preset, loop, micro_batch)` of all powers of 2 that fit, None where not even 1 does."""
    on_gpu = options.device == "cuda"
    memory = micro_batch_search.memory(on_gpu)

    def should_fit(micro_batch: int) -> bool:
        return micro_batch_search.fits(compose(preset, options.overrides, micro_batch, on_gpu), memory)

    found = micro_batch_search.search(lambda size: measure(preset, loop, size), should_fit, on_gpu)
    if not found:
        return None
    tried = {r["micro_batch"]: r["images_per_second"] for r in found}
    return max(found, key=lambda r: r["images_per_second"]) | {"tried": tried}


def compare(options: argparse.Namespace, preset: str) -> list[dict]:
    """Return a row for each loop, all at the first one's micro-batch, and one for the reference at its own best.

    The first one's is the micro-batch that is asked for, or its fastest.
    """
    first, *others = options.loop.split(",")
    measure = functools.cache(functools.partial(in_own_process, options))  # the searches of two loops may meet
    if options.micro_batch == "auto":
        row = best(options, preset, first, measure)
        if row is None:
            raise ValueError(
                f"--preset {preset}: not even one image fits this device's memory; choose a smaller preset"
            )
    elif (row := measure(preset, first, int(options.micro_batch))) is None:
        raise ValueError(
            f"--micro-batch {options.micro_batch}: preset {preset} ran out of memory; use a smaller one or auto"
        )
    rows, micro_batch = [row], row["micro_batch"]
    for loop in others:
        lost = {"preset": preset, "loop": loop, "micro_batch": micro_batch, "out_of_memory": True}
        rows.append(measure(preset, loop, micro_batch) or lost)
        if loop == "reference" and options.micro_batch == "auto":
            own = best(options, preset, loop, measure)
            rows += [own] if own and own["micro_batch"] != micro_batch else []
    return alternate(rows, options.rounds, lambda r: in_own_process(options, preset, r["loop"], r["micro_batch"]))


def alternate(rows: list[dict], rounds: int, measure) -> list[dict]:
    """Measure the rows again and again, in turn, until there are `rounds` of each; return the median ones and their ratios.

    "slower" is the median over rounds of this row's seconds an image divided by the first row's of the same round, "more_host_cpu"
    the same of the host's CPU seconds, which a busy machine disturbs less.
    """
    every = [[r] for r in rows]
    for _ in range(rounds - 1):
        for row in every:
            if "images_per_second" in row[0] and (again := measure(row[0])):
                row.append(again)
    return [_median(row, every[0]) for row in every]


def _median(row: list[dict], first: list[dict]) -> dict:
    if "images_per_second" not in row[0]:
        return row[0]
    rates = [r["images_per_second"] for r in row]
    result = row[rates.index(statistics.median_low(rates))] | {"rounds": rates}
    result |= {"tried": row[0]["tried"]} if "tried" in row[0] else {}

    if row is not first:
        rounds = list(zip(row, first, strict=False))
        slower = [one["images_per_second"] / mine["images_per_second"] for mine, one in rounds]
        shares = [(mine["host_cpu_seconds"] / mine["step_seconds"], one["host_cpu_seconds"] / one["step_seconds"])
                  for mine, one in rounds]  # fmt: skip
        more = [ratio * mine / one for ratio, (mine, one) in zip(slower, shares, strict=True)]
        result |= {"slower_than": first[0]["loop"], "slower": statistics.median(slower)}
        result |= {"more_host_cpu": statistics.median(more)}
    return result


def run(options: argparse.Namespace) -> int:
    """Measure what the options ask for and print it."""
    from rich.console import Console

    _check(options)
    presets = options.preset.split(",")
    if options.here:
        return _here(options)
    for preset in presets:  # what is wrong is told before anything runs
        compose(preset, options.overrides, 1, options.device == "cuda")
    if options.reference:
        once = copy.copy(options)
        once.steps, once.profile = 1, None
        in_own_process(once, presets[0], "reference", 1)
    results = []
    for preset in presets:
        with Console(stderr=True).status(f"measuring {preset} ..."):
            results += compare(options, preset)
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
        loop, profile = _open(config, options), Path(options.profile, name) if options.profile else None
        result = timed_loop.measure(loop, rates, options.steps, profile)
        loop.close()
    except RuntimeError as error:
        if not hardware.ran_out_of_memory(error):
            raise
        result = None
    print(MARK + json.dumps(result), flush=True)
    return 0


def _open(config: Config, options: argparse.Namespace) -> timed_loop.Loop | reference_loop.ReferenceLoop:
    if options.loop == "reference":
        return reference_loop.ReferenceLoop(config, reference_loop.find(options.reference))
    return timed_loop.Loop(config, options.loop == "bare")


def _check(options: argparse.Namespace) -> None:
    """Fill in what depends on the machine; ValueError for what it cannot do."""
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; use --device cpu, or look at nvidia-smi")
    deepspeed = importlib.util.find_spec("deepspeed") is not None
    options.loop = options.loop or ("deepspeed" if deepspeed else "bare")
    loops, known = options.loop.split(","), LOOPS + (("reference",) if options.reference else ())
    if not set(loops) <= set(known) or len(set(loops)) < len(loops):
        more = "" if options.reference else "; reference goes with --reference FOLDER"
        raise ValueError(f"--loop {options.loop}: must be of {', '.join(known)}, with commas between them{more}")
    if options.reference:
        options.reference = str(reference_loop.find(options.reference))
        if "reference" not in loops:
            options.loop += ",reference"
    if "deepspeed" in loops and not deepspeed:
        raise ValueError(f"--loop {options.loop}: deepspeed is not installed; use --loop bare")
    if options.micro_batch != "auto" and not (options.micro_batch.isdecimal() and int(options.micro_batch)):
        raise ValueError(f"--micro-batch {options.micro_batch}: must be a number of images from 1, or auto")
    for name in ("steps", "rounds"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: must be at least 1")
    if options.profile:
        try:
            Path(options.profile).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=options.profile).close()
        except OSError as error:
            raise ValueError(
                f"--profile {options.profile}: nothing can be written there ({error.strerror}); name another folder"
            ) from None
