"""Exact statements about a share of yes and no answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

LEVEL = 0.95
"""Confidence of the intervals."""

HALVINGS = 60
"""Halvings of the unit interval until a limit is found: more than a float64 tells apart."""


def sign_test(successes: int, trials: int) -> float:
    """Probability, were both answers as likely, of a count at least as far from the middle.

    The two-sided exact sign test; 1 without trials.
    """
    fewer = min(successes, trials - successes)
    tail = sum(math.comb(trials, count) for count in range(fewer + 1))
    return min(1.0, float(Fraction(2 * tail, 2**trials)))


def exact_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of the probability of a success (Clopper and Pearson 1934); trials above 0.

    Its limits are where a count as large, or as small, as this one has a probability of 2.5 %.
    """
    tail = (1 - LEVEL) / 2
    low = _rises_to(lambda p: _at_least(successes, trials, p), tail) if successes else 0.0
    failures = trials - successes
    high = 1 - _rises_to(lambda p: _at_least(failures, trials, p), tail) if failures else 1.0
    return low, high


def _rises_to(probability: Callable[[float], float], wanted: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < wanted else (low, middle)
    return (low + high) / 2


def _at_least(successes: int, trials: int, p: float) -> float:
    """P(X ≥ successes) of a binomial X with 0 < p < 1."""

    def log_term(count: int) -> float:
        ways = math.lgamma(trials + 1) - math.lgamma(count + 1) - math.lgamma(trials - count + 1)
        return ways + count * math.log(p) + (trials - count) * math.log1p(-p)

    return math.fsum(math.exp(log_term(count)) for count in range(successes, trials + 1))
