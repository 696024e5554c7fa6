"""How fast training can read its targets: our store against a memmap and the usual engines.

Every engine holds the same rollouts: 8 codebooks of 2,048 ids, the 64 likeliest kept with the mass
of the others, 2.1 kB per timestep. Measured is shuffled streaming into padded torch batches of 16
rollouts, in logical bytes and with a warm page cache, each pass right after one of the reference:
one mapped file per array, all rollouts permuted. Before anything is timed, every engine must give
the same content. `fast` and `compact` are read as training reads them; `single` leaves out the
thread that prepares batches ahead. Random access is one rollout by its key, copied.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch
import xxhash
from measure import Turns, interleaved, report, seconds
from peers import BATCH, FIELDS, PEERS, Arrays, Engine, Memmap, padded
from torch import Tensor

from stages.config import LoaderConfig
from stages.data import BatchReader
from stages.host_memory import HostMemory
from stages.loader import Loader
from store import PredictionStore
from store.order import BUFFER_SHARDS, Order
from store.plan import Key, Plan
from store.schema import Compact, Fast, Profile, TopK
from store.synthetic import synthetic_manifest

STREAMS, VOCABULARY, KEPT, WIDTH = 8, 2048, 64, 64
MAX_TIMESTEPS = 400
VARIATIONS = 2
ROLLOUTS_PER_SHARD = 32


def teacher(timesteps: int, random: np.random.Generator) -> Arrays:
    """What is kept of a guided teacher of low rank whose states drift and whose ids follow Zipf.

    Its entropy is 3.5 nats and the kept ids hold 88 % of the mass, as for a codec model.
    """
    head = random.normal(size=(STREAMS, WIDTH, VOCABULARY)).astype(np.float32) / np.sqrt(WIDTH)
    bias = -0.5 * np.log(np.arange(1, VOCABULARY + 1, dtype=np.float32))
    bias = random.permuted(np.tile(bias, (STREAMS, 1)), axis=-1)
    noise = random.normal(size=(2, timesteps, WIDTH)).astype(np.float32)
    for step in range(1, timesteps):
        noise[:, step] = 0.9 * noise[:, step - 1] + np.sqrt(1 - 0.9**2) * noise[:, step]
    conditional, unconditional = 1.8 * (noise[0] + 0.5 * noise[1]), 1.44 * noise[0]
    states = 2.5 * conditional - 1.5 * unconditional
    arrays = {n: np.empty((timesteps, *shape), dtype) for n, (dtype, shape) in FIELDS.items()}
    for stream in range(STREAMS):
        logits = torch.from_numpy(states @ head[stream] + bias[stream])
        ids = logits.topk(KEPT).indices.sort().values
        kept = logits.gather(-1, ids)
        tail = logits.scatter(-1, ids, -torch.inf).logsumexp(-1) - logits.logsumexp(-1)
        drawn = (kept - torch.from_numpy(random.standard_exponential(kept.shape)).log()).argmax(-1)
        arrays["top_k.ids"][:, stream] = ids.numpy()
        arrays["top_k.logits"][:, stream] = (kept - kept.amax(-1, keepdim=True)).numpy()
        arrays["top_k.tail_logmass"][:, stream, 0] = tail.numpy()
        arrays["codes"][:, stream] = ids.gather(-1, drawn[:, None])[:, 0].numpy()
    return arrays


def synthetic_rollouts(gib: float) -> list[Arrays]:
    """Rollouts of 100 to 400 timesteps, `gib` in total; no row occurs twice.

    A stretch of the teacher's answers serves several rollouts, each with other names for the ids
    and another sharpness: statistics stay, rows differ.
    """
    random = np.random.default_rng(0)
    row_bytes = sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in FIELDS.values())
    wanted = int(gib * 2**30 / row_bytes)
    answers = teacher(min(wanted, 2**14) + MAX_TIMESTEPS, random)
    rollouts: list[Arrays] = []
    while wanted > 0 or len(rollouts) % BATCH:
        length = int(random.integers(100, MAX_TIMESTEPS + 1))
        start = int(random.integers(len(answers["codes"]) - MAX_TIMESTEPS))
        part = {name: array[start : start + length] for name, array in answers.items()}
        rollouts.append(varied(part, random))
        wanted -= length
    return rollouts


def varied(part: Arrays, random: np.random.Generator) -> Arrays:
    """Other names for the ids, the logits scaled; ids rise again and the largest logit stays 0."""
    mask = random.integers(VOCABULARY, size=(STREAMS, 1)).astype(np.uint16)
    sharpness = random.uniform(0.9, 1.1, (*part["codes"].shape, 1)).astype(np.float16)
    logits = (part["top_k.logits"] * sharpness).view(np.uint16)
    # Sorting ids and logits as one number keeps them together.
    pairs = (part["top_k.ids"] ^ mask).astype(np.uint32) << 16 | logits
    pairs.sort(-1)
    return {
        "codes": part["codes"] ^ mask[:, 0],
        "top_k.ids": (pairs >> 16).astype(np.uint16),
        "top_k.logits": pairs.astype(np.uint16).view(np.float16),
        "top_k.tail_logmass": part["top_k.tail_logmass"] * sharpness.astype(np.float32),
    }


def synthetic_store(folder: Path, profile: Profile, rollouts: Sequence[Arrays]) -> PredictionStore:
    """A complete store of the rollouts: two variations of every sample."""
    target = TopK(k=KEPT)
    manifest = synthetic_manifest(target, STREAMS, VOCABULARY, profile)
    manifest = manifest.model_copy(update={"forbidden": (), "end_id": None})
    keys = [key(index) for index in range(len(rollouts))]
    cuts = range(0, len(keys), ROLLOUTS_PER_SHARD)
    plan = Plan.of(keys[cut : cut + ROLLOUTS_PER_SHARD] for cut in cuts)
    sample_ids = list(dict.fromkeys(sample_id for sample_id, _ in keys))
    samples = pa.table({"sample_id": sample_ids, "text": sample_ids})
    store = PredictionStore.create(folder, manifest, plan, samples)
    content = dict(zip(keys, rollouts, strict=True))
    for shard, planned in enumerate(plan):
        with store.writer(shard) as writer:
            for sample_id, variation in planned:
                arrays = content[sample_id, variation]
                writer.append(
                    sample_id, variation, arrays, stop_reason="end", weight=1.0, seed=shard
                )
            writer.commit()
    return PredictionStore.open(folder)


def key(index: int) -> Key:
    """Sample and variation of a rollout."""
    return f"sample-{index // VARIATIONS:06}", index % VARIATIONS


def digest(batches: Iterator[dict[str, Tensor]], names: Sequence[str]) -> int:
    """Sum over all rollouts of the hash of their valid values: whatever their order is."""
    total = 0
    for batch in batches:
        for row, length in enumerate(batch["lengths"].tolist()):
            hashed = xxhash.xxh3_64()
            for name in names:
                hashed.update(batch[name][row, :length].contiguous().view(torch.uint8).numpy().data)
            total += hashed.intdigest()
    return total % 2**64


class Ours(Engine):
    """A store of one profile, read as training reads it."""

    profile: ClassVar[Profile]

    def __init__(self, folder: Path, ahead: bool = True) -> None:
        """Read ahead as training does by default, or every batch when it is asked for."""
        super().__init__(folder)
        self.ahead = ahead

    def write(self, rollouts: Sequence[Arrays]) -> None:
        """Write and commit every shard."""
        synthetic_store(self.folder, self.profile, rollouts)

    @cached_property
    def store(self) -> PredictionStore:
        """The store, opened once."""
        return PredictionStore.open(self.folder, cached_shards=BUFFER_SHARDS)

    @cached_property
    def reader(self) -> BatchReader:
        """Batches in an order that does not group rollouts by length, for no peer does."""
        order = Order.of(self.store.lengths(), seed=0, buffer_shards=BUFFER_SHARDS, neighbours=1)
        return BatchReader(
            store=self.store,
            order=order,
            batch_size=BATCH,
            micro_batch_size=None,
            rank=0,
            world_size=1,
            memory=HostMemory(),
        )

    def batches(self, epoch: int) -> Iterator[dict[str, Tensor]]:
        """One epoch of batches as training reads them, the last one filled from the next."""
        first = epoch * len(self.reader.order)
        positions = range(first, first + len(self.reader.order), BATCH)
        with closing(Loader(self.reader, LoaderConfig(), BATCH)) as loader:
            read = loader.__getitem__ if self.ahead else self.reader
            for position in positions:
                for batch in read(position):
                    yield {name: batch.arrays[name] for name in batch.arrays.fields}

    def lookup(self, index: int) -> Arrays:
        """The arrays of one rollout."""
        return dict(self.store[key(index)].arrays)


class FastStore(Ours):
    """The profile `fast`."""

    profile = Fast()


class CompactStore(Ours):
    """The profile `compact`."""

    profile = Compact()


OURS: dict[str, type[Ours]] = {"fast": FastStore, "compact": CompactStore}


def consume(engine: Engine, epochs: Iterator[int]) -> None:
    """One pass; a batch lives until the next one is there, as in training."""
    for _ in engine.batches(next(epochs)):
        pass


def first_pass_s(engine: type[Engine], folder: Path) -> float:
    """Seconds of opening and one pass in a process that has read nothing before."""
    return seconds(lambda: consume(engine(folder), count()))


def in_a_fresh_process(engine: type[Engine], folder: Path) -> float:
    """`first_pass_s` where nothing is open or verified yet; the page cache stays warm."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(first_pass_s, engine, folder).result()


