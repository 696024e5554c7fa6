"""Noise that a key names, on every machine, and the checksum that tells when it came out otherwise.

The generator is `philox4x64-boxmuller-f32` (`stages.diffusion.facts.NOISE`): raw words of Philox,
whose stream numpy guarantees, and a transform of our own, because numpy may change
`standard_normal` from version to version (NEP 19).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import google_crc32c
import numpy as np

from stages.sampling import keyed_generator

CHUNK_WORDS = 2**13
"""Words transformed at a time, so that what lies between stays in the cache."""
STEP = 2.0**-32
DEVIATIONS = 8.0


class Checksum(NamedTuple):
    """What a store keeps of a noised latent, so that it is known again when it is rebuilt."""

    crc: int
    """Crc32c of the values rounded to float16, in C order, little-endian."""
    sum: float
    """Sum of the float32 values with fixed random signs, in float64."""


def normal(shape: tuple[int, ...], *key: object) -> np.ndarray:
    """Return standard normal numbers [*shape] float32 that belong to a key, and to nothing else.

    The key is any tuple of strings and integers. A word of 64 bits gives two numbers: its upper
    half a radius √(−2 ln u), its lower half an angle (Box & Muller 1958). That is computed in
    float64 and rounded once, so that the last bits in which mathematical libraries differ change
    about one number in 2^27, where float32 would change most. More numbers of a key begin with the
    fewer.
    """
    count = math.prod(shape)
    words = keyed_generator(*key).bit_generator.random_raw((count + 1) // 2)
    pairs = np.empty((len(words), 2), np.float32)
    for start in range(0, len(words), CHUNK_WORDS):
        chunk = words[start : start + CHUNK_WORDS]
        radius = (chunk >> np.uint64(32)).astype(np.float64)
        radius = np.sqrt(-2.0 * np.log((radius + 1.0) * STEP))  # of (0, 1]: ln 0 never comes up
        angle = (chunk & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2 * math.pi * STEP)
        pairs[start : start + CHUNK_WORDS, 0] = radius * np.cos(angle)
        pairs[start : start + CHUNK_WORDS, 1] = radius * np.sin(angle)
    return pairs.reshape(-1)[:count].reshape(shape)


def row_noise(
    seed: int,
    sample_id: str,
    image_variation: int,
    text_variation: int,
    slot: int,
    shape: tuple[int, ...],
) -> np.ndarray:
    """Return the noise [*shape] float32 of one row of a store."""
    return normal(shape, "noise", seed, sample_id, image_variation, text_variation, slot)


def noised(x0: np.ndarray, noise: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """Return alpha·x0 + sigma·noise [*shape] float32 of float16 latents and float32 noise.

    Each product and the sum are rounded to float32, on the host: every processor gives the same.
    """
    summed: np.ndarray = np.float32(alpha) * x0.astype(np.float32) + np.float32(sigma) * noise
    return summed


def checksum(x_t: np.ndarray) -> Checksum:
    """Return the checksum of a noised latent [*shape], float32 or what float32 holds exactly."""
    return Checksum(_crc(x_t), _projected(x_t))


def matches(x_t: np.ndarray, crc: int, sum: float) -> bool:
    """Return whether a rebuilt noised latent is the one that a checksum was taken of.

    It is where it is equal after rounding to float16, or where its sum is off by no more than last
    bits explain. Let the noise be off by one unit in the last place, and one side fuse a
    multiplication with the addition: then an element of alpha·x0 + sigma·z, sigma ≤ 1, is off by at
    most d = 2^-23·(1.5·|x_t| + 2.5·|z|) ≤ 2^-22·(|x_t| + 9). With random signs the sum is off by
    more than 8·√(Σ d²) with a probability below 2·e^-32 (Hoeffding 1963). Of n elements with other
    noise it is off by sigma·√(2n) or so, and passes about once in 10^5 times.
    """
    if _crc(x_t) == crc:
        return True
    bounds = 2.0**-22 * (np.abs(x_t.astype(np.float64)) + 9.0)
    return abs(_projected(x_t) - sum) <= DEVIATIONS * float(np.linalg.norm(bounds))


def _crc(x_t: np.ndarray) -> int:
    with np.errstate(over="ignore"):  # beyond float16 is infinite, on either side
        return int(google_crc32c.value(x_t.astype("<f2").tobytes()))


def _projected(x_t: np.ndarray) -> float:
    return float(x_t.astype(np.float64).reshape(-1) @ _signs(x_t.size))


@lru_cache(maxsize=8)  # one per bucket
def _signs(count: int) -> np.ndarray:
    """Signs [count] float64 that every checksum of this size is taken with."""
    words = keyed_generator("signs").bit_generator.random_raw((count + 63) // 64)
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), count=count)
    return 2.0 * bits - 1.0
