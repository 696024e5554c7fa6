"""The codecs of the profile `compact`: how one chunk of an array becomes bytes, and back.

Each is a small frozen value with its JSON form, an array->bytes codec of Zarr v3: stock zarr calls
it through the entry points of this package, our own reader and writer call `encode_chunk` and
`decode_into`. The entropy coder is Pco (https://github.com/pcodec/pcodec, its standalone files);
the transforms before it are here. A chunk is an array of any shape whose last axis is the row;
nothing loops over rows in Python, and decoding leaves the interpreter free for other threads.
"""

from __future__ import annotations

import math
import struct
from abc import abstractmethod
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

import numpy as np
import pyarrow as pa
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec, standalone
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.common import parse_named_configuration
from zarr.registry import register_codec

from store.encoding import Array, ArraySpec
from store.errors import StoreError
from store.schema import Compact

if TYPE_CHECKING:
    from zarr.core.array_spec import ArraySpec as ChunkSpec
    from zarr.core.buffer import Buffer, NDBuffer
    from zarr.core.common import JSON

PCO_LEVEL = 8
"""Effort of the entropy coder, 0 to 12; above 8 it finds nothing more in these arrays."""

PAGE_NUMBERS = 2**18
"""Numbers per page of a Pco file."""

BLOCK_NUMBERS = 2**15
"""Logits that are rounded at once: a few double-precision copies of them fit into a cache."""


Content = TypeVar("Content", bytes, memoryview)


class DamagedChunk(StoreError, ValueError):
    """Bytes that a codec cannot have written."""


@dataclass(frozen=True)
class ChunkCodec(ArrayBytesCodec):
    """An array->bytes codec of Zarr v3 that also works without Zarr's event loop."""

    name: ClassVar[str]
    is_fixed_size = False

    @abstractmethod
    def encode_chunk(self, values: Array) -> bytes:
        """Bytes of a chunk; raises ValueError for values that the codec cannot hold."""

    @abstractmethod
    def _fill(self, content: bytes, out: Array) -> None:
        """Decode into a C-contiguous array."""

    def decode_into(self, content: bytes, out: Array) -> None:
        """Fill `out`, C-contiguous and of the chunk's shape and type, from a chunk's bytes.

        Memory is bounded by the size of `out`. Raises DamagedChunk, a ValueError, after which
        `out` is undefined; damage that still reads as numbers is for checksums to find.
        """
        if not out.flags.c_contiguous:
            raise ValueError("a chunk can only be decoded into a C-contiguous array")
        self._fill(content, out)

    def decode_chunk(self, content: bytes, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """A chunk as a new array; raises as `decode_into` does."""
        out: Array = np.empty(shape, dtype)
        self.decode_into(content, out)
        return out

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        """The codec from its JSON form in zarr.json."""
        _, configuration = parse_named_configuration(data, cls.name, require_configuration=False)
        return cls(**cast(dict[str, Any], configuration or {}))

    def to_dict(self) -> dict[str, JSON]:
        """The codec's JSON form in zarr.json."""
        return {"name": self.name, "configuration": asdict(self)}

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ChunkSpec) -> int:
        """Not known before the chunk is encoded: raises NotImplementedError."""
        raise NotImplementedError

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ChunkSpec) -> Buffer:
        content = self.encode_chunk(chunk_data.as_numpy_array())
        return chunk_spec.prototype.buffer.from_bytes(content)

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ChunkSpec) -> NDBuffer:
        dtype = chunk_spec.dtype.to_native_dtype().newbyteorder("=")
        values = self.decode_chunk(chunk_data.to_bytes(), chunk_spec.shape, dtype)
        return chunk_spec.prototype.nd_buffer.from_numpy_array(values)


