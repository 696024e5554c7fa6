"""How far a store is from what its teacher predicts now: what is measured, and what was found.

Which rollouts are asked for again is a function of the seed and their keys; what was found of them
is summed up per stream, or per noise level, and per rollout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, Protocol

import numpy as np
from pydantic import Field

from stages.errors import UserError
from stages.sampling import keyed_seed
from store import PredictionStore
from store.plan import Key
from store.schema import Dense, Full, Hidden, Manifest, Quantization, Record, Sampled, TopK

Part = Literal["guided", "cond", "uncond"]
"""What was predicted: under guidance, or by one of its branches, where these are stored apart."""
Further = Literal["kept_ids", "logit_mean", "logit_std", "level", "tail_draws", "states"]
Measured = Literal["kl", "redrawn", "squared_error"] | Further

WORST = 3
"""Rollouts that are named, at most."""


class PartDrift(Record):
    """What was found of one stream, or of one noise level."""

    name: str
    """Name of the stream, or of the noise level."""
    part: Part = "guided"
    """What of it was compared."""
    temperature: float = 1.0
    """Distillation temperature at which it was."""
    predictions: int = Field(ge=0)
    """Predictions that were compared."""
    not_finite: int = Field(0, ge=0)
    """Predictions that the teacher now has no finite answer to; they are in no other number."""
    mean: float
    """Mean drift."""
    p99: float
    """99th percentile over the predictions."""
    largest: float
    """Largest of them."""
    agreement: float | None = Field(None, ge=0, le=1)
    """Share of them whose most probable id is the same; null where there is no such thing."""


class RolloutDrift(Record):
    """What was found of one rollout."""

    sample_id: str
    """Its sample."""
    variation: int
    """Which of its rollouts."""
    mean: float
    """Mean drift over its predictions, of whatever part has the most."""


class Limit(NamedTuple):
    """What a mean drift may be."""

    value: float
    origin: str
    """Where it comes from."""


class StoreDrift(Record):
    """What an audit found."""

    measure: Measured
    """`kl`: KL(stored ‖ recomputed) in nats; `redrawn`: share of the draws that become others;
    `squared_error`: squared difference over the mean square of what is stored, and `states` that of
    hidden states; `kept_ids`: by how much the likeliest logit that was not kept is above the least
    that was; `logit_mean`, `logit_std` and `level` (the row maximum): difference of logits beyond
    what storage rounds; `tail_draws`: how far the random number of a draw from the tail is from the
    mass that its id has there."""
    parts: tuple[PartDrift, ...]
    """By stream or noise level."""
    worst: tuple[RolloutDrift, ...]
    """The rollouts that drifted most, the worst first."""

    @property
    def largest_mean(self) -> float:
        """The largest mean over a stream or noise level, or over a rollout."""
        means = [part.mean for part in self.parts] + [rollout.mean for rollout in self.worst]
        return max(means)

    @property
    def not_finite(self) -> int:
        """Predictions without a finite answer."""
        return sum(part.not_finite for part in self.parts)

    def within(self, limit: float) -> bool:
        """Whether every answer was finite and no mean exceeds `limit`."""
        return self.not_finite == 0 and self.largest_mean <= limit

    def above(self, limit: float) -> tuple[str, ...]:
        """Names of the streams or noise levels whose mean exceeds `limit`, each once."""
        return tuple(dict.fromkeys(part.name for part in self.parts if part.mean > limit))


def chosen_keys(keys: Sequence[Key], fraction: float, seed: int) -> list[Key]:
    """Choose a share of `keys`, rounded up, by a hash of (seed, key); in the given order.

    Neither their order nor shards, batches or processes move the choice. Raises `UserError` for a
    share that is none, or without keys.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"--fraction {fraction:g} must be above 0 and at most 1")
    if not keys:
        raise UserError("the store holds no prediction yet, so there is nothing to audit")
    hashed = [keyed_seed(seed, "audit", *key) for key in keys]
    wanted = math.ceil(fraction * len(keys))
    return [keys[place] for place in sorted(np.argsort(hashed, kind="stable")[:wanted])]


class _Place(NamedTuple):
    """What predictions are summed up by."""

    name: str
    part: Part
    temperature: float


class _Values:
    """Drift of predictions, with their weights in a mean."""

    def __init__(self) -> None:
        self.values: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []
        self.agreed: int | None = None

    def add(self, values: np.ndarray, weights: np.ndarray, agreed: int | None) -> None:
        self.values.append(values)
        self.weights.append(weights)
        if agreed is not None:
            self.agreed = agreed + (self.agreed or 0)

    def summed_up(self, place: _Place) -> PartDrift:
        values, weights = np.concatenate(self.values), np.concatenate(self.weights)
        finite = np.isfinite(values)
        kept = values[finite]
        none = not len(kept)
        return PartDrift(
            name=place.name,
            part=place.part,
            temperature=place.temperature,
            predictions=len(kept),
            not_finite=len(values) - len(kept),
            mean=0.0 if none else float(np.average(kept, weights=weights[finite])),
            p99=0.0 if none else float(np.quantile(kept, 0.99)),
            largest=0.0 if none else float(kept.max()),
            agreement=None if self.agreed is None else self.agreed / max(len(values), 1),
        )


