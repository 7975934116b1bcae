"""Speed and memory on this machine: `python -m trainer.benchmark [--table NAME] [--preset xs,s,xl] [--json]`.

By itself a training step of a small network on a CPU (trainer/step_benchmark.py); `--table` chooses another table, `--preset` the
real step of presets on this device (trainer/preset_benchmark.py).
"""

import argparse
import sys
from collections.abc import Callable

from data_pipeline.command import command_line
from trainer import optimizer_benchmark, preset_benchmark, sampling_benchmark, step_benchmark

# which tables know an option, where not all do; "preset" is the real step of presets
OF_TABLES = {
    **dict.fromkeys(("loop", "reference", "profile", "micro_batch", "rounds"), ("preset",)),
    **dict.fromkeys(("preset", "overrides"), ("preset", "sampling", "fusion")),
    **{"batch": ("sampling", "fusion"), "compiled": ("sampling",), "decoder": ("sampling",), "way": ("step",)},
}


def add_preset_options(parser: argparse.ArgumentParser) -> None:
    """Add what `--preset` goes with (trainer/preset_benchmark.py)."""
    parser.add_argument("--preset", help="comma list of xxs, xs, s, m, l, xl, xxl: their speed on this device instead")
    parser.add_argument("--micro-batch", default="auto", help="images, or auto: the fastest power of 2 that fits")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--loop", help="deepspeed (default where it is installed), bare, or both: bare,deepspeed")
    parser.add_argument("--reference", metavar="FOLDER", help="your clone of github.com/NVlabs/edm2: measured as well")
    parser.add_argument(
        "--rounds", type=int, default=1, help="measure each loop as often, in alternation: the median counts"
    )
    parser.add_argument("--batch", type=int, default=16, help="with --table sampling or fusion: images at once")
    parser.add_argument(
        "--compiled", action="store_true", help="with --table sampling: compiled too, which takes minutes"
    )
    parser.add_argument(
        "--decoder",
        help="with --table sampling: sd-vae (random weights, needs diffusers), FOLDER of its weights, or pixels",
    )
    parser.add_argument("--profile", metavar="FOLDER", help="write a trace of one step per measurement there")
    parser.add_argument("overrides", nargs="*", help="key=value, with --preset: for instance engine.activations=bf16")


@command_line()
def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m trainer.benchmark", description=__doc__.splitlines()[0])
    ways = step_benchmark.WAYS
    parser.add_argument("--way", default=",".join(ways), help=f"comma list of {', '.join(ways)}")
    parser.add_argument("--table", choices=("step", "optimizer", "sampling", "fusion"), default="step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    add_preset_options(parser)
    options = parser.parse_intermixed_args(argv)
    return _chosen(options, parser.get_default)(options)


def _chosen(options: argparse.Namespace, default: Callable):
    """Return what measures and prints the table that is asked for; ValueError for options that it does not know."""
    kind = "preset" if options.preset and options.table == "step" else options.table
    if options.overrides and not options.preset and kind != "fusion":
        raise ValueError(f"{options.overrides[0]}: overrides go with --preset")
    for name, tables in OF_TABLES.items():
        value = getattr(options, name)
        if kind in tables or not value or value == default(name):
            continue
        told = value[0] if name == "overrides" else f"--{name.replace('_', '-')}"
        ways = ["--preset" if table == "preset" else f"--table {table}" for table in tables]
        raise ValueError(f"{told}: goes with {' or '.join(ways)}")
    if options.device == "cuda" and kind in ("step", "optimizer"):
        raise ValueError(f"--device cuda: the table {kind} is of CPUs; with --preset the real step is measured")
    if kind == "fusion":
        from trainer import fusion_benchmark  # the compiler's own modules: seconds to import

        return fusion_benchmark.run
    tables = {"sampling": sampling_benchmark, "preset": preset_benchmark, "optimizer": optimizer_benchmark}
    return tables.get(kind, step_benchmark).run


if __name__ == "__main__":
    sys.exit(main())
