"""Noise: named by its key on every machine, normal, and known again by its checksum."""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise

import google_crc32c
import numpy as np
import pytest
import torch

from stages.diffusion.noise import checksum, matches, noised, normal, row_noise
from stages.sampling import keyed_generator

SHAPES = [(1, 8, 8), (4, 32, 32), (4, 128, 128)]


def latents(shape: tuple[int, ...], name: str = "image") -> np.ndarray:
    return (0.8 * normal(shape, name)).astype(np.float16)


def at(x0: np.ndarray, noise: np.ndarray, sigma: float) -> np.ndarray:
    return noised(x0, noise, math.sqrt(1 - sigma**2), sigma)


def test_a_draw_is_what_it_was_in_every_release():
    # Another digest would make every store unreadable that does not hold its noise.
    drawn = row_noise(7, "sample", 1, 2, 3, (4, 16, 16))
    digest = hashlib.sha256(drawn.astype("<f4").tobytes()).hexdigest()
    assert digest == "522ead6c0ab3c29a5bd109a2f89ddc71a59203e3f5e3b9e2cca46e628cae30b9"


def test_a_draw_is_box_and_mullers_of_the_words_of_philox():
    words = keyed_generator("a", 1).bit_generator.random_raw(4)
    expected = []
    for word in words.tolist():
        radius = math.sqrt(-2 * math.log(((word >> 32) + 1) / 2**32))
        angle = 2 * math.pi * (word % 2**32) / 2**32
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    drawn = normal((8,), "a", 1)
    assert drawn.dtype == np.float32
    np.testing.assert_allclose(drawn, expected, rtol=3e-7, atol=1e-8)


def test_more_numbers_of_a_key_begin_with_the_fewer():
    whole = normal((3, 40_001), "long")
    for shape in [(), (1,), (7,), (2, 5), (16_384,), (40_000,)]:
        part = normal(shape, "long")
        assert part.shape == shape
        np.testing.assert_array_equal(part.reshape(-1), whole.reshape(-1)[: part.size])


@pytest.mark.parametrize(
    "other",
    [
        (8, "sample", 1, 2, 3),
        (7, "sample2", 1, 2, 3),
        (7, "sample", 2, 1, 3),
        (7, "sample", 1, 3, 3),
        (7, "sample", 1, 2, 4),
    ],
)
def test_every_part_of_the_key_of_a_row_counts(other):
    shape = (4, 32, 32)
    here, there = row_noise(7, "sample", 1, 2, 3, shape), row_noise(*other, shape)
    correlation = float((here * there).mean())
    assert abs(correlation) < 4.5 / math.sqrt(here.size)


def test_numbers_are_normal():
    drawn = np.sort(normal((2**19,), "distribution").astype(np.float64))
    n = len(drawn)
    exact = torch.special.ndtr(torch.from_numpy(drawn)).numpy()
    places = np.arange(n + 1) / n
    distance = max(np.abs(exact - places[1:]).max(), np.abs(exact - places[:-1]).max())
    assert distance < 1.95 / math.sqrt(n)  # Kolmogorov and Smirnov, at one in a thousand
    # Moments 1 to 6, each within four standard errors of those of the normal distribution.
    moments = {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96), 5: (0, 945), 6: (15, 10_170)}
    for power, (mean, variance) in moments.items():
        assert abs((drawn**power).mean() - mean) < 4 * math.sqrt(variance / n), power
    assert np.abs(drawn).max() <= math.sqrt(-2 * math.log(2.0**-32)) < 6.67
    beyond = int((np.abs(drawn) > 4).sum())  # 33 expected
    assert 15 <= beyond <= 55


def test_neither_neighbours_nor_neighbouring_keys_know_of_each_other():
    rows = np.stack([normal((4096,), "row", slot) for slot in range(32)]).astype(np.float64)
    pairs = {
        "next number": (rows[:, :-1], rows[:, 1:]),
        "halves of a word": (rows[:, 0::2], rows[:, 1::2]),
        "next word": (rows[:, :-2], rows[:, 2:]),
        "next key": (rows[:-1], rows[1:]),
    }
    for name, (a, b) in pairs.items():
        limit = 4 / math.sqrt(a.size)
        assert abs((a * b).mean()) < limit, name
        assert abs(((a**2 - 1) * (b**2 - 1)).mean()) < 2 * limit, name
    each = np.corrcoef(rows)[np.triu_indices(32, 1)]
    assert np.abs(each).max() < 4.5 / math.sqrt(4096)


