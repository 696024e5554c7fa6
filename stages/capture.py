"""Collecting a batch's predictions: reduced on the device in blocks, then cut into rollouts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stages.reduction import reduce
from store.encoding import array_specs
from store.schema import Manifest

BLOCK_VALUES = 16 * 2**20
"""Logits that may wait on the device before they are reduced together (64 MiB of fp32)."""


class Capture:
    """Reduces the guided logits of one batch to the target's arrays, a block of rows at a time."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._dtypes = {
            name: getattr(torch, spec.dtype.name) for name, spec in array_specs(manifest).items()
        }
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._waiting_values = 0
        self._blocks: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []

    def add(self, rows: Tensor, codes: Tensor, logits: Tensor) -> None:
        """Take predictions of n timesteps, of one row each.

        `rows` [n] int64 says which rollout of the batch each belongs to; the timesteps of a
        rollout come in order. `codes` [n, C], `logits` [n, C, V] guided float32.
        """
        self._waiting.append((rows, codes, logits))
        self._waiting_values += logits.numel()
        if self._waiting_values >= BLOCK_VALUES:
            self._reduce_waiting()

    def _reduce_waiting(self) -> None:
        rows, codes, logits = (torch.cat(part) for part in zip(*self._waiting, strict=True))
        self._waiting.clear()
        self._waiting_values = 0
        manifest = self._manifest
        kind = manifest.target.kind
        reduced = reduce(logits, codes, manifest.target, manifest.forbidden, manifest.end_id)
        tensors = {"codes": codes} | {f"{kind}.{name}": t for name, t in reduced.items()}
        # Narrow on the device: ids are int64 there, and a quarter of that in the store.
        stored = {name: t.to(self._dtypes[name]).cpu().numpy() for name, t in tensors.items()}
        self._blocks.append((rows.cpu().numpy(), stored))

    def rollouts(self) -> list[dict[str, np.ndarray]]:
        """Return the arrays [T, C, ...] of every rollout of the batch, in row order."""
        if self._waiting:
            self._reduce_waiting()
        rows = np.concatenate([rows for rows, _ in self._blocks])
        order = np.argsort(rows, kind="stable")
        cuts = np.flatnonzero(np.diff(rows[order])) + 1
        names = self._blocks[0][1]
        pieces = {
            name: np.split(
                np.concatenate([arrays[name] for _, arrays in self._blocks])[order], cuts
            )
            for name in names
        }
        return [{name: pieces[name][row] for name in names} for row in range(len(cuts) + 1)]
