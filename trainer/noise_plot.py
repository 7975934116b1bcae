"""Draw the densities of configs/noise/ over logSNR: `python -m trainer.noise_plot --out docs/noise.png`."""

import argparse
import sys
from pathlib import Path

import torch

from data_pipeline.command import command_line
from models.noise import density
from trainer.config import CONFIGS, read_yaml

SIGMA_DATA = 0.5
# panels: what belongs together; discrete ones are drawn as steps of their cdf
PANELS = (
    ("edm2_img512", "edm2_img64", "edm_karras", "edm_unit"),
    ("cosine", "cosine_shifted", "cosine_scaled", "flow", "logit_normal"),
    ("laplace", "laplace512", "laplace_floor", "cauchy"),
    ("polynomial", "polynomial_curriculum", "fastddpm_uniform", "fastddpm_nonuniform"),
)


@command_line()
def main(argv=None) -> int:
    """Draw the densities, a panel per family; discrete and polynomial ones by their cdf."""
    parser = argparse.ArgumentParser(prog="python -m trainer.noise_plot", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="FILE.png")
    options = parser.parse_args(argv)
    try:
        import matplotlib
    except ImportError:
        raise ValueError("matplotlib is not installed; pip install -c constraints.txt '.[report]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6), layout="constrained", sharex=True)
    x = torch.linspace(-12, 12, 1201, dtype=torch.float64)
    for names, axis in zip(PANELS, axes.flat, strict=True):
        cumulative = names[0] == "polynomial"
        for name in names:
            found = density(read_yaml(CONFIGS / "noise" / f"{name}.yaml"), SIGMA_DATA)
            axis.plot(x, found.cdf(x) if cumulative else found.pdf(x), label=name, linewidth=1.2)
        axis.set_ylabel("share below" if cumulative else "density")
        axis.legend(fontsize=7, frameon=False)
    for axis in axes[1]:
        axis.set_xlabel("logSNR = 2 ln(sigma_data / sigma)")
    figure.savefig(options.out, dpi=90)
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
