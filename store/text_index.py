"""Finding a text in a column of millions, for twelve bytes each."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np
import pyarrow as pa
import xxhash

BLOCK = 65536

Digest = Callable[[bytes], int]
Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Numbers = np.ndarray[Any, np.dtype[np.int32]]


class TextIndex:
    """Distinct texts by their number, and numbers by text.

    It holds the texts, their hashes, sorted, and whose they are; a hash only says where to look,
    and the text decides.
    """

    texts: pa.StringArray
    """Each once."""

    def __init__(
        self, texts: pa.Array | pa.ChunkedArray, digest: Digest = xxhash.xxh3_64_intdigest
    ) -> None:
        """Index a column of distinct texts; `digest` maps bytes to 64 bits."""
        hashes = _hashes(texts, digest)
        order = np.argsort(hashes, kind="stable")
        self._set(texts, digest, hashes[order], order)

    def _set(
        self, texts: pa.StringArray, digest: Digest, hashes: Hashes, numbers: np.ndarray
    ) -> None:
        self.texts, self._digest = texts, digest
        self._hashes, self._numbers = hashes, numbers.astype(np.int32)

    @classmethod
    def encode(
        cls, column: pa.StringArray, digest: Digest = xxhash.xxh3_64_intdigest
    ) -> tuple[Self, Numbers]:
        """Index of the texts of a column by first appearance, and [rows] the number of each row's.

        It is what Arrow's dictionary encoding gives, whose hash table takes more memory than the
        texts.
        """
        hashes = _hashes(column, digest)
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        begins = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]])[: len(hashes)])
        if len(begins) == len(column):
            index = cls.__new__(cls)
            index._set(column, digest, hashes, order)
            return index, np.arange(len(column), dtype=np.int32)
        first = order[begins]  # row of the first appearance, for the sort is stable
        appearance = np.argsort(first)
        numbers = np.empty(len(first), np.int32)
        numbers[appearance] = np.arange(len(first), dtype=np.int32)
        rows = np.empty(len(column), np.int32)
        rows[order] = np.repeat(numbers, np.diff(begins, append=len(column)))
        texts = column.take(pa.array(first[appearance]))
        if not all(_same(texts, rows[part], column[part]) for part in _parts(column)):
            distinct = column.dictionary_encode()  # two texts share a hash
            return cls(distinct.dictionary, digest), distinct.indices.to_numpy()
        index = cls.__new__(cls)
        index._set(texts, digest, hashes[begins], numbers)
        return index, rows

    def __len__(self) -> int:
        return len(self.texts)

    def find(self, text: str) -> int | None:
        """Number of a text; None where it is not among them."""
        # What UTF-8 cannot encode is in no column, and its hash may be any.
        digest = self._digest(text.encode(errors="surrogatepass"))
        place = bisect_left(self._hashes.data, digest)
        while place < len(self._hashes) and self._hashes.item(place) == digest:
            number = self._numbers.item(place)
            if self.texts[number].as_py() == text:
                return number
            place += 1
        return None

    def find_all(self, column: pa.StringArray) -> Numbers:
        """[rows] the number of each text of a column, -1 where it is not among them."""
        found = np.full(len(column), -1, np.int32)
        if len(self):
            for part in _parts(column):
                found[part] = self._find_part(column[part])
        return found

    def _find_part(self, column: pa.StringArray) -> Numbers:
        hashes = _hashes(column, self._digest)
        places = np.minimum(self._hashes.searchsorted(hashes), len(self) - 1)
        numbers = np.where(self._hashes[places] == hashes, self._numbers[places], np.int32(-1))
        hits = np.flatnonzero(numbers >= 0)
        if not _same(self.texts, numbers[hits], column.take(pa.array(hits))):
            # Two texts share a hash, so the first one that has it need not be the one.
            each = (self.find(text) for text in column.to_pylist())
            numbers[:] = [-1 if number is None else number for number in each]
        return numbers


def _same(texts: pa.StringArray, numbers: Numbers, column: pa.StringArray) -> bool:
    """Whether a column holds the texts with these numbers."""
    return bool(texts.take(pa.array(numbers)).equals(column))


def _parts(column: pa.Array | pa.ChunkedArray) -> Iterator[slice]:
    """What is turned into other objects at once, to bound memory."""
    return (slice(start, start + BLOCK) for start in range(0, len(column), BLOCK))


def _hashes(column: pa.Array | pa.ChunkedArray, digest: Digest) -> Hashes:
    hashes = np.empty(len(column), np.uint64)
    for part in _parts(column):
        hashes[part] = [digest(text) for text in column[part].cast(pa.binary()).to_pylist()]
    return hashes
