"""Collecting a batch's predictions: reduced in blocks on the device, then cut into rollouts.

The device never waits for what is collected: blocks are reduced by launching work, or on the CPU
in the thread of the writer, and each goes to the host in one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.background_writer import BackgroundWriter
from stages.family import Branches
from stages.philox import uniforms
from stages.reduction import Arrays, all_finite, draws_of, ingredients, stored_arrays
from stages.sampling import keyed_seed
from stages.targets import Forbidden
from store.schema import Manifest

BLOCK_VALUES = 16 * 2**20
"""Numbers that may wait on an accelerator before they are reduced together (64 MiB of fp32)."""
CPU_BLOCK_VALUES = 2**18
"""The same on the CPU, whose caches should hold a block (1 MiB of fp32)."""

ROWS, FINITE = "rows", "finite"
"""Arrays that travel with those of the store: the rollout of each timestep, and a flag."""


class _Waiting(NamedTuple):
    """Predictions of n timesteps, not reduced yet."""

    rows: Tensor
    timesteps: Tensor | int
    codes: Tensor
    values: Arrays


class Capture:
    """Reduces the predictions of one batch to the arrays of a store, a block at a time.

    With a `writer` and on the CPU its thread reduces, beside the model; otherwise it is done, or
    launched, by whoever adds.
    """

    def __init__(
        self,
        manifest: Manifest,
        keys: Sequence[tuple[str, int]],
        device: torch.device,
        writer: BackgroundWriter | None = None,
    ) -> None:
        self._manifest, self._device, self._writer = manifest, device, writer
        self._limit = CPU_BLOCK_VALUES if device.type == "cpu" else BLOCK_VALUES
        seeds = [keyed_seed(manifest.seed, "target draws", *key) for key in keys]
        self._seeds = torch.tensor(seeds, device=device)
        self._waiting: list[_Waiting] = []
        self._waiting_values = 0
        self._blocks: list[Callable[[], HostArrays]] = []

    def add(
        self,
        rows: Tensor,
        timesteps: Tensor | int,
        codes: Tensor,
        logits: Tensor | None,
        branches: Branches | None,
    ) -> None:
        """Take predictions of n timesteps, of one row each.

        `rows` [n] int64 says which rollout of the batch each belongs to, `timesteps` [n] int64 (or
        one number) its place there; those of a rollout come in order. `codes` [n, C], which
        continuous streams do not store; `logits` [n, C, V] or [n, C, *shape] and `branches` are of
        `stages.family`, as `ingredients` needs them. Tensors are kept, not copied.
        """
        values = ingredients(self._manifest.target, logits, branches)
        self._waiting.append(_Waiting(rows, timesteps, codes, values))
        self._waiting_values += sum(x.numel() for x in values.values())
        if self._waiting_values >= self._limit:
            self._reduce_waiting()

    def _reduce_waiting(self) -> None:
        work = partial(_reduce, self._manifest, self._seeds, self._waiting)
        values = self._waiting_values
        self._waiting, self._waiting_values = [], 0
        if self._writer is not None and self._device.type == "cpu":
            self._blocks.append(self._writer.compute(work, values).result)
        else:
            block = work()
            self._blocks.append(lambda: block)

    def finish(self) -> Callable[[], list[dict[str, np.ndarray]]]:
        """Return what waits for the blocks and returns the arrays [T, ...] of every rollout.

        They are in row order. It may be called once, in any thread; it raises FloatingPointError
        when a prediction is not finite.
        """
        if self._waiting:
            self._reduce_waiting()
        return partial(_cut, self._blocks)


@torch.inference_mode()
def _reduce(manifest: Manifest, seeds: Tensor, waiting: Sequence[_Waiting]) -> HostArrays:
    rows, codes = _joined([w.rows for w in waiting]), _joined([w.codes for w in waiting])
    values = {name: _joined([w.values[name] for w in waiting]) for name in waiting[0].values}
    draws, numbers = draws_of(manifest.target), None
    if draws:
        timesteps = _joined([torch.zeros_like(w.rows) + w.timesteps for w in waiting])
        numbers = uniforms(seeds[rows], timesteps, codes.shape[1], draws)
    arrays = stored_arrays(manifest, codes, values, numbers)
    arrays[ROWS] = rows
    finite = all_finite(values, Forbidden.of(manifest, rows.device))
    arrays[FINITE] = finite.to(torch.uint8).reshape(1)
    return HostArrays.of(arrays)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@dataclass(frozen=True)
class HostArrays:
    """Arrays on their way from the device to the host, all in one copy."""

    packed: Tensor
    """[bytes] uint8 on the host, pinned where it is filled by an accelerator."""
    layout: tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]
    """Name, type and shape of every array, in the order of their bytes."""
    arrived: torch.cuda.Event | None
    """When the copy has arrived; None where it has."""

    @classmethod
    def of(cls, arrays: Arrays) -> HostArrays:
        """Start to copy arrays to the host; does not wait for the device."""
        # The widest types come first, so that each array lies aligned behind the one before.
        widest = sorted(arrays.items(), key=lambda item: -item[1].element_size())
        layout = tuple((n, np.dtype(str(x.dtype)[6:]), tuple(x.shape)) for n, x in widest)
        packed = torch.cat([x.contiguous().view(torch.uint8).flatten() for _, x in widest])
        if packed.device.type != "cuda":
            return cls(packed.cpu(), layout, None)
        host = torch.empty(packed.shape, dtype=torch.uint8, pin_memory=True)
        host.copy_(packed, non_blocking=True)
        # Blocking: the thread that waits sleeps instead of spinning.
        arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(packed.device))
        return cls(host, layout, arrived)

    def arrays(self) -> dict[str, np.ndarray]:
        """Wait for the copy and return views into it."""
        if self.arrived is not None:
            self.arrived.synchronize()
        packed, start, views = self.packed.numpy(), 0, {}
        for name, dtype, shape in self.layout:
            end = start + dtype.itemsize * int(np.prod(shape))
            views[name] = packed[start:end].view(dtype).reshape(shape)
            start = end
        return views


def _cut(blocks: Sequence[Callable[[], HostArrays]]) -> list[dict[str, np.ndarray]]:
    parts = [block().arrays() for block in blocks]
    if not all(part.pop(FINITE).all() for part in parts):
        raise FloatingPointError("the teacher's predictions hold NaN or infinity")
    sizes = np.cumsum([0] + [len(part[ROWS]) for part in parts])
    rows = np.concatenate([part.pop(ROWS) for part in parts])
    order = np.argsort(rows, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    cuts = np.flatnonzero(np.diff(rows[order])) + 1
    pieces = {}
    for name, first in parts[0].items():
        whole = np.empty((len(rows), *first.shape[1:]), first.dtype)
        for part, start, end in zip(parts, sizes[:-1], sizes[1:], strict=True):
            whole[place[start:end]] = part[name]
        pieces[name] = np.split(whole, cuts)
    return [{name: pieces[name][row] for name in pieces} for row in range(len(cuts) + 1)]
