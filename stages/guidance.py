"""Classifier-free guidance: the only place that holds its formula."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@overload
def guide(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor: ...
@overload
def guide(cond: np.ndarray, uncond: np.ndarray, scale: float) -> np.ndarray: ...
def guide(
    cond: Tensor | np.ndarray, uncond: Tensor | np.ndarray, scale: float | Tensor
) -> Tensor | np.ndarray:
    """Mix conditional and unconditional predictions at a guidance scale.

    `cond` and `uncond` are [..., V] logits (or any continuous prediction) of equal shape and any
    floating dtype; the result is float32, because rounding grows by |scale| + |1 - scale|. A scale
    of 1 is the conditional prediction and 0 the unconditional one; a tensor of scales must
    broadcast. Forbidden ids are masked after mixing, never before: with scale > 1 a masked -inf
    would become NaN. Arrays of numpy are mixed as well, for tools that do without torch.

    Source: Ho & Salimans, Classifier-Free Diffusion Guidance (2207.12598), in the convention
    `scale = 1 + w`.
    """
    mixed: Tensor | np.ndarray = (1.0 - scale) * _single(uncond) + scale * _single(cond)
    return mixed


def error_gain(scale: float) -> float:
    """Return by how much guidance at a scale amplifies an error of its branches, at worst."""
    return abs(scale) + abs(1 - scale)


def _single(values: Any) -> Any:
    return values.astype(np.float32) if isinstance(values, np.ndarray) else values.float()
