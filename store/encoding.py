"""Which arrays a target is stored in, and what their values must be.

A new target adds a declaration and a check here, and nothing elsewhere in the store.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from store.schema import Dense, Full, Hidden, Latent, Manifest, Sampled, TopK

Array = np.ndarray[Any, np.dtype[Any]]

COLUMN = "row."
"""What the array of a column has before its name."""

CHUNK_TIMESTEPS = 256
"""Timesteps of a chunk of an array whose timesteps are small."""
LATENT_CHUNK_BYTES = 2**20
"""Bytes of a chunk of latents, at most, unless one alone has more: the last chunk of an array is
filled up, and 255 latents of a large image would be too much for nothing."""

LOGMASS_TOLERANCE = 1e-5
"""A log mass may exceed 0 by the rounding of two fp32 logsumexp."""


@dataclass(frozen=True)
class ArraySpec:
    """One array of a shard, ragged along the time axis."""

    name: str
    dtype: np.dtype[Any]
    trailing: tuple[int, ...]
    """Shape after the time axis: the array is [N, *trailing]."""
    temperatures: tuple[float, ...] = (1.0,)
    """Temperatures at which rounded logits keep their stated loss."""
    latent: bool = False
    """Whether a timestep holds a latent of every stream."""

    @property
    def chunk_timesteps(self) -> int:
        """Timesteps of a chunk: a power of two, 256 but for large latents."""
        if not self.latent:
            return CHUNK_TIMESTEPS
        fitting = max(LATENT_CHUNK_BYTES // self.row_bytes, 1)
        return min(CHUNK_TIMESTEPS, 1 << (fitting.bit_length() - 1))

    @property
    def fill(self) -> float | int:
        """What a reader gets where nothing was written: never a plausible value."""
        return float("nan") if self.dtype.kind == "f" else int(np.iinfo(self.dtype).max)

    @property
    def row_bytes(self) -> int:
        """Bytes of one timestep."""
        return math.prod(self.trailing) * self.dtype.itemsize


@dataclass(frozen=True)
class Fault:
    """The first wrong value of an array."""

    array: str
    reason: str
    timestep: int | None = None
    stream: int | None = None


def array_specs(manifest: Manifest, bucket: int | None = None) -> dict[str, ArraySpec]:
    """Arrays of the shards of a bucket by name, in the order in which they are written.

    Without a bucket: of every shard of a store that has none. Where it has some, of its first one's
    shape, those of the target included.

    `codes` [N, C] (categorical streams only), then those of the target:

    - `top_k`: `top_k.ids` [N, C, K] rising, `top_k.logits` [N, C, K] in the order of the ids,
      `top_k.tail_logmass` [N, C, temperatures], and where asked for `top_k.tail_ids` [N, C, M]
      rising with repeats and `top_k.moments` [N, C, 2];
    - `full`: `full.logits` [N, C, V] and where asked for `full.levels` [N, C], or `full.cond` and
      `full.uncond`;
    - `sampled`: `sampled.ids` [N, C, draws] rising with repeats;
    - `hidden`: per group `hidden.GROUP` [N, H, D], or `hidden.cond.GROUP`, `hidden.uncond.GROUP`;
    - `dense`: `dense.guided` [N, C, *shape], or `dense.cond` and `dense.delta`; a bucket that is
      not predicted has neither.

    Last `row.NAME` of every column: [N], or [N, C, *shape].
    """
    stream = manifest.streams[0]
    shape, predicted = stream.shape if isinstance(stream, Latent) else (), True
    if bucket is not None:
        shape, predicted = manifest.buckets[bucket].shape, manifest.buckets[bucket].predicted
    latent = (len(manifest.streams), *shape)
    specs = list(_target_specs(manifest, latent)) if predicted else []
    if not isinstance(manifest.target, Dense):
        ids = ids_dtype(manifest.vocabulary)
        specs.insert(0, ArraySpec("codes", ids, (len(manifest.streams),)))
    for column in manifest.columns:
        of_latents = column.latent
        trailing = latent if of_latents else ()
        dtype = np.dtype(column.dtype)
        specs.append(ArraySpec(f"{COLUMN}{column.name}", dtype, trailing, latent=of_latents))
    return {spec.name: spec for spec in specs}


def _target_specs(manifest: Manifest, latent: tuple[int, ...]) -> Iterator[ArraySpec]:
    streams, ids = len(manifest.streams), ids_dtype(manifest.vocabulary)
    single = np.dtype(np.float32)
    match manifest.target:
        case TopK() as target:
            tail = (streams, len(target.temperatures))
            yield ArraySpec("top_k.ids", ids, (streams, target.k))
            logits = np.dtype(target.dtype), (streams, target.k)
            yield ArraySpec("top_k.logits", *logits, temperatures=target.temperatures)
            yield ArraySpec("top_k.tail_logmass", single, tail)
            if target.tail_samples:
                yield ArraySpec("top_k.tail_ids", ids, (streams, target.tail_samples))
            if target.moments:
                yield ArraySpec("top_k.moments", single, (streams, 2))
        case Full() as target:
            for part in ("logits",) if target.branches == "guided" else ("cond", "uncond"):
                shape = (streams, manifest.vocabulary)
                yield ArraySpec(f"full.{part}", np.dtype(target.dtype), shape)
            if target.levels:
                yield ArraySpec("full.levels", single, (streams,))
        case Sampled() as target:
            yield ArraySpec("sampled.ids", ids, (streams, target.draws))
        case Hidden() as target:
            for head in manifest.heads:
                for part in ("",) if target.branches == "guided" else ("cond.", "uncond."):
                    states = (head.vectors, head.width)
                    yield ArraySpec(f"hidden.{part}{head.group}", np.dtype(target.dtype), states)
        case Dense() as target:
            for part in ("guided",) if target.branches == "guided" else ("cond", "delta"):
                yield ArraySpec(f"dense.{part}", np.dtype(target.dtype), latent, latent=True)


def ids_dtype(vocabulary: int) -> np.dtype[Any]:
    """Narrowest unsigned type that holds every id: uint16 up to 65536 ids, else uint32."""
    return np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)


def find_fault(
    manifest: Manifest, arrays: Mapping[str, Array], bucket: int | None = None
) -> Fault | None:
    """First fault of the arrays of one rollout or one shard, each [T, *trailing]; None if sound.

    Names, types, shapes, then values: ids in range, allowed and in order, no NaN, logits relative
    to the row maximum, masses at most 1.
    """
    fault = _shape_fault(array_specs(manifest, bucket), arrays)
    return fault or next(_value_faults(manifest, arrays), None)


def _shape_fault(specs: Mapping[str, ArraySpec], arrays: Mapping[str, Array]) -> Fault | None:
    first = next(iter(specs))
    if set(arrays) != set(specs):
        missing, extra = sorted(set(specs) - set(arrays)), sorted(set(arrays) - set(specs))
        return Fault(first, f"the arrays {missing} are missing and {extra} are not of this store")
    timesteps = arrays[first].shape[:1]
    if timesteps in ((), (0,)):
        return Fault(first, "it has no timestep")
    for name, spec in specs.items():
        expected = (*timesteps, *spec.trailing)
        if arrays[name].shape != expected:
            return Fault(name, f"its shape is {arrays[name].shape} but must be {expected}")
        if arrays[name].dtype != spec.dtype:
            return Fault(name, f"its type is {arrays[name].dtype} but must be {spec.dtype}")
    return None


def _value_faults(manifest: Manifest, arrays: Mapping[str, Array]) -> Iterator[Fault]:
    if "codes" in arrays:
        yield from _id_faults(manifest, "codes", arrays["codes"][..., None])
    match manifest.target:
        case TopK():
            yield from _top_k_faults(manifest, arrays)
        case Full():
            for name in sorted(arrays.keys() - {"codes", "full.levels"}):
                yield from _full_logit_faults(manifest, name, arrays[name])
            if "full.levels" in arrays:
                wrong = ~np.isfinite(arrays["full.levels"])
                yield from _faults("full.levels", "NaN or infinity", wrong)
        case Sampled():
            yield from _id_faults(manifest, "sampled.ids", arrays["sampled.ids"])
            yield from _order_faults("sampled.ids", arrays["sampled.ids"])
        case Hidden() | Dense():
            for name in sorted(arrays.keys() - {"codes"}):
                values = arrays[name]
                for fault in _faults(name, _not_finite(name, values), ~np.isfinite(values)):
                    # A state belongs to a head, which may serve several streams.
                    hidden = isinstance(manifest.target, Hidden)
                    yield replace(fault, stream=None) if hidden else fault


def _not_finite(name: str, values: Array) -> str:
    """The reason of a fault; float16 has no place for what is larger than its largest number."""
    if values.dtype != np.float16:
        return "NaN or infinity"
    wider = "a wider type of the column" if name.startswith(COLUMN) else "target.dtype: float32"
    return f"NaN or infinity (float16 ends at 65504: for larger numbers set {wider})"


def _top_k_faults(manifest: Manifest, arrays: Mapping[str, Array]) -> Iterator[Fault]:
    ids, codes = arrays["top_k.ids"], arrays["codes"]
    yield from _id_faults(manifest, "top_k.ids", ids)
    yield from _faults("top_k.ids", "ids that do not rise", ids[..., 1:] <= ids[..., :-1])
    dropped = ~(ids == codes[..., None]).any(-1)
    yield from _faults("top_k.ids", "no place for the drawn code", dropped)
    logits = arrays["top_k.logits"]
    yield from _faults("top_k.logits", "NaN or infinity", ~np.isfinite(logits))
    yield from _maximum_faults("top_k.logits", logits)
    yield from _mass_faults(arrays["top_k.tail_logmass"])
    if "top_k.tail_ids" in arrays:
        drawn = arrays["top_k.tail_ids"]
        yield from _id_faults(manifest, "top_k.tail_ids", drawn)
        yield from _order_faults("top_k.tail_ids", drawn)
        for place in range(drawn.shape[-1]):
            kept = (ids == drawn[..., place, None]).any(-1)
            yield from _faults("top_k.tail_ids", "an id that is kept, not in the tail", kept)
    if "top_k.moments" in arrays:
        moments = arrays["top_k.moments"]
        yield from _faults("top_k.moments", "NaN or infinity", ~np.isfinite(moments))


def _id_faults(manifest: Manifest, name: str, ids: Array) -> Iterator[Fault]:
    sizes = _vocabularies(manifest)[:, None]
    yield from _faults(name, "an id beyond the vocabulary of its stream", ids >= sizes)
    if manifest.forbidden:
        forbidden = np.isin(ids, np.array(manifest.forbidden, ids.dtype))
        yield from _faults(name, "an id that the manifest forbids", forbidden)


def _order_faults(name: str, ids: Array) -> Iterator[Fault]:
    yield from _faults(name, "ids that fall", ids[..., 1:] < ids[..., :-1])


def _vocabularies(manifest: Manifest) -> Array:
    return np.array(manifest.vocabularies)  # [C]


def _maximum_faults(name: str, logits: Array) -> Iterator[Fault]:
    yield from _faults(name, "a largest logit that is not 0", logits.max(-1) != 0)


def _mass_faults(logmass: Array) -> Iterator[Fault]:
    name = "top_k.tail_logmass"
    yield from _faults(name, "NaN", np.isnan(logmass))
    yield from _faults(name, "a probability mass over 1", logmass > LOGMASS_TOLERANCE)


def _full_logit_faults(manifest: Manifest, name: str, logits: Array) -> Iterator[Fault]:
    banned = np.arange(manifest.vocabulary) >= _vocabularies(manifest)[:, None]  # [C, V]
    banned[:, list(manifest.forbidden)] = True
    # Minus infinity is for ids that are not allowed: at others it would teach NaN.
    wrong = ~(np.isfinite(logits) | banned)
    yield from _faults(name, "NaN or infinity at an id that is allowed", wrong)
    yield from _maximum_faults(name, logits)
    finite = logits[:, banned] != -np.inf
    streams = np.nonzero(banned)[0]
    for fault in _faults(name, "a logit over -inf at an id that is not allowed", finite):
        yield replace(fault, stream=int(streams[fault.stream or 0]))


def _faults(array: str, reason: str, wrong: Array) -> Iterator[Fault]:
    if wrong.any():
        timestep, *stream = np.unravel_index(int(wrong.argmax()), wrong.shape)[:2]
        yield Fault(array, f"it holds {reason}", int(timestep), int(stream[0]) if stream else None)
