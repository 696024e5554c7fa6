"""Counter-based uniform numbers: the published generator, and nothing but key and place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.philox import WORD, philox_4x32, uniforms

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
KNOWN = {
    ((0, 0, 0, 0), (0, 0)): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ((WORD,) * 4, (WORD, WORD)): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    PI: (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
}
"""Known answers of Philox4x32-10, from the test vectors of Random123 (kat_vectors)."""


@pytest.mark.parametrize(("counter", "key"), KNOWN)
def test_the_published_vectors_come_out(counter, key):
    words = philox_4x32(
        tuple(torch.tensor([word]) for word in counter), tuple(torch.tensor([w]) for w in key)
    )
    assert tuple(int(word) for word in words) == KNOWN[counter, key]


def reference(key: int, timestep: int, stream: int, draw: int) -> float:
    """One uniform number in Python's own integers."""
    a, b, c, d = draw // 2, stream, timestep, 0
    first, second = key & WORD, key >> 32
    for _ in range(10):
        x, y = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (y >> 32) ^ b ^ first, y & WORD, (x >> 32) ^ d ^ second, x & WORD
        first, second = (first + 0x9E3779B9) & WORD, (second + 0xBB67AE85) & WORD
    high, low = ((a, b), (c, d))[draw % 2]
    return ((high >> 5) * 2**26 + (low >> 6)) / 2**53


@given(
    st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**31)), min_size=1, max_size=5)
)
def test_each_number_is_that_of_its_key_timestep_stream_and_place(rows):
    keys, timesteps = (torch.tensor(column) for column in zip(*rows, strict=True))
    drawn = uniforms(keys, timesteps, 3, 5)
    assert drawn.dtype == torch.float64
    for row, (key, timestep) in enumerate(rows):
        for stream in range(3):
            expected = [reference(key, timestep, stream, draw) for draw in range(5)]
            assert drawn[row, stream].tolist() == expected
    assert torch.equal(uniforms(keys, timesteps, 3, 2), drawn[..., :2])


def test_the_numbers_are_uniform_and_no_two_streams_share_them():
    drawn = uniforms(torch.tensor([1, 2]), torch.tensor([5, 5]), 4, 5000).flatten(0, 1)
    assert (drawn >= 0).all()
    assert (drawn < 1).all()
    for row in drawn:
        observed = np.histogram(row, bins=50, range=(0, 1))[0]
        # The 99.9 % quantile of chi-square with 49 degrees of freedom is 85.4.
        assert ((observed - 100) ** 2 / 100).sum() < 85.4
    correlation = np.corrcoef(drawn)
    assert np.abs(correlation - np.eye(8)).max() < 0.06
