"""Numbers summed up for people: quantiles, histograms, and what lies far out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from store.encoding import Array

Document = dict[str, Any]

PERCENTS = (1, 10, 50, 90, 99)
BARS = 12
"""Bars of a histogram, at most."""
FAR_OUT = 5.0
"""Robust z-score from which a value is an outlier: one in two million of a normal distribution."""
MOST_OUTLIERS = 10


def quantiles(values: Array) -> Document:
    """Return least, mean, most and percentiles `p1` … `p99` of some numbers; none of no numbers."""
    if not values.size:
        return {}
    exact = values.astype(np.float64).ravel()
    at = np.percentile(exact, PERCENTS)
    shares = {f"p{percent}": float(found) for percent, found in zip(PERCENTS, at, strict=True)}
    return {"least": float(exact.min())} | shares | {
        "most": float(exact.max()), "mean": float(exact.mean())
    }  # fmt: skip


def histogram(values: Array) -> Document:
    """Return `edges` [n + 1] and `counts` [n] of whole numbers, in bars of one round width."""
    if not values.size:
        return {"edges": [], "counts": []}
    least, most = int(values.min()), int(values.max())
    width = _round_width((most - least + 1) / BARS)
    edges = np.arange(least // width * width, most + width + 1, width)
    edges = edges[: int(np.searchsorted(edges, most, side="right")) + 1]
    counts, _ = np.histogram(values, edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def outliers(name_of: Callable[[int], str], values: Array) -> list[Document]:
    """Return what lies far from the median of [n] numbers, the farthest first, at most 10.

    `name_of` names the number at a place. `z` is its distance from the median over 1.4826 times
    the median distance; where that is 0, over 1.2533 times the mean distance (Iglewicz and Hoaglin,
    1993).
    """
    if not values.size:
        return []
    distances = np.abs(values - np.median(values))
    unit = 1.4826 * float(np.median(distances)) or 1.2533 * float(distances.mean())
    if unit == 0:
        return []
    scores = (values - np.median(values)) / unit
    order = np.argsort(-np.abs(scores), kind="stable")[:MOST_OUTLIERS]
    return [
        {"key": name_of(int(place)), "value": float(values[place]), "z": float(scores[place])}
        for place in order
        if abs(scores[place]) >= FAR_OUT
    ]


def _round_width(least: float) -> int:
    """Smallest of 1, 2, 5, 10, 20, 50, … that is not below `least`."""
    power = int(10 ** math.floor(math.log10(max(least, 1))))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least)
