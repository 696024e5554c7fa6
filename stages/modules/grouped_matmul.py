"""Products of sorted rows with stacked matrices, one matrix per group of rows."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F


def grouped_matmul(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply rows ends[g − 1] to ends[g] of `x` [N, E] by `weights[g]` [E, W]: [N, W].

    `weights` is [G, E, W], `ends` [G] int32 with ends[-1] = N. torch's fused kernel exists for
    bfloat16 alone (2.14); other types multiply group by group, hidden from the compiler.
    """
    if x.dtype == torch.bfloat16:
        return F.grouped_mm(x, weights, offs=ends)
    product: Tensor = _grouped(x, weights, ends)
    return product


@torch.library.custom_op("foretell::grouped_matmul", mutates_args=())
def _grouped(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    product = x.new_empty(x.shape[0], weights.shape[2])
    for group, rows in enumerate(_groups(ends)):
        torch.mm(x[rows], weights[group], out=product[rows])
    return product


@_grouped.register_fake
def _shape(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weights.shape[2])


@torch.library.custom_op("foretell::grouped_outer", mutates_args=())
def _grouped_outer(x: Tensor, gradient: Tensor, ends: Tensor) -> Tensor:
    """Gradient of the stacked matrices: x[rows]ᵀ · gradient[rows] per group, [G, E, W]."""
    outer = x.new_empty(ends.shape[0], x.shape[1], gradient.shape[1])
    for group, rows in enumerate(_groups(ends)):
        torch.mm(x[rows].T, gradient[rows], out=outer[group])
    return outer


@_grouped_outer.register_fake
def _outer_shape(x: Tensor, gradient: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], gradient.shape[1])


def _groups(ends: Tensor) -> list[slice]:
    bounds = [0, *ends.tolist()]
    return [slice(start, end) for start, end in itertools.pairwise(bounds)]


def _save(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
    x, weights, ends = ctx.saved_tensors
    gradient = gradient.contiguous()
    inward = _grouped(gradient, weights.transpose(1, 2), ends)
    return inward, _grouped_outer(x, gradient, ends), None


_grouped.register_autograd(_backward, setup_context=_save)