@dataclass(frozen=True)
class Pco(ChunkCodec):
    """Numbers of 16 to 64 bits as they are: one Pco file, bit-exact for any content."""

    name = "foretell.pco"
    level: int = PCO_LEVEL

    def encode_chunk(self, values: Array) -> bytes:
        """Bytes of integers or floats of any shape."""
        return _compress(values, self.level)

    def _fill(self, content: bytes, out: Array) -> None:
        """Exactly the encoded bits."""
        _decompress_into(content, out.reshape(-1))


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
        plain = _join(0, b"", _compress(values, self.level, delta=True))
        if values.dtype.itemsize < 4 or not values.size:
            return plain
        ids, places = np.unique(values, return_inverse=True)
        parts = (ids, places.astype(np.int64))
        first, second = (_compress(part, self.level, delta=True) for part in parts)
        return min(plain, _join(len(ids), first, second), key=len)

    def _fill(self, content: bytes, out: Array) -> None:
        """Exactly the encoded bits."""
        count, (first, second) = _split(content)
        if not count:
            return _decompress_into(second, out.reshape(-1))
        if count > out.size:
            raise DamagedChunk(f"{count} different ids are more than the {out.size} of the chunk")
        ids, places = np.empty(count, out.dtype), np.empty(out.shape, np.int64)
        _decompress_into(first, ids)
        _decompress_into(second, places.reshape(-1))
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
        return _join(len(places), ids, _compress(lengths, self.level))

    def _fill(self, content: bytes, out: Array) -> None:
        """Exactly the encoded bits."""
        runs, (first, second) = _split(content)
        if runs > out.size:
            raise DamagedChunk(f"{runs} runs are more than the {out.size} ids of the chunk")
        ids, lengths = np.empty(runs, out.dtype), np.empty(runs, np.uint32)
        RisingIds(self.level).decode_into(first, ids)
        _decompress_into(second, lengths)
        if int(lengths.sum(dtype=np.uint64)) != out.size:
            raise DamagedChunk(f"its runs do not add up to the {out.size} ids of the chunk")
        out.reshape(-1)[:] = np.repeat(ids, lengths)


DEEPEST = 126
"""Nats below level 2 at which counting ends: the probability is 0 in fp32 long before."""

LEVEL_OF_MINUS_INFINITY = 1 - DEEPEST
LEVEL_OF_NAN = -DEEPEST


