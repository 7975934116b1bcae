"""Measure all-reduce, reduce-scatter and all-gather of a run's own sizes: `python -m trainer.comm_bench CONFIG [key=value ...]`.

One process per rank, as in training (torchrun, Slurm, or alone); NCCL where every rank has a GPU, else gloo. Bytes are what
each rank sends in a ring. The step of the config's ZeRO stage is predicted from these rows, then measured.
"""

import argparse
import json
import statistics
import sys
import time

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from data_pipeline.command import command_line
from trainer import communication, size
from trainer.communication import RING, Traffic
from trainer.config import load, to_dict
from trainer.engine import device, start_process_group
from trainer.flops import count
from trainer.groups import Config
from trainer.zero import BUCKET_ELEMENTS

# messages beyond this are measured at this size: a host has less memory, and gloo less speed, than GPUs
LIMIT_BYTES = {"cpu": 2**26, "cuda": 2**31}
TYPES = {4: torch.float32, 2: torch.bfloat16}


class Exchange:
    """One collective on this rank, ready to be repeated."""

    def __init__(self, operation: str, payload_bytes: int, element_bytes: int, world: int):
        self.operation = operation
        part = max(1, payload_bytes // element_bytes // world)
        self.payload_bytes = part * world * element_bytes
        where = {"dtype": TYPES[element_bytes], "device": device()}
        self.whole, self.part = torch.zeros(part * world, **where), torch.zeros(part, **where)

    def __call__(self) -> None:
        if self.operation == "all-reduce":
            dist.all_reduce(self.whole)
        elif self.operation == "reduce-scatter":
            dist.reduce_scatter_tensor(self.part, self.whole)
        else:
            dist.all_gather_into_tensor(self.whole, self.part)


def seconds_of(work, repeats: int) -> float:
    """Return the median time of `work` over the repetitions, on the slowest rank, after one for warming up."""
    measured = []
    for _ in range(repeats + 1):
        _wait()
        dist.barrier()
        started = time.perf_counter()
        work()
        _wait()
        measured.append(time.perf_counter() - started)
    worst = torch.tensor(statistics.median(measured[1:]), device=device())
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)


def _wait() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


def measure(traffic: list[Traffic], world: int, weights: str, repeats: int, limit: int) -> dict:
    """Return the operations' bandwidths and the step's time, predicted from them and measured."""
    share = (world - 1) / world
    rows, work = [], []
    scaled = min(1.0, limit / max(t.payload_bytes for t in traffic))  # the same for all: the step keeps its proportions
    for t in traffic:
        element = communication.WEIGHT_BYTES[weights] if "weights" in t.what else communication.GRADIENT_BYTES
        # gradients travel in buckets
        most = BUCKET_ELEMENTS * element if t.what == "gradients" else t.payload_bytes
        exchange = Exchange(t.operation, int(min(most, t.payload_bytes) * scaled), element, world)
        seconds = seconds_of(exchange, repeats)
        sent = RING[t.operation] * share * exchange.payload_bytes
        messages = round(t.times * t.payload_bytes * scaled / exchange.payload_bytes)
        rows.append(
            {
                "what": t.what,
                "operation": t.operation,
                "message_bytes": exchange.payload_bytes,
                "messages_per_step": messages,
                "seconds": seconds,
                "sent_bytes_per_second": sent / seconds,
            }
        )
        work.append((exchange, messages))
    predicted = sum(r["seconds"] * r["messages_per_step"] for r in rows) / scaled

    def step():
        for exchange, times in work:
            for _ in range(times):
                exchange()

    measured = seconds_of(step, max(2, repeats // 4)) / scaled
    return {"rows": rows, "predicted_step_seconds": predicted, "measured_step_seconds": measured, "scaled": scaled}


def bench(config: Config, repeats: int, limit: int = 0) -> dict:
    """Measure the traffic of a config on the ranks there are; collective."""
    world = dist.get_world_size()
    counted = size.count(to_dict(config)["model"])
    parameters = counted.parameters if counted else count(to_dict(config)["model"]).parameters
    micro_steps = max(1, config.global_batch // (world * config.micro_batch))
    e = config.engine
    traffic = communication.per_step(parameters, e.zero_stage, micro_steps, e.weights)
    sent = sum(t.sent_bytes(world) for t in traffic)
    facts = {
        "world": world,
        "backend": dist.get_backend(),
        "zero_stage": e.zero_stage,
        "parameters": parameters,
        "micro_steps": micro_steps,
        "sent_bytes_per_step": sent,
    }
    return facts | measure(traffic, world, e.weights, repeats, limit or LIMIT_BYTES[device().type])


def table(facts: dict) -> Table:
    """Lay out the measurement: a row per operation, the step in the caption."""
    predicted, measured = facts["predicted_step_seconds"], facts["measured_step_seconds"]
    at = {name: facts["sent_bytes_per_step"] / rate for name, rate in communication.BANDWIDTHS.items()}
    caption = (
        f"a step sends {facts['sent_bytes_per_step'] / 1e9:.3g} GB per rank: {predicted:.3g} s predicted from the rows, "
        f"{measured:.3g} s measured; by arithmetic {', '.join(f'{s:.3g} s at {name}' for name, s in at.items())}"
    )
    if facts["scaled"] < 1:
        caption += f"; measured with messages of {facts['scaled']:.2%} of their size, and scaled"
    where = f"{facts['world']} ranks, {facts['backend']}, ZeRO stage {facts['zero_stage']}"
    title = f"{where}, {facts['parameters'] / 1e6:.1f} M parameters, {facts['micro_steps']} micro-steps"
    result = Table(title=title, caption=caption)
    for column in ("what", "operation", "MB a message", "messages a step", "ms", "sent GB/s per rank"):
        result.add_column(column, justify="left" if column in ("what", "operation") else "right")
    for r in facts["rows"]:
        result.add_row(
            r["what"],
            r["operation"],
            f"{r['message_bytes'] / 1e6:.2f}",
            str(r["messages_per_step"]),
            f"{1e3 * r['seconds']:.3f}",
            f"{r['sent_bytes_per_second'] / 1e9:.3f}",
        )
    return result


@command_line()
def main(argv: list[str] | None = None) -> int:
    """Measure and print, from rank 0."""
    parser = argparse.ArgumentParser(prog="python -m trainer.comm_bench", description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default="configs/edm2_xs.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value, for instance engine.zero_stage=2")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_intermixed_args(argv)
    config = load(options.config, options.overrides)
    rank, _ = start_process_group()
    facts = bench(config, options.repeats)
    if rank == 0:
        if options.json:
            print(json.dumps(facts))
        else:
            Console(width=None if sys.stdout.isatty() else 160).print(table(facts))
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