def test_a_noised_latent_is_rounded_to_float32_at_every_operation():
    shape, alpha, sigma = (4, 32, 32), math.sqrt(0.3), math.sqrt(0.7)
    x0, noise = latents(shape), normal(shape, "noise")
    x_t = noised(x0, noise, alpha, sigma)
    assert x_t.dtype == np.float32
    alpha, sigma = (float(np.float32(each)) for each in (alpha, sigma))
    exact = (x0.astype(np.float64) * alpha, noise.astype(np.float64) * sigma)
    products = [each.astype(np.float32).astype(np.float64) for each in exact]
    np.testing.assert_array_equal(x_t, sum(products).astype(np.float32))
    assert (x_t != sum(exact).astype(np.float32)).any()


def test_a_checksum_is_the_crc_of_float16_and_a_sum_with_random_signs():
    x = normal((4, 8, 8), "x")
    crc, projection = checksum(x)
    assert crc == google_crc32c.value(x.astype(np.float16).tobytes())
    signs = np.array([checksum(unit)[1] for unit in np.eye(256, dtype=np.float32)])
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.sum()) < 4 * 16
    assert projection == pytest.approx(float(signs @ x.astype(np.float64).reshape(-1)), abs=1e-12)
    # Fortran order, a view and float16 are the same values.
    assert checksum(np.asfortranarray(x)) == (crc, projection)
    assert checksum(np.stack([x, x], -1)[..., 0]) == (crc, projection)
    half = x.astype(np.float16)
    assert checksum(half) == checksum(half.astype(np.float32))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sigma", [1.0, 0.7, 0.1, 0.01])
def test_what_is_rebuilt_with_other_last_bits_matches(shape, sigma):
    x0, noise = latents(shape), normal(shape, "noise")
    stored = checksum(at(x0, noise, sigma))
    up = np.nextafter(noise, np.float32(np.inf))
    coin = normal(shape, "coin") > 0
    alpha = np.float32(math.sqrt(1 - sigma**2))
    fused = alpha.astype(np.float64) * x0 + np.float64(np.float32(sigma)) * up
    rebuilt = {
        "the same": at(x0, noise, sigma),
        "all rounded up": at(x0, up, sigma),
        "rounded either way": at(x0, np.where(coin, up, noise), sigma),
        "away from zero": at(x0, np.nextafter(noise, np.inf * np.sign(noise)), sigma),
        "fused as well": fused.astype(np.float32),
    }
    for name, x_t in rebuilt.items():
        assert matches(x_t, *stored), name


@pytest.mark.parametrize("shape", SHAPES)
def test_the_tolerance_is_the_one_derived(shape):
    # Every element off by as much as last bits explain, either way; and by a hundred times that.
    x_t = at(latents(shape), normal(shape, "noise"), 0.7).astype(np.float64)
    stored, bound = checksum(x_t), 2.0**-22 * (np.abs(x_t) + 9)
    kept = {1: 0, 100: 0}
    for key in range(20):
        signs = np.sign(normal(shape, "sign", key))
        for times in kept:
            kept[times] += matches(x_t + times * signs * bound, *stored)
    assert kept[1] == 20
    assert kept[100] <= 6  # of sums that are off by 100 deviations, where 8 are tolerated


def test_last_bits_do_change_the_crc_so_that_the_sum_is_needed():
    shape = SHAPES[-1]
    x0, noise = latents(shape), normal(shape, "noise")
    stored = checksum(at(x0, noise, 0.7))
    assert checksum(at(x0, np.nextafter(noise, np.float32(np.inf)), 0.7)).crc != stored.crc


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sigma", [1.0, 0.7, 0.1, 0.01])
def test_other_noise_does_not_match(shape, sigma):
    x0 = latents(shape)
    rows = [at(x0, normal(shape, "noise", slot), sigma) for slot in range(16)]
    for here, there in pairwise(rows):
        assert not matches(here, *checksum(there))


@pytest.mark.parametrize("shape", SHAPES)
def test_another_image_crop_noise_level_or_order_does_not_match(shape):
    x0, noise = latents(shape), normal(shape, "noise")
    x_t = at(x0, noise, 0.5)
    stored = checksum(x_t)
    others = {
        "another image": at(latents(shape, "other"), noise, 0.5),
        "mirrored": at(x0[..., ::-1], noise, 0.5),
        "the next step of a thousand": at(x0, noise, 0.501),
        "noise in another order": at(x0, noise.swapaxes(-1, -2), 0.5),
        "float16 noise": at(x0, noise.astype(np.float16).astype(np.float32), 0.5),
        "not a number": np.where(x_t == x_t.max(), np.float32(np.nan), x_t),
    }
    for name, other in others.items():
        assert not matches(np.ascontiguousarray(other), *stored), name


def test_values_beyond_float16_have_a_checksum_too():
    x = np.array([7e4, -7e4, 1.0], np.float32)
    assert matches(x, *checksum(x))
    assert not matches(-x, *checksum(x))
