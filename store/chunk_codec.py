"""What all codecs of the profile `compact` are: a chunk of an array becomes bytes, and back.

The entropy coder is Pco (https://github.com/pcodec/pcodec, its standalone files).
"""

from __future__ import annotations

import math
import struct
from abc import abstractmethod
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

import numpy as np
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec, standalone
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.common import parse_named_configuration

from store.encoding import Array
from store.errors import StoreError

if TYPE_CHECKING:
    from zarr.core.array_spec import ArraySpec as ChunkSpec
    from zarr.core.buffer import Buffer, NDBuffer
    from zarr.core.common import JSON

PCO_LEVEL = 8
"""Effort of the entropy coder, 0 to 12; above 8 it finds nothing more in these arrays."""

PAGE_NUMBERS = 2**18
"""Numbers per page of a Pco file."""

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


def compress(values: Array, level: int, delta: bool = False) -> bytes:
    """A Pco file of numbers of any shape, of their differences with `delta`."""
    flat = native(values).reshape(-1)
    config = ChunkConfig(
        compression_level=level,
        mode_spec=ModeSpec.classic(),
        delta_spec=DeltaSpec.try_consecutive(1) if delta else DeltaSpec.no_op(),
        paging_spec=PagingSpec.equal_pages_up_to(PAGE_NUMBERS),
        enable_8_bit=flat.itemsize == 1,
    )
    return cast(bytes, standalone.simple_compress(flat, config))


def native(values: Array) -> Array:
    """The same values, C-contiguous and in the byte order of this machine."""
    return np.ascontiguousarray(values, values.dtype.newbyteorder("="))


def as_rows(values: Array) -> Array:
    """Values [..., K] as [rows, K]; shares the memory of a C-contiguous array."""
    return values.reshape(math.prod(values.shape[:-1]), values.shape[-1])


def decompress_into(content: bytes, out: Array) -> None:
    """Fill `out` [n] from a Pco file that must hold exactly n numbers of its type."""
    try:
        progress = standalone.simple_decompress_into(content, out)
    except (RuntimeError, TypeError) as error:
        raise DamagedChunk(f"Pco cannot decode it ({error})") from error
    if progress.n_processed != len(out) or not progress.finished:
        raise DamagedChunk(f"it does not hold the {len(out)} numbers that are expected")


def join(count: int, first: bytes, second: bytes) -> bytes:
    """A chunk of two parts: `count (u32), bytes of the first part (u32)`, both parts."""
    return struct.pack("<II", count, len(first)) + first + second


def split(content: Content) -> tuple[int, tuple[Content, Content]]:
    """The count and the two parts of a chunk that `_join` made."""
    if len(content) < 8:
        raise DamagedChunk(f"it has {len(content)} bytes where a header has 8")
    count, length = struct.unpack_from("<II", content)
    return count, (content[8 : 8 + length], content[8 + length :])
