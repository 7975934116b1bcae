"""The optimizer step and what it holds: `python -m trainer.benchmark --table optimizer`.

Time: the step with projection, renormalisation and two averages against plain Adam on the same tensors, in alternation, so that the
ratio holds on a busy machine too. Memory: bytes per parameter on each of two gloo ranks, by ZeRO stage, measured and predicted.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from trainer.child import die_with_parent
from trainer.config import ROOT, Config
from trainer.ema import ShardedEma
from trainer.engine import Engine, build_denoiser, start_process_group
from trainer.fragments import whole_fragments
from trainer.groups import Engine as EngineOptions
from trainer.groups import Model
from trainer.optimizer import MagnitudeAdam
from trainer.size import bytes_per_parameter

SIGMA_REL = (0.05, 0.10)
SMALL = {"model_channels": 64, "resolution": 32, "channels": 4, "label_dim": 1000}  # the network of the table of steps
CASES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
KINDS = ("weights", "masters", "moments", "averages")


def _config(**engine) -> Config:
    return Config(
        run="", duration_images=2, global_batch=2, micro_batch=1, model=Model(**SMALL), engine=EngineOptions(**engine)
    )


WAYS = ("plain Adam", "in plain torch", "in one pass")
# read and written, with two averages: of plain Adam w, g, m, v and w, m, v
BYTES = {"plain Adam": 28, "in one pass": 4 + 24 + 20}  # the norm of the gradients is a pass of its own


def step_ratio(steps: int) -> dict:
    """Return the median seconds of each way over `steps` alternating rounds on one process, and the median ratio to plain Adam."""
    torch.set_num_threads(1)
    ways, taken = {}, {way: [] for way in WAYS}
    for way in WAYS:
        module = build_denoiser(_config())
        adam = torch.optim.Adam(module.parameters(), lr=1e-4, betas=(0.9, 0.99), fused=True)
        optimizer = None
        if way != "plain Adam":
            fragments = whole_fragments(module)
            ema = ShardedEma(fragments, SIGMA_REL)
            optimizer = MagnitudeAdam(adam, fragments, ema, one_pass=way == "in one pass")
        for p in module.parameters():
            p.grad = torch.randn_like(p)
        ways[way] = (adam, optimizer)
    for step in range(1, steps + 2):
        for way, (adam, optimizer) in ways.items():
            if optimizer is not None:
                optimizer.schedule(1e-4, 1.0, 64 * step, 64)
            started = time.perf_counter()
            adam.step()
            if step > 1:
                taken[way].append(time.perf_counter() - started)
    number = sum(p.numel() for p in module.parameters())
    results = {}
    for way, seconds in taken.items():
        middle, ratios = median(seconds), [a / b for a, b in zip(seconds, taken["plain Adam"], strict=True)]
        speed = BYTES[way] * number / middle if way in BYTES else None
        results[way] = {
            "seconds": middle,
            "best_seconds": min(seconds),
            "ratio": median(ratios),
            "bytes_per_second": speed,
        }
    return results


def held(rank_out: str) -> None:
    """Write what this rank of a group holds per parameter in each case, from rank 0; run by `memory`."""
    rank, world = start_process_group()
    results = []
    for stage, weights in CASES:
        engine = Engine(_config(zero_stage=stage, weights=weights), build_denoiser(_config()))
        engine.backward(sum(p.sum() for p in _outputs(engine)))
        engine.step(1e-3, 2)
        total = engine.num_parameters()
        measured = {kind: engine.held_bytes()[kind] / total for kind in KINDS}
        parts = bytes_per_parameter(len(SIGMA_REL), weights)[str(stage)]
        predicted = (
            parts["replicated"] + parts["sharded"] / world - (4 if stage < 2 else 4 / world)
        )  # but the gradients
        results.append({"zero_stage": stage, "dtype": weights, "world": world, **measured, "predicted": predicted})
        engine._deepspeed.destroy()
    if rank == 0:
        with open(rank_out, "w") as f:
            json.dump(results, f)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _outputs(engine: Engine):
    x, sigma = torch.randn(1, SMALL["channels"], SMALL["resolution"], SMALL["resolution"]), torch.ones(1)
    return engine.denoiser(x, sigma, torch.zeros(1, dtype=torch.long), return_logvar=True)


def memory(folder: str, world: int = 2) -> list[dict]:
    """Run `held` on gloo ranks of this machine and return what it found."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    out = os.path.join(folder, "held.json")
    variables = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": world}
    known = (
        os.environ | {k: str(v) for k, v in variables.items()} | {"GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    )
    command = [sys.executable, "-c", f"from trainer.optimizer_benchmark import held; held({out!r})"]
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=known | {"RANK": str(r), "LOCAL_RANK": str(r), "CUDA_VISIBLE_DEVICES": ""},
            preexec_fn=die_with_parent,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if r == 0 else subprocess.DEVNULL,
        )
        for r in range(world)
    ]
    try:
        errors = ranks[0].communicate(timeout=600)[1]
        for p in ranks[1:]:
            p.kill() if ranks[0].returncode else p.wait(60)
    except BaseException:  # Ctrl-C, or one that hangs: none outlives this
        for p in ranks:
            p.kill()
            p.wait()
        raise
    if ranks[0].returncode:
        raise RuntimeError(f"measuring memory on {world} ranks failed:\n{errors.decode()}")
    with open(out) as f:
        return json.load(f)


def tables(ratio: dict, rows: list[dict]) -> list[Table]:
    """Lay both measurements out."""
    title = f"optimizer step, CPU, one thread, {SMALL['model_channels']} channels"
    caption = (
        "medians over alternating steps; goal: ratio at most 2. Ours: projection, Adam, two averages, renormalisation; "
    )
    caption += "in one pass: with engine.compile=true, and on GPUs"
    first = Table(title=title, caption=caption)
    for column in ("way", "ms", "of plain Adam", "GB/s"):
        first.add_column(column, justify="left" if column == "way" else "right")
    for way, r in ratio.items():
        speed = f"{r['bytes_per_second'] / 1e9:.1f}" if r["bytes_per_second"] else ""
        first.add_row(way, f"{1e3 * r['seconds']:.1f}", f"{r['ratio']:.2f}", speed)
    second = Table(title=f"bytes per parameter on rank 0 of {rows[0]['world']}, two averages, without gradients")
    for column in ("ZeRO stage", "dtype", *KINDS, "sum", "predicted"):
        second.add_column(column, justify="right")
    for r in rows:
        parts = [f"{r[kind]:.2f}" for kind in KINDS]
        total = sum(r[kind] for kind in KINDS)
        second.add_row(str(r["zero_stage"]), r["dtype"], *parts, f"{total:.2f}", f"{r['predicted']:.2f}")
    return [first, second]


def run(options: argparse.Namespace) -> int:
    """Measure and print both tables."""
    if options.steps < 1:
        raise ValueError(f"--steps {options.steps}: must be at least 1")
    ratio = step_ratio(options.steps)
    with tempfile.TemporaryDirectory() as folder:
        rows = memory(folder)
    if options.json:
        print(json.dumps({"optimizer_step_cpu": ratio, "bytes_per_parameter": rows}))
        return 0
    for each in tables(ratio, rows):
        Console(width=None if sys.stdout.isatty() else 120).print(each)
    return 0
