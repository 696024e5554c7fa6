"""Where systems differ from the guided teacher, and how far their confidence can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from stages.metrics import Bootstrap, ratio
from stages.paired import CONFIDENCE_EDGES, SHARES, Axes, Confidence, Paired, Sums
from stages.report_schema import Bins, Calibration, Divergence, Metric

Array = NDArray[np.float64]


def divergences(
    systems: Mapping[str, Sequence[Paired]], axes: Axes, bootstrap: Bootstrap
) -> tuple[Divergence, ...]:
    """Return the mean KL of every system in the bins of each axis.

    `systems` holds every system's rollouts in the order of the bootstrap's utterances.
    """
    if not systems:
        return ()

    def of(field: str) -> dict[str, Bins]:
        return {
            name: _kl_bins([getattr(rollout, field) for rollout in rollouts], bootstrap)
            for name, rollouts in systems.items()
        }

    return (
        Divergence(axis="timestep", bins=_timestep_names(axes), systems=of("timesteps")),
        Divergence(axis="share", bins=_share_names(), systems=of("shares")),
        Divergence(axis="codebook", bins=axes.codebooks, systems=of("codebooks")),
    )


def _timestep_names(axes: Axes) -> tuple[str, ...]:
    width, last = axes.timesteps_per_bin, axes.timesteps - 1
    firsts = range(0, axes.timesteps, width)
    ends = [min(first + width - 1, last) for first in firsts]
    return tuple(str(a) if a == b else f"{a}–{b}" for a, b in zip(firsts, ends, strict=True))


def _share_names() -> tuple[str, ...]:
    width = 100 // SHARES
    return tuple(
        f"{width * part}–{width * (part + 1)}\N{NO-BREAK SPACE}%" for part in range(SHARES)
    )


def _kl_bins(sums: Sequence[Sums], bootstrap: Bootstrap) -> Bins:
    kl = np.array([each.kl for each in sums])
    return _bins(kl, np.array([each.predictions for each in sums]), bootstrap)


def _bins(sums: Array, counts: NDArray[np.int64], bootstrap: Bootstrap) -> Bins:
    """Return means with intervals of sums [U, b] over counts [U, b], bin by bin."""
    return Bins(
        values=tuple(
            _mean(above, below, bootstrap) for above, below in zip(sums.T, counts.T, strict=True)
        ),
        predictions=tuple(counts.sum(0).tolist()),
    )


def _mean(above: Array, below: NDArray[np.int64], bootstrap: Bootstrap) -> Metric | None:
    return bootstrap.metric(ratio(above, below)) if below.any() else None


def calibration(
    systems: Mapping[str, Sequence[Paired]], bootstrap: Bootstrap
) -> dict[str, Calibration]:
    """Return what the confidence of every system is worth, where it can be said."""
    return {
        name: _calibration(confidences, bootstrap)
        for name, rollouts in systems.items()
        if (confidences := _confidences(rollouts)) is not None
    }


def _calibration(confidences: Sequence[Confidence], bootstrap: Bootstrap) -> Calibration:
    ours, theirs, counts = _arrays(confidences)
    totals = zip(ours.sum(0).tolist(), counts.sum(0).tolist(), strict=True)
    return Calibration(
        edges=CONFIDENCE_EDGES,
        confidence=tuple(above / below if below else None for above, below in totals),
        reference=_bins(theirs, counts, bootstrap),
    )


def calibration_error(rollouts: Sequence[Paired], bootstrap: Bootstrap) -> Metric | None:
    """Return the expected calibration error of one system; None where it cannot be said."""
    confidences = _confidences(rollouts)
    if confidences is None:
        return None
    ours, theirs, counts = _arrays(confidences)
    return bootstrap.error_of_bins(ours, theirs, counts)


def _confidences(rollouts: Sequence[Paired]) -> list[Confidence] | None:
    found = [rollout.confidence for rollout in rollouts if rollout.confidence is not None]
    return found if found and len(found) == len(rollouts) else None


def _arrays(confidences: Sequence[Confidence]) -> tuple[Array, Array, NDArray[np.int64]]:
    """Return sums of the system's and the teacher's probabilities and counts, each [U, b]."""
    ours = np.array([each.system for each in confidences])
    theirs = np.array([each.teacher for each in confidences])
    counts = np.array([each.predictions for each in confidences])
    return ours, theirs, counts
