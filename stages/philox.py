"""Uniform numbers, on any device, that depend on a key and a place and on nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def uniforms(keys: Tensor, timesteps: Tensor, streams: int, draws: int) -> Tensor:
    """Return uniform numbers [n, streams, draws] float64 in [0, 1), multiples of 2^-53.

    `keys` [n] int64 names a generator per row and `timesteps` [n] int64 the place in it, so a row
    does not depend on the rows beside it, nor on when or in what portions it is asked for. More
    draws begin with the fewer.
    """
    pairs = torch.arange((draws + 1) // 2, device=keys.device)
    place = torch.arange(streams, device=keys.device).unsqueeze(-1)
    shape = (len(keys), streams, len(pairs))
    counter = [x.expand(shape) for x in (pairs, place, timesteps[:, None, None])]
    key = keys[:, None, None]
    words = philox_4x32((*counter, torch.zeros_like(key)), (key & WORD, key >> 32 & WORD))
    doubles = [_double(words[0], words[1]), _double(words[2], words[3])]
    return torch.stack(doubles, -1).flatten(-2)[..., :draws]


def _double(high: Tensor, low: Tensor) -> Tensor:
    return (high >> 5 << 26 | low >> 6).double() * 2.0**-53


def philox_4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return four random 32-bit words per counter, as int64; all tensors int64 in [0, 2^32).

    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011), Philox4x32-10.
    """
    a, b, c, d = counter
    first, second = key
    for _ in range(ROUNDS):
        # A product of two words wraps around int64; its bits are those of the unsigned product.
        x, y = MULTIPLIERS[0] * a, MULTIPLIERS[1] * c
        a, b, c, d = (y >> 32 & WORD) ^ b ^ first, y & WORD, (x >> 32 & WORD) ^ d ^ second, x & WORD
        first, second = first + WEYL[0] & WORD, second + WEYL[1] & WORD
    return a, b, c, d
