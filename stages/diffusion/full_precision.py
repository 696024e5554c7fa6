"""A model that computes in float32 for a moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn


@contextmanager
def full_precision(module: nn.Module) -> Iterator[None]:
    """Hold a module's weights in float32 inside the block, and as they were behind it.

    Nothing is lost on the way: float32 holds every number of the narrower types. For quantized
    weights, which are no such numbers, it is not made.
    """
    tensors = list(chain(module.parameters(), module.buffers()))
    narrow = [(x, x.dtype) for x in tensors if x.is_floating_point() and x.dtype != torch.float32]
    _cast([(x, torch.float32) for x, _ in narrow])
    try:
        yield
    finally:
        _cast(narrow)


def _cast(wanted: list[tuple[torch.Tensor, torch.dtype]]) -> None:
    with torch.inference_mode(False):  # so that what may be trained later stays trainable
        for tensor, dtype in wanted:
            tensor.data = tensor.data.to(dtype)
