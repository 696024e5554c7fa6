"""The engines that `read_rate` compares with, each storing the same rollouts and used generously.

A rollout is a dict of arrays [T, …] with the names, types and shapes of a store's. Every peer keeps
the raw bytes of an array, never lists of numbers, in a record per rollout, is read in this process
without workers, and hands the arrays out without a copy where it can. Engines with random access
walk a permutation of all rollouts; the others shuffle as their documentation says, which is weaker.
"""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from functools import cached_property, partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

Arrays = dict[str, np.ndarray]
FIELDS: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
    "codes": (np.dtype(np.uint16), (8,)),
    "top_k.ids": (np.dtype(np.uint16), (8, 64)),
    "top_k.logits": (np.dtype(np.float16), (8, 64)),
    "top_k.tail_logmass": (np.dtype(np.float32), (8, 1)),
}
"""Type and trailing shape of the arrays of a rollout of 8 codebooks that keeps 64 ids."""
BATCH = 16
SHARD_BYTES = 1 << 26
BUFFER = 64
"""Rollouts in the shuffle buffer of the engines that have no random access."""


def padded(rollouts: Sequence[Arrays]) -> dict[str, Tensor]:
    """Stack rollouts to [B, T, …]; beyond a length is NaN, or id 0. Also `lengths` [B]."""
    lengths = [len(rollout["codes"]) for rollout in rollouts]
    batch = {"lengths": torch.tensor(lengths)}
    for name, (dtype, trailing) in FIELDS.items():
        array = np.empty((len(rollouts), max(lengths), *trailing), dtype)
        for row, (rollout, length) in enumerate(zip(rollouts, lengths, strict=True)):
            array[row, :length] = rollout[name]
            array[row, length:] = np.nan if dtype.kind == "f" else 0
        batch[name] = torch.from_numpy(array)
    return batch


def batches(rollouts: Iterator[Arrays]) -> Iterator[dict[str, Tensor]]:
    """Padded batches of rollouts in the order in which they come."""
    while chosen := list(islice(rollouts, BATCH)):
        yield padded(chosen)


def permutation(count: int, epoch: int) -> list[int]:
    """All rollouts in the order of an epoch."""
    order: list[int] = np.random.default_rng(epoch).permutation(count).tolist()
    return order


def encode(rollout: Arrays) -> dict[str, bytes]:
    """The raw bytes of every array."""
    return {name: rollout[name].tobytes() for name in FIELDS}


def decode(buffers: Mapping[str, bytes | memoryview]) -> Arrays:
    """Arrays over the raw bytes of every array, not copied."""
    return {
        name: np.frombuffer(buffers[name], dtype).reshape(-1, *trailing)
        for name, (dtype, trailing) in FIELDS.items()
    }


