"""Divergences of a student from its teacher, with their gradients in closed form.

A divergence compares two sets of log-probabilities over the same categories: all V ids, or the K
kept ids and one for the rest. It returns its value and its derivative with respect to the student's
log-probabilities; `AllIds` and `KeptIds` carry such a derivative on to the logits. Nothing here
needs autograd, so a loss can be computed a block at a time with nothing kept for later.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

LEAST = -1e30
"""Log-probability of what is impossible: its product with a probability of 0 is 0, not NaN."""

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(teacher, student), both log-probabilities [..., M] of at least `LEAST` → value [...], derivative
[..., M] with respect to the student's, as if they were free."""


class AllIds:
    """A student's distribution over all V ids."""

    def __init__(self, logits: Tensor) -> None:
        """Take logits [..., V], -inf at forbidden ids."""
        self._logits = logits
        largest = logits.amax(-1, keepdim=True)
        self._probabilities = (logits - largest).exp_()
        total = self._probabilities.sum(-1, keepdim=True)
        self._probabilities.div_(total)
        self.normaliser = largest + total.log()
        """[..., 1]: logsumexp of the logits."""

    def logprobs(self) -> Tensor:
        """Return log-probabilities [..., V], at least `LEAST`."""
        return (self._logits - self.normaliser).clamp_min_(LEAST)

    def gradient(self, derivative: Tensor | None, drawn: Tensor | float) -> Tensor:
        """Return the gradient [..., V] with respect to the logits; may be called once.

        `derivative` [..., V] is with respect to the log-probabilities, None for 0 everywhere;
        `drawn` [..., 1] is the sum of further derivatives, with respect to log-probabilities of
        single ids, which the caller adds to the gradient itself.
        """
        if derivative is None:
            return self._probabilities.mul_(-drawn)
        through = derivative.sum(-1, keepdim=True) + drawn
        return derivative - self._probabilities.mul_(through)


class KeptIds:
    """A student's distribution over K ids and one category for all others."""

    def __init__(self, logits: Tensor, ids: Tensor) -> None:
        """Take logits [..., V], -inf at forbidden ids, which are used up, and ids [..., K].

        The mass of the others is summed over them, never 1 less the mass of the kept.
        """
        self._ids, self.k = ids, ids.shape[-1]
        kept = logits.gather(-1, ids)
        outside = logits.scatter_(-1, ids, float("-inf"))
        largest = outside.amax(-1, keepdim=True).clamp_min_(LEAST)  # all -inf: nothing is outside
        self._outside = outside.sub_(largest).exp_()
        self._total = self._outside.sum(-1, keepdim=True)
        categories = torch.cat([kept, largest + self._total.log()], -1)
        self.normaliser = categories.logsumexp(-1, keepdim=True)
        """[..., 1]: logsumexp of the logits."""
        self._logprobs = (categories - self.normaliser).clamp_min_(LEAST)

    def logprobs(self) -> Tensor:
        """Return log-probabilities [..., K + 1] of the ids and the rest, at least `LEAST`."""
        return self._logprobs

    def gradient(self, derivative: Tensor | None, drawn: Tensor | float) -> Tensor:
        """Return the gradient [..., V] with respect to the logits, as `AllIds.gradient` does.

        What the category of the rest receives is shared out by the student's own probabilities.
        """
        if derivative is None:
            derivative = torch.zeros_like(self._logprobs)
        through = derivative.sum(-1, keepdim=True) + drawn
        categories = derivative - self._logprobs.exp() * through
        shares = categories[..., -1:] / self._total.clamp_min(1.0)  # the largest has exp(0)
        return self._outside.mul_(shares).scatter_(-1, self._ids, categories[..., :-1])


def bucketed(logprobs: Tensor, ids: Tensor) -> Tensor:
    """Return log-probabilities [..., K + 1] of ids [..., K] and the rest, from all [..., V]."""
    rest = logprobs.scatter(-1, ids, LEAST).logsumexp(-1, keepdim=True)
    return torch.cat([logprobs.gather(-1, ids), rest], -1)


def forward_kl(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p ‖ q) = Σ p log(p / q). Source: Hinton et al. (1503.02531)."""
    p = teacher.exp()
    return (p * (teacher - student)).sum(-1), -p


def reverse_kl(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q ‖ p) = Σ q log(q / p). Source: MiniLLM (2306.08543)."""
    q, gap = student.exp(), student - teacher
    return (q * gap).sum(-1), q * (gap + 1)


def jensen_shannon(beta: float) -> Divergence:
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m), m = β p + (1 − β) q. Source: GKD (2306.13649)."""

    def divergence(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        middle = mixture(teacher, student, beta)
        p, q, gap = teacher.exp(), student.exp(), student - middle
        terms = beta * p * (teacher - middle) + (1 - beta) * q * gap
        return terms.sum(-1), (1 - beta) * q * gap

    return divergence


def skew_kl(alpha: float) -> Divergence:
    """KL(p ‖ α p + (1 − α) q). Source: DistiLLM (2402.03898)."""

    def divergence(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        middle = mixture(teacher, student, alpha)
        p = teacher.exp()
        derivative = -(1 - alpha) * p * (student - middle).exp()
        return (p * (teacher - middle)).sum(-1), derivative

    return divergence


def skew_reverse_kl(alpha: float) -> Divergence:
    """KL(q ‖ (1 − α) p + α q). Source: DistiLLM (2402.03898)."""

    def divergence(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        middle = mixture(teacher, student, 1 - alpha)
        q, gap = student.exp(), student - middle
        return (q * gap).sum(-1), q * (gap + 1 - alpha * gap.exp())

    return divergence


def total_variation(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """½ Σ |p − q|; where p = q the derivative is 0. Source: f-DISTILL (2307.15190)."""
    q = student.exp()
    difference = q - teacher.exp()
    return difference.abs().sum(-1) / 2, difference.sign() * q / 2


def mixture(teacher: Tensor, student: Tensor, share: float) -> Tensor:
    """Return log(share · p + (1 − share) · q) from log-probabilities, 0 < share < 1."""
    return torch.logaddexp(teacher + math.log(share), student + math.log1p(-share))