class DriftTally:
    """Sums up drift as it is measured, per stream or noise level and per rollout."""

    def __init__(self, measure: Measured) -> None:
        self._measure = measure
        self._places: dict[_Place, _Values] = {}
        self._rollouts: dict[Key, dict[tuple[Part, float], _Values]] = {}

    def add(
        self,
        key: Key,
        name: str,
        values: np.ndarray,
        *,
        part: Part = "guided",
        temperature: float = 1.0,
        weights: np.ndarray | None = None,
        agreed: int | None = None,
    ) -> None:
        """Take the drift [n] of predictions of one rollout and one stream or noise level.

        Those that are not finite are counted apart. `weights` [n] are those of the means, 1 if none
        are given; `agreed` says how many of the predictions have the same most probable id.
        """
        values = values.astype(np.float64)
        weighed = np.ones(len(values)) if weights is None else weights.astype(np.float64)
        of_rollout = self._rollouts.setdefault(key, {})
        place = _Place(name, part, temperature)
        for sums in (
            self._places.setdefault(place, _Values()),
            of_rollout.setdefault((part, temperature), _Values()),
        ):
            sums.add(values, weighed, agreed)

    def result(self) -> StoreDrift:
        """Return what was found; raises `UserError` where nothing was compared."""
        if not self._places:
            raise UserError(
                "none of the chosen rollouts holds a prediction: raise --fraction, or choose "
                "others with --seed"
            )
        rollouts = [
            RolloutDrift(
                sample_id=sample_id,
                variation=variation,
                mean=max(
                    sums.summed_up(_Place("", part, temperature)).mean
                    for (part, temperature), sums in parts.items()
                ),
            )
            for (sample_id, variation), parts in self._rollouts.items()
        ]
        worst = sorted(rollouts, key=lambda r: (-r.mean, r.sample_id, r.variation))[:WORST]
        return StoreDrift(
            measure=self._measure,
            parts=tuple(sums.summed_up(place) for place, sums in self._places.items()),
            worst=tuple(worst),
        )


def measure_of(manifest: Manifest) -> Measured:
    """Return what can be measured of a store's predictions."""
    match manifest.target:
        case Dense():
            return "squared_error"
        case Sampled():
            return "redrawn"
        case _:
            return "kl"


def further_of(manifest: Manifest) -> tuple[Further, ...]:
    """Return what can be measured of all that a store holds beside: what no KL sees."""
    match manifest.target:
        case TopK() as target:
            moments: tuple[Further, ...] = ("logit_mean", "logit_std") if target.moments else ()
            tail: tuple[Further, ...] = ("tail_draws",) if target.tail_samples else ()
            return ("kept_ids", *moments, *tail)
        case Full() as target:
            return ("level",) if target.levels else ()
        case Hidden():
            return ("states",)
        case _:
            return ()


class JudgedDrift(Record):
    """What was found of something that the drift of predictions does not see, and what may be."""

    drift: StoreDrift
    """What was found."""
    limit: float
    """What a mean may be."""
    limit_from: str
    """Where that comes from."""

    @property
    def ok(self) -> bool:
        """Whether it is what this teacher predicts."""
        return self.drift.within(self.limit)


class AuditedStore(Record):
    """What an audit of a store found, and what may be."""

    store: str
    """Where it lies."""
    fraction: float
    """Share of the rollouts that was asked for again."""
    seed: int
    """With which they were chosen."""
    rollouts: int
    """Rollouts that were."""
    committed: int
    """Rollouts of the store."""
    timesteps: int
    """Timesteps of those that were asked for again."""
    teacher_matches: bool
    """Whether the teacher that was asked is the one that the manifest names."""
    differences: dict[str, tuple[str, str]]
    """What differs of that which predictions depend on, as the store has it and as it is now."""
    drift: StoreDrift
    """What was found."""
    limit: float
    """What a mean may be."""
    limit_from: str
    """Where that comes from."""
    further: tuple[JudgedDrift, ...] = ()
    """What was found of all that the drift of predictions does not see."""

    @property
    def ok(self) -> bool:
        """Whether the store is what this teacher predicts."""
        return self.drift.within(self.limit) and all(each.ok for each in self.further)


class Bar(Protocol):
    """What shows how many rollouts are done."""

    def update(self, count: int, /) -> object:
        """Count that many more."""
        ...


Progress = Callable[[int], AbstractContextManager[Bar]]
"""Begins to show the progress of so many rollouts."""


GIVEN = "--limit"
"""Where a limit comes from that was given."""


class AuditChoice(NamedTuple):
    """What of a store is audited, and against which limit."""

    fraction: float
    seed: int = 0
    limit: float | None = None
    """Of a mean drift, in its unit; None takes what arithmetic and storage explain."""


def audited(
    store: PredictionStore,
    keys: Sequence[Key],
    choice: AuditChoice,
    drifts: Sequence[StoreDrift],
    differences: dict[str, tuple[str, str]],
    explained: Sequence[Limit],
) -> AuditedStore:
    """Put together what was found of the chosen `keys` of a store, each with its limit.

    The first is of the predictions; the limit of a choice is for that one.
    """
    drift, *others = drifts
    first, *limits = explained
    limit = first if choice.limit is None else Limit(choice.limit, GIVEN)
    return AuditedStore(
        store=str(store.path),
        fraction=choice.fraction,
        seed=choice.seed,
        rollouts=len(keys),
        committed=len(store),
        timesteps=sum(_length(store, key) for key in keys),
        teacher_matches=not {"teacher", "quantization", "other model"} & differences.keys(),
        differences=differences,
        drift=drift,
        limit=limit.value,
        limit_from=limit.origin,
        further=tuple(
            JudgedDrift(drift=other, limit=its.value, limit_from=its.origin)
            for other, its in zip(others, limits, strict=True)
        ),
    )


def _length(store: PredictionStore, key: Key) -> int:
    """Timesteps of a committed rollout."""
    place = store.plan.locate(key)
    assert place is not None
    shard, row = place
    return int(store.rollout_table(shard).lengths[row])


def method_of(record: Quantization | None) -> str:
    """Return how weights are quantized, by the record of that."""
    return "none" if record is None else record.method


def differing(pairs: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Return those of some pairs, as the store has it and as it is now, that differ."""
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
