"""Repetition of frames: against plain loops over tuples, and on streams whose answer is known."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.frame_repetition import ends_in_loop, longest_run, repeated_ngrams

streams = st.integers(1, 3).flatmap(
    lambda codes: st.lists(st.lists(st.integers(0, 2), min_size=codes, max_size=codes), max_size=40)
    .map(lambda rows: np.array(rows, np.int64).reshape(-1, codes))
)  # fmt: skip


def stream(text: str) -> np.ndarray:
    """A stream of two codes per frame; the letter is one code and the other never changes."""
    return np.array([[ord(letter), 7] for letter in text], np.int64).reshape(-1, 2)


@given(streams)
def test_the_longest_run_is_that_of_a_walk_over_the_frames(frames):
    runs = [len(list(run)) for _, run in groupby(map(tuple, frames.tolist()))]
    assert longest_run(frames) == max(runs, default=0)


@given(streams, st.integers(2, 5))
def test_repeated_ngrams_are_those_that_stood_before(frames, n):
    rows = [tuple(row) for row in frames.tolist()]
    counts = Counter(tuple(rows[i : i + n]) for i in range(len(rows) - n + 1))
    repeated = sum(count - 1 for count in counts.values())
    expected = repeated / counts.total() if counts else 0.0
    assert repeated_ngrams(frames, n) == pytest.approx(expected)


@given(streams, st.floats(1, 30))
def test_a_looped_tail_is_one_whose_end_can_be_written_as_a_repetition(frames, rate_hz):
    rows = [tuple(row) for row in frames.tolist()]
    expected = any(
        tail >= 3 * period
        and tail >= 0.5 * rate_hz
        and all(rows[i] == rows[i - period] for i in range(len(rows) - tail + period, len(rows)))
        for period in range(1, len(rows) + 1)
        for tail in range(period, len(rows) + 1)
    )
    assert ends_in_loop(frames, rate_hz) == expected


@pytest.mark.parametrize(
    ("text", "rate_hz", "looped"),
    [
        ("xyzabcabcabc", 10, True),
        ("xyzabcabcab", 10, False),
        ("abcabcabca", 10, True),
        ("abcabcabcx", 10, False),
        ("xaaa", 6, True),
        ("xaaa", 7, False),
        ("", 10, False),
    ],
)
def test_a_loop_has_three_rounds_lasts_half_a_second_and_reaches_the_end(text, rate_hz, looped):
    assert ends_in_loop(stream(text), rate_hz) is looped


def test_frames_are_equal_only_in_all_of_their_codes():
    frames = np.array([[1, 1], [1, 2], [1, 1], [1, 2]], np.int64)
    assert longest_run(frames) == 1
    assert repeated_ngrams(frames, 2) == pytest.approx(1 / 3)
    assert repeated_ngrams(frames[:, :1], 2) == pytest.approx(2 / 3)
