"""Finding a text in a column of millions, for twelve bytes each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

BLOCK = 65536

Digest = Callable[[bytes], int]
Hashes = np.ndarray[Any, np.dtype[np.uint64]]


class TextIndex:
    """Rows of a column by their text.

    It holds sorted hashes and rows; a hash only says where to look, and the column decides.
    """

    def __init__(
        self, column: pa.Array | pa.ChunkedArray, digest: Digest = xxhash.xxh3_64_intdigest
    ) -> None:
        """Index a column of distinct texts; `digest` maps bytes to 64 bits."""
        hashes = np.fromiter(_digests(column, digest), np.uint64, len(column))
        order = np.argsort(hashes, kind="stable")
        self._column, self._digest = column, digest
        self._hashes: Hashes = hashes[order]
        self._rows = order.astype(np.int32)

    def find(self, text: str) -> int | None:
        """Row that holds a text; None where no row does."""
        # What UTF-8 cannot encode is in no column, and its hash may be any.
        digest = np.uint64(self._digest(text.encode(errors="surrogatepass")))
        place = int(self._hashes.searchsorted(digest))
        while place < len(self._hashes) and self._hashes[place] == digest:
            row = int(self._rows[place])
            if self._column[row].as_py() == text:
                return row
            place += 1
        return None


def _digests(column: pa.Array | pa.ChunkedArray, digest: Digest) -> Iterator[int]:
    for start in range(0, len(column), BLOCK):  # texts become Python objects block by block
        yield from map(digest, column.slice(start, BLOCK).cast(pa.binary()).to_pylist())
