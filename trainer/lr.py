"""Learning rate from the clock: linear ramp-up, then inverse-square-root decay (arXiv 2312.02696, Eq. 67). No torch."""

import math


def learning_rate(clock_images: int, ref_lr: float, decay_images: float, rampup_images: float) -> float:
    """Return ref_lr / sqrt(max(clock / decay_images, 1)) * min(clock / rampup_images, 1).

    `clock_images` is the clock before the step, so the first step of a ramp has rate 0, as in the reference. Either
    factor is left out where its parameter is 0 or less. The paper's 70,000 batches of 2,048 are 143.36 M images.
    """
    rate = ref_lr
    if decay_images > 0:
        rate /= math.sqrt(max(clock_images / decay_images, 1))
    if rampup_images > 0:
        rate *= min(clock_images / rampup_images, 1)
    return rate
