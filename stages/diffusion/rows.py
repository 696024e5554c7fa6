"""Batches of rows of a diffusion store: what a student is asked of, and what it is taught of it.

A row is one timestep of a rollout: a sample's variation at one noise level. Which rows a batch
holds is a pure function of the seed and the position in the run (`store.order`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from stages.data import planned_samples
from stages.diffusion.conversion import Conversion, Placed
from stages.diffusion.facts import SIZES, ImageFacts, Recording
from stages.diffusion.model_config import PredictionType, TimestepsConfig
from stages.diffusion.noise import noised
from stages.diffusion.stored_row import DATA, SOURCES, Described, RowKey, StoredRow
from stages.diffusion.train_config import DistilConfig
from stages.distributed import Place
from stages.host_memory import HostMemory
from stages.loader import Loader
from stages.packed import Packed
from store import PredictionStore
from store.order import Array, Order, rank_share
from store.plan import Plan
from store.schema import Manifest

CONDITION = "condition."
"""What arrays of conditions have before their names in a batch."""
Taught = Literal["prediction", "end", "pairs"]


@dataclass(frozen=True)
class RowBatch:
    """Rows of a micro-batch as they were read, all of one bucket.

    `arrays` are, by name: `x_t` [b, *shape] float32, as recorded; `alpha` and `sigma` [b] float64
    of it; `scale`, `own_alpha`, `own_sigma` and `t` [b] float64 as placed in the student's
    schedule; `weight` [b] float32; `source` [b] uint8, the place in `SOURCES`; `condition.NAME`
    [b, ...]; and where they are needed `dense.PART` [b, 1, *shape], `x0` and `noise` [b, *shape],
    and `mask` [b, 1, h, w].
    """

    keys: Sequence[RowKey]
    epochs: Sequence[int]
    arrays: Packed
    counts: Mapping[str, int]
    """Rows of every source, and of those that weigh 0: `failed`, whose prediction was not finite,
    and `left_out`, which the student's schedule or type of prediction has no place for."""

    @property
    def weight(self) -> float:
        """Rows, whatever they weigh: the loss is a mean over them."""
        return float(len(self.keys))

    def pin_memory(self) -> RowBatch:
        """Copy the arrays into page-locked memory."""
        return replace(self, arrays=self.arrays.pin_memory())


@dataclass(frozen=True)
class Reading:
    """What is read of every row of a store, and how it becomes a row of the student."""

    conversion: Conversion
    along_trajectories: bool
    teaches: Taught
    with_data: bool
    """Whether x0 and noise are needed of all rows, and not just of those that they are taught."""
    with_mask: bool
    largest_factor: float
    seed: int
    """Of the run; keys at which noise level a pair is mixed."""

    @classmethod
    def of(
        cls, recording: Recording, conversion: Conversion, config: DistilConfig, seed: int
    ) -> Reading:
        """Return what the loss of a configuration needs."""
        loss = config.loss
        return cls(
            conversion=conversion,
            along_trajectories=recording.rows.kind == "trajectory",
            teaches=loss.teaches,
            with_data=loss.data_share > 0,
            with_mask=loss.mask is not None,
            largest_factor=loss.largest_factor,
            seed=seed,
        )


class _State(NamedTuple):
    """A noised latent that the student is asked of."""

    x_t: np.ndarray
    """[*shape] float32."""
    level: tuple[float, float, float]
    """t, alpha and sigma."""
    finite: bool
    """Whether what is taught of it was finite."""
    x0: np.ndarray | None = None
    noise: np.ndarray | None = None


