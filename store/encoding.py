"""Which arrays a target is stored in, and what their values must be.

A new target adds a declaration and a check here, and nothing elsewhere in the store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from store.schema import Full, Manifest, TopK

Array = np.ndarray[Any, np.dtype[Any]]

LOGMASS_TOLERANCE = 1e-5
"""A log mass may exceed 0 by the rounding of two fp32 logsumexp."""


@dataclass(frozen=True)
class ArraySpec:
    """One array of a shard, ragged along the time axis."""

    name: str
    dtype: np.dtype[Any]
    trailing: tuple[int, ...]
    """Shape after the time axis: the array is [N, *trailing]."""

    @property
    def fill(self) -> float | int:
        """What a reader gets where nothing was written: never a plausible value."""
        return float("nan") if self.dtype.kind == "f" else int(np.iinfo(self.dtype).max)

    @property
    def row_bytes(self) -> int:
        """Bytes of one timestep."""
        return int(np.prod(self.trailing)) * self.dtype.itemsize


@dataclass(frozen=True)
class Fault:
    """The first wrong value of an array."""

    array: str
    reason: str
    timestep: int | None = None
    stream: int | None = None


def array_specs(manifest: Manifest) -> dict[str, ArraySpec]:
    """Arrays of every shard of a store by name, in the order in which they are written.

    `codes` [N, C] and, for `top_k`, `top_k.ids` [N, C, K], `top_k.logits` [N, C, K],
    `top_k.tail_logmass` [N, C, temperatures] and, with moments, `top_k.moments` [N, C, 2];
    for `full`, `full.logits` [N, C, V].
    """
    streams, ids = len(manifest.streams), ids_dtype(manifest.vocabulary)
    target = manifest.target
    specs = [ArraySpec("codes", ids, (streams,))]
    logits = np.dtype(target.dtype)
    match target:
        case TopK():
            tail = (streams, len(target.temperatures))
            specs.append(ArraySpec("top_k.ids", ids, (streams, target.k)))
            specs.append(ArraySpec("top_k.logits", logits, (streams, target.k)))
            specs.append(ArraySpec("top_k.tail_logmass", np.dtype(np.float32), tail))
            if target.moments:
                specs.append(ArraySpec("top_k.moments", np.dtype(np.float32), (streams, 2)))
        case Full():
            specs.append(ArraySpec("full.logits", logits, (streams, manifest.vocabulary)))
    return {spec.name: spec for spec in specs}


def ids_dtype(vocabulary: int) -> np.dtype[Any]:
    """Narrowest unsigned type that holds every id: uint16 up to 65536 ids, else uint32."""
    return np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)


def find_fault(manifest: Manifest, arrays: Mapping[str, Array]) -> Fault | None:
    """First fault of the arrays of one rollout or one shard, each [T, *trailing]; None if sound.

    Names, types, shapes, then values: ids in range and allowed, no NaN, logits relative to the
    row maximum, masses at most 1.
    """
    fault = _shape_fault(array_specs(manifest), arrays)
    return fault or next(_value_faults(manifest, arrays), None)


def _shape_fault(specs: Mapping[str, ArraySpec], arrays: Mapping[str, Array]) -> Fault | None:
    if set(arrays) != set(specs):
        missing, extra = sorted(set(specs) - set(arrays)), sorted(set(arrays) - set(specs))
        return Fault("codes", f"the arrays {missing} are missing and {extra} are not of this store")
    timesteps = arrays["codes"].shape[:1]
    if timesteps in ((), (0,)):
        return Fault("codes", "it has no timestep")
    for name, spec in specs.items():
        expected = (*timesteps, *spec.trailing)
        if arrays[name].shape != expected:
            return Fault(name, f"its shape is {arrays[name].shape} but must be {expected}")
        if arrays[name].dtype != spec.dtype:
            return Fault(name, f"its type is {arrays[name].dtype} but must be {spec.dtype}")
    return None


def _value_faults(manifest: Manifest, arrays: Mapping[str, Array]) -> Iterator[Fault]:
    codes = arrays["codes"]
    yield from _id_faults(manifest, "codes", codes[..., None])
    match manifest.target:
        case TopK():
            ids = arrays["top_k.ids"]
            yield from _id_faults(manifest, "top_k.ids", ids)
            ranked = np.sort(ids, axis=-1)
            yield from _faults("top_k.ids", "an id twice", ranked[..., 1:] == ranked[..., :-1])
            dropped = ~(ids == codes[..., None]).any(-1)
            yield from _faults("top_k.ids", "no place for the drawn code", dropped)
            yield from _top_k_logit_faults(arrays["top_k.logits"])
            yield from _mass_faults(arrays["top_k.tail_logmass"])
            if manifest.target.moments:
                moments = arrays["top_k.moments"]
                yield from _faults("top_k.moments", "NaN or infinity", ~np.isfinite(moments))
        case Full():
            yield from _full_logit_faults(manifest, arrays["full.logits"])


def _id_faults(manifest: Manifest, name: str, ids: Array) -> Iterator[Fault]:
    sizes = _vocabularies(manifest)[:, None]
    yield from _faults(name, "an id beyond the vocabulary of its stream", ids >= sizes)
    forbidden = np.isin(ids, np.array(manifest.forbidden, ids.dtype))
    yield from _faults(name, "an id that the manifest forbids", forbidden)


def _vocabularies(manifest: Manifest) -> Array:
    return np.array([stream.vocabulary for stream in manifest.streams])  # [C]


def _top_k_logit_faults(logits: Array) -> Iterator[Fault]:
    name = "top_k.logits"
    yield from _faults(name, "NaN", np.isnan(logits))
    yield from _faults(name, "a first logit that is not 0", logits[..., 0] != 0)
    yield from _faults(name, "logits that do not fall", logits[..., 1:] > logits[..., :-1])


def _mass_faults(logmass: Array) -> Iterator[Fault]:
    name = "top_k.tail_logmass"
    yield from _faults(name, "NaN", np.isnan(logmass))
    yield from _faults(name, "a probability mass over 1", logmass > LOGMASS_TOLERANCE)


def _full_logit_faults(manifest: Manifest, logits: Array) -> Iterator[Fault]:
    name = "full.logits"
    yield from _faults(name, "NaN", np.isnan(logits))
    yield from _faults(name, "a row maximum that is not 0", logits.max(-1) != 0)
    banned = np.arange(manifest.vocabulary) >= _vocabularies(manifest)[:, None]  # [C, V]
    banned[:, list(manifest.forbidden)] = True
    finite = logits[:, banned] != -np.inf
    streams = np.nonzero(banned)[0]
    for fault in _faults(name, "a logit over -inf at an id that is not allowed", finite):
        yield replace(fault, stream=int(streams[fault.stream or 0]))


def _faults(array: str, reason: str, wrong: Array) -> Iterator[Fault]:
    if wrong.any():
        timestep, stream = np.unravel_index(int(wrong.argmax()), wrong.shape)[:2]
        yield Fault(array, f"it holds {reason}", int(timestep), int(stream))