def lookup_ms(
    engines: Mapping[str, Memmap | Ours], rollouts: int, draws: int
) -> dict[str, list[float]]:
    """Milliseconds [draws] to look up one rollout and copy its arrays.

    `fast` and the memmap take turns; decoding in between would cool the caches for both.
    """
    scratch = {n: np.empty((MAX_TIMESTEPS, *shape), d) for n, (d, shape) in FIELDS.items()}
    spent: dict[str, list[float]] = {name: [] for name in engines}
    indices = np.random.default_rng(0).integers(rollouts, size=draws).tolist()
    turns: list[tuple[int, tuple[str, ...]]]
    turns = [(index, ("memmap", "fast")) for index in indices]
    turns += [(index, ("compact",)) for index in indices]
    for index, names in turns:
        for name in names:
            engine = engines[name]
            started = time.perf_counter()
            for array_name, array in engine.lookup(index).items():
                scratch[array_name][: len(array)] = array
            spent[name].append(1e3 * (time.perf_counter() - started))
    return spent


def chosen_peers(which: str) -> dict[str, type[Engine]]:
    """The peers to compare with; exits with code 2 where all are wanted but one is missing."""
    lacking = {name: engine.package for name, engine in PEERS.items() if not engine.installed()}
    if which == "all" and lacking:
        print(
            f"not installed: {', '.join(lacking.values())}. Install with `pip install -e "
            "'.[bench]'` in a venv of its own (`make bench` does), or choose --peers installed",
            file=sys.stderr,
        )
        sys.exit(2)
    if which == "installed" and lacking:
        print(f"skipped, not installed: {', '.join(lacking)}", file=sys.stderr)
    return {
        name: engine for name, engine in PEERS.items() if which != "none" and name not in lacking
    }


