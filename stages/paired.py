"""A system beside the guided teacher on the same codes, summed by where the codes stand.

What `paired_kl` is made of, taken apart by timestep, by share of the utterance and by codebook, and
what the system's confidence is worth. Sums, so that any mean and any bootstrap follows from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator
from torch import Tensor

from stages.losses import kl_divergence
from stages.targets import DenseTarget, SparseTarget
from store import PredictionStore
from store.schema import Record

SHARES = 10
"""Parts of equal length into which every rollout is cut."""
MOST_TIMESTEP_BINS = 20
"""Bins of timesteps over the longest rollout, at most."""
CONFIDENCE_EDGES = (0, 0.01, 0.02, 0.05, *(round(0.1 * tenth, 1) for tenth in range(1, 11)))
"""Ends of the bins of the probability that a system gives to its most probable id: tenths, and
finer ones in the first, for most codes of speech are less sure than that."""
CONFIDENCES = len(CONFIDENCE_EDGES) - 1

Array = NDArray[np.float64]


class Sums(Record):
    """Summed divergences of one rollout, bin by bin of one axis."""

    kl: tuple[float, ...]
    """Summed KL(guided teacher ‖ system) of the predictions in each bin, in nats."""
    predictions: tuple[int, ...]
    """Predictions in each bin."""


class Confidence(Record):
    """How sure a system is of its most probable ids along one rollout, bin by bin."""

    predictions: tuple[int, ...]
    """Predictions whose most probable id has a probability in each bin."""
    system: tuple[float, ...]
    """Summed probabilities that the system gives to these ids."""
    teacher: tuple[float, ...]
    """Summed probabilities that the guided teacher gives to the same ids."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        sizes = {len(self.predictions), len(self.system), len(self.teacher)}
        if sizes != {CONFIDENCES}:
            raise ValueError(f"{sorted(sizes)} bins of confidence, but there are {CONFIDENCES}")
        return self


class Paired(Record):
    """What a system predicts along one rollout of the guided teacher, beside that teacher."""

    agreed: int
    """Predictions whose most probable id is the guided teacher's."""
    timesteps: Sums
    """By timestep, in bins of `Axes.timesteps_per_bin`."""
    shares: Sums
    """By share of the rollout, in `SHARES` parts."""
    codebooks: Sums
    """By stream of the reference store; of streams that the system lacks there is nothing."""
    confidence: Confidence | None
    """Null where the reference store does not hold the probabilities of all ids."""

    @property
    def kl(self) -> float:
        """Summed KL over all predictions, in nats."""
        return sum(self.codebooks.kl)

    @property
    def predictions(self) -> int:
        """Predictions of the rollout: its codes that are predicted, of all streams."""
        return sum(self.codebooks.predictions)


