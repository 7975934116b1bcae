"""FLOPs, parameters and bytes of a configuration, counted on meta tensors: no weights are made, nothing is computed.

One convention everywhere: 2 FLOPs per multiply-accumulate of convolutions, matrix products and attention; elementwise
work is left out. The EDM2 paper's "Gflops" are multiply-accumulates (and count elementwise work too, about 1 %); they
are named GMAC here. Training is 3 forwards: one forward, and a backward of two products for each of the forward's.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, field

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.command import command_line
from models.denoiser import build
from models.edm2 import magnitude_bucket
from models.magnitude import MPConv
from trainer import config as configs
from trainer.peaks import peak_flops as peak_flops
from trainer.size import TRAINING_FORWARDS, bytes_per_parameter


@dataclass
class Level:
    """The share of one part of the network: a side and resolution, the embedding, or the ends."""

    name: str
    parameters: int = 0
    forward_flops: int = 0


@dataclass
class Counts:
    """What one image costs; FLOPs are 2 per multiply-accumulate."""

    parameters: int  # of network and uncertainty head
    trainable_parameters: int
    network_parameters: int  # without the uncertainty head
    frozen_table_values: int  # constants of the network, in its buffers: published totals count some of them
    forward_flops: int
    training_flops_per_image: int
    by_operation: dict[str, int] = field(default_factory=dict)
    by_layer: dict[str, int] = field(default_factory=dict)
    levels: list[Level] = field(default_factory=list)
    function_evaluations: dict[str, int] = field(default_factory=dict)  # by ODE block; 0: an adaptive solver decides

    @property
    def recomputed_flops_per_image(self) -> int:
        """Return what activation checkpointing executes again: the forward of every block."""
        return sum(level.forward_flops for level in self.levels[1:])


def count(model: dict) -> Counts:
    """Count the forward of one image, with label and uncertainty head, of the network in config group `model`.

    A right-hand side of an ODE counts as often as it is evaluated; adaptive solvers as `ode.steps` steps of rk4.
    """
    with torch.device("meta"):
        denoiser = build(model).eval()
        x = torch.empty(1, denoiser.channels, denoiser.resolution, denoiser.resolution)
        labels = torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            denoiser(x, torch.empty(1), labels, return_logvar=True)
    counts = counter.get_flop_counts()
    # Names as in named_modules(); the whole network is under the name of its class.
    prefix = f"{type(denoiser).__name__}."
    layers = {key.removeprefix(prefix): sum(value.values()) for key, value in counts.items() if key != "Global"}
    parameters = list(denoiser.parameters())
    forward = counter.get_total_flops()
    return Counts(
        parameters=sum(p.numel() for p in parameters),
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        network_parameters=sum(p.numel() for p in denoiser.unet.parameters()),
        frozen_table_values=sum(b.numel() for b in denoiser.unet.buffers()),
        forward_flops=forward,
        training_flops_per_image=TRAINING_FORWARDS * forward,
        by_operation={str(operation): flops for operation, flops in counts["Global"].items()},
        by_layer=layers,
        levels=_levels(denoiser, layers),
        function_evaluations=denoiser.function_evaluations(),
    )


def _levels(denoiser: nn.Module, layers: dict[str, int]) -> list[Level]:
    """Add up the blocks by {Enc, Dec} x resolution; what lies outside of blocks is the first level."""
    levels: dict[str, Level] = {}
    rest = Level("embedding and ends", sum(p.numel() for p in denoiser.parameters()), layers[type(denoiser).__name__])
    for name, module in denoiser.named_modules():
        bucket = magnitude_bucket(f"{name}.any")
        if bucket is None or name.count(".") != 2 or isinstance(module, MPConv):  # EDM2's first convolution is an end
            continue
        key = f"{bucket[0]} {bucket[1]}x{bucket[1]}"
        level = levels.setdefault(key, Level(key))
        for part, sign in ((level, 1), (rest, -1)):
            part.parameters += sign * sum(p.numel() for p in module.parameters())
            part.forward_flops += sign * layers[name]
    return [rest, *levels.values()]


def describe(config: configs.Config) -> dict:
    """Return what `--json` prints: counts, and bytes per parameter on one rank of the configured world by ZeRO stage."""
    model = configs.to_dict(config)["model"]
    counts = count(model)
    world = config.cluster.nodes * config.cluster.ranks_per_node
    by_stage = bytes_per_parameter(len(config.ema.sigma_rel), config.engine.weights, config.engine.prepares)
    return {
        "parameters": counts.parameters,
        "trainable_parameters": counts.trainable_parameters,
        "network_parameters": counts.network_parameters,
        "network_parameters_with_frozen_tables": counts.network_parameters + counts.frozen_table_values,
        "function_evaluations": counts.function_evaluations,
        "forward_flops": counts.forward_flops,
        "forward_macs": counts.forward_flops // 2,
        "training_flops_per_image": counts.training_flops_per_image,
        "training_flops": counts.training_flops_per_image * config.duration_images,
        "by_operation": counts.by_operation,
        "levels": [asdict(level) for level in counts.levels],
        "bytes_per_parameter": {k: v["replicated"] + v["sharded"] / world for k, v in by_stage.items()},
        "bytes_per_parameter_parts": by_stage,
        "world": world,
        "zero_stage": config.engine.zero_stage,
        "adaptive": 0 in counts.function_evaluations.values(),
        "convention": "2 FLOPs per multiply-accumulate; the EDM2 paper's Gflops are multiply-accumulates",
    }


def table(facts: dict) -> str:
    """Lay the facts out for reading: a row per level of the network, then the totals."""
    lines = [f"{'level':<20}{'parameters':>16}{'GFLOP':>12}{'GMAC':>12}{'share':>8}"]
    for level in facts["levels"]:
        flops = level["forward_flops"]
        lines.append(
            f"{level['name']:<20}{level['parameters']:>16,}{flops / 1e9:>12.3f}{flops / 2e9:>12.3f}"
            f"{flops / facts['forward_flops']:>8.1%}"
        )
    total = facts["forward_flops"]
    lines += [
        f"{'forward, one image':<20}{facts['parameters']:>16,}{total / 1e9:>12.3f}{total / 2e9:>12.3f}{1:>8.0%}",
        "",
        f"training       {facts['training_flops_per_image'] / 1e9:,.1f} GFLOP per image (3 forwards), "
        f"{facts['training_flops'] / 1e21:.3g} ZFLOP for the whole run",
        f"convention     {facts['convention']}",
        f"network        {facts['network_parameters']:,} parameters without the uncertainty head, "
        f"{facts['network_parameters_with_frozen_tables']:,} with its frozen tables",
    ]
    if facts["function_evaluations"]:
        each = ", ".join(
            f"{name.removeprefix('unet.')} {n or '?'}" for name, n in facts["function_evaluations"].items()
        )
        lines.append(f"evaluations    {each} of the right-hand side in a forward")
    if facts["adaptive"]:
        lines.append("               an adaptive solver decides: FLOPs are those of rk4 with model.ode.steps steps")
    for stage, held in facts["bytes_per_parameter"].items():
        chosen = " (configured)" if int(stage) == facts["zero_stage"] else ""
        gib = held * facts["parameters"] / 2**30
        lines.append(
            f"ZeRO stage {stage}   {held:.2f} bytes per parameter, {gib:.2f} GiB a rank of {facts['world']}{chosen}"
        )
    return "\n".join(lines)


@command_line()
def main(argv=None) -> int:
    """Print parameters, FLOPs and bytes of a configuration."""
    parser = argparse.ArgumentParser(prog="python -m trainer.flops", description=main.__doc__)
    parser.add_argument("config", help="a YAML file, a composed RUN/config.yaml, or a run directory")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_intermixed_args(argv)
    facts = describe(configs.load(options.config, options.overrides))
    print(json.dumps(facts) if options.json else table(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
