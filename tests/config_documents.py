"""Configurations that differ from one that is sound in a few keys."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import Run, load_config


def load_changed(
    folder: Path,
    document: Mapping[str, Any],
    changes: Mapping[str, Any] | None,
    overrides: Sequence[str] = (),
) -> Run:
    """Load a document with changes `{"a.b": value}`; a value of ... removes the key."""
    document = copy.deepcopy(dict(document))
    for key, value in (changes or {}).items():
        *sections, last = key.split(".")
        place = document
        for section in sections:
            place = place.setdefault(section, {})
        if value is ...:
            del place[last]
        else:
            place[last] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return load_config(path, overrides)
