"""What the dashboards show: each panel's PromQL, legend and unit, over the metrics of trainer/metrics_table.py.

`dashboards.py` turns this into Grafana's JSON and `picture.py` draws the same queries. `needs` names what a run must have for
a panel to show anything: "" for nothing. $run is the dashboards' variable.
"""

from typing import NamedTuple

from trainer.metrics_table import BY_NAME

OWN_WORK = 'phase=~"data|forward"'  # what a rank does before it waits for others


class Panel(NamedTuple):
    """One graph; queries are (PromQL, legend)."""

    title: str
    unit: str  # Grafana's identifier
    queries: tuple[tuple[str, str], ...]
    needs: str = ""
    log: bool = False


class Board(NamedTuple):
    """One dashboard: rows of panels."""

    uid: str
    title: str
    panels: tuple[Panel, ...]


def of(name: str, labels: str = "") -> str:
    """Return a selector of the chosen runs for a metric that the table knows."""
    assert name in BY_NAME, f"{name} is not in trainer/metrics_table.py"
    return f'{name}{{run=~"$run"{"," if labels else ""}{labels}}}'


def plain(title: str, unit: str, name: str, legend: str = "{{run}}", needs: str = "", log: bool = False) -> Panel:
    """Return a panel that shows one metric as it is."""
    return Panel(title, unit, ((of(name), legend),), needs, log)


def buckets(title: str, name: str, statistic: str, unit: str = "none", needs: str = "") -> Panel:
    """Return the curves of the paper's Figures 3 and 15."""
    query = of(name, f'statistic="{statistic}"')
    return Panel(title, unit, ((query, "{{run}} {{side}} {{resolution}}"),), needs)


