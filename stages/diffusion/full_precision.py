"""A denoiser that computes in float32 for a moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch

from stages.diffusion.denoiser import Denoiser


@contextmanager
def full_precision(denoiser: Denoiser) -> Iterator[None]:
    """Hold a denoiser's weights in float32 inside the block, and as they were behind it.

    Nothing is lost on the way: float32 holds every number of the narrower types. For quantized
    weights, which are no such numbers, it is not made. Raises torch.OutOfMemoryError where they do
    not fit on the device like this.
    """
    tensors = list(chain(denoiser.module.parameters(), denoiser.module.buffers()))
    narrow = [(x, x.dtype) for x in tensors if x.is_floating_point() and x.dtype != torch.float32]
    before = denoiser.dtype
    try:
        _cast([(x, torch.float32) for x, _ in narrow])
        denoiser.dtype = torch.float32
        yield
    finally:
        _cast(narrow)
        denoiser.dtype = before


def _cast(wanted: list[tuple[torch.Tensor, torch.dtype]]) -> None:
    with torch.inference_mode(False):  # so that what may be trained later stays trainable
        for tensor, dtype in wanted:
            tensor.data = tensor.data.to(dtype)
