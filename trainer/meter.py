"""Measures a run between two publications: throughput, phases of a step, losses, magnitudes.

Sums stay on the device until they are published, so that no step waits for a measurement.
"""

import math
import os
import time
from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.reader import Source
from trainer import flops, hardware, magnitudes
from trainer.bins import CENTRES, BinMeans, Bins, means
from trainer.config import Config
from trainer.ema_profiles import beta
from trainer.engine import Engine
from trainer.loss import LossParts
from trainer.metrics import Metrics
from trainer.profiles import Profiles
from trainer.snapshot_plan import clocks_of

# what the source counts in this start of the run
COUNTED = {
    "evenkeel_samples_read_total": "samples",
    "evenkeel_bytes_read_total": "bytes",
    "evenkeel_data_wait_seconds_total": "wait_seconds",
    "evenkeel_checksum_failures_total": "checksum_failures",
    "evenkeel_replaced_samples_total": "replaced",
    "evenkeel_cache_hits_total": "cache_hits",
    "evenkeel_fetched_bytes_total": "fetched_bytes",
    "evenkeel_fetch_retries_total": "fetch_retries",
}
PHASES = ("data", "forward", "backward", "optimizer", "snapshot", "checkpoint", "metrics")
SNAPSHOT_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}  # per element


class Meter:
    """Collects what happens in each step and publishes it every `metrics.every_images`."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        source: Source,
        metrics: Metrics,
        clock: int,
        cost: flops.Counts,
        bad_before: int = 0,
    ):
        self.config, self.engine, self.source, self.metrics, self.cost = config, engine, source, metrics, cost
        recomputed = cost.recomputed_flops_per_image if config.engine.activation_checkpointing else 0
        self.hardware_flops = cost.training_flops_per_image + recomputed
        self.peak = _peak(config, engine.device)
        self.bad_before = bad_before  # non-finite steps that count for nothing here
        self.profiles = Profiles(metrics.run, metrics.rank, engine.device, config.metrics.profile_at_images)
        self.elements = config.model.channels * config.model.resolution**2
        self.clock = self.published_clock = clock
        self.published_time = time.perf_counter()
        self.phases = hardware.Phases(engine.device)
        self.phase = self.phases.measure
        self.sums = torch.zeros(3, device=engine.device)  # loss, denoising loss, samples
        self.bins = Bins(engine.device, config.model.sigma_data)
        self.magnitudes: dict[str, Tensor] = {}
        self.recent: deque[tuple[Tensor, Tensor]] = deque(
            maxlen=2 * engine.micro_steps
        )  # positions and losses of two steps
        metrics.set("evenkeel_duration_images", config.duration_images)
        metrics.set("evenkeel_model_flops_per_image", cost.training_flops_per_image)
        metrics.set("evenkeel_hardware_flops_per_image", self.hardware_flops)
        metrics.set("evenkeel_attempt", metrics.attempt)
        metrics.set("evenkeel_restarts_total", metrics.attempt - 1)
        metrics.set("evenkeel_requeues_total", int(os.environ.get("EVENKEEL_REQUEUES", "0")))
        metrics.set("evenkeel_preflight_failures_total", int(os.environ.get("EVENKEEL_PREFLIGHT_FAILURES", "0")))
        self.engine.time_collectives(self._due(clock + config.global_batch))
        for kind, held in engine.held_bytes().items():
            metrics.set("evenkeel_state_bytes", held, kind=kind)

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
        self.profiles.step(self.clock, clock)
        self.clock = clock
        self.metrics.set("evenkeel_last_step_timestamp_seconds", time.time())
        self.metrics.set("evenkeel_rank_clock_images", clock)
        due = self._due(clock) or clock >= self.config.duration_images
        if due:
            self._publish(learning_rate)
        if self._due(clock + self.config.global_batch):
            self.engine.time_collectives(
                True
            )  # in the step that is to be published, where magnitudes are collected as well
        return due

    def check_finite(self) -> None:
        """Raise FloatingPointError on every rank when the policy says that the run must not go on; it knows a step later."""
        policy, steps = self.config.optimizer, self.engine.optimizer.nonfinite_steps() - self.bad_before
        if (
            steps <= 0
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
        with self.phase("metrics"):
            self._put_clock()
            self._put_learning(learning_rate)
            self._put_magnitudes()
            self.count_data()
            self._put_machine()
        self.metrics.publish(self.clock)
        self.published_clock, self.published_time = self.clock, time.perf_counter()
        self.magnitudes.clear()
        self.sums.zero_()
        self.bins.clear()

    def _put_clock(self) -> None:
        put, now = self.metrics.set, time.perf_counter()
        elapsed, images = now - self.published_time, self.clock - self.published_clock
        rate = images / elapsed
        put("evenkeel_images_seen", self.clock)
        put("evenkeel_epoch_ratio", self.clock / self.source.num_samples)
        put("evenkeel_images_per_second", rate)
        put("evenkeel_eta_seconds", (self.config.duration_images - self.clock) / rate)
        put("evenkeel_flops_per_second", rate * self.cost.training_flops_per_image)
        per_rank = rate / self.engine.world
        put("evenkeel_rank_flops_per_second", per_rank * self.cost.training_flops_per_image)
        if self.peak is not None:
            name, peak = self.peak
            put("evenkeel_mfu_ratio", per_rank * self.cost.training_flops_per_image / peak, peak=name)
            put("evenkeel_hfu_ratio", per_rank * self.hardware_flops / peak, peak=name)
        steps = images / self.config.global_batch
        put("evenkeel_step_seconds", elapsed / steps)
        seconds = self.phases.take()
        for name in PHASES:
            put("evenkeel_phase_seconds", seconds.get(name, 0.0) / steps, phase=name)
        put("evenkeel_phase_seconds", self.engine.time_collectives(False), phase="communication")

    def _put_learning(self, learning_rate: float) -> None:
        put, optimizer = self.metrics.set, self.engine.optimizer
        if self.engine.world > 1:
            dist.all_reduce(self.sums)
        loss, denoising_loss, count = self.sums.tolist()
        put("evenkeel_loss", loss / count)
        put("evenkeel_denoising_loss", denoising_loss / count)
        self._put_bins(means(self.bins.total()))
        put("evenkeel_learning_rate", learning_rate)
        put("evenkeel_gradient_norm", float(optimizer.gradient_norm))
        put("evenkeel_nonfinite_steps_total", float(optimizer.num_nonfinite))
        for sigma_rel, gamma in zip(self.engine.ema.sigma_rel, self.engine.ema.gammas, strict=True):
            put("evenkeel_ema_beta", beta(self.clock, self.config.global_batch, gamma), sigma_rel=f"{sigma_rel:.3f}")

    def _put_bins(self, bins: BinMeans) -> None:
        for centre, n, loss, logvar in zip(CENTRES, bins.count, bins.loss, bins.logvar, strict=True):
            self.metrics.set("evenkeel_samples_by_logsnr_ratio", n / max(1, sum(bins.count)), logsnr=str(centre))
            for name, value in (("evenkeel_loss_by_logsnr", loss), ("evenkeel_uncertainty_by_logsnr", logvar)):
                if n:
                    self.metrics.set(name, value, logsnr=str(centre))
                else:
                    self.metrics.forget(name, logsnr=str(centre))

    def _put_magnitudes(self) -> None:
        put = self.metrics.set
        put("evenkeel_row_rms_deviation", float(self.engine.optimizer.row_rms_deviation()))
        weights = magnitudes.measure_weights(self.engine)
        layers = magnitudes.layer_rms(weights)
        for metric, of in (("evenkeel_layer_weight_rms", layers), ("evenkeel_gain", magnitudes.gains(weights))):
            for layer, value in of.items():
                put(metric, value, layer=layer)
        for (side, resolution), value in magnitudes.update_ratios(weights).items():
            put("evenkeel_update_ratio", value, side=side, resolution=str(resolution))
        collected = magnitudes.reduce_collected(self.magnitudes, self.engine.world)
        self._put_buckets("evenkeel_weight_magnitude", magnitudes.by_bucket(layers))
        self._put_buckets("evenkeel_activation_magnitude", magnitudes.by_bucket(collected))
        self._put_buckets("evenkeel_clipped_ratio", magnitudes.by_bucket(collected, "clipped"))
        for (side, resolution), values in magnitudes.by_bucket(collected, "attn_logit_max").items():
            put("evenkeel_attention_logit_max", max(values), side=side, resolution=str(resolution))

    def _put_buckets(self, metric: str, buckets: dict[magnitudes.Bucket, list[float]]) -> None:
        for (side, resolution), values in buckets.items():
            for statistic, value in (("mean", math.fsum(values) / len(values)), ("max", max(values))):
                self.metrics.set(metric, value, side=side, resolution=str(resolution), statistic=statistic)

    def count_data(self) -> None:
        """Put what the source has counted."""
        read = self.source.counters()
        for metric, key in COUNTED.items():
            self.metrics.count(metric, read.get(key, 0))
        for what in ("samples", "shards"):
            self.metrics.set(f"evenkeel_quarantined_{what}", read.get(f"quarantined_{what}", 0))

    def _put_machine(self) -> None:
        put, plan = self.metrics.set, self.config.snapshots
        put("evenkeel_memory_bytes", hardware.peak_memory(self.engine.device))
        put("evenkeel_parameters", self.cost.trainable_parameters, kind="trainable")
        put("evenkeel_parameters", self.cost.parameters + self.cost.frozen_table_values, kind="with_frozen_tables")
        for block, evaluations in self.engine.module.function_evaluations().items():
            put("evenkeel_function_evaluations", evaluations, block=block)
        for name, value in hardware.gpu_load(self.engine.device).items():
            put(name, value)
        put("evenkeel_disk_free_bytes", hardware.disk_free(self.metrics.run))
        left = sum(clock > self.clock for clock in clocks_of(self.config.duration_images, plan.every_images))
        one = self.cost.parameters * SNAPSHOT_BYTES[plan.dtype]
        put("evenkeel_snapshots_left_bytes", left * len(self.engine.ema.sigma_rel) * one)


def _peak(config: Config, device: torch.device) -> tuple[str, float] | None:
    """Return (name, FLOP/s) of the peak that MFU is measured against, None where there is none."""
    if config.metrics.peak_flops:
        return "metrics.peak_flops", config.metrics.peak_flops
    if device.type != "cuda":
        return None
    return flops.peak_flops(torch.cuda.get_device_name(device), config.engine.activations)
