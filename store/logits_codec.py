"""Logits of the profile `compact`: rounded where it costs least, within a stated loss."""

from __future__ import annotations

import math
import struct
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from store.chunk_codec import (
    PCO_LEVEL,
    ChunkCodec,
    DamagedChunk,
    as_rows,
    compress,
    decompress_into,
    join,
    split,
)
from store.encoding import Array

if TYPE_CHECKING:
    from zarr.core.common import JSON

BLOCK_NUMBERS = 2**15
"""Logits that are rounded at once: a few double-precision copies of them fit into a cache."""

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
        rows = as_rows(values)
        tops, levels = np.empty(len(rows), np.int64), np.empty(rows.shape, np.int64)
        height = max(1, BLOCK_NUMBERS // max(1, rows.shape[1]))
        for start in range(0, len(rows), height):
            block = slice(start, start + height)
            tops[block], levels[block] = self._round(rows[block])
            if tops[block].max(initial=0) == len(TOPS):
                exact = _relative(rows, np.nan).astype(values.dtype)
                return join(len(rows), b"", compress(exact, self.level))
        places = compress(tops.astype(np.uint16), self.level)
        return join(len(tops), places, _pack_levels(levels, self.level))

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
        count, (first, second) = split(content)
        rows = as_rows(out)
        if count != len(rows):
            raise DamagedChunk(f"it holds {count} rows where {len(rows)} are expected")
        if not first:
            return decompress_into(second, rows.reshape(-1))
        tops = np.empty(count, np.uint16)
        decompress_into(first, tops)
        if count and tops.max() >= len(TOPS):
            raise DamagedChunk(f"a row has the scale {tops.max()} of {len(TOPS)}")
        least, above = _unpack_levels(second, rows.shape)
        if rows.size:
            _look_up(tops, least, above, rows)


def _pack_levels(levels: Array, effort: int) -> bytes:
    least = int(levels.min(initial=0))
    above = (levels - least).astype(np.uint16)
    packed = _pack_bytes(above)
    form, content = (0, compress(above, effort)) if packed is None else (1, packed)
    return struct.pack("<hH", least, form) + content


def _unpack_levels(content: bytes, shape: tuple[int, int]) -> tuple[int, Array]:
    """The least level, and how far all of them [rows, K] are above it, uint16."""
    if len(content) < 4:
        raise DamagedChunk(f"its levels have {len(content)} bytes where a header has 4")
    least, form = struct.unpack_from("<hH", content)
    if form == 1:
        return least, _unpack_bytes(memoryview(content)[4:], shape)
    above = np.empty(shape, np.uint16)
    decompress_into(content[4:], above.reshape(-1))
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
    return join(len(places), low, places.astype("<u4").tobytes() + high.tobytes())


def _unpack_bytes(content: memoryview, shape: tuple[int, int]) -> Array:
    """The numbers that `_pack_bytes` packed, as a new uint16 array."""
    count, (first, rest) = split(content)
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
