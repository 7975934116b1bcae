"""Training speed of presets: `python -m trainer.benchmark --preset xs,s,xl --micro-batch auto [--device cpu|cuda] [--json]`.

The real step on one device: samples read from disk and checked, drawn and whitened there, forward, backward, the optimizer with its
averages; no accumulation, so that the optimizer weighs most. Each measurement runs in a process of its own: memory that was used up
is gone with it. Beside the times stands what they must be at least (trainer/roofline.py).
"""

import argparse
import importlib.util
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
import yaml

from data_pipeline import adopt
from trainer import flops, hardware, roofline
from trainer.bare import Bare
from trainer.config import CONFIGS, ROOT, Config, from_dict, read_yaml, to_dict
from trainer.engine import Engine, build_denoiser, device, start_process_group
from trainer.examples import Examples, micro_batches
from trainer.loss import denoising_loss
from trainer.preset_table import tables

WARM_UP = 2  # steps: the first compiles, the second settles the allocators
LARGEST = 1024
MARK = "benchmark result: "  # before the line of JSON that a measurement prints


def compose(preset: str, overrides: list[str], micro_batch: int, on_gpu: bool) -> Config:
    """Return the config of `configs/edm2_<preset>.yaml` (or `configs/<preset>.yaml`) for one device, without Hydra."""
    known = {p.stem.removeprefix("edm2_"): p for p in CONFIGS.glob("edm2_*.yaml") if "img64" not in p.stem}
    if preset not in known:
        raise ValueError(f"--preset {preset}: choose among {', '.join(sorted(known))}")
    plain = _merged(known[preset])
    own = {"cluster.nodes": 1, "cluster.ranks_per_node": 1, "global_batch": micro_batch, "micro_batch": micro_batch}
    own |= {"duration_images": micro_batch * 1_000_000, "run": "unused"}
    if not on_gpu:  # fp16 is slow on CPUs, and compiling takes minutes
        own |= {"engine.activations": "fp32", "engine.compile": "false"}
    for key, value in own.items():
        _put(plain, key, value)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r}: must be written key=value, for instance engine.compile=true")
        _put(plain, key, yaml.safe_load(value))
    return from_dict(plain)


def _merged(path: Path) -> dict:
    plain, own = {}, read_yaml(path)
    for entry in own.pop("defaults", []):
        for group, name in entry.items() if isinstance(entry, dict) else ():
            plain[group] = _merged(CONFIGS / group / f"{name}.yaml")
    for key, value in own.items():
        plain[key] = {**plain.get(key, {}), **value} if isinstance(value, dict) else value
    return plain


def _put(plain: dict, key: str, value) -> None:
    *groups, name = key.split(".")
    for group in groups:
        plain = plain.setdefault(group, {})
    plain[name] = value