FLEET = Board(
    "evenkeel-fleet",
    "evenkeel: fleet",
    (
        Panel(
            "Progress",
            "percentunit",
            ((f"{of('evenkeel_images_seen')} / {of('evenkeel_duration_images')}", "{{run}}"),),
        ),
        plain("Time left", "s", "evenkeel_eta_seconds"),
        plain("Throughput", "short", "evenkeel_images_per_second"),
        Panel("Ranks that answer", "short", (('sum by (run) (up{run=~"$run"})', "{{run}}"),)),
        Panel(
            "Since the last step",
            "s",
            ((f"time() - min by (run) ({of('evenkeel_last_step_timestamp_seconds')})", "{{run}}"),),
        ),
        Panel("Age of the checkpoint", "s", ((f"time() - {of('evenkeel_checkpoint_timestamp_seconds')}", "{{run}}"),)),
        plain("Restarts", "short", "evenkeel_restarts_total"),
        plain("Requeues", "short", "evenkeel_requeues_total"),
        plain("Nodes left out by the preflight", "short", "evenkeel_preflight_failures_total"),
        plain("MFU", "percentunit", "evenkeel_mfu_ratio", "{{run}} of {{peak}}", "a known peak"),
        plain("FLOP/s of all ranks", "short", "evenkeel_flops_per_second"),
        plain("Loss", "none", "evenkeel_loss"),
        Panel(
            "Alerts",
            "short",
            (('sum by (alertname, run) (ALERTS{alertstate="firing",run=~"$run"})', "{{alertname}} {{run}}"),),
            "an alert",
        ),
    ),
)
ONE_RUN = Board(
    "evenkeel-run",
    "evenkeel: one run",
    (
        plain("Loss", "none", "evenkeel_loss"),
        plain("Denoising loss", "none", "evenkeel_denoising_loss", log=True),
        plain("Gradient norm", "none", "evenkeel_gradient_norm", log=True),
        plain("Learning rate", "none", "evenkeel_learning_rate"),
        plain("Images per second", "short", "evenkeel_images_per_second"),
        Panel(
            "Time of a step by phase, mean over ranks",
            "s",
            ((f"avg by (run, phase) ({of('evenkeel_phase_seconds')})", "{{phase}}"),),
        ),
        plain("Time of a step by rank", "s", "evenkeel_step_seconds", "rank {{rank}}"),
        Panel(
            "Own work by rank: data and forward",
            "s",
            ((f"sum by (run, rank) ({of('evenkeel_phase_seconds', OWN_WORK)})", "rank {{rank}}"),),
        ),
        plain("Clock of each rank", "short", "evenkeel_rank_clock_images", "rank {{rank}}"),
        Panel(
            "Since each rank's last forward",
            "s",
            ((f"time() - {of('evenkeel_last_forward_timestamp_seconds')}", "rank {{rank}}"),),
        ),
        plain("Memory by rank", "bytes", "evenkeel_memory_bytes", "rank {{rank}}"),
        plain("What each rank holds between steps", "bytes", "evenkeel_state_bytes", "rank {{rank}} {{kind}}"),
        plain("GPU utilisation", "percentunit", "evenkeel_gpu_utilization_ratio", "rank {{rank}}", "a GPU"),
        plain("GPU power", "watt", "evenkeel_gpu_power_watts", "rank {{rank}}", "a GPU"),
        plain("FLOP/s of one rank", "short", "evenkeel_rank_flops_per_second"),
        Panel(
            "FLOPs of an image: model and executed",
            "short",
            ((of("evenkeel_model_flops_per_image"), "model"), (of("evenkeel_hardware_flops_per_image"), "executed")),
        ),
        Panel(
            "Utilisation: model and executed FLOPs",
            "percentunit",
            ((of("evenkeel_mfu_ratio"), "model, of {{peak}}"), (of("evenkeel_hfu_ratio"), "executed, of {{peak}}")),
            "a known peak",
        ),
        plain("Non-finite steps", "short", "evenkeel_nonfinite_steps_total"),
        Panel(
            "Stalls",
            "s",
            (
                (of("evenkeel_snapshot_stall_seconds"), "snapshot"),
                (of("evenkeel_checkpoint_stall_seconds"), "checkpoint"),
            ),
            "snapshots and checkpoints",
        ),
        Panel(
            "Disk: free, and what snapshots will take",
            "bytes",
            ((of("evenkeel_disk_free_bytes"), "free"), (of("evenkeel_snapshots_left_bytes"), "snapshots to come")),
        ),
        plain(
            "What runs", "short", "evenkeel_run_info", "{{run}}: commit {{commit}}, config {{config}}, {{world}} ranks"
        ),
    ),
)
MAGNITUDES = Board(
    "evenkeel-magnitudes",
    "evenkeel: magnitudes",
    (
        buckets("Activations, max over layers (Fig. 3)", "evenkeel_activation_magnitude", "max"),
        buckets("Weights, max over layers (Fig. 3)", "evenkeel_weight_magnitude", "max"),
        buckets("Activations, mean over layers (Fig. 15)", "evenkeel_activation_magnitude", "mean"),
        buckets("Weights, mean over layers (Fig. 15)", "evenkeel_weight_magnitude", "mean"),
        Panel("RMS of every learned layer's weight", "none", ((of("evenkeel_layer_weight_rms"), "{{layer}}"),)),
        plain("Largest deviation of a row's RMS", "none", "evenkeel_row_rms_deviation", log=True),
        Panel(
            "Relative size of updates",
            "none",
            ((of("evenkeel_update_ratio"), "{{run}} {{side}} {{resolution}}"),),
            log=True,
        ),
        plain("Gains", "none", "evenkeel_gain", "{{layer}}"),
        Panel(
            "Largest attention logit",
            "none",
            ((of("evenkeel_attention_logit_max"), "{{run}} {{side}} {{resolution}}"),),
            "attention",
        ),
        buckets(
            "Share of clipped activations, max over blocks", "evenkeel_clipped_ratio", "max", "percentunit", "clipping"
        ),
        plain("Parameters", "short", "evenkeel_parameters", "{{run}} {{kind}}"),
        plain(
            "Function evaluations of ODE blocks", "short", "evenkeel_function_evaluations", "{{block}}", "ODE blocks"
        ),
    ),
)
NOISE = Board(
    "evenkeel-noise",
    "evenkeel: noise levels",
    (
        Panel("Loss by logSNR", "none", ((of("evenkeel_loss_by_logsnr"), "logSNR {{logsnr}}"),), log=True),
        Panel("Learned uncertainty by logSNR", "none", ((of("evenkeel_uncertainty_by_logsnr"), "logSNR {{logsnr}}"),)),
        Panel(
            "Share of draws by logSNR", "percentunit", ((of("evenkeel_samples_by_logsnr_ratio"), "logSNR {{logsnr}}"),)
        ),
        Panel(
            "Loss over its learned level: uncertainty that keeps up stays at 1",
            "none",
            ((f"{of('evenkeel_loss_by_logsnr')} / exp({of('evenkeel_uncertainty_by_logsnr')})", "logSNR {{logsnr}}"),),
        ),
    ),
)
DATA = Board(
    "evenkeel-data",
    "evenkeel: data",
    (
        Panel(
            "Samples read per second",
            "short",
            ((f"sum by (run) (rate({of('evenkeel_samples_read_total')}[$__rate_interval]))", "{{run}}"),),
        ),
        Panel(
            "Bytes read per second",
            "Bps",
            ((f"sum by (run) (rate({of('evenkeel_bytes_read_total')}[$__rate_interval]))", "{{run}}"),),
        ),
        Panel(
            "Share of time that ranks wait for samples",
            "percentunit",
            ((f"max by (run) (rate({of('evenkeel_data_wait_seconds_total')}[$__rate_interval]))", "{{run}}"),),
        ),
        plain("Epochs", "none", "evenkeel_epoch_ratio"),
        Panel(
            "Failed checksums and replaced samples",
            "short",
            (
                (f"sum by (run) ({of('evenkeel_checksum_failures_total')})", "{{run}} failed"),
                (f"sum by (run) ({of('evenkeel_replaced_samples_total')})", "{{run}} replaced"),
            ),
        ),
        Panel(
            "Quarantine",
            "short",
            (
                (f"max by (run) ({of('evenkeel_quarantined_shards')})", "{{run}} shards"),
                (f"max by (run) ({of('evenkeel_quarantined_samples')})", "{{run}} samples"),
            ),
        ),
        Panel(
            "Cache: hits and retries",
            "short",
            (
                (f"sum by (run) ({of('evenkeel_cache_hits_total')})", "{{run}} hits"),
                (f"sum by (run) ({of('evenkeel_fetch_retries_total')})", "{{run}} retries"),
            ),
        ),
        Panel("Fetched", "bytes", ((f"sum by (run) ({of('evenkeel_fetched_bytes_total')})", "{{run}}"),)),
    ),
)
EMA = Board(
    "evenkeel-ema",
    "evenkeel: EMA sweep",
    (
        Panel(
            "What the next update adds to each average: 1 - beta",
            "none",
            ((f"1 - {of('evenkeel_ema_beta')}", "{{run}} sigma_rel {{sigma_rel}}"),),
            log=True,
        ),
        plain("Snapshots written", "short", "evenkeel_snapshots_written_total"),
        Panel(
            "Images between snapshots written",
            "short",
            ((f"{of('evenkeel_images_seen')} / {of('evenkeel_snapshots_written_total')}", "{{run}}"),),
            "snapshots and checkpoints",
        ),
        Panel("Snapshots: on disk still to come", "bytes", ((of("evenkeel_snapshots_left_bytes"), "{{run}}"),)),
        Panel(
            "Snapshots: in host memory, not on disk yet",
            "bytes",
            ((f"sum by (run) ({of('evenkeel_snapshot_queue_bytes')})", "{{run}}"),),
        ),
        Panel(
            "Writes that failed",
            "short",
            (
                (of("evenkeel_snapshot_write_failures_total"), "{{run}} snapshots"),
                (f"max by (run) ({of('evenkeel_checkpoint_write_failures_total')})", "{{run}} checkpoints"),
            ),
        ),
        plain("Clock of the newest checkpoint", "short", "evenkeel_checkpoint_clock_images"),
    ),
)

BOARDS = (FLEET, ONE_RUN, MAGNITUDES, NOISE, DATA, EMA)
