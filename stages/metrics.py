"""Numbers over a test set, with bootstrap intervals over its sentences.

Every metric here is a ratio of sums over utterances: edits over words, divergence over
predictions, seconds over seconds. Utterances of the same sentence (several voices) are drawn
together, because their errors are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.report_schema import Comparison, Metric
from stages.transcripts import normalise, readings

LEVEL = 0.95
"""Share of the bootstrap distribution that an interval holds."""

LONGEST_REPEAT = 4
"""Longest phrase, in words, whose immediate repetition is counted."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Ratio:
    """A metric before it is summed: what each utterance adds above and below the line."""

    numerator: Array
    """[U] float64: edits, summed divergences, seconds, ..."""
    denominator: Array
    """[U] float64, at least 0 and not all 0: reference words, predictions, seconds, ..."""

    def __post_init__(self) -> None:
        shapes = self.numerator.shape, self.denominator.shape
        if shapes[0] != shapes[1] or len(shapes[0]) != 1:
            raise ValueError(f"numerator and denominator must both be [U], not {shapes}")
        if not np.isfinite(self.numerator).all() or not np.isfinite(self.denominator).all():
            raise ValueError("a ratio needs finite numbers, but some utterance has NaN or infinity")
        if (self.denominator < 0).any() or self.denominator.sum() <= 0:
            raise ValueError("the denominators of a ratio must be at least 0 and not all 0")

    @property
    def value(self) -> float:
        """Sum over sum."""
        return float(self.numerator.sum() / self.denominator.sum())


def ratio(numerator: ArrayLike, denominator: ArrayLike | None = None) -> Ratio:
    """Pair per-utterance sums [U] with their counts [U]; without counts it is a plain mean."""
    above = np.asarray(numerator, np.float64)
    below = np.ones_like(above) if denominator is None else np.asarray(denominator, np.float64)
    return Ratio(above, below)


def word_errors(references: Sequence[str], heard: Sequence[str]) -> Ratio:
    """Count word edits and reference words per utterance; the value of the result is the WER.

    Texts are normalised first (`stages.transcripts`). Insertions count, so a value may exceed 1.
    """
    from jiwer import process_words

    def count(reference: str, heard: str) -> int:
        edits = process_words(reference, heard)
        return edits.substitutions + edits.deletions + edits.insertions

    lengths = [len(normalise(text).split()) for text in references]
    return ratio(_least_edits(references, heard, count), lengths)


def character_errors(references: Sequence[str], heard: Sequence[str]) -> Ratio:
    """Count character edits and reference characters, spaces included: the value is the CER."""
    from jiwer import process_characters

    def count(reference: str, heard: str) -> int:
        edits = process_characters(reference, heard)
        return edits.substitutions + edits.deletions + edits.insertions

    return ratio(
        _least_edits(references, heard, count), [len(normalise(text)) for text in references]
    )


def _least_edits(
    references: Sequence[str], heard: Sequence[str], count: Callable[[str, str], int]
) -> list[int]:
    """Edits per utterance, over the readings of what was heard."""
    return [
        min(count(normalise(reference), reading) for reading in readings(text))
        for reference, text in zip(references, heard, strict=True)
    ]


def repetition(references: Sequence[str], heard: Sequence[str]) -> Ratio:
    """Count words heard again directly after themselves, beyond the text's own repetitions."""
    texts = [normalise(text).split() for text in references]
    spoken = [normalise(text).split() for text in heard]
    extra = [
        max(repeated_words(b) - repeated_words(a), 0) for a, b in zip(texts, spoken, strict=True)
    ]
    return ratio(extra, [len(words) for words in texts])


def repeated_words(words: Sequence[str]) -> int:
    """Count the words that lie in a phrase equal to the phrase directly before it."""
    repeated = np.zeros(len(words), bool)
    for size in range(1, LONGEST_REPEAT + 1):
        for start in range(size, len(words) - size + 1):
            if words[start : start + size] == words[start - size : start]:
                repeated[start : start + size] = True
    return int(repeated.sum())


