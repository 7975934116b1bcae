"""Parameters of a density that move with images_seen. Imports no torch, so that configs are checked with it.

A sample's clock is its own position, rounded down to BLOCK: not the step's, so that noise levels are the same for any batch and
any number of ranks. What a maintainer must not break: pure functions of the position.
"""

import math

BLOCK = 1024  # samples that share one density; steps of 2^k up to it stay exactly stratified

RANGE = ("sigma_min", "sigma_max")  # move where they are set: 0 is no end of a range
# which parameters a density has; those that count are rounded up
PARAMETERS = {
    "lognormal": ("P_mean", "P_std", *RANGE),
    "laplace": ("mu", "b", *RANGE),
    "cosine": ("mu", "s", *RANGE),
    "cauchy": ("mu", "gamma", *RANGE),
    "flow": ("mu", *RANGE),
    "logit_normal": ("logit_mean", "logit_std", *RANGE),
    "polynomial": ("curve", "rho", "levels", *RANGE),
    "fastddpm-uniform": (),
    "fastddpm-nonuniform": (),
}
COUNTS = ("levels",)

# progress in [0, 1] -> how far the parameter has gone
SHAPES = {
    "linear": lambda progress: progress,
    "sinusoidal": lambda progress: math.sin(math.pi / 2 * progress),
    # arXiv 2404.06353, its code of March 2024: sin a with a = floor(10 pi progress^1.5) / 10; full at 0.63, back at the end
    "high_noise": lambda progress: abs(math.sin(math.floor(10 * math.pi * progress**1.5) / 10)),
}


def at(noise: dict, position: int) -> dict:
    """Return the config group `noise` with its parameters as they are for the sample at `position`."""
    curriculum = noise.get("curriculum") or {}
    if not curriculum.get("to"):
        return noise
    clock = position // BLOCK * BLOCK
    gone = SHAPES[curriculum["shape"]](min(1.0, clock / curriculum["over_images"]))
    moved = {key: noise[key] + (end - noise[key]) * gone for key, end in curriculum["to"].items()}
    return noise | {key: math.ceil(value) if key in COUNTS else value for key, value in moved.items()}