@dataclass(frozen=True)
class Axes:
    """Along what divergences are taken apart: the same bins for all systems."""

    timesteps: int
    """Of the longest rollout."""
    codebooks: tuple[str, ...]
    """Names of the reference store's streams."""

    @classmethod
    def of(cls, reference: PredictionStore) -> Self:
        """Lay out the bins for the rollouts of a store."""
        longest = int(np.concatenate(reference.lengths()).max())
        return cls(longest, tuple(stream.name for stream in reference.manifest.streams))

    @property
    def timesteps_per_bin(self) -> int:
        """Timesteps of a bin; the last may have fewer."""
        return -(-self.timesteps // MOST_TIMESTEP_BINS)

    @property
    def timestep_bins(self) -> int:
        """Bins of timesteps."""
        return -(-self.timesteps // self.timesteps_per_bin)


class RolloutSums:
    """The sums of one rollout while its blocks of timesteps come in."""

    def __init__(self, axes: Axes, length: int, streams: Sequence[int]) -> None:
        """Begin with a rollout of `length` timesteps, of whose streams the system has `streams`."""
        self._axes, self._streams = axes, list(streams)
        self._kl = np.zeros((length, len(self._streams)))
        self._counts = np.zeros((length, len(self._streams)), np.int64)
        self._agreed = 0
        self._confidence: Array | None = np.zeros((3, CONFIDENCES))

    def add(
        self,
        timesteps: Tensor,
        student: Tensor,
        target: DenseTarget | SparseTarget,
        predicted: Tensor,
    ) -> None:
        """Add the predictions at `timesteps` [n].

        `student` is [n, C, V] float32 logits, -inf at forbidden ids, `target` what the guided
        teacher predicts there, and `predicted` [n, C] bool which of them count.
        """
        kl = kl_divergence(student, target).double()
        likeliest, rows = student.argmax(-1, keepdim=True), timesteps.cpu().numpy()
        self._kl[rows] = kl.where(predicted, 0.0).cpu().numpy()
        self._counts[rows] = predicted.cpu().numpy()
        self._agreed += int((likeliest == _likeliest(target)).squeeze(-1)[predicted].sum())
        if isinstance(target, DenseTarget):
            both = (_probability(logits, likeliest) for logits in (student, target.logits))
            self._add_confidence(*(probabilities[predicted] for probabilities in both))
        else:
            self._confidence = None

    def _add_confidence(self, system: Tensor, teacher: Tensor) -> None:
        """Add probabilities [P] of the system's most probable ids, its own and the teacher's."""
        assert self._confidence is not None
        ours = system.double().cpu().numpy()
        bins = np.digitize(ours, CONFIDENCE_EDGES[1:-1])
        for row, weights in enumerate((np.ones_like(ours), ours, teacher.double().cpu().numpy())):
            self._confidence[row] += np.bincount(bins, weights, CONFIDENCES)

    def paired(self) -> Paired:
        """Return the sums of the whole rollout."""
        axes, length = self._axes, len(self._kl)
        timesteps = np.arange(length)
        return Paired(
            agreed=self._agreed,
            timesteps=self._sums(timesteps // axes.timesteps_per_bin, axes.timestep_bins),
            shares=self._sums(timesteps * SHARES // length, SHARES),
            codebooks=Sums(
                kl=_placed(self._kl.sum(0), self._streams, len(axes.codebooks)),
                predictions=_placed(self._counts.sum(0), self._streams, len(axes.codebooks)),
            ),
            confidence=self._confidences(),
        )

    def _sums(self, bins: NDArray[np.int64], count: int) -> Sums:
        """Sum all streams of the timesteps that lie in each bin; `bins` is [T]."""
        return Sums(
            kl=tuple(np.bincount(bins, self._kl.sum(1), count).tolist()),
            predictions=tuple(int(n) for n in np.bincount(bins, self._counts.sum(1), count)),
        )

    def _confidences(self) -> Confidence | None:
        if self._confidence is None:
            return None
        counts, system, teacher = self._confidence
        return Confidence(
            predictions=tuple(int(n) for n in counts),
            system=tuple(system.tolist()),
            teacher=tuple(teacher.tolist()),
        )


def _placed(values: NDArray[Any], places: Sequence[int], count: int) -> tuple[Any, ...]:
    """Return `values` at their places among `count`, 0 elsewhere."""
    placed = np.zeros(count, values.dtype)
    placed[list(places)] = values
    return tuple(placed.tolist())


def _probability(logits: Tensor, ids: Tensor) -> Tensor:
    """Probability [...] that `logits` [..., V] give to `ids` [..., 1]."""
    chosen = logits.gather(-1, ids).squeeze(-1)
    return (chosen - logits.logsumexp(-1)).exp()


def _likeliest(target: DenseTarget | SparseTarget) -> Tensor:
    """Ids [..., 1] of the teacher's largest logit."""
    places = target.logits.argmax(-1, keepdim=True)
    return places if isinstance(target, DenseTarget) else target.ids.gather(-1, places)
