"""Every random number of a run: pure functions of (seed, stream, position).

Philox4x32-10 (Salmon et al. 2011) with the seed as key and (element, position, stream) as counter, in plain integer tensor
operations, so that every device and every layout of ranks and micro-batches gets the same integers. No torch generator is involved:
never draw training randomness from one, or a run could no longer be continued bitwise on another number of ranks.
"""

import math
import zlib

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
# multipliers and Weyl constants of Philox4x32 (Salmon et al. 2011, Table 2)
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def _mul_hi_lo(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Return high and low 32 bits of a * m; the int64 product wraps modulo 2^64, which keeps both words exact."""
    product = a * m
    return (product >> 32) & _MASK, product & _MASK


def philox(key: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four words in [0, 2^32) as int64 tensors for counters (c0, c1, c2, c3), broadcast against each other."""
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(_ROUNDS):
        hi0, lo0 = _mul_hi_lo(c0, _M0)
        hi1, lo1 = _mul_hi_lo(c2, _M1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def stream_number(stream: str) -> int:
    """Return the 32-bit number of a named stream ('noise', 'sigma', 'posterior', 'label dropout', 'dropout', ...)."""
    return zlib.crc32(stream.encode())


def _words(seed: int, stream: str, positions: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return four tensors int64 [N, count / 4, rounded up]: element 4 i + j of row n is the j-th one's [n, i]."""
    positions = positions.to(torch.int64).view(-1, 1)
    # masked, though it changes nothing: Inductor would take a multiple of arange for an index, of 32 bits on GPUs, and overflow
    element = torch.arange((count + 3) // 4, device=positions.device).view(1, -1) & _MASK
    words = philox(
        seed, element, positions & _MASK, (positions >> 32) & _MASK, torch.full_like(element, stream_number(stream))
    )
    return torch.broadcast_tensors(*words)


def bits(seed: int, stream: str, positions: Tensor, count: int) -> Tensor:
    """Return int64 [N, count] words in [0, 2^32), row n a function of (seed, stream, positions[n]) alone."""
    return torch.stack(_words(seed, stream, positions, count), dim=-1).flatten(1)[:, :count]


def _fraction(words: Tensor) -> Tensor:
    return ((words >> 8).float() + 0.5) * 2.0**-24


def uniform(seed: int, stream: str, positions: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Return fp32 [N, *shape] in (0, 1), on a grid of 2^-24 offset by half a cell, so that neither end occurs."""
    return _fraction(bits(seed, stream, positions, math.prod(shape))).view(-1, *shape)


def at_least(bound: float, seed: int, stream: str, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return `uniform` >= bound, bool [N, *shape].

    By way of one byte for four elements: compiled for a GPU, that byte is all that goes through memory, where the words would be 32
    bytes an element, sixteen times what the mask is for.
    """
    count = math.prod(shape)
    found = [_fraction(words) >= bound for words in _words(seed, stream, positions, count)]
    packed = sum(flag.to(torch.uint8) * 2**j for j, flag in enumerate(found)).contiguous()
    # by strides: through an expanded view Inductor would compute it four times, and keep the words after all
    four = packed.as_strided((*packed.shape, 4), (packed.shape[1], 1, 0))
    each = (four >> torch.arange(4, dtype=torch.uint8, device=packed.device)) & 1
    return each.bool().flatten(1)[:, :count].reshape(-1, *shape)


def normal(seed: int, stream: str, positions: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Return fp32 [N, *shape] standard normal draws (Box & Muller 1958: each pair of words gives two)."""
    count = math.prod(shape)
    words = bits(seed, stream, positions, count + count % 2)
    # 32 bits under the logarithm put the tail at 6.7 standard deviations; float64 keeps them (fp32 would round 1 - 2^-32 to 1)
    radius = torch.sqrt(-2.0 * torch.log((words[:, 0::2].double() + 0.5) * 2.0**-32)).float()
    angle = (2.0 * math.pi * 2.0**-32) * (words[:, 1::2].double() + 0.5)
    pairs = torch.stack([radius * angle.cos().float(), radius * angle.sin().float()], dim=-1)
    return pairs.flatten(1)[:, :count].reshape(-1, *shape)


def sigma_uniform(seed: int, positions: Tensor) -> Tensor:
    """Return float64 [N] in (0, 1): an Owen-scrambled base-2 van der Corput sequence over global positions.

    Every aligned block of 2^k positions (a batch, a rank's part of it, a micro-batch) has exactly one point in each of 2^k equal
    strata, whatever the batch size; the scrambling (Owen 1995) makes each point uniform. Beyond 2^32 positions the sequence goes on
    with another scramble.
    """
    positions = positions.to(torch.int64).view(-1)
    low, high = positions & _MASK, positions >> 32
    level = torch.arange(32, device=positions.device)
    # digit j of the radical inverse is bit j of the position; its flip depends on the digits before it, that is on the low j bits
    prefix = low.view(-1, 1) & ((1 << level) - 1)
    flip = (
        philox(
            seed, prefix, level.view(1, -1), high.view(-1, 1) & _MASK, torch.full_like(prefix, stream_number("sigma"))
        )[0]
        & 1
    )
    digit = ((low.view(-1, 1) >> level) & 1) ^ flip
    return ((digit << (31 - level)).sum(1).double() + 0.5) * 2.0**-32
