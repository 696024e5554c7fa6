"""Arrays as the files of a Zarr v3 group, and back.

Every array is one sharded Zarr array in one file: chunks of some timesteps end to end, trailing
axes whole, then their index. Zarr writes the headers and reads all of it; the data are written
and read here, because Zarr itself reaches a tenth of the speed of the disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import google_crc32c
import numpy as np
from zarr.core.buffer import default_buffer_prototype
from zarr.core.group import GroupMetadata
from zarr.core.metadata.v3 import ArrayV3Metadata

from store.chunk_codec import ChunkCodec
from store.durable import Content
from store.encoding import Array, ArraySpec, array_specs
from store.errors import StoreError
from store.schema import Compact, Manifest, Profile
from store.threads import in_threads
from store.zarr_codecs import compact_codec

HEADER_FILE = "zarr.json"

INDEX_ENTRY_BYTES = 16
CRC_BYTES = 4

LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
BYTES = {"name": "bytes"}
"""Where a value is one byte, there is no order of bytes."""
SILENT = ("attributes", "dimension_names")
"""Keys of a header that say nothing about the values."""


class Unencodable(ValueError):
    """Values that a codec cannot hold."""

    def __init__(self, timestep: int, reason: str) -> None:
        self.timestep = timestep
        """First timestep of the chunk that holds them."""
        super().__init__(reason)


@dataclass(frozen=True)
class ArrayFiles:
    """How one array lies in a shard: a header, and a data file."""

    spec: ArraySpec
    codec: ChunkCodec | None
    """What encodes a chunk; None for the plain little-endian values."""

    @classmethod
    def of(cls, spec: ArraySpec, profile: Profile) -> ArrayFiles:
        """The files of an array under a profile."""
        return cls(spec, compact_codec(spec, profile) if isinstance(profile, Compact) else None)

    @classmethod
    def of_all(cls, manifest: Manifest, bucket: int | None) -> dict[str, ArrayFiles]:
        """The files of every array of the shards of a bucket, by its name."""
        specs = array_specs(manifest, bucket)
        return {name: cls.of(spec, manifest.profile) for name, spec in specs.items()}

    @property
    def header(self) -> str:
        """Path of the header below the shard."""
        return f"{self.spec.name}/{HEADER_FILE}"

    @property
    def data(self) -> str:
        """Path of the data file below the shard."""
        return f"{self.spec.name}/c/0{'/0' * len(self.spec.trailing)}"

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """Type of the values, little-endian on any machine."""
        return self.spec.dtype.newbyteorder("<")

    @property
    def chunk(self) -> int:
        """Timesteps of a chunk."""
        return self.spec.chunk_timesteps

    def chunk_count(self, timesteps: int) -> int:
        """Chunks that hold this many timesteps."""
        return -(-timesteps // self.chunk)

    def most_timesteps(self, data_bytes: int) -> int:
        """Timesteps that a data file of this size may index at most, whatever its chunks hold."""
        return max(0, data_bytes - CRC_BYTES) // INDEX_ENTRY_BYTES * self.chunk

    def timesteps_within(self, data_bytes: int) -> int | None:
        """Timesteps that the beginning of the data file holds; None where chunks are encoded."""
        return None if self.codec else data_bytes // self.spec.row_bytes

    def describe(self, timesteps: int) -> dict[str, Any]:
        """What the header of an array of so many timesteps must say, as JSON values."""
        trailing = list(self.spec.trailing)
        plain = LITTLE if self.spec.dtype.itemsize > 1 else BYTES
        sharding = {
            "chunk_shape": [self.chunk, *trailing],
            "codecs": [self.codec.to_dict() if self.codec else plain],
            "index_codecs": [LITTLE, {"name": "crc32c"}],
            "index_location": "end",
        }
        whole = [self.chunk_count(timesteps) * self.chunk, *trailing]
        fill = self.spec.fill
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [timesteps, *trailing],
            "data_type": self.spec.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": whole}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": fill if isinstance(fill, int) else "NaN",
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "storage_transformers": [],
        }

    def encode_header(self, timesteps: int) -> bytes:
        """Content of the header file, as Zarr writes it."""
        return _text(ArrayV3Metadata.from_dict(self.describe(timesteps) | {"attributes": {}}))

    def check_header(self, content: bytes, timesteps: int) -> None:
        """Refuse the content of a header that is not the array's; raises StoreError."""
        self.check_description(_parse(content), timesteps)

    def check_description(self, found: object, timesteps: int) -> None:
        """Refuse the JSON value of a header that is not the array's; raises StoreError."""
        if not isinstance(found, dict):
            raise StoreError("it describes no Zarr array")
        found = {"storage_transformers": []} | found
        expected = self.describe(timesteps)
        if '"big"' in json.dumps(found.get("codecs")):
            raise StoreError(
                "its values are big-endian but this format is little-endian on every machine: "
                "write the array again with little-endian codecs"
            )
        for key in sorted((expected.keys() | found.keys()) - set(SILENT)):
            if found.get(key) != expected.get(key):
                raise StoreError(
                    f"its {key} is {json.dumps(found.get(key))} but format and manifest call for "
                    f"{json.dumps(expected.get(key))}"
                )

    def encode(self, parts: Sequence[Array]) -> Iterator[Content]:
        """Content of the data file, in pieces; the parts [T, *trailing] lie end to end.

        Raises Unencodable, from whichever thread.
        """
        starts = np.cumsum([0, *map(len, parts)])
        count = self.chunk_count(int(starts[-1]))
        if self.codec is None:
            sizes = [self.chunk * self.spec.row_bytes] * count
            yield from self._plain(parts, count * self.chunk - int(starts[-1]))
        else:
            sizes = []
            for chunk in in_threads(partial(self._coded, parts, starts), range(count)):
                sizes.append(len(chunk))
                yield chunk
        yield _index(sizes)

    def chunk_bounds(self, content: memoryview, timesteps: int) -> Array:
        """[chunks + 1] int64: chunk i holds the bytes bounds[i] to bounds[i + 1] of the data file.

        Raises StoreError when the index does not list the chunks end to end.
        """
        count = self.chunk_count(timesteps)
        data_bytes = len(content) - count * INDEX_ENTRY_BYTES - CRC_BYTES
        index = bytes(content[max(data_bytes, 0) :])
        if data_bytes < 0 or _crc(index[:-CRC_BYTES]) != index[-CRC_BYTES:]:
            raise StoreError(f"it does not end in an index of {count} chunks")
        entries = np.frombuffer(index[:-CRC_BYTES], "<u8").reshape(count, 2).astype(np.int64)
        bounds: Array = np.append(entries[:, 0], data_bytes)
        sizes = np.diff(bounds)
        least = self.chunk * self.spec.row_bytes if self.codec is None else 1
        most = least if self.codec is None else data_bytes
        in_line = bounds[0] == 0 and (sizes == entries[:, 1]).all()
        if not in_line or (sizes < least).any() or (sizes > most).any():
            raise StoreError("its index does not list its chunks end to end")
        return bounds

    def view(self, content: memoryview, timesteps: int) -> Array:
        """[N, *trailing] the values of an array without codec, read-only and not copied."""
        return np.ndarray((timesteps, *self.spec.trailing), self.stored_dtype, content)

    def decode_chunk(self, content: memoryview, bounds: Array, chunk: int, out: Array) -> None:
        """Fill `out` [chunk, *trailing] with one chunk; raises StoreError for damage."""
        coded = bytes(content[bounds[chunk] : bounds[chunk + 1]])
        cast(ChunkCodec, self.codec).decode_into(coded, out)

    def _plain(self, parts: Sequence[Array], padding: int) -> Iterator[Content]:
        for part in parts:
            yield _raw(part.astype(self.stored_dtype, order="C", copy=False))
        if padding:
            yield _raw(self._fill(padding))

    def _coded(self, parts: Sequence[Array], starts: Array, chunk: int) -> bytes:
        rows = _rows(parts, starts, chunk * self.chunk, self.chunk)
        rows = np.concatenate([rows, self._fill(self.chunk - len(rows))])
        try:
            return cast(ChunkCodec, self.codec).encode_chunk(rows)
        except ValueError as error:
            raise Unencodable(chunk * self.chunk, str(error)) from error

    def _fill(self, timesteps: int) -> Array:
        return np.full((timesteps, *self.spec.trailing), self.spec.fill, self.stored_dtype)