class Engine(ABC):
    """One way to keep rollouts in a folder."""

    needs: ClassVar[str] = "numpy"
    """Module that must be installed."""
    package: ClassVar[str] = "numpy"
    """What to install for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def write(self, rollouts: Sequence[Arrays]) -> None:
        """Store all rollouts."""

    @abstractmethod
    def batches(self, epoch: int) -> Iterator[dict[str, Tensor]]:
        """Shuffled padded batches: what is measured."""

    @classmethod
    def installed(cls) -> bool:
        """Whether the engine can be measured here."""
        return find_spec(cls.needs) is not None


class Peer(Engine):
    """A way that hands out rollouts; the batches are padded by the benchmark, alike for all."""

    @abstractmethod
    def rollouts(self, epoch: int) -> Iterator[Arrays]:
        """Every rollout once, shuffled."""

    def batches(self, epoch: int) -> Iterator[dict[str, Tensor]]:
        return batches(self.rollouts(epoch))


class Memmap(Peer):
    """One mapped file per array, and the offsets of the rollouts: the reference."""

    def write(self, rollouts: Sequence[Arrays]) -> None:
        for name in FIELDS:
            with (self.folder / name).open("wb") as file:
                for rollout in rollouts:
                    file.write(rollout[name].data)
        offsets = np.cumsum([0, *(len(rollout["codes"]) for rollout in rollouts)])
        (self.folder / "offsets.json").write_text(json.dumps(offsets.tolist()))

    @cached_property
    def offsets(self) -> list[int]:
        offsets: list[int] = json.loads((self.folder / "offsets.json").read_text())
        return offsets

    @cached_property
    def maps(self) -> Arrays:
        shape = self.offsets[-1:]
        return {
            name: np.memmap(self.folder / name, dtype, "r", shape=(*shape, *trailing)).view(
                np.ndarray
            )
            for name, (dtype, trailing) in FIELDS.items()
        }

    def lookup(self, index: int) -> Arrays:
        """Views of the arrays of one rollout."""
        rows = slice(self.offsets[index], self.offsets[index + 1])
        return {name: array[rows] for name, array in self.maps.items()}

    def rollouts(self, epoch: int) -> Iterator[Arrays]:
        return map(self.lookup, permutation(len(self.offsets) - 1, epoch))


class Arrow(Peer):
    """Hugging Face datasets: one memory-mapped Arrow file, a binary column per array."""

    needs, package = "datasets", "datasets"

    def write(self, rollouts: Sequence[Arrays]) -> None:
        import datasets
        from datasets.arrow_writer import ArrowWriter

        columns = {name: datasets.Value("large_binary") for name in FIELDS}
        file = str(self.folder / "data.arrow")
        with ArrowWriter(path=file, features=datasets.Features(columns)) as writer:
            for rollout in rollouts:
                writer.write(encode(rollout))
            writer.finalize()

    @cached_property
    def dataset(self) -> Any:
        import datasets

        return datasets.Dataset.from_file(str(self.folder / "data.arrow")).with_format("arrow")

    def rollouts(self, epoch: int) -> Iterator[Arrays]:
        order = permutation(len(self.dataset), epoch)
        for start in range(0, len(order), BATCH):
            chosen = self.dataset[order[start : start + BATCH]]
            yield from _decode_rows(chosen, range(chosen.num_rows))


def _decode_rows(table: Any, rows: Iterable[int]) -> Iterator[Arrays]:
    columns = {name: table[name] for name in FIELDS}
    for row in rows:
        yield decode({name: columns[name][row].as_buffer() for name in FIELDS})


class Lmdb(Peer):
    """LMDB: a record per rollout and array, read through the map without a copy."""

    needs, package = "lmdb", "lmdb"

    def write(self, rollouts: Sequence[Arrays]) -> None:
        import lmdb

        size = 2 * sum(array.nbytes for rollout in rollouts for array in rollout.values())
        with (
            lmdb.open(str(self.folder), map_size=size + (1 << 24)) as env,
            env.begin(write=True) as transaction,
        ):
            for index, rollout in enumerate(rollouts):
                for name, content in encode(rollout).items():
                    transaction.put(f"{index:08}.{name}".encode(), content)

    @cached_property
    def environment(self) -> Any:
        import lmdb

        return lmdb.open(str(self.folder), readonly=True, lock=False)

    def rollouts(self, epoch: int) -> Iterator[Arrays]:
        count = self.environment.stat()["entries"] // len(FIELDS)
        with self.environment.begin(buffers=True) as transaction:
            for index in permutation(count, epoch):
                yield decode(
                    {name: transaction.get(f"{index:08}.{name}".encode()) for name in FIELDS}
                )


class Mds(Peer):
    """MosaicML streaming: MDS shards of 64 MiB, shuffled by its own py1e."""

    needs, package = "streaming", "mosaicml-streaming"

    def write(self, rollouts: Sequence[Arrays]) -> None:
        from streaming import MDSWriter

        columns = dict.fromkeys(FIELDS, "bytes")
        with MDSWriter(out=str(self.folder), columns=columns, size_limit=SHARD_BYTES) as writer:
            for rollout in rollouts:
                writer.write(encode(rollout))

    @cached_property
    def dataset(self) -> Any:
        from streaming import StreamingDataset

        return StreamingDataset(
            local=str(self.folder), shuffle=True, batch_size=BATCH, num_canonical_nodes=1
        )

    def rollouts(self, epoch: int) -> Iterator[Arrays]:
        return map(decode, self.dataset)


class LitData(Peer):
    """LitData: chunks of 64 MiB written by `optimize`, shuffled by its own sampler."""

    needs, package = "litdata", "litdata"

    def write(self, rollouts: Sequence[Arrays]) -> None:
        from litdata import optimize

        with redirect_stdout(sys.stderr):
            optimize(
                fn=partial(_encode_nth, rollouts),
                inputs=list(range(len(rollouts))),
                output_dir=str(self.folder),
                chunk_bytes=SHARD_BYTES,
                num_workers=1,
                verbose=False,
            )

    @cached_property
    def dataset(self) -> Any:
        from litdata import StreamingDataset

        return StreamingDataset(str(self.folder), shuffle=True)

    def rollouts(self, epoch: int) -> Iterator[Arrays]:
        return map(decode, self.dataset)


def _encode_nth(rollouts: Sequence[Arrays], index: int) -> dict[str, bytes]:
    return encode(rollouts[index])


class WebDataset(Peer):
    """WebDataset: tar files of 64 MiB with a member per array, in shuffled order and a buffer."""

    needs, package = "webdataset", "webdataset"

    def write(self, rollouts: Sequence[Arrays]) -> None:
        import webdataset

        pattern = str(self.folder / "%05d.tar")
        with webdataset.ShardWriter(pattern, maxsize=SHARD_BYTES, verbose=0) as writer:
            for index, rollout in enumerate(rollouts):
                writer.write({"__key__": f"{index:08}"} | encode(rollout))

    @cached_property
    def dataset(self) -> Any:
        import webdataset

        files = sorted(map(str, self.folder.glob("*.tar")))
        return webdataset.WebDataset(files, shardshuffle=len(files), empty_check=False).shuffle(
            BUFFER
        )

    def rollouts(self, epoch: int) -> Iterator[Arrays]:
        return map(decode, self.dataset)


class Parquet(Peer):
    """Uncompressed Parquet, a binary column per array; row groups shuffled, then in a buffer."""

    needs, package = "pyarrow", "pyarrow"
    row_group = 32

    def write(self, rollouts: Sequence[Arrays]) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        schema = pa.schema([(name, pa.large_binary()) for name in FIELDS])
        file = self.folder / "data.parquet"
        with parquet.ParquetWriter(file, schema, compression="none", use_dictionary=False) as out:
            for start in range(0, len(rollouts), self.row_group):
                rows = [encode(rollout) for rollout in rollouts[start : start + self.row_group]]
                out.write_table(pa.Table.from_pylist(rows, schema))

    @cached_property
    def file(self) -> Any:
        from pyarrow import parquet

        return parquet.ParquetFile(self.folder / "data.parquet", memory_map=True)

    def rollouts(self, epoch: int) -> Iterator[Arrays]:
        groups = permutation(self.file.num_row_groups, epoch)
        together = BUFFER // self.row_group
        for start in range(0, len(groups), together):
            table = self.file.read_row_groups(groups[start : start + together], use_threads=False)
            yield from _decode_rows(table, permutation(table.num_rows, epoch))


PEERS: dict[str, type[Peer]] = {
    "arrow": Arrow,
    "lmdb": Lmdb,
    "mds": Mds,
    "litdata": LitData,
    "webdataset": WebDataset,
    "parquet": Parquet,
}