def write_samples(folder: Path, number: int, shape: tuple[int, ...]) -> None:
    """Write a dataset of random latents."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    with tarfile.open(folder / "shard-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(number):
            buffer = io.BytesIO()
            np.save(buffer, rng.standard_normal(shape, dtype=np.float32).astype(np.float16))
            for suffix, content in (("npy", buffer.getvalue()), ("cls", str(999 * i // (number - 1)).encode())):
                member = tarfile.TarInfo(f"{i:08d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    adopt.adopt(folder, "sd-vae-ft-mse", progress=lambda text: None)


class Loop:
    """Steps of a run, timed by part."""

    def __init__(self, config: Config, bare: bool):
        self.config, self.clock = config, 0
        if not bare:
            start_process_group()
        self.engine = (Bare if bare else Engine)(config, build_denoiser(config))
        self.examples = Examples(config, device())
        self.phases = hardware.Phases(device())

    def step(self) -> None:
        """Do what trainer.train does in a step, without publishing anything."""
        c, engine, phase = self.config, self.engine, self.phases.measure
        for here, upcoming in micro_batches(self.clock, c.global_batch, c.micro_batch, 0, 1):
            with phase("examples"):
                e = self.examples.at(here, upcoming)
            with phase("forward"):
                losses, _ = denoising_loss(
                    engine.denoiser, e.latents, e.labels, e.sigma, e.noise,
                    sigma_data=c.model.sigma_data, dropout_mask=self.examples.dropout_mask(e.positions),
                )  # fmt: skip
            with phase("backward"):
                engine.backward(losses.sum())
        self.clock += c.global_batch
        with phase("optimizer"):
            engine.step(1e-4, self.clock)
        engine.optimizer.nonfinite_steps()


def measure(config: Config, bare: bool, steps: int, profile: Path | None) -> dict:
    """Return the figures of one preset at one micro-batch, in this process."""
    where = device()
    rates = roofline.measure(where, config.engine.activations)
    model = to_dict(config)["model"]
    with tempfile.TemporaryDirectory() as folder:
        shape = (2 * config.model.channels, config.model.resolution, config.model.resolution)
        write_samples(Path(folder, "data"), max(64, 2 * config.micro_batch), shape)
        config.data.path = str(Path(folder, "data"))
        loop = Loop(config, bare)
        started = time.perf_counter()
        loop.step()
        roofline.synchronize(where)
        first = time.perf_counter() - started
        for _ in range(WARM_UP - 1):
            loop.step()
        roofline.synchronize(where)
        loop.phases.take()
        started, worked = time.perf_counter(), time.process_time()
        for _ in range(steps):
            loop.step()
        host_seconds = (time.process_time() - worked) / steps  # on a GPU: what launching takes
        roofline.synchronize(where)
        seconds = (time.perf_counter() - started) / steps
        parts = {name: value / steps for name, value in loop.phases.take().items()}
        peak_memory = hardware.peak_memory(where)
        loop.engine.time_collectives(True)
        loop.step()
        parts["communication"] = loop.engine.time_collectives(False)
        parts["data"] = parts.pop("examples")
        kernels = _kernels(loop, where, profile)
        loop.examples.source.close()
        loop.engine.close()
    cost, work = flops.count(model), roofline.count(model, config.engine.activations, config.micro_batch)
    least = {name: w.seconds(rates.flops_per_second, rates.bytes_per_second) for name, w in work.items()}
    least["optimizer"] = roofline.OPTIMIZER_BYTES * cost.parameters / rates.bytes_per_second
    rate = config.micro_batch / seconds * cost.training_flops_per_image
    return {
        "micro_batch": config.micro_batch,
        "loop": "bare" if bare else "deepspeed",
        "activations": config.engine.activations,
        "compile": config.engine.compile,
        "images_per_second": config.micro_batch / seconds,
        "flops_per_second": rate,
        "mfu": rate / rates.peak_flops,
        "peak": rates.peak_name,
        "peak_flops": rates.peak_flops,
        "first_step_seconds": first,
        "step_seconds": seconds,
        "host_cpu_seconds": host_seconds,
        "part_seconds": parts,
        "least_seconds": least,
        "kernels_per_step": kernels,
        "unfused_kernels": sum(w.kernels for w in work.values()),
        "matrix_bytes": sum(w.matrix_bytes for w in work.values()),
        "unfused_elementwise_bytes": sum(w.elementwise_bytes for w in work.values()),
        "peak_memory_bytes": peak_memory,
        "measured_flops_per_second": rates.flops_per_second,
        "measured_bytes_per_second": rates.bytes_per_second,
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else _processor(),
    }


def _kernels(loop: Loop, where: torch.device, out: Path | None) -> int:
    """Return what one step launches: kernels on a GPU, operators that call no other on a CPU; write a trace if asked."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if where.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        loop.step()
        roofline.synchronize(where)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(out))
    if where.type == "cuda":
        found = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return sum(not e.name.startswith(("Memcpy", "Memset")) for e in found)
    work = [e for e in profile.events() if e.name.startswith(("aten::", "evenkeel::")) and not e.cpu_children]
    return sum(not e.name.partition("::")[2].startswith(roofline.FREE) for e in work)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or another layout: the architecture must do
        return platform.machine()


def fits(config: Config, memory_bytes: float) -> bool:
    """Say whether a step should fit in memory: two copies of what the backward needs, and 32 bytes a parameter."""
    from trainer import size

    counted = size.count(to_dict(config)["model"])
    element = 4 if config.engine.activations == "fp32" else 2
    return 2 * element * counted.saved_elements * config.micro_batch + 32 * counted.parameters < memory_bytes