def cosine(ours: ArrayLike, theirs: ArrayLike) -> Array:
    """Cosine per utterance of embeddings [U, D] and [U, D]; 0 where one of them is all zero."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosines: Array = np.zeros_like(norms)
    np.divide((a * b).sum(axis=-1), norms, out=cosines, where=norms > 0)
    return cosines


@dataclass(frozen=True)
class Bootstrap:
    """Resampled weights of the sentences; one object serves all metrics and systems of a test set.

    Sharing the weights is what makes a difference paired.
    """

    groups: NDArray[np.int64]
    """[U] int64: which sentence an utterance belongs to."""
    weights: NDArray[np.int64]
    """[draws, G] int64: how often each sentence was drawn."""

    @classmethod
    def over(cls, sentences: Sequence[str], *, draws: int, seed: int) -> Self:
        """Draw sentences with replacement; `sentences` [U] names the sentence of each utterance."""
        _, groups = np.unique(np.asarray(sentences, object).astype(str), return_inverse=True)
        count = int(groups.max()) + 1
        generator = np.random.default_rng(seed)
        weights = generator.multinomial(count, np.full(count, 1 / count), size=draws)
        return cls(groups, weights)

    def metric(self, values: Ratio) -> Metric:
        """Return the value with its percentile interval."""
        return _metric(values.value, self._draws(values))

    def difference(self, ours: Ratio, theirs: Ratio) -> Metric:
        """Return `ours - theirs` with the percentile interval of the paired difference."""
        return _metric(ours.value - theirs.value, self._draws(ours) - self._draws(theirs))

    def error_of_bins(self, ours: Array, theirs: Array, counts: NDArray[np.int64]) -> Metric:
        """Return Σ_b |Σ ours − Σ theirs| / Σ counts, bins b, of sums [U, b], with its interval.

        With summed confidences, summed outcomes and counts it is the expected calibration error
        (Guo et al., 1706.04599). The bootstrap draws sentences, as for any other metric.
        """
        size = self.weights.shape[1]
        totals = np.zeros((2, size, ours.shape[1]))
        np.add.at(totals[0], self.groups, ours - theirs)
        np.add.at(totals[1], self.groups, counts)
        errors, predictions = np.abs(self.weights @ totals[0]).sum(1), self.weights @ totals[1]
        value = float(np.abs((ours - theirs).sum(0)).sum() / counts.sum())
        return _metric(value, errors / predictions.sum(1))

    def _draws(self, values: Ratio) -> Array:
        """Return the metric on every draw: [draws], NaN where a draw has an empty denominator."""
        size = self.weights.shape[1]
        above = self.weights @ np.bincount(self.groups, values.numerator, size)
        below = self.weights @ np.bincount(self.groups, values.denominator, size)
        drawn: Array = np.full(len(above), np.nan)
        np.divide(above, below, out=drawn, where=below > 0)
        return drawn


def comparisons(
    found: Mapping[str, Mapping[str, Ratio]], bootstrap: Bootstrap, metrics: Sequence[str]
) -> tuple[Comparison, ...]:
    """Return paired differences: guided against unguided teacher, every student against both.

    `found` holds the metrics of every system by name; what one of a pair lacks is left out.
    """
    students = [name for name in found if name.startswith("student")]
    pairs = [("teacher_guided", "teacher_unguided")]
    pairs += [(s, t) for s in students for t in ("teacher_guided", "teacher_unguided")]
    return tuple(
        Comparison(
            metric=metric,
            system=ours,
            against=theirs,
            difference=bootstrap.difference(found[ours][metric], found[theirs][metric]),
        )
        for ours, theirs in pairs
        for metric in metrics
        if metric in found.get(ours, {}) and metric in found.get(theirs, {})
    )


def crossed_metric(sentences: Bootstrap, listeners: Bootstrap, values: Ratio) -> Metric:
    """Return the value with a percentile interval that draws sentences and listeners alike.

    An answer weighs as often as its sentence was drawn times as often as its listener was: Owen's
    pigeonhole bootstrap (2007, Annals of Applied Statistics 1(2)), which is rather too wide than
    too narrow. Both have the same number of draws.
    """
    weights = sentences.weights[:, sentences.groups] * listeners.weights[:, listeners.groups]
    above, below = weights @ values.numerator, weights @ values.denominator
    drawn: Array = np.full(len(above), np.nan)
    np.divide(above, below, out=drawn, where=below > 0)
    return _metric(values.value, drawn)


def _metric(value: float, draws: Array) -> Metric:
    tails = 50 * (1 - LEVEL), 100 - 50 * (1 - LEVEL)
    low, high = np.nanpercentile(draws, tails)
    return Metric(value=value, low=float(low), high=float(high))
