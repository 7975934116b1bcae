"""Speed and memory on this machine: `python -m trainer.benchmark [--table NAME] [--preset xs,s,xl] [--json]`.

By itself a training step of a small network on a CPU (trainer/step_benchmark.py); `--table` chooses another table, `--preset` the
real step of presets on this device (trainer/preset_benchmark.py).
"""

import argparse
import sys

from data_pipeline.command import command_line
from trainer import optimizer_benchmark, preset_benchmark, sampling_benchmark, step_benchmark

# options that mean something with --preset alone
OF_PRESETS = ("loop", "reference", "profile")


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
    return _chosen(options)(options)


def _chosen(options: argparse.Namespace):
    """Return what measures and prints the table that is asked for; ValueError for options that it does not know."""
    of_presets = [f"--{name}" for name in OF_PRESETS if getattr(options, name)]
    if of_presets and (options.table in ("sampling", "fusion") or not options.preset):
        raise ValueError(f"{of_presets[0]}: goes with --preset, and with no other table")
    if options.table == "fusion":
        from trainer import fusion_benchmark  # the compiler's own modules: seconds to import

        return fusion_benchmark.run
    if options.decoder and options.table != "sampling":
        raise ValueError(f"--decoder {options.decoder}: goes with --table sampling")
    if options.device == "cuda" and not options.preset and options.table in ("step", "optimizer"):
        raise ValueError(
            f"--device cuda: the table {options.table} is of CPUs; with --preset the real step is measured"
        )
    if options.overrides and not options.preset:
        raise ValueError(f"{options.overrides[0]}: overrides go with --preset")
    if options.table == "sampling":
        return sampling_benchmark.run
    if options.preset:
        return preset_benchmark.run
    return optimizer_benchmark.run if options.table == "optimizer" else step_benchmark.run


if __name__ == "__main__":
    sys.exit(main())