@dataclass(frozen=True)
class RowReader:
    """Reads one process's micro-batches of a store; with it, it may travel to other processes.

    Every row is compared with the checksums that stage one took.
    """

    store: PredictionStore
    order: Order
    """Over the rows of the shards that are committed in `store`, ends of trajectories left out."""
    reading: Reading
    batch_size: int
    micro_batch_size: int | None
    rank: int
    world_size: int
    memory: HostMemory
    """Where batches are read into."""

    @cached_property
    def _told(self) -> Mapping[str, Described]:
        """Tensors of a condition."""
        facts = ImageFacts.of(self.store.manifest).conditions
        return {name: (each.dtype, each.shape) for name, each in facts.items()}

    def __call__(self, position: int) -> list[RowBatch]:
        """Return the micro-batches of the global batch that starts at `position`.

        Each is of rows of one bucket. Raises `UserError` for a row that is not what was recorded.
        """
        rows = self.order.take(position, self.batch_size)
        epochs = self.order.epochs(position, self.batch_size)
        share = rank_share(np.column_stack([rows, epochs]), self.rank, self.world_size)
        return [self._read(part) for part in self._parts(share)]

    def _parts(self, share: Array) -> Iterator[Array]:
        """Cut a process's share [n, 3] of a global batch into micro-batches."""
        plan, committed = self.store.plan, self.store.committed
        buckets = [plan.bucket_of(committed[place]) for place in share[:, 0].tolist()]
        return (share[part] for part in of_one_kind(buckets, self.micro_batch_size))

    def _read(self, part: Array) -> RowBatch:
        """`part` is [b, 3]: place of the shard, taught row in the shard, epoch."""
        cells = self._cells(part)
        states = [self._state(cell) for cell in cells]
        levels = np.array([state.level for state in states]).T
        usable, placed = self._usable(cells, levels)
        finite = np.array([state.finite for state in states])
        weights = np.array([cell.weight for cell in cells]) * (finite & usable)
        numbers = {
            "alpha": levels[1],
            "sigma": levels[2],
            "scale": placed.scale,
            "own_alpha": placed.alpha,
            "own_sigma": placed.sigma,
            "t": placed.t,
            "weight": weights.astype(np.float32),
            "source": np.array([cell.source for cell in cells], np.uint8),
        }
        with_data = self.reading.with_data or any(cell.source == DATA for cell in cells)
        rows = [
            self._tensors(cell, state, with_data) for cell, state in zip(cells, states, strict=True)
        ]
        counts = Counter(SOURCES[cell.source] for cell in cells)
        return RowBatch(
            keys=[cell.key for cell in cells],
            epochs=[cell.epoch for cell in cells],
            arrays=packed(numbers, rows, self.memory),
            counts={name: counts[name] for name in SOURCES}
            | {"failed": int((~finite).sum()), "left_out": int((finite & ~usable).sum())},
        )

    def _cells(self, part: Array) -> list[StoredRow]:
        shards = [self.store.committed[place] for place in part[:, 0].tolist()]
        held = {shard: self.store.shard(shard) for shard in dict.fromkeys(shards)}
        starts = {n: self._starts(shard.offsets) for n, shard in held.items()}
        rows, epochs = part[:, 1].tolist(), part[:, 2].tolist()
        rollouts = [
            int(np.searchsorted(starts[n], row, side="right")) - 1
            for n, row in zip(shards, rows, strict=True)
        ]
        samples = self.store.samples_at(shards, rollouts)
        return [
            StoredRow(self.store, held[n], rollout, row - starts[n].item(rollout), epoch, sample)
            for n, rollout, row, epoch, sample in zip(
                shards, rollouts, rows, epochs, samples, strict=True
            )
        ]

    def _starts(self, offsets: Array) -> Array:
        """First taught row of every rollout of a shard, then their number."""
        return offsets - np.arange(len(offsets)) * self.reading.along_trajectories

    def _state(self, cell: StoredRow) -> _State:
        if not self.reading.along_trajectories:
            return self._noised(cell)
        match self.reading.teaches:
            case "prediction":
                return self._visited(cell)
            case "end":
                x0 = cell.state(cell.end)
                return self._visited(cell)._replace(finite=cell.ended, x0=x0)
            case "pairs":
                return self._mixed(cell)

    def _noised(self, cell: StoredRow) -> _State:
        """A latent of the dataset, with its noise drawn again."""
        x_t, noise = cell.noised()
        return _State(x_t, cell.level, cell.answered, cell.image["latent"], noise)

    def _visited(self, cell: StoredRow) -> _State:
        """A state of a trajectory."""
        state = cell.state(cell.row)
        return _State(state.astype(np.float32), cell.level, cell.answered)

    def _mixed(self, cell: StoredRow) -> _State:
        """A point of the line between both ends of a trajectory, one of a stratum per row."""
        x0, start = cell.state(cell.end), cell.state(cell.end - self._of(cell))
        own, noise = self.reading.conversion.own, start.astype(np.float32)
        key = (self.reading.seed, "pairs", *cell.key[:2], cell.epoch)
        t = own.draw(TimestepsConfig(), self._of(cell), *key)[cell.slot]
        alpha, sigma = own.at(t)
        x_t = noised(x0, noise, float(alpha), float(sigma))
        return _State(x_t, (float(t), float(alpha), float(sigma)), cell.ended, x0, noise)

    def _of(self, cell: StoredRow) -> int:
        """Rows of the trajectory of a row, its end left out."""
        return cell.end - cell.row + cell.slot

    def _usable(self, cells: Sequence[StoredRow], levels: np.ndarray) -> tuple[np.ndarray, Placed]:
        """Which rows the student's schedule and type of prediction have a place for, [b] bool."""
        t, alpha, sigma = levels
        conversion = self.reading.conversion
        if self.reading.teaches == "pairs":  # already a row of the student
            ones = np.ones_like(t)
            return ones.astype(bool), Placed(ones, alpha, sigma, t, ones.astype(bool))
        placed = conversion.placed(t, alpha, sigma)
        source: PredictionType | None = "sample" if self.reading.teaches == "end" else None
        exact = conversion.factor(alpha, sigma, source) <= self.reading.largest_factor
        data = np.array([cell.source == DATA for cell in cells])
        return placed.fits & (exact | data), placed

    def _tensors(self, cell: StoredRow, state: _State, with_data: bool) -> dict[str, np.ndarray]:
        """What differs in shape from store to store, of one row."""
        tensors = {"x_t": state.x_t} | self._conditions(cell)
        if self.reading.teaches == "prediction":
            tensors |= cell.predicted()
        if self.reading.teaches != "prediction" or with_data:
            tensors |= {
                name: values
                for name, values in (("x0", state.x0), ("noise", state.noise))
                if values is not None
            }
        if self.reading.with_mask:
            mask = cell.image.get("mask")
            shape = 1, *state.x_t.shape[1:]
            tensors["mask"] = np.ones(shape, np.float16) if mask is None else mask
        return tensors

    def _conditions(self, cell: StoredRow) -> dict[str, np.ndarray]:
        row = cell.drawn("condition")
        stored = self.store.table("conditions")[row] if row >= 0 else {}
        cell.require(stored, self._told, "conditions")
        found = {name: stored[name] for name in self._told}
        sizes = cell.image.get(SIZES)
        if sizes is not None:
            found[SIZES] = sizes
        return {f"{CONDITION}{name}": values for name, values in found.items()}


