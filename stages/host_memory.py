"""Memory for batches on the host, used again and again."""

from __future__ import annotations

import weakref

import numpy as np
import torch
from torch import Tensor

from stages.loader import serves_another_process


class HostMemory:
    """Gives out pieces of memory; a piece that nobody holds any more is given out again.

    A new piece of megabytes costs the kernel about as much as filling it. There are never more
    pieces than were in use at the same time. Threads may share it; where it travels to another
    process, that one begins with none.
    """

    def __init__(self, pin: bool = False) -> None:
        """`pin` makes pieces page-locked."""
        self._pin = pin
        self._free: dict[int, np.ndarray] = {}
        """By their `id`, so that taking one and giving one back are single operations."""

    def __reduce__(self) -> tuple[type[HostMemory], tuple[bool]]:
        return HostMemory, (self._pin,)

    def take(self, size_bytes: int) -> Tensor:
        """Return [size_bytes] uint8 of any content."""
        if serves_another_process():  # what it sends lies in shared memory at once
            shared = torch.UntypedStorage._new_shared(size_bytes)  # type: ignore[no-untyped-call]
            return torch.empty(0, dtype=torch.uint8).set_(shared)
        if self._pin:  # torch itself uses page-locked memory again
            return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
        piece = self._piece(size_bytes)
        given = piece[:size_bytes]
        # Whatever tensor or array still looks at `given` keeps it alive.
        weakref.finalize(given, self._free.__setitem__, id(piece), piece).atexit = False
        return torch.from_numpy(given)

    def _piece(self, size_bytes: int) -> np.ndarray:
        """Take the smallest free piece that is large enough; else make one in place of another."""
        free = sorted(list(self._free.items()), key=_size)
        for number, piece in free:
            if len(piece) >= size_bytes and self._free.pop(number, None) is not None:
                return piece
        if free:
            self._free.pop(free[0][0], None)
        return np.empty(max(size_bytes, 1), np.uint8)  # torch gives an empty array another stride


def _size(item: tuple[int, np.ndarray]) -> int:
    return len(item[1])
