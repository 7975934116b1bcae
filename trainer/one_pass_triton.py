"""The Triton kernel of the optimizer's one pass (one_pass.py): a program per segment, a launch for long and one for short ones.

44 bytes a parameter with two averages: weights, gradients, moments and averages are read once (what a program reads again lies in
L2, where no more rows are in flight than fit), all but the gradients are written once. Gradients are left as they were: nothing
reads them after the step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

EPS = tl.constexpr(1e-4)  # models/magnitude.py
# (elements at a time, warps): 4 elements a thread and 64 registers, so that a multiprocessor of Hopper holds 4 programs for short
# segments, 1 for long ones. Weights and gradients of all rows in flight are read twice, and must stay in L2 (50 MB) meanwhile:
# 8 bytes x 132 multiprocessors x 4 x 8192 are 35 MB, 8 x 132 x 27,648 (the longest of XL) 29 MB
SHORT, LONG = (1024, 8), (4096, 32)
LONG_FROM = 8193
# to L2, which the rows in flight fill: what a program reads again stays, what it passes by once goes first
KEPT, PASSING = tl.constexpr("evict_last"), tl.constexpr("evict_first")


@triton.jit
def _address(pointers, fragment, fragments, which, begin):
    return tl.load(pointers + which * fragments + fragment).to(tl.pointer_type(tl.float32)) + begin


@triton.jit
def _step(
    pointers, segments, cut, corrections, masked, weights, fragments, slots, gradient_scale, lr, beta1, beta2, eps,
    AVERAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = segments + tl.program_id(0).to(tl.int64) * 5
    fragment, begin, n, kind = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    length = tl.load(row + 4).to(tl.float32)  # of the whole row
    w = _address(pointers, fragment, fragments, 0, begin)
    g = _address(pointers, fragment, fragments, 1, begin)
    m = _address(pointers, fragment, fragments, 2, begin)
    v = _address(pointers, fragment, fragments, 3, begin)
    lanes = tl.arange(0, BLOCK)
    still = tl.load(masked) > 0

    along, scale = gradient_scale * 0.0, gradient_scale
    if kind != -2:
        if kind == -1:
            ww, wg = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
            for at in range(0, n, BLOCK):
                a = tl.load(w + at + lanes, mask=at + lanes < n, other=0.0, eviction_policy=KEPT)
                b = tl.load(g + at + lanes, mask=at + lanes < n, other=0.0, eviction_policy=KEPT)
                ww += a * a
                wg += a * b
            square, dot = tl.sum(ww, 0), tl.sum(wg, 0)
        else:
            square, dot = tl.load(cut + kind), tl.load(cut + slots + kind)
        r = tl.sqrt(square / length)
        along = dot / tl.maximum(length * r * (r + EPS), 1e-30)
        scale = gradient_scale / (r + EPS)

    step_size = lr / tl.load(corrections).to(tl.float32)
    root = tl.sqrt(tl.load(corrections + 1).to(tl.float32))
    squares = tl.zeros([BLOCK], tl.float32)
    for at in range(0, n, BLOCK):
        here = at + lanes
        inside = here < n
        x = tl.load(w + here, mask=inside, other=0.0)
        if not still:
            grad = (tl.load(g + here, mask=inside, other=0.0, eviction_policy=PASSING) - along * x) * scale
            old = tl.load(m + here, mask=inside, other=0.0, eviction_policy=PASSING)
            mean = old + (1 - beta1) * (grad - old)
            old_square = tl.load(v + here, mask=inside, other=0.0, eviction_policy=PASSING)
            square_mean = beta2 * old_square + (1 - beta2) * grad * grad
            x -= step_size * mean / (tl.sqrt(square_mean) / root + eps)
            tl.store(m + here, mean, mask=inside, eviction_policy=PASSING)
            tl.store(v + here, square_mean, mask=inside, eviction_policy=PASSING)
            tl.store(w + here, x, mask=inside)
            squares += x * x
        for i in tl.static_range(AVERAGES):
            e = _address(pointers, fragment, fragments, 4 + i, begin)
            average = tl.load(e + here, mask=inside, other=0.0, eviction_policy=PASSING)
            weight = tl.load(weights + i)
            near, far = average + weight * (x - average), x - (x - average) * (1 - weight)
            lerped = tl.where(weight < 0.5, near, far)  # as torch.lerp: exact at both ends
            tl.store(e + here, lerped, mask=inside, eviction_policy=PASSING)

    if (kind == -1) & (not still):
        factor = 1 / (tl.sqrt(tl.sum(squares, 0) / length) + EPS)
        tl.debug_barrier()  # what is read again was written above, perhaps by another thread
        for at in range(0, n, BLOCK):
            here = at + lanes
            x = tl.load(w + here, mask=here < n, other=0.0, eviction_policy=PASSING)
            tl.store(w + here, x * factor, mask=here < n, eviction_policy=PASSING)


class Kernel:
    """The launch, with the addresses of all tensors kept on the device."""

    def __init__(self, segments: Tensor):
        self.segments, self._known, self._pointers = segments, (), None
        num_long = int((segments[:, 2] >= LONG_FROM).sum())  # they come first
        launches = (segments[:num_long], LONG), (segments[num_long:], SHORT)
        self._launches = [(part, *shape) for part, shape in launches if len(part)]

    def __call__(self, masters, grads, first, second, averages, cut, corrections, masked, numbers, weights) -> None:
        addresses = tuple(t.data_ptr() for t in (*masters, *grads, *first, *second, *averages))
        if addresses != self._known:  # gradients may be allocated anew in every step
            self._known = addresses
            self._pointers = torch.tensor(addresses, dtype=torch.int64).to(self.segments.device, non_blocking=True)
        shared = cut.reshape(-1) if cut.numel() else masked.view(1)
        how_far = torch.tensor(weights or [0.0], dtype=torch.float32).to(self.segments.device, non_blocking=True)
        for part, block, warps in self._launches:
            _step[(len(part),)](
                self._pointers, part, shared, corrections, masked, how_far, len(masters), cut.shape[1], *numbers,
                AVERAGES=len(weights), BLOCK=block, num_warps=warps,
            )  # fmt: skip
