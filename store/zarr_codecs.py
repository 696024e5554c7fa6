"""The codecs of the profile `compact`: how one chunk of an array becomes bytes, and back.

Each is a small frozen value with its JSON form, an array->bytes codec of Zarr v3: stock zarr calls
it through the entry points of this package, our own reader and writer call `encode_chunk` and
`decode_into`. A chunk is an array of any shape whose last axis is the row; nothing loops over rows
in Python, and decoding leaves the interpreter free for other threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from zarr.registry import register_codec

from store.chunk_codec import (
    PCO_LEVEL,
    ChunkCodec,
    DamagedChunk,
    as_rows,
    compress,
    decompress_into,
    join,
    native,
    split,
)
from store.encoding import Array, ArraySpec
from store.logits_codec import Logits
from store.schema import Compact


@dataclass(frozen=True)
class Pco(ChunkCodec):
    """Numbers of 8 to 64 bits as they are: one Pco file, bit-exact for any content."""

    name = "foretell.pco"
    level: int = PCO_LEVEL

    def encode_chunk(self, values: Array) -> bytes:
        """Bytes of integers or floats of any shape."""
        return compress(values, self.level)

    def _fill(self, content: bytes, out: Array) -> None:
        """Exactly the encoded bits."""
        decompress_into(content, out.reshape(-1))


@dataclass(frozen=True)
class RisingIds(ChunkCodec):
    """Rows of rising ids: bit-exact for any content, small for such rows.

    The ids of the whole chunk end to end as one Pco file of their differences. Differences within
    rows alone would save 1 byte per row and take twice as long to sum up again. Of a large
    vocabulary a chunk uses few ids, many of them often; if that is shorter, the file holds places
    (i64) in a dictionary of the chunk's ids. Layout: `size of the dictionary, 0 for none (u32),
    bytes of the first file (u32)`, dictionary, ids or places, all Pco with differences.
    """

    name = "foretell.rising_ids"
    level: int = PCO_LEVEL

    def encode_chunk(self, values: Array) -> bytes:
        """Bytes of ids of any shape, uint16 or uint32."""
        if values.dtype.kind != "u":
            raise ValueError(f"ids must be unsigned integers, not {values.dtype}")
        plain = join(0, b"", compress(values, self.level, delta=True))
        if values.dtype.itemsize < 4 or not values.size:
            return plain
        ids, places = np.unique(values, return_inverse=True)
        parts = (ids, places.astype(np.int64))
        first, second = (compress(part, self.level, delta=True) for part in parts)
        return min(plain, join(len(ids), first, second), key=len)

    def _fill(self, content: bytes, out: Array) -> None:
        """Exactly the encoded bits."""
        count, (first, second) = split(content)
        if not count:
            return decompress_into(second, out.reshape(-1))
        if count > out.size:
            raise DamagedChunk(f"{count} different ids are more than the {out.size} of the chunk")
        ids, places = np.empty(count, out.dtype), np.empty(out.shape, np.int64)
        decompress_into(first, ids)
        decompress_into(second, places.reshape(-1))
        np.take(ids, places, out=out, mode="clip")  # only damage is beyond the dictionary


@dataclass(frozen=True)
class SortedDraws(ChunkCodec):
    """Rows of sorted ids with repeats, as runs: bit-exact for any content, small for such rows.

    The runs of all rows end to end, a run never longer than a row. Layout: `number of runs (u32),
    bytes of the first part (u32)`, the ids of the runs as `RisingIds`, their lengths (Pco of u32).
    """

    name = "foretell.sorted_draws"
    level: int = PCO_LEVEL

    def encode_chunk(self, values: Array) -> bytes:
        """Bytes of ids [..., draws], uint16 or uint32."""
        starts = np.ones(values.shape, bool)
        np.not_equal(values[..., 1:], values[..., :-1], out=starts[..., 1:])
        places = np.flatnonzero(starts)
        lengths = np.diff(places, append=values.size).astype(np.uint32)
        ids = RisingIds(self.level).encode_chunk(values[starts])
        return join(len(places), ids, compress(lengths, self.level))

    def _fill(self, content: bytes, out: Array) -> None:
        """Exactly the encoded bits."""
        runs, (first, second) = split(content)
        if runs > out.size:
            raise DamagedChunk(f"{runs} runs are more than the {out.size} ids of the chunk")
        ids, lengths = np.empty(runs, out.dtype), np.empty(runs, np.uint32)
        RisingIds(self.level).decode_into(first, ids)
        decompress_into(second, lengths)
        if int(lengths.sum(dtype=np.uint64)) != out.size:
            raise DamagedChunk(f"its runs do not add up to the {out.size} ids of the chunk")
        out.reshape(-1)[:] = np.repeat(ids, lengths)


MOST_STEPS = 2**24
"""Largest multiple of a step: up to here fp32, in which states are decoded, holds every integer."""

LEAST_SCALE = float(np.finfo(np.float32).smallest_subnormal)


@dataclass(frozen=True)
class States(ChunkCodec):
    """States rounded to whole multiples of `step` times the root mean square of each row.

    Layout: `number of rows (u32), bytes of the first file (u32)`, the multiple's value per row
    (Pco of f32), the multiples (Pco of i32). A row that is not finite, or with a multiple beyond
    `MOST_STEPS`, is refused but for rows that are NaN throughout, which stay so.
    """

    name = "foretell.states"
    step: float
    level: int = PCO_LEVEL

    def encode_chunk(self, values: Array) -> bytes:
        """Bytes of states [..., D], float16 or float32.

        Raises ValueError for a row that mixes finite and other values, or has a multiple beyond
        `MOST_STEPS`.
        """
        rows = as_rows(values).astype(np.float64)
        empty = np.flatnonzero(np.isnan(rows).all(-1))
        rows[empty] = 0
        if not np.isfinite(rows).all():
            raise ValueError("a state is NaN or infinite: correct the family that made it")
        sizes = np.sqrt((rows**2).mean(-1))
        # A step below what fp32 holds would be 0, and make the whole row 0.
        scales = np.where(sizes > 0, np.maximum(self.step * sizes, LEAST_SCALE), 0)
        scales = scales.astype(np.float32)
        multiples = np.rint(rows / np.where(scales > 0, scales, 1)[:, None])
        self._check_multiples(multiples)
        beyond = np.abs(multiples * scales[:, None]) > np.finfo(values.dtype).max
        multiples -= np.sign(multiples) * beyond  # toward 0 where rounding would overflow
        scales[empty] = np.nan
        multiples = multiples.astype(np.int32)
        first, second = (compress(part, self.level) for part in (scales, multiples))
        return join(len(scales), first, second)

    def _check_multiples(self, multiples: Array) -> None:
        most = np.abs(multiples).max(initial=0)
        if most > MOST_STEPS:
            raise ValueError(
                f"a feature is {most:.0f} steps of its state but must be at most {MOST_STEPS}: "
                f"raise hidden_step ({self.step:g}), or use the profile `fast`"
            )

    def _fill(self, content: bytes, out: Array) -> None:
        """The rounded states in the type of `out`."""
        count, (first, second) = split(content)
        rows = as_rows(out)
        if count != len(rows):
            raise DamagedChunk(f"it holds {count} rows where {len(rows)} are expected")
        scales, multiples = np.empty(count, np.float32), np.empty(rows.shape, np.int32)
        decompress_into(first, scales)
        decompress_into(second, multiples.reshape(-1))
        with np.errstate(over="ignore", invalid="ignore"):  # only damage overflows
            np.multiply(multiples, scales[:, None], out=rows, dtype=np.float32, casting="unsafe")


@dataclass(frozen=True)
class LogMass(ChunkCodec):
    """Log masses rounded to multiples of `step` in their log odds, ln m − ln(1 − m).

    Both the mass and the rest keep their relative precision: rounding costs at most step²/32 nats.
    A mass of 1 (0 or above, by the rounding of the sum), minus infinity and NaN are kept. Layout:
    the multiples (Pco of i64).
    """

    name = "foretell.log_mass"
    step: float = 1 / 64
    level: int = PCO_LEVEL

    def encode_chunk(self, values: Array) -> bytes:
        """Bytes of log masses of any shape, float16 or float32."""
        masses = values.astype(np.float64)
        inside = (masses < 0) & (masses > -np.inf)
        known = np.where(inside, masses, -1.0)
        odds = np.round((known - np.log(-np.expm1(known))) / self.step)
        multiples = np.clip(odds, -HIGHEST_ODDS, HIGHEST_ODDS)
        multiples[masses >= 0] = HIGHEST_ODDS + 1
        multiples[np.isneginf(masses)] = -HIGHEST_ODDS - 1
        multiples[np.isnan(masses)] = -HIGHEST_ODDS - 2
        return compress(multiples.astype(np.int64), self.level)

    def _fill(self, content: bytes, out: Array) -> None:
        """Log masses in the type of `out`, at most 0."""
        multiples = np.empty(out.shape, np.int64)
        decompress_into(content, multiples.reshape(-1))
        multiples += HIGHEST_ODDS + 2
        np.take(_decoded_odds(self.step, out.dtype.char), multiples, out=out, mode="clip")


HIGHEST_ODDS = 2**14
"""Largest multiple of a step of log odds."""


@cache
def _decoded_odds(step: float, kind: str) -> Array:
    """Log masses of all multiples, NaN and minus infinity first, the mass 1 last."""
    odds = np.arange(-HIGHEST_ODDS, HIGHEST_ODDS + 1) * step
    table: Array = np.concatenate([[np.nan, -np.inf], -np.logaddexp(0, -odds), [0.0]]).astype(kind)
    table.setflags(write=False)
    return table


@dataclass(frozen=True)
class Rounded(ChunkCodec):
    """Floats rounded to `bits` explicit bits of mantissa, ties to even: one Pco file.

    Encoding decoded values again changes nothing.
    """

    name = "foretell.rounded"
    bits: int
    level: int = PCO_LEVEL

    def encode_chunk(self, values: Array) -> bytes:
        """Bytes of float32 of any shape; NaN and infinities are kept."""
        if values.dtype != np.float32:
            raise ValueError(f"only float32 can be rounded, not {values.dtype}")
        drop = 23 - self.bits
        values = native(values)
        words = values.view(np.uint32)
        half = (words >> drop & 1) + np.uint32((1 << (drop - 1)) - 1)
        rounded = (words + half) & np.uint32(2**32 - (1 << drop))
        kept = np.where(np.isfinite(values), rounded, words)
        return compress(kept.view(np.float32), self.level)

    def _fill(self, content: bytes, out: Array) -> None:
        """The rounded values."""
        decompress_into(content, out.reshape(-1))


def compact_codec(spec: ArraySpec, profile: Compact) -> ChunkCodec:
    """The codec of an array of `store.encoding.array_specs` under the profile `compact`.

    Lossless but for the logits of `top_k` and `full`, tail log-masses, moments and hidden states.
    Branches of `full` stay exact too: guidance would multiply their rounding.
    """
    codecs: dict[str, ChunkCodec] = {
        "codes": Pco(),
        "top_k.ids": RisingIds(),
        "top_k.logits": Logits(profile.loss_nats, spec.temperatures),
        "top_k.tail_logmass": LogMass(),
        "top_k.tail_ids": SortedDraws(),
        "top_k.moments": Rounded(bits=12),
        "full.logits": Logits(profile.loss_nats, spec.temperatures),
        "full.levels": Pco(),
        "full.cond": Pco(),
        "full.uncond": Pco(),
        "sampled.ids": SortedDraws(),
        "hidden": States(profile.hidden_step),
        "dense": Pco(),
        "row": Pco(),
    }
    kind = spec.name.split(".")[0]
    return codecs[kind if kind in ("hidden", "dense", "row") else spec.name]


CODECS: tuple[type[ChunkCodec], ...] = (
    Pco,
    RisingIds,
    SortedDraws,
    Logits,
    States,
    LogMass,
    Rounded,
)
"""All codecs; pyproject.toml lists the same as entry points of Zarr."""

for _codec in CODECS:
    register_codec(_codec.name, _codec)
