"""Rollouts of a store as one batch: padded on the host, then moved to the device that learns.

How rollouts become arrays, whose predictions count, and what a target is made of again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.errors import UserError
from stages.family import Predicted, Sample
from stages.host_memory import HostMemory
from stages.loss_config import Mean
from stages.packed import Packed
from stages.targets import RestoredTarget, restore
from store import Rollout
from store.plan import Key
from store.schema import Hidden, Manifest
from store.shard import Shard


@dataclass(frozen=True)
class HostBatch:
    """Rollouts of a micro-batch as they were read: padded, in the types of the store."""

    keys: Sequence[Key]
    epochs: Sequence[int]
    samples: Sequence[Sample]
    lengths: Sequence[int]
    arrays: Packed
    """`lengths` [B] int64, `weights` [B] float32 of each prediction, and [B, T, ...] all others.

    `predicted` [B, T, C] uint8 is there where not all codes are predicted; it is 1 for those that
    are and lie within the length, and for streams that are read.
    """
    weight: float
    """By what the sum of the loss is divided: the weights of the predictions, or the rollouts."""

    def pin_memory(self) -> HostBatch:
        """Copy the arrays into page-locked memory."""
        return replace(self, arrays=self.arrays.pin_memory())


@dataclass(frozen=True)
class TargetBatch:
    """Rollouts of a micro-batch with what the teacher predicted, padded to the longest."""

    keys: Sequence[Key]
    """(sample_id, variation) of each."""
    epochs: Sequence[int]
    """In which epoch each is read; keys what is random about it."""
    samples: Sequence[Sample]
    codes: Tensor
    """[B, T, C] int64; what lies beyond a length is 0 and never read. 0 for continuous streams."""
    lengths: Tensor
    """[B] int64."""
    target: RestoredTarget
    """[B, T, C, ...]; NaN beyond a length, so that reading there shows."""
    predicted: Tensor
    """[B, T, C] bool: which codes are predicted; none beyond a length."""
    element_weights: Tensor
    """[B, T, C] float32: what each prediction of the rollout weighs, 0 where none is."""
    weight: float
    """By what the sum of the loss is divided: the weights of the predictions, or the rollouts."""


class Span(NamedTuple):
    """A rollout as rows of arrays that may hold others too.

    A `Rollout` cuts out each of its arrays at once. For the batches of a store on fast memory that
    took as long as a third of the copying.
    """

    key: Key
    weight: float
    arrays: Mapping[str, np.ndarray]
    start: int
    stop: int

    @classmethod
    def of_shard(cls, shard: Shard, row: int) -> Span:
        """Return the rollout of a row of a shard."""
        start, stop = shard.offsets.item(row), shard.offsets.item(row + 1)
        weight = shard.rollouts.weights.item(row)
        return cls(shard.keys[row], weight, shard.arrays, start, stop)

    @classmethod
    def of(cls, rollout: Rollout) -> Span:
        """Return a rollout by itself."""
        key = rollout.sample_id, rollout.variation
        return cls(key, rollout.weight, rollout.arrays, 0, len(rollout))


def host_batch(
    manifest: Manifest,
    spans: Sequence[Span],
    samples: Sequence[Sample],
    epochs: Sequence[int],
    memory: HostMemory,
    mean: Mean = "predictions",
    groups: Collection[str] | None = None,
    predicted: Predicted | None = None,
) -> HostBatch:
    """Pad the codes and the target's arrays of some rollouts of a store into one batch.

    A `mean` over rollouts spreads the weight of each over its predictions, and the batch then
    counts as many as it has, whatever they weigh. Only predictions of the streams of `groups`
    count, where they are given, and of their codes those that `predicted` marks. Raises `UserError`
    for a rollout without any.
    """
    prefix = f"{manifest.target.kind}."
    first = spans[0].arrays
    like = {name: first[name] for name in first if name == "codes" or name.startswith(prefix)}
    lengths = np.array([span.stop - span.start for span in spans])
    frame = len(spans), int(lengths.max())
    shapes = {name: (array.dtype, (*frame, *array.shape[1:])) for name, array in like.items()}
    if predicted is not None:
        shapes["predicted"] = np.dtype(np.uint8), shapes["codes"][1]
    each = {"lengths": lengths.dtype, "weights": np.dtype(np.float32)}
    arrays = Packed.empty(shapes | {n: (t, frame[:1]) for n, t in each.items()}, memory)
    filled = arrays.as_numpy()
    for name in like:
        pad(filled[name], name, spans)

    if predicted is None:
        counts = lengths * len(of_groups(manifest, groups).streams)
    else:
        places = _places(manifest, groups)
        counts = _mark(filled["predicted"], filled["codes"], lengths, places, predicted)
        _require_predicted(spans, counts)
    weights = np.array([span.weight for span in spans], np.float32)
    if mean == "rollouts":
        weights, total = (weights / counts).astype(np.float32), float(len(spans))
    else:
        total = float(counts @ weights.astype(np.float64))
    filled["lengths"][:], filled["weights"][:] = lengths, weights
    return HostBatch(
        keys=[span.key for span in spans],
        epochs=epochs,
        samples=samples,
        lengths=lengths.tolist(),
        arrays=arrays,
        weight=total,
    )


def _mark(
    out: np.ndarray,
    codes: np.ndarray,
    lengths: np.ndarray,
    places: slice | list[int],
    predicted: Predicted,
) -> np.ndarray:
    """Write into `out` [B, T, C] which codes are predicted; return how many of each row, [B]."""
    out[:] = 0
    out[:, :, places] = predicted(torch.from_numpy(codes[:, :, places].astype(np.int64))).numpy()
    out[np.arange(out.shape[1]) >= lengths[:, None]] = 0
    counts: np.ndarray = out.sum((1, 2), dtype=np.int64)
    return counts


def _require_predicted(spans: Sequence[Span], counts: np.ndarray) -> None:
    """Refuse a rollout of whose codes none is predicted."""
    for span, count in zip(spans, counts.tolist(), strict=True):
        if not count:
            sample_id, variation = span.key
            raise UserError(
                f"the rollout {sample_id!r} variation {variation} has nothing to learn from: its "
                f"{span.stop - span.start} timesteps hold no code that the model predicts; leave "
                "the sample out of the dataset and roll out again"
            )


def pad(out: np.ndarray, name: str, spans: Sequence[Span]) -> None:
    """Write an array of some rollouts into `out` [B, T, ...]; beyond their lengths is NaN, or 0."""
    beyond = np.nan if out.dtype.kind == "f" else 0
    for row, span in zip(out, spans, strict=True):
        length = span.stop - span.start
        row[:length] = span.arrays[name][span.start : span.stop]
        row[length:] = beyond


def restored_batch(
    batch: HostBatch,
    manifest: Manifest,
    heads: Mapping[str, Tensor] | None,
    device: torch.device,
    scale: float | Tensor | None,
    groups: Collection[str] | None = None,
) -> TargetBatch:
    """Move a batch to `device` in the types of the store; `restore` says what else.

    Of its streams those of `groups` are kept, where they are given.
    """
    arrays, kept = batch.arrays.to(device), _places(manifest, groups)
    manifest = of_groups(manifest, groups)
    prefix = f"{manifest.target.kind}."
    target = {n.removeprefix(prefix): arrays[n] for n in arrays.fields if n.startswith(prefix)}
    if not isinstance(manifest.target, Hidden):  # whose states lie apart by group
        target = {name: values[:, :, kept] for name, values in target.items()}
    lengths = arrays["lengths"]
    if "predicted" in arrays.fields:
        predicted = arrays["predicted"][:, :, kept].bool()
    else:
        within = torch.arange(max(batch.lengths), device=device) < lengths.unsqueeze(1)
        predicted = within.unsqueeze(-1).expand(-1, -1, len(manifest.streams))
    if "codes" in arrays.fields:
        codes = arrays["codes"][:, :, kept].long()
    else:
        codes = torch.zeros(predicted.shape, dtype=torch.int64, device=device)
    return TargetBatch(
        keys=batch.keys,
        epochs=batch.epochs,
        samples=batch.samples,
        codes=codes,
        lengths=lengths,
        target=restore(target, manifest, heads, device, scale),
        predicted=predicted,
        element_weights=predicted * arrays["weights"][:, None, None],
        weight=batch.weight,
    )


def of_groups(manifest: Manifest, groups: Collection[str] | None) -> Manifest:
    """Return what the manifest would be without the streams of other groups; None keeps all."""
    if groups is None:
        return manifest
    streams = tuple(stream for stream in manifest.streams if stream.group in groups)
    heads = tuple(head for head in manifest.heads if head.group in groups)
    return manifest.model_copy(update={"streams": streams, "heads": heads})


def _places(manifest: Manifest, groups: Collection[str] | None) -> slice | list[int]:
    """Where the streams of `groups` lie on the axis C: a slice, which copies nothing, if it can."""
    if groups is None:
        return slice(None)
    places = [i for i, stream in enumerate(manifest.streams) if stream.group in groups]
    span = slice(places[0], places[-1] + 1)
    return span if places == list(range(span.start, span.stop)) else places
