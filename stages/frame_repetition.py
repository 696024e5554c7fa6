"""How much a stream of codec frames repeats itself: the marks of a model that is stuck or loops.

Frames are compared whole, all codes of a frame at once, so what is counted are exact repetitions.
Speech has few of them beside digital silence; the recordings' own codes give the yardstick.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

LOOPED_TIMES = 3
"""How often a loop's frames stand one after the other, at least."""

LOOPED_S = 0.5
"""Seconds that a loop lasts, at least: three equal frames alone are a pause."""

Frames = NDArray[np.int64]


def longest_run(frames: Frames) -> int:
    """Length in frames of the longest run of one frame of `frames` [F, C]; 0 without frames."""
    if not len(frames):
        return 0
    changes = np.flatnonzero((frames[1:] != frames[:-1]).any(axis=1)) + 1
    return int(np.diff(changes, prepend=0, append=len(frames)).max())


def repeated_ngrams(frames: Frames, n: int) -> float:
    """Share of the runs of `n` frames of `frames` [F, C] that stood before in the same stream.

    1 − |different n-grams| / |n-grams|, the seq-rep-n of Welleck et al. 2020 (Neural Text
    Generation with Unlikelihood Training, arXiv:1908.04319), on frames in place of words; 0 for
    streams of fewer than `n` frames.
    """
    count = len(frames) - n + 1
    if count < 1:
        return 0.0
    ngrams = np.concatenate([frames[start : start + count] for start in range(n)], axis=1)
    return 1 - len(np.unique(ngrams, axis=0)) / count


def ends_in_loop(frames: Frames, frame_rate_hz: float) -> bool:
    """Whether `frames` [F, C] end in the same stretch at least three times over, for 0.5 s.

    The stretch may be of any length, one frame included; the last of it may be cut off anywhere.
    """
    least = math.ceil(LOOPED_S * frame_rate_hz)
    for period in range(1, len(frames) // LOOPED_TIMES + 1):
        same = (frames[period:] == frames[:-period]).all(axis=1)
        breaks = np.flatnonzero(~same)
        tail = len(same) - (breaks[-1] + 1 if len(breaks) else 0) + period
        if tail >= max(LOOPED_TIMES * period, least):
            return True
    return False
