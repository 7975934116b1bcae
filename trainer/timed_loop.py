"""Training steps that are timed by part, on data of their own, and the figures of one measurement.

Samples are read from disk and checked, drawn and whitened on the device, then forward, backward and the optimizer with its
averages, as trainer.train does it. What must not break: times are taken without waiting for the device inside of a step.
"""

import io
import platform
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from data_pipeline import adopt
from trainer import compilation, flops, hardware, roofline
from trainer.bare import Bare
from trainer.config import Config, to_dict
from trainer.engine import Engine, build_denoiser, device, start_process_group
from trainer.examples import Examples, micro_batches
from trainer.loss import denoising_loss

WARM_UP = 2  # steps: the first compiles, the second settles the allocators


def write_samples(folder: Path, number: int, shape: tuple[int, ...]) -> None:
    """Write a dataset of random latents with labels from 0 to 999."""
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
        self.config, self.clock, self.where = config, 0, device()
        self.name, self.activations = "bare" if bare else "deepspeed", config.engine.activations
        self.compiled = compilation.wanted(config, self.where.type == "cuda")
        self.folder = tempfile.TemporaryDirectory()
        shape = (2 * config.model.channels, config.model.resolution, config.model.resolution)
        config.data.path = str(Path(self.folder.name, "data"))
        write_samples(Path(config.data.path), max(64, 2 * config.micro_batch), shape)
        if not bare:
            start_process_group()
        self.engine = (Bare if bare else Engine)(config, build_denoiser(config))
        self.examples = Examples(config, self.where)
        self.phases = hardware.Phases(self.where)

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

    def communication_seconds(self) -> float:
        """Do a step and return what its collectives took."""
        self.engine.time_collectives(True)
        self.step()
        return self.engine.time_collectives(False)

    def close(self) -> None:
        """Leave the process group and remove the data."""
        self.examples.source.close()
        self.engine.close()
        self.folder.cleanup()


def measure(loop: Loop, rates: roofline.Rates, steps: int, profile: Path | None) -> dict:
    """Return the figures of a loop: what a step took, by part, beside what it must take at least at these rates."""
    config = loop.config
    timed = _time(loop, steps, profile)
    model, activations = to_dict(config)["model"], loop.activations
    cost, work = flops.count(model), roofline.count(model, activations, config.micro_batch)
    least = {name: w.seconds(rates.flops_per_second, rates.bytes_per_second) for name, w in work.items()}
    rounds = config.global_batch // config.micro_batch  # 1, unless an override asks for more
    least = {name: rounds * s for name, s in least.items()}
    least["optimizer"] = roofline.OPTIMIZER_BYTES * cost.parameters / rates.bytes_per_second
    images_per_second = config.global_batch / timed["step_seconds"]
    rate = images_per_second * cost.training_flops_per_image
    return timed | {
        "micro_batch": config.micro_batch,
        "loop": loop.name,
        "activations": activations,
        "compiled": loop.compiled,
        "images_per_second": images_per_second,
        "flops_per_second": rate,
        "mfu": rate / rates.peak_flops,
        "peak": rates.peak_name,
        "peak_flops": rates.peak_flops,
        "least_seconds": least,
        "unfused_kernels": rounds * sum(w.kernels for w in work.values()),
        "matrix_bytes": rounds * sum(w.matrix_bytes for w in work.values()),
        "unfused_elementwise_bytes": rounds * sum(w.elementwise_bytes for w in work.values()),
        "measured_flops_per_second": rates.flops_per_second,
        "measured_bytes_per_second": rates.bytes_per_second,
        "device": torch.cuda.get_device_name(loop.where) if loop.where.type == "cuda" else _processor(),
    }


def _time(loop: Loop, steps: int, profile: Path | None) -> dict:
    where = loop.where
    if where.type == "cuda":
        torch.cuda.empty_cache()  # the rates of the device were measured before, on gigabytes
        torch.cuda.reset_peak_memory_stats(where)
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
    parts["data"] = parts.pop("examples", 0.0)
    peak_memory = hardware.peak_memory(where)
    return {
        "first_step_seconds": first,
        "step_seconds": seconds,
        "host_cpu_seconds": host_seconds,
        "part_seconds": parts | {"communication": loop.communication_seconds()},
        "peak_memory_bytes": peak_memory,
        "kernels_per_step": _kernels(loop, where, profile),
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
        profile.export_chrome_trace(str(out))
    if where.type == "cuda":
        found = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return sum(not (e.is_user_annotation or e.name.startswith(("Memcpy", "Memset"))) for e in found)
    work = [e for e in profile.events() if e.name.startswith(("aten::", "evenkeel::")) and not e.cpu_children]
    return sum(not e.name.partition("::")[2].startswith(roofline.FREE) for e in work)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or another layout: the architecture must do
        return platform.machine()