def check_content(engines: Mapping[str, Engine], rollouts: Sequence[Arrays]) -> None:
    """Read every engine once; raises ValueError where one gives other content than was stored.

    `compact` rounds logits and tails, so only its integers are compared to the bit.
    """
    integers = [name for name, (dtype, _) in FIELDS.items() if dtype.kind == "u"]
    for name, engine in engines.items():
        names = integers if isinstance(engine, CompactStore) else list(FIELDS)
        stored = digest(map(padded, ([rollout] for rollout in rollouts)), names)
        if digest(engine.batches(0), names) != stored:
            raise ValueError(f"{name} gives other rollouts than were stored")


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@dataclass(frozen=True)
class Measured:
    """What one run found."""

    logical_bytes: int
    passes: Mapping[str, Turns]
    """Shuffled passes by engine, against `memmap`."""
    stored_bytes: Mapping[str, int]
    first_pass_s: Mapping[str, float]
    """Opening and one pass in a fresh process, by engine."""
    lookups_ms: Mapping[str, Sequence[float]]
    """Random accesses by engine."""

    def percentile_ms(self, name: str, percent: float) -> float:
        """Milliseconds of a random access."""
        return float(np.percentile(self.lookups_ms[name], percent))

    def ratios(self) -> dict[str, float]:
        """The numbers of the last line."""
        speed = {name: turns.speedup for name, turns in self.passes.items()}
        others = [name for name in speed if name in PEERS]
        memmap_ms = self.percentile_ms("memmap", 50)
        return {
            **{f"{name}_vs_memmap": speed[name] for name in speed if name.split("_")[0] in OURS},
            **{f"fast_vs_{name}": speed["fast"] / speed[name] for name in others},
            "compact_bytes_vs_fast": self.stored_bytes["compact"] / self.stored_bytes["fast"],
            "random_p50_vs_memmap": self.percentile_ms("fast", 50) / memmap_ms,
            "random_p95_ms": self.percentile_ms("fast", 95),
            "random_compact_p50_ms": self.percentile_ms("compact", 50),
            "random_compact_p95_ms": self.percentile_ms("compact", 95),
        }

    def show(self) -> None:
        """Print a table of the engines."""
        print(f"{'':<16}{'MB/s':>8}{'÷ memmap':>10}{'÷ bytes':>9}{'first pass s':>14}")
        for name, turns in self.passes.items():
            rate = self.logical_bytes / turns.median_s / 1e6
            size = self.stored_bytes[name] / self.logical_bytes
            first = self.first_pass_s.get(name)
            shown = "" if first is None else f"{first:.2f}"
            print(f"{name:<16}{rate:>8,.0f}{turns.speedup:>10.2f}{size:>9.2f}{shown:>14}")
        for name in self.lookups_ms:
            p50, p95 = self.percentile_ms(name, 50), self.percentile_ms(name, 95)
            print(f"{name:<16}random access {p50:.3f} ms, {p95:.3f} ms at the 95th percentile")


