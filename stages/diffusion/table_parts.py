"""How large the files of a side table are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from store.side_tables import SideTableWriter

PART_BYTES = 2**25
"""About how large a file is."""
MAX_ROWS = 4096
"""Rows of a file at most, for each tensor has a place in its header."""


def table_writer(
    folder: Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]
) -> SideTableWriter:
    """Open a writer of a table whose rows hold tensors of these types and shapes."""
    row_bytes = sum(dtype.itemsize * math.prod(shape) for dtype, shape in tensors.values())
    return SideTableWriter(folder, min(max(PART_BYTES // row_bytes, 1), MAX_ROWS))