def in_own_process(options: argparse.Namespace, preset: str, micro_batch: int) -> dict | None:
    """Return a measurement, None where memory did not suffice; ValueError for what the user got wrong."""
    command = [sys.executable, "-m", "trainer.benchmark", "--preset", preset, "--micro-batch", str(micro_batch)]
    command += ["--device", options.device, "--steps", str(options.steps), "--loop", options.loop, "--here"]
    command += ["--profile", options.profile] if options.profile else []
    known = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if options.device == "cpu":
        known["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([*command, *options.overrides], cwd=ROOT, env=known, capture_output=True, text=True)
    if done.returncode == 2:
        raise ValueError(done.stderr.strip().removeprefix("error: "))
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stderr[-4000:]}")
    result = next(line for line in done.stdout.splitlines() if line.startswith(MARK))
    return json.loads(result.removeprefix(MARK))


def best(options: argparse.Namespace, preset: str) -> dict:
    """Return the fastest measurement of a preset: at the micro-batch that is asked for, or of all powers of 2 that fit."""
    if options.micro_batch != "auto":
        result = in_own_process(options, preset, int(options.micro_batch))
        if result is None:
            raise ValueError(
                f"--micro-batch {options.micro_batch}: preset {preset} ran out of memory; use a smaller one or auto"
            )
        return result
    on_gpu, found, micro_batch = options.device == "cuda", [], 1
    memory = _memory(on_gpu)
    if on_gpu:  # every size is compiled anew: begin near the largest that should fit
        while micro_batch < LARGEST and fits(compose(preset, options.overrides, 4 * micro_batch, True), memory):
            micro_batch *= 2
    while micro_batch <= LARGEST:
        # a CPU's memory is everyone's: what might not fit is not tried
        if not on_gpu and not fits(compose(preset, options.overrides, micro_batch, False), 0.5 * memory):
            break
        result = in_own_process(options, preset, micro_batch)
        if result is None:
            if found or micro_batch == 1:
                break
            micro_batch //= 2
            continue
        found.append(result)
        if len(found) > 1 and not on_gpu and result["images_per_second"] < 1.02 * found[-2]["images_per_second"]:
            break
        micro_batch *= 2
    if not found:
        raise ValueError(f"--preset {preset}: not even one image fits this device's memory; choose a smaller preset")
    return max(found, key=lambda r: r["images_per_second"]) | {
        "tried": {r["micro_batch"]: r["images_per_second"] for r in found}
    }


def _memory(on_gpu: bool) -> float:
    if on_gpu:
        return torch.cuda.get_device_properties(0).total_memory
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * float(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def run(options: argparse.Namespace) -> int:
    """Measure what the options ask for and print it."""
    from rich.console import Console

    try:
        _check(options)
        presets = options.preset.split(",")
        if options.here:
            return _here(options)
        for preset in presets:
            compose(
                preset, options.overrides, 1, options.device == "cuda"
            )  # what is wrong is told before anything runs
        results = []
        for preset in presets:
            with Console(stderr=True).status(f"measuring {preset} ..."):
                results.append({"preset": preset} | best(options, preset))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps({"training": results, "torch": torch.__version__, "date": str(date.today())}))
        return 0
    for table in tables(results):
        Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0


def _here(options: argparse.Namespace) -> int:
    config = compose(options.preset, options.overrides, int(options.micro_batch), options.device == "cuda")
    if options.device == "cpu":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    profile = Path(options.profile, f"{options.preset}-{options.micro_batch}.json") if options.profile else None
    try:
        result = measure(config, options.loop == "bare", options.steps, profile)
    except torch.cuda.OutOfMemoryError:
        result = None
    print(MARK + json.dumps(result))
    return 0


def _check(options: argparse.Namespace) -> None:
    """Fill in what depends on the machine; ValueError for what it cannot do."""
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; use --device cpu, or look at nvidia-smi")
    deepspeed = options.loop != "bare" and importlib.util.find_spec("deepspeed") is not None
    options.loop = options.loop or ("deepspeed" if deepspeed else "bare")
    if options.loop == "deepspeed" and not deepspeed:
        raise ValueError("--loop deepspeed: deepspeed is not installed; use --loop bare")
    if options.micro_batch != "auto" and not (options.micro_batch.isdigit() and int(options.micro_batch)):
        raise ValueError(f"--micro-batch {options.micro_batch}: must be a number of images from 1, or auto")
    if options.steps < 1:
        raise ValueError(f"--steps {options.steps}: must be at least 1")
