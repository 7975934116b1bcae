"""The optimizer step and what it holds: `python -m trainer.benchmark --table optimizer`.

Time: the step with projection, renormalisation and two averages against plain Adam on the same tensors, in alternation, so that the
ratio holds on a busy machine too. Memory: bytes per parameter on each of two gloo ranks, by ZeRO stage, measured and predicted.
"""

import json
import os
import socket
import subprocess
import sys
import time

import torch
from rich.table import Table

from trainer.config import ROOT, Config
from trainer.ema import ShardedEma
from trainer.engine import Engine, build_denoiser, start_process_group
from trainer.groups import Engine as EngineOptions
from trainer.groups import Model
from trainer.optimizer import MagnitudeAdam, whole_fragments
from trainer.size import bytes_per_parameter

SIGMA_REL = (0.05, 0.10)
SMALL = {"model_channels": 64, "resolution": 32, "channels": 4, "label_dim": 1000}  # the network of the table of steps
CASES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
KINDS = ("weights", "masters", "moments", "averages")


def _config(**engine) -> Config:
    return Config(
        run="", duration_images=2, global_batch=2, micro_batch=1, model=Model(**SMALL), engine=EngineOptions(**engine)
    )


def step_ratio(steps: int) -> dict:
    """Return the best seconds of each way of `steps` alternating steps on one process, and their ratio."""
    torch.set_num_threads(1)
    ways, best = {}, {}
    for way in ("plain Adam", "projection, Adam, two averages, renormalisation"):
        module = build_denoiser(_config())
        adam = torch.optim.Adam(module.parameters(), lr=1e-4, betas=(0.9, 0.99), fused=True)
        optimizer = None
        if way != "plain Adam":
            fragments = whole_fragments(module)
            optimizer = MagnitudeAdam(adam, fragments, ShardedEma(fragments, SIGMA_REL))
        for p in module.parameters():
            p.grad = torch.randn_like(p)
        ways[way] = (adam, optimizer)
    for step in range(1, steps + 2):
        for way, (adam, optimizer) in ways.items():
            if optimizer is not None:
                optimizer.schedule(1e-4, 1.0, 64 * step, 64)
            started = time.perf_counter()
            adam.step()
            seconds = time.perf_counter() - started
            best[way] = min(seconds, best.get(way, float("inf"))) if step > 1 else float("inf")
    plain, ours = best.values()
    return {"plain_adam_seconds": plain, "optimizer_seconds": ours, "ratio": ours / plain}


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
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if r == 0 else subprocess.DEVNULL,
        )
        for r in range(world)
    ]
    try:
        errors = ranks[0].communicate(timeout=600)[1]
    finally:
        for p in ranks[1:]:
            p.kill() if ranks[0].returncode else p.wait(60)
    if ranks[0].returncode:
        raise RuntimeError(f"measuring memory on {world} ranks failed:\n{errors.decode()}")
    with open(out) as f:
        return json.load(f)


def tables(ratio: dict, rows: list[dict]) -> list[Table]:
    """Lay both measurements out."""
    title = f"optimizer step, CPU, one thread, {SMALL['model_channels']} channels"
    first = Table(title=title, caption="best of alternating steps; goal: ratio at most 2")
    for column in ("plain Adam, ms", "with projection, two averages, renormalisation, ms", "ratio"):
        first.add_column(column, justify="right")
    values = (1e3 * ratio["plain_adam_seconds"], 1e3 * ratio["optimizer_seconds"], ratio["ratio"])
    first.add_row(f"{values[0]:.1f}", f"{values[1]:.1f}", f"{values[2]:.2f}")
    second = Table(title=f"bytes per parameter on rank 0 of {rows[0]['world']}, two averages, without gradients")
    for column in ("ZeRO stage", "dtype", *KINDS, "sum", "predicted"):
        second.add_column(column, justify="right")
    for r in rows:
        parts = [f"{r[kind]:.2f}" for kind in KINDS]
        total = sum(r[kind] for kind in KINDS)
        second.add_row(str(r["zero_stage"]), r["dtype"], *parts, f"{total:.2f}", f"{r['predicted']:.2f}")
    return [first, second]