def of_one_kind(kinds: Sequence[object], most: int | None) -> Iterator[list[int]]:
    """Yield the places of things of one kind, at most so many at a time, in order."""
    for kind in dict.fromkeys(kinds):
        places = [place for place, each in enumerate(kinds) if each == kind]
        size = most or len(places)
        for start in range(0, len(places), size):
            yield places[start : start + size]


def packed(
    numbers: Mapping[str, np.ndarray], rows: Sequence[Mapping[str, np.ndarray]], memory: HostMemory
) -> Packed:
    """Put arrays [b] and the tensors of b rows, stacked, into one piece of memory."""
    shapes = {name: (values.dtype, values.shape) for name, values in numbers.items()}
    shapes |= {name: (v.dtype, (len(rows), *v.shape)) for name, v in rows[0].items()}
    arrays = Packed.empty(shapes, memory)
    filled = arrays.as_numpy()
    for name, values in numbers.items():
        filled[name][:] = values
    for place, row in enumerate(rows):
        for name, values in row.items():
            filled[name][place] = values
    return arrays


class StoreRows:
    """Micro-batches of a store's rows, for this process's share of every global batch.

    They are read ahead as `config.loader` says; `close` ends that.
    """

    def __init__(
        self,
        store: PredictionStore,
        config: DistilConfig,
        reading: Reading,
        seed: int,
        place: Place,
    ) -> None:
        pin = config.loader.pin_memory and place.device.type == "cuda"
        reader = RowReader(
            store,
            row_order(store, config, reading.along_trajectories, seed),
            reading,
            config.optimizer.batch_size,
            config.optimizer.micro_batch_size,
            place.rank,
            place.world_size,
            # A process has no device to pin memory for.
            HostMemory(pin=pin and not config.loader.workers),
        )
        self._loader = Loader(
            reader, config.loader, config.optimizer.batch_size, _pinned if pin else None
        )

    def batches(self, position: int) -> list[RowBatch]:
        """Return this process's micro-batches of the global batch that starts at `position`."""
        return self._loader[position]

    def close(self) -> None:
        """End the thread or the processes that read ahead."""
        self._loader.close()


def _pinned(batches: list[RowBatch]) -> list[RowBatch]:
    return [batch.pin_memory() for batch in batches]


def row_order(
    store: PredictionStore, config: DistilConfig, along_trajectories: bool, seed: int
) -> Order:
    """Return the order in which the rows of the committed shards are read.

    An epoch has every row, or with `variations: one` one row of each sample. The ends of
    trajectories, of which nothing was predicted, are left out. Rows of one shape stay together, so
    that few batches need more than one micro-batch.
    """
    lengths = store.lengths()
    counts = [each - along_trajectories for each in lengths]
    shapes = _shapes(store.manifest, store.plan, store.committed)
    samples = None
    if config.variations == "one":
        samples = np.repeat(planned_samples(store.plan, store.committed), np.concatenate(counts))
    # What the order keeps together is what is alike in length.
    alike = [
        np.full(int(each.sum()), 1 + shape) for each, shape in zip(counts, shapes, strict=True)
    ]
    return Order.of(alike, seed, config.buffer_shards, samples=samples)


def _shapes(manifest: Manifest, plan: Plan, shards: Sequence[int]) -> list[int]:
    """Number of the shape of every shard's latents."""
    shapes = list(dict.fromkeys(bucket.shape for bucket in manifest.buckets))
    numbers = [shapes.index(bucket.shape) for bucket in manifest.buckets] or [0]
    return [numbers[plan.bucket_of(shard) or 0] for shard in shards]
