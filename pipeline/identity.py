"""What the result of a stage depends on, as one hash; unequal hashes mean other work."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from stages.config import OptimizerConfig, RolloutConfig, TrainConfig
from store.schema import Record

VOLATILE = {
    "processes", "parallel", "device", "log_every", "checkpoint_every", "keep_checkpoints",
    "micro_batch_size", "loader", "disk_check", "free_floor", "tensorboard",
}  # fmt: skip
"""Settings that change how fast a stage works, or when it stops, and nothing that it produces."""


def identity(*parts: Record | dict[str, Any] | str | int | None) -> str:
    """Return a sha256 over settings and fingerprints, without the volatile settings."""
    document = [_lasting(p.model_dump(mode="json")) if isinstance(p, Record) else p for p in parts]
    text = json.dumps(document, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(inner) for key, inner in value.items() if key not in VOLATILE}
    return [_lasting(inner) for inner in value] if isinstance(value, list) else value


RECORDS = (OptimizerConfig, TrainConfig, RolloutConfig)
assert {name for record in RECORDS for name in record.model_fields} >= VOLATILE
