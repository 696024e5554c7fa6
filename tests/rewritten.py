"""Copies of a store that say something else, with checksums that are right again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from store import PredictionStore, verify
from store.plan import Key

Change = Callable[[Key, dict[str, np.ndarray]], None]
"""Changes the arrays of one rollout in place."""


def rewritten(
    store: PredictionStore, path: Path, change: Change = lambda *_: None, **fields: Any
) -> PredictionStore:
    """A copy of a store with changed arrays, and with other fields of its manifest."""
    manifest = store.manifest.model_copy(update={"files": {}} | fields)
    heads = dict(store.heads) if manifest.heads else None
    copy = PredictionStore.create(path, manifest, store.plan, store.samples, heads=heads)
    for shard in range(store.planned_shards):
        with copy.writer(shard) as writer:
            for key in store.plan[shard]:
                rollout = store[key]
                arrays = {name: np.array(values) for name, values in rollout.arrays.items()}
                change(key, arrays)
                writer.append(
                    *key, arrays, stop_reason=rollout.stop_reason, weight=rollout.weight,
                    seed=rollout.seed,
                )  # fmt: skip
            writer.commit()
    assert verify(path).ok
    return PredictionStore.open(path)