@dataclass(frozen=True)
class Logits(ChunkCodec):
    """Logits rounded where it costs least: evenly in the square root of the probability.

    A row is read as p = softmax(row), and each p as `top·sqrt(p / max p)`, rounded to a whole
    level; below level 2 whole nats are counted down. With rounding error e, |e| <= 1/2, a level
    costs about (2e)²·max p/top²/2 nats, whatever p is, so for an even e all K together cost
    K·max p/(6·top²). `top`, the level of the row's largest logit, is taken per row from `TOPS`: the
    least, from where such a formula gives `loss_nats`, whose loss as measured on the decoded logits
    is at most that. The loss is the largest T²·KL(softmax(row / T), softmax(decoded / T)) of all
    `temperatures`; above 1 unlikely ids weigh more, and levels are finer. Layout: `number of rows
    (u32), bytes of the first part (u32)`, the places in `TOPS` [rows] (Pco of u16), then `least
    level (i16), form (u16)` and how far the levels are above the least: form 1 as `_pack_bytes`,
    form 0 as Pco of u16. Where no level is fine enough for some row, the first part is empty and
    the second holds all logits of the chunk as they are (Pco).

    Decoded rows are relative to their maximum, which is exactly 0, in the order of the encoded
    ones; minus infinity and NaN stay in their places. Encoding decoded rows again may cost
    `loss_nats` again.
    """

    name = "foretell.logits"
    loss_nats: float
    temperatures: tuple[float, ...] = (1.0,)
    level: int = PCO_LEVEL

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperatures", tuple(self.temperatures))  # JSON has lists

    def to_dict(self) -> dict[str, JSON]:
        """The codec's JSON form in zarr.json."""
        plain = asdict(self) | {"temperatures": list(self.temperatures)}
        return {"name": self.name, "configuration": plain}

    def encode_chunk(self, values: Array) -> bytes:
        """Bytes of logits [..., K], float16 or float32, any row offset.

        Raises ValueError for plus infinity.
        """
        rows = _rows(values)
        tops, levels = np.empty(len(rows), np.int64), np.empty(rows.shape, np.int64)
        height = max(1, BLOCK_NUMBERS // max(1, rows.shape[1]))
        for start in range(0, len(rows), height):
            block = slice(start, start + height)
            tops[block], levels[block] = self._round(rows[block])
            if tops[block].max(initial=0) == len(TOPS):
                exact = _relative(rows, np.nan).astype(values.dtype)
                return _join(len(rows), b"", _compress(exact, self.level))
        places = _compress(tops.astype(np.uint16), self.level)
        return _join(len(tops), places, _pack_levels(levels, self.level))

    def _round(self, rows: Array) -> tuple[Array, Array]:
        """Place in `TOPS` [rows] and levels [rows, K] int64 of logits [rows, K].

        The place of a row for which no level is fine enough is the number of `TOPS`.
        """
        logits = _relative(rows)
        tops = _tops_by_formula(logits, self.loss_nats, self.temperatures)
        places = np.searchsorted(TOPS[:-1], tops)
        levels = np.empty(rows.shape, np.int64)
        weights = [np.exp(logits / temperature) for temperature in self.temperatures]
        table, pending = _decoded_levels(rows.dtype.char), np.arange(len(rows))
        while len(pending):
            part, place = logits[pending], places[pending]
            levels[pending] = rounded = _levels(part, TOPS[place])
            decoded = table[rounded + ORIGINS[place][:, None]].astype(np.float64)
            losses = [
                t**2 * _divergence(w[pending], part / t, decoded / t)
                for t, w in zip(self.temperatures, weights, strict=True)
            ]
            pending = pending[np.max(losses, axis=0) > self.loss_nats]
            places[pending] += 1
            pending = pending[places[pending] < len(TOPS)]
        levels[np.isnan(rows)] = LEVEL_OF_NAN
        return places, levels

    def _fill(self, content: bytes, out: Array) -> None:
        """Logits relative to the row maximum, each the nearest of its type to its level's."""
        count, (first, second) = _split(content)
        rows = _rows(out)
        if count != len(rows):
            raise DamagedChunk(f"it holds {count} rows where {len(rows)} are expected")
        if not first:
            return _decompress_into(second, rows.reshape(-1))
        tops = np.empty(count, np.uint16)
        _decompress_into(first, tops)
        if count and tops.max() >= len(TOPS):
            raise DamagedChunk(f"a row has the scale {tops.max()} of {len(TOPS)}")
        least, above = _unpack_levels(second, rows.shape)
        if rows.size:
            _look_up(tops, least, above, rows)


def _pack_levels(levels: Array, effort: int) -> bytes:
    least = int(levels.min(initial=0))
    above = (levels - least).astype(np.uint16)
    packed = _pack_bytes(above)
    form, content = (0, _compress(above, effort)) if packed is None else (1, packed)
    return struct.pack("<hH", least, form) + content


def _unpack_levels(content: bytes, shape: tuple[int, int]) -> tuple[int, Array]:
    """The least level, and how far all of them [rows, K] are above it, uint16."""
    if len(content) < 4:
        raise DamagedChunk(f"its levels have {len(content)} bytes where a header has 4")
    least, form = struct.unpack_from("<hH", content)
    if form == 1:
        return least, _unpack_bytes(memoryview(content)[4:], shape)
    above = np.empty(shape, np.uint16)
    _decompress_into(content[4:], above.reshape(-1))
    return least, above


def _look_up(tops: Array, least: int, above: Array, out: Array) -> None:
    """Fill `out` [rows, K] with the logits of the levels; overwrites `above`.

    The part of the table that a chunk needs nearly always has less than 2^16 entries. Then places
    are summed in 16 bits, which also keeps damage within that part.
    """
    origins = ORIGINS[tops] + least
    start = int(ORIGINS[tops.min()]) + LEVEL_OF_NAN
    if int(ORIGINS[tops.max()] + TOPS[tops.max()]) - start < PLACES:
        above += (origins - start).astype(np.uint16)[:, None]
        places = pa.Array.from_buffers(pa.uint16(), above.size, [None, pa.py_buffer(above)])
        found = _words(out.dtype.char).slice(start, PLACES).take(places).buffers()[1]
        out[:] = np.frombuffer(found, out.dtype).reshape(out.shape)
    else:
        # A level beyond its row's top can only be damage; clipping keeps it within the table.
        np.take(_decoded_levels(out.dtype.char), above + origins[:, None], out=out, mode="clip")


PLACES = 2**16
"""Places of a table that 16 bits tell apart."""

TOPS = np.unique(np.round(2.0 ** np.arange(1, 15.01, 1 / 8)).astype(np.int64))
"""Levels that the largest logit of a row may have."""

_WIDTHS = TOPS - LEVEL_OF_NAN + 1
ORIGINS = np.cumsum(_WIDTHS) - _WIDTHS - LEVEL_OF_NAN
"""Where level 0 of each of `TOPS` lies in the table of decoded levels."""


@cache
def _decoded_levels(kind: str) -> Array:
    """Logits relative to the row maximum of all levels under each of `TOPS`, one after another."""
    tables = []
    for top in TOPS:
        levels = np.arange(2, top + 1)
        nats = np.arange(-DEEPEST, 0) + 2 * np.log(2 / top)
        tables += [[np.nan, -np.inf], nats, 2 * np.log(levels / top)]
    table: Array = np.concatenate(tables).astype(kind)
    table.setflags(write=False)
    return table


@cache
def _words(kind: str) -> pa.Array:
    """The bits of that table and 2^16 zeros, for Arrow, which looks up in half of numpy's time."""
    table = _decoded_levels(kind)
    words = table.view(f"u{table.itemsize}")
    return pa.array(np.append(words, np.zeros(PLACES, words.dtype)))


def _relative(rows: Array, absent: float = -np.inf) -> Array:
    """Logits [rows, K] float64 relative to the row maximum, `absent` in place of NaN."""
    logits = rows.astype(np.float64)
    unwritten = np.isnan(logits)
    logits[unwritten] = -np.inf
    highest = logits.max(-1, keepdims=True, initial=-np.inf)
    if (highest == np.inf).any():
        raise ValueError("a logit is infinite: correct the family that made it")
    logits -= np.where(highest == -np.inf, 0.0, highest)
    logits[unwritten] = absent
    return logits


def _tops_by_formula(logits: Array, loss_nats: float, temperatures: tuple[float, ...]) -> Array:
    """Top [rows] at which even rounding errors cost `loss_nats` at one temperature at least.

    The error of a logit has the variance 1/(3·top²·p/max p), of whole nats 1/12. Its mean over
    softmax(row / T), halved, is the loss.
    """
    weights = np.exp(logits)  # p / max p
    total = np.maximum(weights.sum(-1), 1)  # 1 / max p, and 1 for a row that holds nothing
    tops: Array = np.sqrt(weights.shape[-1] / (6 * loss_nats) / total)
    for temperature in temperatures:
        if temperature != 1:
            softer = weights ** (1 / temperature)
            errors = 1 / np.maximum(weights, 4 / tops[:, None] ** 2)
            cost = (softer * errors).sum(-1) / np.maximum(softer.sum(-1), 1)
            tops = np.maximum(tops, np.sqrt(cost / (6 * loss_nats)))
    return tops


def _levels(logits: Array, tops: Array) -> Array:
    """Levels [rows, K] int64 of logits relative to the row maximum, none of them NaN."""
    levels: Array = np.rint(np.exp(logits / 2) * tops[:, None]).astype(np.int64)
    low = np.nonzero(levels < 2)
    nats = np.rint(-logits[low] - 2 * np.log(tops / 2)[low[0]]).clip(1, DEEPEST)
    levels[low] = 2 - nats.astype(np.int64)
    levels[np.isneginf(logits)] = LEVEL_OF_MINUS_INFINITY
    return levels


def _divergence(weights: Array, logits: Array, decoded: Array) -> Array:
    """KL(softmax(logits), softmax(decoded)) [rows] in nats, at weights exp(logits).

    Minus infinity for a row that holds nothing.
    """
    total = np.maximum(weights.sum(-1), 1)
    gaps = np.subtract(logits, decoded, out=np.zeros_like(logits), where=weights > 0)
    with np.errstate(divide="ignore"):
        divergence: Array = np.log(np.exp(decoded).sum(-1) / total)
    divergence += np.einsum("rk,rk->r", weights, gaps) / total
    return divergence


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
        rows = _rows(values).astype(np.float64)
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
        first, second = (_compress(part, self.level) for part in (scales, multiples))
        return _join(len(scales), first, second)

    def _check_multiples(self, multiples: Array) -> None:
        most = np.abs(multiples).max(initial=0)
        if most > MOST_STEPS:
            raise ValueError(
                f"a feature is {most:.0f} steps of its state but must be at most {MOST_STEPS}: "
                f"raise hidden_step ({self.step:g}), or use the profile `fast`"
            )

    def _fill(self, content: bytes, out: Array) -> None:
        """The rounded states in the type of `out`."""
        count, (first, second) = _split(content)
        rows = _rows(out)
        if count != len(rows):
            raise DamagedChunk(f"it holds {count} rows where {len(rows)} are expected")
        scales, multiples = np.empty(count, np.float32), np.empty(rows.shape, np.int32)
        _decompress_into(first, scales)
        _decompress_into(second, multiples.reshape(-1))
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
        return _compress(multiples.astype(np.int64), self.level)

    def _fill(self, content: bytes, out: Array) -> None:
        """Log masses in the type of `out`, at most 0."""
        multiples = np.empty(out.shape, np.int64)
        _decompress_into(content, multiples.reshape(-1))
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
        values = _native(values)
        words = values.view(np.uint32)
        half = (words >> drop & 1) + np.uint32((1 << (drop - 1)) - 1)
        rounded = (words + half) & np.uint32(2**32 - (1 << drop))
        kept = np.where(np.isfinite(values), rounded, words)
        return _compress(kept.view(np.float32), self.level)

    def _fill(self, content: bytes, out: Array) -> None:
        """The rounded values."""
        _decompress_into(content, out.reshape(-1))


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
        "full.cond": Pco(),
        "full.uncond": Pco(),
        "sampled.ids": SortedDraws(),
        "hidden": States(profile.hidden_step),
        "dense": Pco(),
    }
    kind = spec.name.split(".")[0]
    return codecs[kind if kind in ("hidden", "dense") else spec.name]


