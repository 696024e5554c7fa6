"""The checksum of a prediction: taken when a teacher has made it, compared before it is taught."""

from __future__ import annotations

from collections.abc import Mapping

import google_crc32c
import numpy as np

TARGET = "dense."
"""What arrays of a prediction have before their names."""


def target_names(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Return the names of the arrays of a prediction, in the order of their checksum."""
    return sorted(name for name in arrays if name.startswith(TARGET))


def target_crc(arrays: Mapping[str, np.ndarray], row: int) -> int:
    """Return the crc32c of the stored bytes of a row's prediction; 0 where it has none."""
    crc = 0
    for name in target_names(arrays):
        crc = google_crc32c.extend(crc, arrays[name][row].tobytes())
    return crc
