"""Measures a run between two publications: throughput, phases of a step, losses, magnitudes.

Sums stay on the device until they are published, so that no step waits for a measurement.
"""

import math
import resource
import time
from collections import defaultdict, deque
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.reader import Source
from models.edm2 import magnitude_bucket
from trainer.bins import CENTRES, BinMeans, Bins, means
from trainer.config import Config
from trainer.engine import Engine
from trainer.loss import LossParts
from trainer.metrics import Metrics


class Meter:
    """Collects what happens in each step and publishes it every `metrics.every_images`."""

    def __init__(
        self, config: Config, engine: Engine, source: Source, metrics: Metrics, clock: int, flops_per_image: int
    ):
        self.config, self.engine, self.source, self.metrics = config, engine, source, metrics
        self.flops_per_image = flops_per_image
        self.elements = config.model.channels * config.model.resolution**2
        self.clock = self.published_clock = clock
        self.published_time = time.perf_counter()
        self.phases: dict[str, float] = defaultdict(float)
        self.sums = torch.zeros(3, device=engine.device)  # loss, denoising loss, samples
        self.bins = Bins(engine.device, config.model.sigma_data)
        self.magnitudes: dict[str, Tensor] = {}
        self.recent: deque[tuple[Tensor, Tensor]] = deque(
            maxlen=2 * engine.micro_steps
        )  # positions and losses of two steps
        metrics.set("evenkeel_duration_images", config.duration_images)
        metrics.set("evenkeel_model_flops_per_image", flops_per_image)
        metrics.set("evenkeel_attempt", metrics.attempt)

    @contextmanager
    def phase(self, name: str):
        """Add the time spent inside to a phase of the step, as the host sees it."""
        started = time.perf_counter()
        yield
        self.phases[name] += time.perf_counter() - started

    def wants_magnitudes(self) -> bool:
        """Say whether the step under way is followed by a publication, so that its forward should collect magnitudes."""
        return self._due(self.clock + self.config.global_batch) and not self.magnitudes

    def losses(self, positions: Tensor, losses: Tensor, parts: LossParts) -> None:
        """Take note of one micro-batch's per-sample losses [N]."""
        losses = losses.detach()
        self.recent.append((positions, losses))
        total = losses.sum() / self.elements
        self.sums += torch.stack([total, parts.weighted.sum(), torch.full_like(total, losses.numel())])
        self.bins.add(parts.sigma, parts.weighted, parts.logvar)
        self.magnitudes.update(parts.magnitudes)

    def step(self, clock: int, learning_rate: float) -> bool:
        """End a step; publish if it is time, and say so."""
        self.clock = clock
        self.metrics.set("evenkeel_last_step_timestamp_seconds", time.time())
        if not self._due(clock) and clock < self.config.duration_images:
            return False
        self._publish(learning_rate)
        return True

    def check_finite(self) -> None:
        """Raise FloatingPointError on every rank when the policy says that the run must not go on; it knows a step later."""
        policy, steps = self.config.optimizer, self.engine.optimizer.nonfinite_steps()
        if (
            steps == 0
            or policy.nonfinite == "zero"
            or (policy.nonfinite == "skip" and steps <= policy.max_skipped_steps)
        ):
            return
        bad = [int(p) for where, loss in self.recent for p in where[~torch.isfinite(loss)]]
        found = [None] * self.engine.world
        dist.all_gather_object(found, (self.engine.optimizer.bad_tensors(), bad))
        tensors = sorted({name for names, _ in found for name in names})
        positions = sorted({p for _, part in found for p in part})
        named = ", ".join(tensors[:8]) + (f" and {len(tensors) - 8} more" if len(tensors) > 8 else "")
        samples = f"samples at positions {positions[:8]}" if positions else "no sample's own loss was non-finite"
        raise FloatingPointError(
            f"non-finite gradient ({steps} steps) in the step before clock {self.clock}: in {named}; {samples}; the weights did "
            f"not move; lower lr.ref_lr, look at the samples, or set optimizer.nonfinite to skip or zero"
        )

    def _due(self, clock: int) -> bool:
        return clock // self.config.metrics.every_images > self.published_clock // self.config.metrics.every_images

    def _publish(self, learning_rate: float) -> None:
        deviation = self.engine.optimizer.row_rms_deviation()
        if self.engine.world > 1:
            dist.all_reduce(self.sums)
        loss, denoising_loss, count = self.sums.tolist()
        now = time.perf_counter()
        elapsed, images = now - self.published_time, self.clock - self.published_clock
        steps, put = images / self.config.global_batch, self.metrics.set
        rate = images / elapsed
        put("evenkeel_images_seen", self.clock)
        put("evenkeel_epoch_ratio", self.clock / self.source.num_samples)
        put("evenkeel_images_per_second", rate)
        put("evenkeel_eta_seconds", (self.config.duration_images - self.clock) / rate)
        put("evenkeel_flops_per_second", rate * self.flops_per_image)
        put("evenkeel_loss", loss / count)
        put("evenkeel_denoising_loss", denoising_loss / count)
        self._put_bins(means(self.bins.total()))
        put("evenkeel_learning_rate", learning_rate)
        put("evenkeel_gradient_norm", float(self.engine.optimizer.gradient_norm))
        put("evenkeel_nonfinite_steps_total", float(self.engine.optimizer.num_nonfinite))
        put("evenkeel_row_rms_deviation", float(deviation))
        put("evenkeel_step_seconds", elapsed / steps)
        for name, seconds in self.phases.items():
            put("evenkeel_phase_seconds", seconds / steps, phase=name)
        read = self.source.counters()
        put("evenkeel_samples_read_total", read["samples"])
        put("evenkeel_bytes_read_total", read["bytes"])
        put("evenkeel_data_wait_seconds_total", read.get("wait_seconds", 0.0))
        put("evenkeel_checksum_failures_total", read["checksum_failures"])
        put("evenkeel_replaced_samples_total", read.get("replaced", 0))
        put("evenkeel_memory_bytes", _peak_memory(self.engine.device))
        for block, evaluations in self.engine.module.function_evaluations().items():
            put("evenkeel_function_evaluations", evaluations, block=block)
        self._put_magnitudes("evenkeel_activation_magnitude", self.magnitudes)
        weights = {name.removesuffix(".weight"): rms for name, rms in self.engine.weight_magnitudes().items()}
        self._put_magnitudes("evenkeel_weight_magnitude", weights)
        self.metrics.publish()
        self.published_clock, self.published_time = self.clock, time.perf_counter()
        self.phases.clear()
        self.magnitudes.clear()
        self.sums.zero_()
        self.bins.clear()

    def _put_bins(self, bins: BinMeans) -> None:
        for centre, n, loss, logvar in zip(CENTRES, bins.count, bins.loss, bins.logvar, strict=True):
            self.metrics.set("evenkeel_samples_by_logsnr_ratio", n / max(1, sum(bins.count)), logsnr=str(centre))
            if n:
                self.metrics.set("evenkeel_loss_by_logsnr", loss, logsnr=str(centre))
                self.metrics.set("evenkeel_uncertainty_by_logsnr", logvar, logsnr=str(centre))

    def _put_magnitudes(self, metric: str, by_layer: dict[str, Tensor]) -> None:
        buckets = defaultdict(list)
        for name, value in by_layer.items():
            bucket = None if name.endswith((".clipped", ".attn_logit_max")) else magnitude_bucket(name)
            if bucket:
                buckets[bucket].append(float(value))
        for (side, resolution), values in buckets.items():
            for statistic, value in (("mean", math.fsum(values) / len(values)), ("max", max(values))):
                self.metrics.set(metric, value, side=side, resolution=str(resolution), statistic=statistic)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