_ZSTD = pa.Codec("zstd", compression_level=1)


def _pack_bytes(numbers: Array) -> bytes | None:
    """Numbers of uint16 that are less than 256 but for few; None where more than 1 in 512 are not.

    Where their order tells nothing this is as short as Pco, and decodes in 2/3 of the time. Layout:
    `number of exceptions (u32), bytes of the first part (u32)`, the low bytes (Zstandard), the
    places of the exceptions (u32), their high bytes (u8).
    """
    flat = numbers.reshape(-1)
    places = np.flatnonzero(flat > 255)
    if len(places) > flat.size // 512:
        return None
    low = _ZSTD.compress(flat.astype(np.uint8), asbytes=True)
    high = (flat[places] >> 8).astype(np.uint8)
    return _join(len(places), low, places.astype("<u4").tobytes() + high.tobytes())


def _unpack_bytes(content: memoryview, shape: tuple[int, int]) -> Array:
    """The numbers that `_pack_bytes` packed, as a new uint16 array."""
    count, (first, rest) = _split(content)
    if len(rest) != 5 * count:
        raise DamagedChunk(f"{len(rest)} bytes do not hold {count} exceptions")
    try:
        low = _ZSTD.decompress(first, math.prod(shape))
    except OSError as error:
        raise DamagedChunk(f"Zstandard cannot decode it ({error})") from error
    numbers = np.frombuffer(low, np.uint8).astype(np.uint16)
    if count:
        places = np.frombuffer(rest, "<u4", count)
        if places.max() >= numbers.size:
            raise DamagedChunk(f"an exception lies at {places.max()} of {numbers.size} numbers")
        numbers[places] |= np.frombuffer(rest, np.uint8, count, 4 * count).astype(np.uint16) << 8
    return numbers.reshape(shape)


