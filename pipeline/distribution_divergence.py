"""KL between what two stores say of the same rows, as far as both say it exactly."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipeline.stored_rows import Arrays, Distributions, Kept, Whole, distributions_of
from store import PredictionStore
from store.encoding import Array
from store.schema import Manifest, Sampled, TopK

BLOCK_NUMBERS = 2**23
"""Numbers that one block of rows takes at a time, at most."""


def common_temperature(a: Manifest, b: Manifest) -> float | None:
    """Return the temperature at which both stores know their tails, 1 if it is one; else None."""
    lists = [m.target.temperatures for m in (a, b) if isinstance(m.target, TopK)]
    shared = set(lists[0]).intersection(*lists[1:]) if lists else {1.0}
    return 1.0 if 1.0 in shared else min(shared, default=None)


def incomparable(a: Manifest, b: Manifest) -> str | None:
    """Return why no KL between the targets of two stores of codes can be given; else None."""
    if a.vocabularies != b.vocabularies:
        return f"their streams have vocabularies {a.vocabularies} and {b.vocabularies}"
    if isinstance(a.target, Sampled) or isinstance(b.target, Sampled):
        return "the draws of a target `sampled` are no distribution"
    if common_temperature(a, b) is None:
        return "they list no temperature in common"
    return None


def divergence_of_rows(a: PredictionStore, of_a: Arrays, b: PredictionStore, of_b: Arrays) -> Array:
    """Return KL(a ‖ b) [n, C] float64 in nats of n rows, those of the second being at its place.

    Between whole distributions it is exact. Where a store kept K ids and the mass of all others,
    it is the KL between the finest distributions that both tell exactly: one category for every
    id that all such stores kept, and one for all the rest. That bounds the whole KL from below (of
    a coarser distribution it is never larger) and equals it where the rest is alike. It is
    infinite where the first gives mass to what the second rules out.
    """
    heat = common_temperature(a.manifest, b.manifest)
    rows = len(of_a["codes"])
    found = []
    for block in _blocks(a.manifest, b.manifest, rows):
        parts = [{n: x[block] for n, x in arrays.items()} for arrays in (of_a, of_b)]
        p, q = distributions_of(a, parts[0], heat), distributions_of(b, parts[1], heat)
        found.append(_kl(*_on_common_categories(p, q)))
    return np.concatenate(found)


def _blocks(a: Manifest, b: Manifest, rows: int) -> Iterator[slice]:
    widths = [m.target.k if isinstance(m.target, TopK) else m.vocabulary for m in (a, b)]
    both_kept = all(isinstance(m.target, TopK) for m in (a, b))
    width = widths[0] * widths[1] if both_kept else max(widths)
    step = max(1, BLOCK_NUMBERS // (width * len(a.streams)))
    return (slice(start, start + step) for start in range(0, rows, step))


def _on_common_categories(p: Distributions, q: Distributions) -> tuple[Array, Array]:
    """Natural logs of the masses [n, C, categories] of both; a category of neither is -inf."""
    match p, q:
        case Whole(), Whole():
            return _double(p.logprobs), _double(q.logprobs)
        case Kept(), Whole():
            return _kept(p), _gathered(q, p.ids)
        case Whole(), Kept():
            return _gathered(p, q.ids), _kept(q)
        case Kept(), Kept():
            return _on_common_ids(p, q)
        case _:
            raise ValueError("draws are no distribution")


def _kept(found: Kept) -> Array:
    """The kept ids, and the rest."""
    return np.concatenate([_double(found.logprobs), _double(found.tail_logmass)[..., None]], -1)


def _gathered(found: Whole, ids: Array) -> Array:
    """Some ids of a whole distribution, and the rest."""
    logprobs, places = _double(found.logprobs), ids.astype(np.int64)
    rest = logprobs.copy()
    np.put_along_axis(rest, places, -np.inf, -1)
    chosen = np.take_along_axis(logprobs, places, -1)
    return np.concatenate([chosen, _logsumexp(rest)[..., None]], -1)


def _on_common_ids(p: Kept, q: Kept) -> tuple[Array, Array]:
    """The ids that both kept, in the places of the first's, and the rest."""
    match = p.ids[..., :, None] == q.ids[..., None, :]  # [n, C, Kp, Kq]
    of_p, of_q = _double(p.logprobs), _double(q.logprobs)
    common_p, common_q = match.any(-1), match.any(-2)
    there = np.where(match, of_q[..., None, :], -np.inf).max(-1)
    rests = [
        _logsumexp(np.concatenate([np.where(common, -np.inf, logs), _double(tail)[..., None]], -1))
        for common, logs, tail in (
            (common_p, of_p, p.tail_logmass),
            (common_q, of_q, q.tail_logmass),
        )
    ]
    here = np.where(common_p, of_p, -np.inf)
    return (
        np.concatenate([here, rests[0][..., None]], -1),
        np.concatenate([there, rests[1][..., None]], -1),
    )


def _kl(p: Array, q: Array) -> Array:
    """[n, C] Σ exp(p)·(p − q); nothing where exp(p) is 0."""
    present = p > -np.inf
    difference = np.subtract(p, q, out=np.zeros_like(p), where=present)
    terms = np.where(present, np.exp(p), 0) * difference
    return np.asarray(np.maximum(terms.sum(-1), 0))


def _logsumexp(logs: Array) -> Array:
    top = logs.max(-1, keepdims=True)
    safe = np.where(top > -np.inf, top, 0)
    total = np.exp(logs - safe).sum(-1)
    found = np.log(total, out=np.full(total.shape, -np.inf), where=total > 0)
    return np.asarray(found + safe[..., 0])


def _double(values: Array) -> Array:
    return values.astype(np.float64)
