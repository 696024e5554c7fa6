"""Divergences of a student from its teacher, with their gradients in closed form.

A divergence compares two distributions over the same categories: all V ids, or the K kept ids and
one for the rest. It returns its value and its derivative with respect to the student's
log-probabilities; `AllIds` and `KeptIds` carry such a derivative on to the logits. Nothing here
needs autograd, so a loss can be computed a block at a time with nothing kept for later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = -1e6
"""Log-probability of what is impossible: times a share of nothing it is nothing, never NaN."""
NEGLIGIBLE = -60.0
"""Log of the least ratio that is computed, 1e-26: beside 1 it is nothing in float32, and towards
1e-38 begin denormal numbers, for which a CPU takes 20 to 100 times as long."""


def ratios_(logs: Tensor) -> Tensor:
    """Return exp of logs <= 0, in place, at least exp(`NEGLIGIBLE`)."""
    return logs.clamp_min_(NEGLIGIBLE).exp_()


@dataclass(frozen=True)
class Distribution:
    """Probabilities of M categories, in two forms."""

    logs: Tensor
    """[..., M], at least `LEAST`."""
    shares: Tensor
    """[..., M], at least exp(`NEGLIGIBLE`)."""

    @classmethod
    def of(cls, logs: Tensor) -> Distribution:
        """Take log-probabilities, -inf where impossible."""
        return cls(logs.clamp_min(LEAST), logs.clamp_min(NEGLIGIBLE).exp_())


Divergence = Callable[[Distribution, Distribution], tuple[Tensor, Tensor]]
"""Of teacher and student: value [...], and derivative [..., M] with respect to the student's logs,
which may be changed. Any multiple of the student's shares may be left out of it: normalising takes
it out again."""


class AllIds:
    """A distribution over all V ids."""

    def __init__(self, logits: Tensor) -> None:
        """Take logits [..., V], -inf at forbidden ids."""
        self._logits = logits
        largest = logits.amax(-1, keepdim=True)
        shares = ratios_(logits - largest)
        total = shares.sum(-1, keepdim=True)
        self._shares = shares.div_(total)
        self.normaliser = largest + total.log()
        """[..., 1]: logsumexp of the logits."""

    def distribution(self) -> Distribution:
        """Return the probabilities of all ids."""
        return Distribution((self._logits - self.normaliser).clamp_min_(LEAST), self._shares)

    def gradient(self, derivative: Tensor | None, drawn: Tensor | float) -> Tensor:
        """Return the gradient [..., V] with respect to the logits; uses up all others.

        `derivative` [..., V] is with respect to the log-probabilities, None for 0 everywhere;
        `drawn` [..., 1] is the sum of further derivatives, with respect to log-probabilities of
        single ids, which the caller adds to the gradient itself.
        """
        if derivative is None:
            return self._shares.mul_(-drawn)
        through = derivative.sum(-1, keepdim=True) + drawn
        return derivative.sub_(self._shares.mul_(through))


class KeptIds:
    """A distribution over K ids and one category for all others."""

    def __init__(self, logits: Tensor, ids: Tensor) -> None:
        """Take logits [..., V], -inf at forbidden ids, which are used up, and ids [..., K].

        The mass of the others is summed over them, never 1 less the mass of the kept.
        """
        self._ids, self.k = ids, ids.shape[-1]
        kept = logits.gather(-1, ids)
        outside = logits.scatter_(-1, ids, torch.full_like(kept, float("-inf")))
        largest = outside.amax(-1, keepdim=True).clamp_min_(LEAST)  # all -inf: nothing is outside
        self._outside = ratios_(outside.sub_(largest))
        self._total = self._outside.sum(-1, keepdim=True)
        categories = torch.cat([kept, largest + self._total.log()], -1)
        logs = categories.log_softmax(-1)
        self.normaliser = categories[..., :1] - logs[..., :1]
        """[..., 1]: logsumexp of the logits."""
        self._distribution = Distribution.of(logs)

    def distribution(self) -> Distribution:
        """Return the probabilities of the K ids and, last, the rest."""
        return self._distribution

    def gradient(self, derivative: Tensor | None, drawn: Tensor | float) -> Tensor:
        """Return the gradient [..., V] with respect to the logits, as `AllIds.gradient` does.

        What the category of the rest receives is shared out by the student's own probabilities.
        """
        if derivative is None:
            derivative = torch.zeros_like(self._distribution.shares)
        through = derivative.sum(-1, keepdim=True) + drawn
        categories = derivative - self._distribution.shares * through
        # Where nothing is outside the total is a sum of negligible ratios, else at least 1.
        each = categories[..., -1:] / self._total.clamp_min(1.0)
        return self._outside.mul_(each).scatter_(-1, self._ids, categories[..., :-1])


def bucketed(logs: Tensor, ids: Tensor) -> Tensor:
    """Return log-probabilities [..., K + 1] of ids [..., K] and the rest, from all [..., V]."""
    rest = logs.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([logs.gather(-1, ids), rest], -1)


def forward_kl(p: Distribution, q: Distribution) -> tuple[Tensor, Tensor]:
    """KL(p ‖ q) = Σ p log(p / q). Source: Hinton et al. (1503.02531)."""
    return (p.logs - q.logs).mul_(p.shares).sum(-1), -p.shares


def reverse_kl(p: Distribution, q: Distribution) -> tuple[Tensor, Tensor]:
    """KL(q ‖ p) = Σ q log(q / p). Source: MiniLLM (2306.08543)."""
    terms = (q.logs - p.logs).mul_(q.shares)
    return terms.sum(-1), terms


def jensen_shannon(beta: float) -> Divergence:
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m), m = β p + (1 − β) q. Source: GKD (2306.13649)."""

    def divergence(p: Distribution, q: Distribution) -> tuple[Tensor, Tensor]:
        middle = mixture(p, q, beta)
        ours = (1 - beta) * q.shares * (q.logs - middle)
        theirs = beta * p.shares * (p.logs - middle)
        return (theirs + ours).sum(-1), ours

    return divergence


def skew_kl(alpha: float) -> Divergence:
    """KL(p ‖ α p + (1 − α) q). Source: DistiLLM (2402.03898)."""

    def divergence(p: Distribution, q: Distribution) -> tuple[Tensor, Tensor]:
        middle = mixture(p, q, alpha)
        value = (p.shares * (p.logs - middle)).sum(-1)
        return value, (alpha - 1) * p.shares * (q.logs - middle).exp_()

    return divergence


def skew_reverse_kl(alpha: float) -> Divergence:
    """KL(q ‖ (1 − α) p + α q). Source: DistiLLM (2402.03898)."""

    def divergence(p: Distribution, q: Distribution) -> tuple[Tensor, Tensor]:
        gap = q.logs - mixture(p, q, 1 - alpha)
        return (q.shares * gap).sum(-1), q.shares * (gap - alpha * gap.exp())

    return divergence


def total_variation(p: Distribution, q: Distribution) -> tuple[Tensor, Tensor]:
    """½ Σ |p − q|; where p = q the derivative is 0. Source: f-DISTILL (2307.15190)."""
    difference = q.shares - p.shares
    return difference.abs().sum(-1) / 2, difference.sign_().mul_(q.shares) / 2


def mixture(p: Distribution, q: Distribution, share: float) -> Tensor:
    """Return log(share · p + (1 − share) · q), 0 < share < 1."""
    return torch.logaddexp(p.logs + math.log(share), q.logs + math.log1p(-share))
