"""Arrays as the files of a Zarr v3 group, and back; the disk is never touched here.

Every array is one sharded Zarr array: 4096 timesteps a file, 256 a chunk, the trailing axes whole.
Chunks are plain little-endian bytes followed by their CRC-32C, so the files depend on the values
alone, not on the version of a compressor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import zarr
from zarr.abc.store import Store
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.core.buffer.cpu import Buffer as MemoryBuffer
from zarr.errors import BaseZarrError
from zarr.storage import MemoryStore

from store.encoding import Array, ArraySpec
from store.errors import StoreError

CHUNK_TIMESTEPS = 256
FILE_TIMESTEPS = 4096
GROUP_FILE = "zarr.json"

Files = Mapping[str, bytes]


def expected_files(spec: ArraySpec, timesteps: int) -> list[str]:
    """Paths of an array's files below the shard: its zarr.json, then its data in time order."""
    zeros = "/0" * len(spec.trailing)
    count = -(-timesteps // FILE_TIMESTEPS)
    data = [f"{spec.name}/c/{index}{zeros}" for index in range(count)]
    return [f"{spec.name}/zarr.json", *data]


def encode_group() -> dict[str, bytes]:
    """The one file of the Zarr group itself."""
    contents: dict[str, Buffer] = {}
    zarr.create_group(store=MemoryStore(contents), zarr_format=3)
    return _plain(contents)


def encode_array(spec: ArraySpec, values: Array) -> dict[str, bytes]:
    """Files of an array [N, *trailing] by their path below the shard."""
    contents: dict[str, Buffer] = {}
    array = zarr.create_array(
        store=MemoryStore(contents),
        name=spec.name,
        shape=values.shape,
        dtype=spec.dtype,
        chunks=(CHUNK_TIMESTEPS, *spec.trailing),
        shards=(FILE_TIMESTEPS, *spec.trailing),
        filters=None,
        serializer=BytesCodec(endian="little"),
        compressors=Crc32cCodec(),
        fill_value=spec.fill,
        zarr_format=3,
        # Chunks equal to the fill value would be left out, and a lost file would look the same.
        config={"write_empty_chunks": True},
    )
    array[:] = values
    return {path: content for path, content in _plain(contents).items() if path != GROUP_FILE}


def decode_array(spec: ArraySpec, files: Files, timesteps: int) -> Array:
    """Values [N, *trailing] of an array from its files, read-only.

    Raises StoreError when the metadata disagree with `spec` or `timesteps`, or the data are too
    few for them; memory is bounded by the size of the files.
    """
    shape = (timesteps, *spec.trailing)
    data = sum(len(content) for path, content in files.items() if not path.endswith("zarr.json"))
    if data < timesteps * spec.row_bytes:
        raise StoreError(f"{data} bytes of data cannot hold {timesteps} timesteps")
    try:
        array = zarr.open_array(_store(files), path=spec.name, mode="r", zarr_format=3)
        if array.shape != shape or array.dtype != spec.dtype:
            raise StoreError(
                f"zarr.json says {array.dtype} {array.shape}, the manifest {spec.dtype} {shape}"
            )
        values = cast(Array, array[:])
    except (ValueError, TypeError, KeyError, BaseZarrError) as error:
        raise StoreError(f"Zarr cannot decode it ({error})") from error
    values.setflags(write=False)
    return values


def _store(files: Files) -> Store:
    contents: dict[str, Buffer] = {p: MemoryBuffer.from_bytes(b) for p, b in files.items()}
    return MemoryStore(contents, read_only=True)


def _plain(contents: Mapping[str, Buffer]) -> dict[str, bytes]:
    return {path: contents[path].to_bytes() for path in sorted(contents)}
