"""A student's logits as a loss reads them: a block of timesteps at a time, gradients likewise.

Either they exist already, or linear heads compute those of a block from what they read: then
neither the logits of a whole batch nor their gradient are ever held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from stages.family import LinearOutput


class StudentLogits(Protocol):
    """Logits of N timesteps, and where their gradient goes."""

    dtype: torch.dtype
    """What they are computed in."""
    row_values: int
    """Logits of one timestep, over all streams."""

    def rows(self, index: Tensor) -> Tensor:
        """Return timesteps `index` [n], in float32 at least and in memory of their own."""
        ...

    def take_gradient(self, index: Tensor, gradient: Tensor) -> None:
        """Take the gradient of timesteps `index` [n], rising; each timestep at most once."""
        ...

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Return the gradients of the tensors that the logits come from, in their order."""
        ...


class WholeLogits:
    """Logits [B, T, ...] that exist already; their gradient has their type."""

    def __init__(self, logits: Tensor, counted: Tensor, wanted: bool) -> None:
        """Take logits, and which timesteps [B·T] bool will be read; the others get no gradient."""
        self._shape, self._flat = logits.shape, logits.flatten(0, 1)
        self.dtype, self.row_values = logits.dtype, self._flat[0].numel()
        self._gradient = torch.empty_like(self._flat) if wanted else None
        if self._gradient is not None:
            self._gradient.index_fill_(0, (~counted).nonzero().squeeze(1), 0.0)

    def rows(self, index: Tensor) -> Tensor:
        """Return timesteps `index` [n], lifted."""
        return lifted(self._flat.index_select(0, index))

    def take_gradient(self, index: Tensor, gradient: Tensor) -> None:
        """Write the gradient of timesteps `index` [n]."""
        if self._gradient is not None:
            write(self._gradient, index, gradient)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Return the gradient of the logits, [B, T, ...]."""
        return (None if self._gradient is None else self._gradient.view(self._shape),)


class HeadedLogits:
    """Logits that one linear head for each group of streams computes, in the order of streams."""

    def __init__(
        self, outputs: Sequence[LinearOutput], counts: Sequence[bool], wanted: Sequence[bool]
    ) -> None:
        """Take heads on states [B, T, H, D], and which of them count: the others are not read.

        `wanted` says of states, weight and bias of each in turn whether their gradient is.
        """
        self._heads = [
            _Head(output, count, wanted[3 * number : 3 * number + 3])
            for number, (output, count) in enumerate(zip(outputs, counts, strict=True))
        ]
        self.dtype = self._heads[0].dtype
        self.row_values = sum(output.weight.shape[:2].numel() for output in outputs)

    def rows(self, index: Tensor) -> Tensor:
        """Return logits [n, C, V] of timesteps `index` [n]; 0 of heads that do not count."""
        parts = [head.rows(index) for head in self._heads]
        return lifted(parts[0] if len(parts) == 1 else torch.cat(parts, 1))

    def take_gradient(self, index: Tensor, gradient: Tensor) -> None:
        """Carry the gradient [n, C, V] on to states, weights and biases."""
        streams = [head.streams for head in self._heads]
        for head, part in zip(self._heads, torch.split(gradient, streams, 1), strict=True):
            head.take_gradient(index, part)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Return the gradients of states, weight and bias of every head in turn."""
        return tuple(gradient for head in self._heads for gradient in head.gradients())


class _Head:
    """One head, its products in the type that autocast would choose, sums of them in float32."""

    def __init__(self, output: LinearOutput, counts: bool, wanted: Sequence[bool]) -> None:
        states, weight, bias = output.states, output.weight, output.bias
        self._counts, self._shape = counts, states.shape
        self.dtype, self.streams = _product_type(output), weight.shape[0]
        # Cast once: autocast itself would cast the weights for every block.
        self._output = LinearOutput(
            states.flatten(0, 1),
            weight.to(self.dtype),
            None if bias is None else bias.to(self.dtype),
        )
        wide = torch.promote_types(weight.dtype, torch.float32)
        self._of_states = torch.zeros_like(self._output.states) if wanted[0] else None
        self._of_weight = (
            torch.zeros(weight.shape, dtype=wide, device=weight.device) if wanted[1] else None
        )
        self._of_bias = (
            torch.zeros_like(bias, dtype=wide) if bias is not None and wanted[2] else None
        )

    def rows(self, index: Tensor) -> Tensor:
        if not self._counts:
            shape = len(index), *self._output.weight.shape[:2]
            return torch.zeros(shape, dtype=self.dtype, device=index.device)
        return replace(self._output, states=self._read(index)).logits()

    def _read(self, index: Tensor) -> Tensor:
        return self._output.states.index_select(0, index).to(self.dtype)

    def take_gradient(self, index: Tensor, gradient: Tensor) -> None:
        if not self._counts:
            return
        if self._of_bias is not None:
            self._of_bias += gradient.sum(0)
        vectors = self._shape[-2]
        # What reads one state is one head: by state [H, n, V'], V' being C_g·V or V.
        by_state = gradient.to(self.dtype).reshape(len(index), vectors, -1).transpose(0, 1)
        if self._of_weight is not None:
            sums = self._of_weight.view(vectors, -1, self._shape[-1])
            _add_product(sums, by_state.transpose(1, 2), self._read(index).transpose(0, 1))
        if self._of_states is not None:
            weight = self._output.weight.reshape(vectors, -1, self._shape[-1])
            write(self._of_states, index, torch.bmm(by_state, weight).transpose(0, 1))

    def gradients(self) -> tuple[Tensor | None, ...]:
        states = None if self._of_states is None else self._of_states.view(self._shape)
        return states, self._of_weight, self._of_bias


def _product_type(output: LinearOutput) -> torch.dtype:
    """What `output.logits()` multiplies in: under autocast its type, but of doubles."""
    dtype, device = (
        torch.promote_types(output.states.dtype, output.weight.dtype),
        output.states.device,
    )
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        return torch.get_autocast_dtype(device.type)
    return dtype


def _add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `sums`, which may be of a wider type."""
    if sums.dtype == left.dtype:
        sums.baddbmm_(left, right)
    else:
        sums.add_(torch.bmm(left, right))


def lifted(values: Tensor) -> Tensor:
    """Return values in float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def write(gradient: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write values [n, ...] at rows [n], rising, of the gradient [N, ...], in its dtype."""
    if rows.is_cuda:
        gradient.index_copy_(0, rows, values.to(gradient.dtype))
        return
    # Rows that follow each other are one copy, several times as fast as an indexed one.
    breaks = (rows.diff() != 1).nonzero().squeeze(1) + 1
    for run, part in zip(rows.tensor_split(breaks), values.tensor_split(breaks), strict=True):
        gradient[int(run[0]) : int(run[-1]) + 1] = part
