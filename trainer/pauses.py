"""How long a checkpoint and a snapshot hold up the loop, against one step: `python -m trainer.pauses [CONFIG] [key=value ...]`.

One process, synthetic latents, the real services writing to a temporary folder. The loop waits for the copy to host memory only;
what the writing threads take goes on beside it. Medians over alternating repetitions, so that a busy machine shifts all alike.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from data_pipeline.command import command_line
from trainer.checkpoint_writer import CheckpointWriter
from trainer.config import CONFIGS, load, to_dict
from trainer.engine import Engine, build_denoiser, start_process_group
from trainer.snapshot_writer import SnapshotWriter


def measure(config, run: Path, repeats: int) -> dict[str, float]:
    """Return median seconds of a step, of a checkpoint's and of a snapshot's pause, and of the writing beside the loop."""
    start_process_group()
    engine = Engine(config, build_denoiser(config))
    m, n = config.model, config.micro_batch
    x, sigma = torch.randn(n, m.channels, m.resolution, m.resolution, device=engine.device), torch.ones(n)
    labels = torch.zeros(n, dtype=torch.int64, device=engine.device)
    snapshots = SnapshotWriter(run, {"dtype": config.snapshots.dtype, "model": to_dict(config)["model"]}, 0, 1, None)
    checkpoints = CheckpointWriter(run, engine, None, snapshots, keep_last=1)
    times: dict[str, list[float]] = {"step": [], "checkpoint": [], "snapshot": [], "writing": []}
    for k in range(1, repeats + 2):
        began = time.perf_counter()
        engine.backward(engine.denoiser(x, sigma.to(engine.device), labels).square().sum())
        engine.step(1e-3, k * n)
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        stepped = time.perf_counter()
        for sigma_rel, average in zip(engine.ema.sigma_rel, engine.ema.averages, strict=True):
            pieces = snapshots.pieces(engine.owned(), average)
            snapshots.submit(k * n, sigma_rel, pieces, engine.buffers())
        submitted = time.perf_counter()
        checkpoints.save(k * n, 1, {})
        saved = time.perf_counter()
        checkpoints.wait()
        written = time.perf_counter()
        if k > 1:  # the first step allocates
            for name, seconds in zip(times, (stepped - began, saved - submitted, submitted - stepped, written - saved)):
                times[name].append(seconds)
    snapshots.close()
    return {name: statistics.median(seconds) for name, seconds in times.items()}


@command_line()
def main(argv=None) -> int:
    """Print the pauses of the loop against one step."""
    parser = argparse.ArgumentParser(prog="python -m trainer.pauses", description=main.__doc__)
    parser.add_argument("config", nargs="?", default=str(CONFIGS / "quickstart.yaml"))
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_intermixed_args(argv)
    config = load(options.config, options.overrides)
    config.global_batch = config.micro_batch  # one process, one micro-batch a step
    with tempfile.TemporaryDirectory() as folder:
        found = measure(config, Path(folder), options.repeats)
    for name, seconds in found.items():
        what = {"step": "one step", "writing": "writing both, beside the loop"}.get(name, f"pause for a {name}")
        print(f"{what:30s} {1000 * seconds:9.1f} ms  {seconds / found['step']:6.2f} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
