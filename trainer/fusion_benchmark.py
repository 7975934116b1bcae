"""What Inductor leaves of elementwise work on a GPU, counted without one: `python -m trainer.benchmark --table fusion --preset xs`.

The network is lowered and scheduled as for an H200, and not run (trainer/lowering.py): which kernels would be launched, and what
they would read and write. The least: all elementwise work and reductions between two matrix products (convolutions, attention)
in one kernel, each tensor read or written once. Left out are the padding of the ends' channels and the loss.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._inductor.virtualized import V

from trainer.config import to_dict
from trainer.lowering import lower
from trainer.preset_config import compose

# what a stretch between matrix products is, by the operations in it; the first that fits
CHAINS = {
    "forward": [
        ("clip, MP-cat, MP-SiLU", {"cat", "clamp_min"}),
        ("clip, resample (pixel norm), MP-SiLU", {"avg_pool2d"}),
        ("clip, resample (pixel norm), MP-SiLU", {"_unsafe_index"}),
        ("MP-sum, clip, pixel norm, MP-SiLU", {"pow", "exp"}),
        ("q, k, v normalised for attention", {"pow", "sum", "reshape"}),
        ("MP-sum, clip, MP-SiLU", {"clamp_min"}),
        ("modulation, MP-SiLU", {"exp"}),
    ],
    "backward": [
        ("of q, k, v normalised for attention", {"cat", "div"}),
        ("of resample, MP-cat, clip, MP-sum, MP-SiLU", {"index_put_"}),
        ("of resample, MP-cat, clip, MP-sum, MP-SiLU", {"avg_pool2d_backward"}),
        ("of modulation, MP-SiLU", {"expand", "sum", "sigmoid"}),
        ("of MP-cat, clip, MP-sum (pixel norm), MP-SiLU", {"slice"}),
        ("of clip, MP-sum (pixel norm), MP-SiLU", {"where"}),
        ("of clip, MP-sum (pixel norm), MP-SiLU", {"sigmoid"}),
        ("gradients of weights, to fp32 and scaled", {"mul", "clone"}),
    ],
}


@dataclass
class Region:
    """Elementwise work and reductions between matrix products."""

    operations: set[str]
    kernels: int
    num_bytes: int
    least_bytes: int


def regions(graph: GraphLowering) -> list[Region]:
    """Return the stretches between matrix products: kernels that feed each other, or read the same, as many products deep."""
    with V.set_graph_handler(graph):
        nodes = [n for n in graph.scheduler.nodes if not isinstance(n, NopKernelSchedulerNode)]
        product = [isinstance(n, ExternKernelSchedulerNode) for n in nodes]
        reads, writes = (
            [{} if p else n.get_read_write_buffer_accesses(r, not r) for n, p in zip(nodes, product)]
            for r in (True, False)
        )
        kept = set(graph.get_output_names())
    makers, users, depth, first = {}, defaultdict(set), [], {}
    parent = list(range(len(nodes)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i, node in enumerate(nodes):
        inputs = {d.name for d in node.read_writes.reads}
        depth.append(max((depth[m] + product[m] for m in (makers[b] for b in inputs if b in makers)), default=0))
        makers |= dict.fromkeys(node.get_buffer_names(), i)
        for b in inputs:
            users[b].add(i)
        for b in reads[i]:
            if b in makers and not product[makers[b]] and depth[makers[b]] == depth[i]:
                parent[root(i)] = root(makers[b])
            parent[root(i)] = root(first.setdefault((b, depth[i]), i))
    members = defaultdict(list)
    for i in range(len(nodes)):
        if not product[i]:
            members[root(i)].append(i)
    found = []
    for inside in members.values():
        made = {b for i in inside for b in nodes[i].get_buffer_names()}
        read, written = {}, {}
        for i in inside:
            read |= {b: max(n, read.get(b, 0)) for b, n in reads[i].items() if b not in made}
            written |= {b: n for b, n in writes[i].items() if b in kept or users[b] - set(inside)}
        origins = [o for i in inside for s in nodes[i].get_nodes() if s.node for o in s.node.origins]
        names = {
            str(o.target).removeprefix("aten.").removeprefix("prims.").partition(".")[0].removesuffix("_Scalar")
            for o in origins
        }
        actual = sum(sum(reads[i].values()) + sum(writes[i].values()) for i in inside)
        found.append(Region(names, len(inside), actual, sum(read.values()) + sum(written.values())))
    return found


def rows(graphs: dict[str, GraphLowering]) -> list[dict]:
    """Return kernels, bytes and least bytes by chain."""
    table: dict[tuple[str, str], list[int]] = {}
    for name, graph in graphs.items():
        for region in regions(graph):
            label = next((chain for chain, has in CHAINS[name] if has <= region.operations), "the rest")
            row = table.setdefault((name, label), [0, 0, 0, 0])
            for k, n in enumerate((1, region.kernels, region.num_bytes, region.least_bytes)):
                row[k] += n
    return [
        {"pass": name, "chain": label, "regions": r[0], "kernels": r[1], "bytes": r[2], "least_bytes": r[3]}
        for (name, label), r in sorted(table.items(), key=lambda item: (item[0][0] != "forward", -item[1][2]))
    ]


def run(options: argparse.Namespace) -> int:
    """Count and print."""
    if options.batch < 1:
        raise ValueError(f"--batch {options.batch}: must be at least 1")
    preset = options.preset or "xs"
    config = compose(preset, ["engine.activations=bf16", *options.overrides], options.batch, True)
    found = rows(lower(to_dict(config)["model"], options.batch))
    if options.json:
        print(json.dumps({"fusion": found, "preset": preset, "batch": options.batch, "torch": torch.__version__}))
        return 0
    table = Table(
        title=f"{preset}, {options.batch} images, bf16, lowered for an H200, not run; torch {torch.__version__}"
    )
    for column in ("pass", "chain", "between products", "kernels", "GB", "least GB", "above"):
        table.add_column(column, justify="left" if column in ("pass", "chain") else "right")
    keys = ("regions", "kernels", "bytes", "least_bytes")
    for r in [*found, {"pass": "both", "chain": "all"} | {k: sum(r[k] for r in found) for k in keys}]:
        sizes = (
            f"{r['bytes'] / 1e9:.3f}",
            f"{r['least_bytes'] / 1e9:.3f}",
            f"{r['bytes'] / max(1, r['least_bytes']) - 1:.1%}",
        )
        table.add_row(r["pass"], r["chain"], str(r["regions"]), str(r["kernels"]), *sizes)
    Console(width=160).print(table)
    return 0
