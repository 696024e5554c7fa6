"""Encoded batches that an interrupted `prepare` left, so that it goes on where it stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from stages.errors import UserError
from stages.publish import publish_file
from store.sums import file_sum

Tensors = Mapping[str, np.ndarray]
T = TypeVar("T")
SUM_BYTES = 32
"""Length of the hexadecimal XXH3-128 that a file begins with."""


class KeptBatches:
    """Batches of named tensors in a folder, each in a file that is whole or not there.

    A file is named after all that its content depends on, so other settings or another image never
    meet what is not theirs. What is in the folder is garbage once the dataset is there.
    """

    def __init__(self, folder: Path | None, maker: str) -> None:
        """Take the folder, which is made with the first batch, and what names who encodes.

        Without a folder nothing is kept.
        """
        self._folder, self._maker = folder, maker

    def get(
        self, content: Iterable[bytes], make: Callable[[], Sequence[Tensors]]
    ) -> Sequence[Tensors]:
        """Return the rows that `make` makes of `content`, read where they are known.

        Raises UserError when a file cannot be read.
        """
        if self._folder is None:
            return make()
        digest = hashlib.sha256(self._maker.encode())
        for each in content:
            digest.update(b" %d " % len(each))
            digest.update(each)
        path = self._folder / f"{digest.hexdigest()}.part"
        if path.exists():
            return _read(path)
        rows = make()
        named = {
            f"{i}/{name}": values for i, row in enumerate(rows) for name, values in row.items()
        }
        body = save({name: np.array(values, order="C") for name, values in named.items()})
        with publish_file(path) as draft:
            draft.write_bytes(file_sum(body).xxh3.encode() + body)
        return rows


def batches_of(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Yield items in order, `size` at a time, as they come."""
    while batch := list(islice(items, size)):
        yield batch


def _read(path: Path) -> list[Tensors]:
    content = path.read_bytes()
    body = content[SUM_BYTES:]
    expected = content[:SUM_BYTES].decode("ascii", errors="replace")
    try:
        if file_sum(body).xxh3 != expected:
            raise SafetensorError("it was altered")
        rows: dict[int, dict[str, np.ndarray]] = {}
        for key, values in load(body).items():
            index, name = key.split("/", maxsplit=1)
            rows.setdefault(int(index), {})[name] = values
    except SafetensorError as error:
        raise UserError(
            f"{path}, which an interrupted run left, cannot be read: {error}; remove it and run "
            "the same command again"
        ) from error
    return [rows[index] for index in sorted(rows)]
