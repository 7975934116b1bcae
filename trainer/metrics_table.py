"""The one table of metrics: everything a run exports, to Prometheus and to metrics.jsonl, under the same names. Imports nothing.

`scope` rank: every rank serves its own, so that stragglers and hangs show; run: rank 0 serves the reduced value. `present` says
on which runs a row is there, where it is not on all. Counters go on after a resume, on any number of ranks.
FLOPs are 2 per multiply-accumulate; a training image costs three forwards.
"""

from typing import NamedTuple


class Metric(NamedTuple):
    """One row: its name is evenkeel_<thing>_<unit>[_total]."""

    name: str
    type: str  # gauge | counter
    unit: str
    labels: tuple[str, ...]
    scope: str  # run | rank
    help: str
    present: str = ""  # "": after the first publication of every run


# fmt: off
# name, type, unit, labels, scope, help
TABLE = tuple(Metric(*row) for row in (
    # the clock
    ("evenkeel_images_seen", "gauge", "images", (), "run", "The run's clock: images trained on so far"),
    ("evenkeel_duration_images", "gauge", "images", (), "run", "Clock at which the run ends"),
    ("evenkeel_epoch_ratio", "gauge", "epochs", (), "run", "Passes over the data so far"),
    ("evenkeel_eta_seconds", "gauge", "seconds", (), "run", "Time left at the present throughput"),
    ("evenkeel_attempt", "gauge", "starts", (), "run", "Which start of the run this is"),
    ("evenkeel_restarts_total", "counter", "starts", (), "run", "Starts of the run after its first"),
    ("evenkeel_requeues_total", "counter", "starts", (), "run", "Times the scheduler has started this job again"),
    ("evenkeel_preflight_failures_total", "counter", "nodes", (), "run",
     "Nodes that a preflight found unfit and left out of the job; logs/excluded.json says why"),
    # throughput
    ("evenkeel_images_per_second", "gauge", "images/s", (), "run", "Throughput since the last publication, stalls included"),
    ("evenkeel_step_seconds", "gauge", "seconds", (), "rank", "Mean time of an optimizer step since the last publication"),
    ("evenkeel_phase_seconds", "gauge", "seconds", ("phase",), "rank",
     "Mean time per step in one part of it; communication (inside the others) is that of the one step before the publication"),
    ("evenkeel_last_step_timestamp_seconds", "gauge", "unix seconds", (), "rank", "When this rank ended its last step"),
    ("evenkeel_last_forward_timestamp_seconds", "gauge", "unix seconds", (), "rank",
     "When this rank ended its last forward, before any collective: in a hang the oldest is the culprit"),
    ("evenkeel_rank_clock_images", "gauge", "images", (), "rank", "The clock after this rank's last step"),
    ("evenkeel_memory_bytes", "gauge", "bytes", (), "rank", "Peak memory of this rank: device if there is one, else resident"),
    ("evenkeel_gpu_utilization_ratio", "gauge", "1", (), "rank", "Share of the last second in which a kernel ran (NVML)",
     "GPU with nvidia-ml-py"),
    ("evenkeel_gpu_power_watts", "gauge", "W", (), "rank", "Power that the GPU draws (NVML)", "GPU with nvidia-ml-py"),
    ("evenkeel_state_bytes", "gauge", "bytes", ("kind",), "rank",
     "What this rank holds between steps: weights of the forward, masters, Adam's moments, averages"),
    ("evenkeel_model_flops_per_image", "gauge", "FLOP", (), "run",
     "Model FLOPs of training on one image, forward and backward"),
    ("evenkeel_flops_per_second", "gauge", "FLOP/s", (), "run", "Model FLOP/s of all ranks"),
    ("evenkeel_rank_flops_per_second", "gauge", "FLOP/s", (), "run", "Model FLOP/s of one rank (one GPU), mean over ranks"),
    ("evenkeel_hardware_flops_per_image", "gauge", "FLOP", (), "run",
     "FLOPs executed for one image: the model's, and those of forwards repeated by activation checkpointing"),
    ("evenkeel_mfu_ratio", "gauge", "1", ("peak",), "run",
     "Model FLOP/s of a rank over its device's peak, which the label names", "device in trainer/peaks.py, or metrics.peak_flops"),
    ("evenkeel_hfu_ratio", "gauge", "1", ("peak",), "run",
     "The same with the FLOPs executed, recomputation included", "device in trainer/peaks.py, or metrics.peak_flops"),
    # learning
    ("evenkeel_loss", "gauge", "nats per element", (), "run", "Training objective with uncertainty, mean over elements"),
    ("evenkeel_denoising_loss", "gauge", "1", (), "run", "EDM-weighted squared error without uncertainty, mean over elements"),
    ("evenkeel_loss_by_logsnr", "gauge", "1", ("logsnr",), "run",
     "evenkeel_denoising_loss by noise level: bins one wide about logsnr = -10 ... 10, the outermost open; 1: knows nothing"),
    ("evenkeel_uncertainty_by_logsnr", "gauge", "nats", ("logsnr",), "run",
     "Learned uncertainty u by noise level, near the log of evenkeel_loss_by_logsnr where it is learned"),
    ("evenkeel_samples_by_logsnr_ratio", "gauge", "1", ("logsnr",), "run",
     "Share of the noise levels drawn since the last publication"),
    ("evenkeel_learning_rate", "gauge", "1", (), "run", "Learning rate of the last step"),
    ("evenkeel_gradient_norm", "gauge", "1", (), "run", "Norm of the last step's gradient, before projection"),
    ("evenkeel_ema_beta", "gauge", "1", ("sigma_rel",), "run", "Factor of the average in its last update"),
    ("evenkeel_update_ratio", "gauge", "1", ("side", "resolution"), "run",
     "Size of Adam's last update relative to the weights, by encoder/decoder and resolution"),
    # magnitudes (Karras et al. 2024, Figures 3 and 15)
    ("evenkeel_activation_magnitude", "gauge", "RMS", ("side", "resolution", "statistic"), "run",
     "Activation magnitude of learned layers by encoder/decoder and resolution, mean or max over layers"),
    ("evenkeel_weight_magnitude", "gauge", "RMS", ("side", "resolution", "statistic"), "run",
     "Weight magnitude of learned layers by encoder/decoder and resolution, mean or max over layers"),
    ("evenkeel_row_rms_deviation", "gauge", "RMS", (), "run", "Largest |RMS - (1 - 1e-4)| over all normalised weight rows"),
    ("evenkeel_function_evaluations", "gauge", "evaluations", ("block",), "rank",
     "How often an ODE block evaluated its right-hand side in the last forward", "network with ODE blocks"),
    ("evenkeel_parameters", "gauge", "parameters", ("kind",), "run",
     "Size of the network with its uncertainty head: trainable, and with its frozen tables, which published totals count"),
    ("evenkeel_layer_weight_rms", "gauge", "RMS", ("layer",), "run", "RMS of a learned layer's weight: it must be 1"),
    ("evenkeel_gain", "gauge", "1", ("layer",), "run", "A learned gain"),
    ("evenkeel_attention_logit_max", "gauge", "1", ("side", "resolution"), "run",
     "Largest attention logit; cosine attention bounds it by the root of the head's channels", "network with attention"),
    ("evenkeel_clipped_ratio", "gauge", "1", ("side", "resolution", "statistic"), "run",
     "Share of activations that were clipped, mean or max over blocks", "model.clip_act above 0"),
    # faults, data and files
    ("evenkeel_nonfinite_steps_total", "counter", "steps", (), "run", "Steps with a non-finite gradient"),
    ("evenkeel_samples_read_total", "counter", "samples", (), "rank", "Samples read and verified by this rank"),
    ("evenkeel_bytes_read_total", "counter", "bytes", (), "rank", "Bytes of samples read by this rank"),
    ("evenkeel_data_wait_seconds_total", "counter", "seconds", (), "rank", "Time this rank waited for samples"),
    ("evenkeel_checksum_failures_total", "counter", "samples", (), "rank", "Samples that failed their checksum"),
    ("evenkeel_replaced_samples_total", "counter", "samples", (), "rank", "Bad samples replaced by others"),
    ("evenkeel_quarantined_samples", "gauge", "samples", (), "rank", "Samples in quarantine"),
    ("evenkeel_quarantined_shards", "gauge", "shards", (), "rank", "Shards in quarantine"),
    ("evenkeel_cache_hits_total", "counter", "files", (), "rank", "Files of a remote dataset found in the local cache"),
    ("evenkeel_fetched_bytes_total", "counter", "bytes", (), "rank", "Bytes of a remote dataset fetched by this rank"),
    ("evenkeel_fetch_retries_total", "counter", "tries", (), "rank", "Fetches of a remote dataset that had to be tried again"),
    ("evenkeel_snapshots_written_total", "counter", "files", (), "run", "EMA snapshots written"),
    ("evenkeel_snapshot_stall_seconds", "gauge", "seconds", (), "run", "Time the last snapshot held up the loop",
     "after a snapshot"),
    ("evenkeel_snapshots_left_bytes", "gauge", "bytes", (), "run", "What the snapshots still to come will take on disk"),
    ("evenkeel_disk_free_bytes", "gauge", "bytes", (), "run", "Free space on the run directory's file system"),
    ("evenkeel_snapshot_queue_bytes", "gauge", "bytes", (), "rank", "Host memory of EMA snapshots that are not on disk yet"),
    ("evenkeel_snapshot_write_failures_total", "counter", "attempts", (), "run", "Snapshot writes that a full disk refused"),
    ("evenkeel_checkpoint_write_failures_total", "counter", "saves", (), "rank", "Checkpoints that could not be written"),
    ("evenkeel_checkpoint_clock_images", "gauge", "images", (), "run", "Clock of the newest checkpoint"),
    ("evenkeel_checkpoint_timestamp_seconds", "gauge", "unix seconds", (), "run",
     "When the newest checkpoint was written; without one, when this start began"),
    ("evenkeel_checkpoint_stall_seconds", "gauge", "seconds", (), "run", "Time the last checkpoint held up the loop",
     "after a checkpoint"),
    ("evenkeel_run_info", "gauge", "1", ("commit", "config", "world"), "run", "Constant 1; its labels say what is running"),
))
# fmt: on

BY_NAME = {metric.name: metric for metric in TABLE}


def markdown() -> str:
    """Return the text of docs/metrics.md; `python -m trainer.metrics_table > docs/metrics.md` writes it."""
    lines = [
        "# Metrics",
        "",
        "Generated from `trainer/metrics_table.py`. Prometheus and `metrics.jsonl` use the same names. Scope *rank*: every rank",
        "serves its own value; *run*: rank 0 serves the reduced one. FLOPs are 2 per multiply-accumulate.",
        "",
        "| name | type | unit | labels | scope | meaning | where |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for m in TABLE:
        cells = (f"`{m.name}`", m.type, m.unit, ", ".join(m.labels), m.scope, m.help, m.present or "every run")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