def measure(
    kinds: Mapping[str, type[Engine]],
    rollouts: Sequence[Arrays],
    folder: Path,
    repeats: int,
    lookups: int,
) -> Measured:
    """Write the rollouts with every engine, check what they give, and time them in turns."""
    engines = {name: kind(folder / name) for name, kind in kinds.items()}
    for engine in engines.values():
        engine.folder.mkdir()
        engine.write(rollouts)
    random_access = {n: e for n, e in engines.items() if isinstance(e, Memmap | Ours)}
    for name, kind in OURS.items():
        engines[f"{name}_single"] = kind(folder / name, ahead=False)
    check_content(engines, rollouts)
    epochs = count(1)
    ways = {name: partial(consume, engine, epochs) for name, engine in engines.items()}
    return Measured(
        logical_bytes=sum(array.nbytes for rollout in rollouts for array in rollout.values()),
        passes=interleaved(ways, "memmap", repeats),
        stored_bytes={name: folder_bytes(engine.folder) for name, engine in engines.items()},
        first_pass_s={
            name: in_a_fresh_process(kinds[name], engine.folder)
            for name, engine in random_access.items()
        },
        lookups_ms=lookup_ms(random_access, len(rollouts), lookups),
    )


def main() -> None:
    """Measure, print a table, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=0.5, help="size of the data, as arrays")
    parser.add_argument("--repeats", type=int, default=7, help="timed passes of each engine")
    parser.add_argument("--lookups", type=int, default=2000, help="random accesses")
    parser.add_argument("--peers", choices=["all", "installed", "none"], default="all")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if absent")
    parser.add_argument("--json", action="store_true", help="print the last line only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds: dict[str, type[Engine]] = {"memmap": Memmap, **OURS, **chosen_peers(options.peers)}
    rollouts = synthetic_rollouts(options.gib)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measured = measure(kinds, rollouts, Path(folder), options.repeats, options.lookups)
    if not options.json:
        measured.show()
    report(__file__, measured.ratios(), ["torch", "numpy"])


if __name__ == "__main__":
    main()
