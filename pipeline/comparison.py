"""`foretell inspect diff`: what differs between two stores, runs, models or configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.distribution_divergence import (
    common_temperature,
    divergence_of_rows,
    incomparable,
)
from pipeline.dotted import dotted
from pipeline.inspection import describe_model, is_model
from pipeline.quantiles import quantiles
from pipeline.store_statistics import spread
from stages.errors import UserError
from store import PredictionStore, Rollout
from store.encoding import COLUMN, Array
from store.object_url import ObjectUrl
from store.plan import Key
from store.schema import Dense, TopK

Document = dict[str, Any]
Place = Path | ObjectUrl
Progress = Callable[[Sequence[Key]], Iterable[Key]]

MOST_ROLLOUTS = 256
"""Rollouts that are compared unless all are asked for."""
MOST_NAMES = 5
"""Keys that are named where a store lacks them."""


def describe_difference(
    a: Place, b: Place, everything: bool = False, progress: Progress = iter
) -> Document:
    """Return what differs between two stores, run folders, model folders or configurations.

    `kind` says what they are, `settings` which values differ by dotted names (one that a side
    lacks is absent there), and `stores` compares every store that both have: their keys, codes, and
    targets on common keys, over rollouts that lie evenly over these or over all where `everything`
    is asked for. Raises UserError where the two are not of one kind.
    """
    kinds = [_kind_of(place) for place in (a, b)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{a} is a {kinds[0]} and {b} a {kinds[1]}: give two stores, two run folders, two "
            "models or two configurations"
        )
    stores = _stores_of(a, b, kinds[0])
    return {
        "a": str(a),
        "b": str(b),
        "kind": kinds[0],
        "settings": differing(_settings(a, kinds[0]), _settings(b, kinds[0])),
        "stores": [
            {"store": name} | compare_stores(*pair, everything, progress)
            for name, pair in stores.items()
        ],
    }


def differing(a: Document, b: Document) -> list[Document]:
    """Return which settings differ, in the order of the first, by dotted names."""
    ours, theirs = dotted(a), dotted(b)
    return [
        {"name": name}
        | ({"a": ours[name]} if name in ours else {})
        | ({"b": theirs[name]} if name in theirs else {})
        for name in dict.fromkeys([*ours, *theirs])
        if name not in ours or name not in theirs or ours[name] != theirs[name]
    ]


def _kind_of(place: Place) -> str:
    if not isinstance(place, Path) or (place / "manifest.json").exists():
        return "store"
    if place.is_file():
        return "configuration"
    if is_model(place):
        return "model"
    if (place / "stages").is_dir():
        return "run"
    raise UserError(
        f"{place} is no store (it has no manifest.json), no model (no config.json), no run (no "
        "stages/) and no configuration file: correct it"
    )


def _settings(place: Place, kind: str) -> Document:
    match kind:
        case "store":
            manifest = PredictionStore.open(place).manifest
            return manifest.model_dump(mode="json", exclude={"files"})
        case "configuration":
            assert isinstance(place, Path)
            from pipeline.config import load_config  # noqa: PLC0415, stores are compared without

            return load_config(place, []).model_dump(mode="json")
        case "model":
            assert isinstance(place, Path)
            return describe_model(place)
    assert isinstance(place, Path)
    parts = _parts_of_run(place)
    return {name: _settings(place / name, part) for name, part in parts.items()}


def _parts_of_run(run: Path) -> dict[str, str]:
    """Stores and models below a run folder, with their kind."""
    folders = sorted(path for path in run.iterdir() if path.is_dir())
    found = {path.name: "store" for path in folders if (path / "manifest.json").exists()}
    return found | {path.name: "model" for path in folders if is_model(path)}


def _stores_of(a: Place, b: Place, kind: str) -> dict[str, tuple[PredictionStore, PredictionStore]]:
    if kind == "store":
        return {"store": (PredictionStore.open(a), PredictionStore.open(b))}
    if kind != "run":
        return {}
    assert isinstance(a, Path)
    assert isinstance(b, Path)
    ours, theirs = _parts_of_run(a), _parts_of_run(b)
    names = [name for name, part in ours.items() if part == theirs.get(name) == "store"]
    return {n: (PredictionStore.open(a / n), PredictionStore.open(b / n)) for n in names}


def compare_stores(
    a: PredictionStore, b: PredictionStore, everything: bool, progress: Progress = iter
) -> Document:
    """Return how the keys, codes and targets of two stores differ, as JSON values.

    A prediction depends on the codes before it, so KL is taken only as far as these are equal: at
    the first timestep where a code differs, up to the first stream in which it does.
    """
    ours, theirs = list(a), list(b)
    in_b, in_a = set(theirs), set(ours)
    common = [key for key in ours if key in in_b]
    compared = _Compared(a, b)
    for key in progress(common if everything else spread(common, MOST_ROLLOUTS)):
        compared.add(a[key], b[key])
    return {
        "keys": {
            "common": len(common),
            "only_a": _named([key for key in ours if key not in in_b]),
            "only_b": _named([key for key in theirs if key not in in_a]),
        },
        **compared.document(),
    }


def _named(keys: list[Key]) -> Document:
    return {"count": len(keys), "first": [f"{s}/{variation}" for s, variation in keys[:MOST_NAMES]]}


@dataclass
class _Compared:
    """Rollouts of the same keys in two stores."""

    a: PredictionStore
    b: PredictionStore
    rollouts: int = 0
    equal_conditions: int = 0
    equal_lengths: int = 0
    equal_codes: int = 0
    timesteps: int = 0
    at_equal_history: int = 0
    divergences: list[Array] = field(default_factory=list)
    """[n, C] nats, NaN where histories differ."""
    squares: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Mean square of the difference, and of the first, of every row, by array."""

    @property
    def reason(self) -> str | None:
        """Why the targets cannot be compared."""
        a, b = self.a.manifest, self.b.manifest
        if isinstance(a.target, Dense) != isinstance(b.target, Dense):
            return "one has continuous streams and the other codes"
        return None if isinstance(a.target, Dense) else incomparable(a, b)

    def add(self, ours: Rollout, theirs: Rollout) -> None:
        self.rollouts += 1
        samples = [store.sample(ours.sample_id) for store in (self.a, self.b)]
        self.equal_conditions += samples[0] == samples[1]
        self.equal_lengths += len(ours) == len(theirs)
        self.timesteps += len(ours)
        if "codes" in ours.arrays and "codes" in theirs.arrays:
            self._add_codes(ours, theirs)
        elif self.reason is None:
            self._add_latents(ours, theirs)

    def _add_codes(self, ours: Rollout, theirs: Rollout) -> None:
        self.equal_codes += np.array_equal(ours.codes, theirs.codes)
        if self.reason is not None:
            return
        alike = equal_history(ours.codes, theirs.codes)
        rows = len(alike)
        self.at_equal_history += rows
        parts = [{n: x[:rows] for n, x in r.arrays.items()} for r in (ours, theirs)]
        found = divergence_of_rows(self.a, parts[0], self.b, parts[1])
        self.divergences.append(np.where(alike, found, np.nan))

    def _add_latents(self, ours: Rollout, theirs: Rollout) -> None:
        rows = np.flatnonzero(_same_states(ours, theirs))
        self.at_equal_history += len(rows)
        for name, values in ours.arrays.items():
            other = theirs.arrays.get(name)
            if name.startswith(COLUMN) or other is None or other.shape[1:] != values.shape[1:]:
                continue
            for row in rows:
                exact, there = values[row].astype(np.float64), other[row].astype(np.float64)
                squares = float(np.square(there - exact).mean()), float(np.square(exact).mean())
                self.squares.setdefault(name, []).append(squares)

    def document(self) -> Document:
        """What was found, as JSON values."""
        codes = not isinstance(self.a.manifest.target, Dense)
        return {
            "rollouts": {
                "compared": self.rollouts,
                "equal_conditions": self.equal_conditions,
                "equal_lengths": self.equal_lengths,
                **({"equal_codes": self.equal_codes} if codes else {}),
                "timesteps": self.timesteps,
                "at_equal_history": self.at_equal_history,
            },
            "incomparable": self.reason,
            "kl": self._kl() if self.divergences else None,
            "mse": [
                {"array": name, "rows": len(found), "mse": mse, "mse_share": mse / square}
                for name, found in self.squares.items()
                for mse, square in [np.mean(found, 0).tolist()]
            ],
        }

    def _kl(self) -> Document:
        found = np.concatenate(self.divergences)
        targets = [store.manifest.target for store in (self.a, self.b)]
        kept = any(isinstance(target, TopK) for target in targets)
        finite = found[np.isfinite(found)]
        return {
            "unit": "nats",
            "is": "lower bound" if kept else "exact",
            "temperature": common_temperature(self.a.manifest, self.b.manifest),
            "mean": float(finite.mean()) if finite.size else None,
            "streams": [
                {
                    "stream": stream.name,
                    "rows": int((~np.isnan(values)).sum()),
                    "infinite": int(np.isinf(values).sum()),
                    **quantiles(values[np.isfinite(values)]),
                }
                for stream, values in zip(self.a.manifest.streams, found.T, strict=True)
            ],
        }


def equal_history(ours: Array, theirs: Array) -> Array:
    """Return which predictions [t, C] bool follow on equal codes [T, C] of two rollouts.

    All up to the first code that differs, in the order of timesteps and then of streams; `t` is as
    far as any does. Where streams are predicted at once more of them follow on equal codes.
    """
    rows = min(len(ours), len(theirs))
    differ = (ours[:rows] != theirs[:rows]).ravel()
    alike = np.ones(differ.shape, bool)
    if differ.any():
        alike[int(differ.argmax()) + 1 :] = False
    alike = alike.reshape(rows, -1)
    return np.asarray(alike[alike.any(-1)])


def _same_states(ours: Rollout, theirs: Rollout) -> Array:
    """[T] bool: rows whose columns that both have, but sums of the answer, are equal."""
    rows = min(len(ours), len(theirs))
    alike = np.ones(rows, bool)
    for name in ("t", "x_t_crc", "x_t_sum"):
        values, other = ours.arrays.get(f"{COLUMN}{name}"), theirs.arrays.get(f"{COLUMN}{name}")
        if values is not None and other is not None:
            alike &= values[:rows] == other[:rows]
    return alike