def group_header(arrays: Sequence[ArrayFiles], timesteps: int) -> bytes:
    """The zarr.json of the group itself, as Zarr writes it, with the headers of its arrays.

    Zarr then need not look for them, and does not stumble over the other files of a shard.
    """
    headers = {array.spec.name: array.describe(timesteps) for array in arrays}
    members = {name: header | {"attributes": {}} for name, header in sorted(headers.items())}
    consolidated = {"kind": "inline", "must_understand": False, "metadata": members}
    group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    return _text(GroupMetadata.from_dict(group | {"consolidated_metadata": consolidated}))


def check_group(content: bytes, arrays: Sequence[ArrayFiles], timesteps: int) -> None:
    """Refuse a header of the group that does not describe its arrays; raises StoreError."""
    match _parse(content):
        case {
            "zarr_format": 3,
            "node_type": "group",
            "consolidated_metadata": {"metadata": dict() as members},
        }:
            if set(members) != {array.spec.name for array in arrays}:
                raise StoreError(f"it lists the arrays {sorted(members)}, not those of its target")
            for array in arrays:
                array.check_description(members[array.spec.name], timesteps)
        case _:
            raise StoreError("it describes no Zarr group of version 3 with its arrays")


def _parse(content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError as error:
        raise StoreError(f"it is not JSON ({error})") from error


def _rows(parts: Sequence[Array], starts: Array, start: int, count: int) -> Array:
    """At most `count` rows from `start` of parts that lie end to end from `starts` on."""
    stop = min(start + count, int(starts[-1]))
    first = int(np.searchsorted(starts, start, side="right")) - 1
    last = int(np.searchsorted(starts, stop, side="left"))
    pieces = [
        parts[part][max(start - int(starts[part]), 0) : stop - int(starts[part])]
        for part in range(first, last)
    ]
    return np.concatenate(pieces)


def _index(sizes: Sequence[int]) -> bytes:
    """Offset and size of every chunk (u64 each), and the CRC-32C of that."""
    ends = np.cumsum(sizes)
    entries = np.stack([ends - sizes, sizes], 1).astype("<u8").tobytes()
    return entries + _crc(entries)


def _crc(content: bytes) -> bytes:
    return int(google_crc32c.value(content)).to_bytes(CRC_BYTES, "little")


def _raw(values: Array) -> memoryview:
    """The bytes of a C-contiguous array, not copied."""
    return memoryview(cast(Any, values.reshape(-1).view(np.uint8)))


def _text(metadata: ArrayV3Metadata | GroupMetadata) -> bytes:
    files: Mapping[str, Any] = metadata.to_buffer_dict(default_buffer_prototype())
    content: bytes = files[HEADER_FILE].to_bytes()
    return content
