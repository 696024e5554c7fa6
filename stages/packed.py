"""Arrays of a batch in one piece of memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from stages.host_memory import HostMemory

ALIGNMENT_BYTES = 64
"""Where an array may begin in packed memory: any element size divides it."""

TORCH_TYPES = {
    np.dtype(name): getattr(torch, name)
    for name in ("uint8", "uint16", "uint32", "int64", "float16", "float32", "float64")
}
NUMPY_TYPES = {ours: theirs for theirs, ours in TORCH_TYPES.items()}


@dataclass(frozen=True)
class Packed:
    """Arrays in one piece of memory, so that one copy moves them and one file shares them."""

    memory: Tensor
    """[bytes] uint8."""
    fields: Mapping[str, tuple[int, torch.dtype, tuple[int, ...]]]
    """First byte, type and shape of each."""

    @classmethod
    def empty(
        cls, shapes: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], memory: HostMemory
    ) -> Self:
        """Make room for arrays of these types and shapes."""
        fields, end = {}, 0
        for name, (dtype, shape) in shapes.items():
            fields[name] = (end, TORCH_TYPES[dtype], shape)
            size = dtype.itemsize * math.prod(shape)
            end += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return cls(memory.take(end), fields)

    def __getitem__(self, name: str) -> Tensor:
        start, dtype, shape = self.fields[name]
        stop = start + dtype.itemsize * math.prod(shape)
        return self.memory[start:stop].view(dtype).view(shape)

    def as_numpy(self) -> dict[str, np.ndarray]:
        """Return the arrays on the host, to fill them: numpy makes them in a third of the time."""
        memory = self.memory.numpy()
        return {
            name: np.ndarray(shape, NUMPY_TYPES[dtype], memory, start)
            for name, (start, dtype, shape) in self.fields.items()
        }

    def to(self, device: torch.device) -> Packed:
        """Copy all of it; from page-locked memory to CUDA the copy is not waited for."""
        return replace(self, memory=self.memory.to(device, non_blocking=True))

    def pin_memory(self) -> Packed:
        """Copy all of it into page-locked memory."""
        return replace(self, memory=self.memory.pin_memory())