def _compress(values: Array, level: int, delta: bool = False) -> bytes:
    flat = _native(values).reshape(-1)
    config = ChunkConfig(
        compression_level=level,
        mode_spec=ModeSpec.classic(),
        delta_spec=DeltaSpec.try_consecutive(1) if delta else DeltaSpec.no_op(),
        paging_spec=PagingSpec.equal_pages_up_to(PAGE_NUMBERS),
    )
    return cast(bytes, standalone.simple_compress(flat, config))


def _native(values: Array) -> Array:
    """The same values, C-contiguous and in the byte order of this machine."""
    return np.ascontiguousarray(values, values.dtype.newbyteorder("="))


def _rows(values: Array) -> Array:
    """Values [..., K] as [rows, K]; shares the memory of a C-contiguous array."""
    return values.reshape(math.prod(values.shape[:-1]), values.shape[-1])


def _decompress_into(content: bytes, out: Array) -> None:
    """Fill `out` [n] from a Pco file that must hold exactly n numbers of its type."""
    try:
        progress = standalone.simple_decompress_into(content, out)
    except (RuntimeError, TypeError) as error:
        raise DamagedChunk(f"Pco cannot decode it ({error})") from error
    if progress.n_processed != len(out) or not progress.finished:
        raise DamagedChunk(f"it does not hold the {len(out)} numbers that are expected")


def _join(count: int, first: bytes, second: bytes) -> bytes:
    """A chunk of two parts: `count (u32), bytes of the first part (u32)`, both parts."""
    return struct.pack("<II", count, len(first)) + first + second


def _split(content: Content) -> tuple[int, tuple[Content, Content]]:
    """The count and the two parts of a chunk that `_join` made."""
    if len(content) < 8:
        raise DamagedChunk(f"it has {len(content)} bytes where a header has 8")
    count, length = struct.unpack_from("<II", content)
    return count, (content[8 : 8 + length], content[8 + length :])


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
