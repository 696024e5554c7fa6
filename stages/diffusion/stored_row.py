"""A row of a diffusion store: one timestep of a rollout, read with its checksums compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import numpy as np

from stages.diffusion.facts import END, OK, REPEATED
from stages.diffusion.image_config import TargetSource
from stages.diffusion.noise import matches, noised, row_noise
from stages.diffusion.target_sums import target_crc, target_names
from stages.errors import UserError
from store import PredictionStore
from store.encoding import COLUMN
from store.schema import Bucket, Latent
from store.shard import Shard

RowKey = tuple[str, int, int]
"""(sample_id, variation, slot)."""
Described = tuple[str, tuple[int, ...]]
"""Type and shape of a tensor."""
SOURCES: tuple[TargetSource, ...] = get_args(TargetSource)
_, DATA, PRIOR = range(3)
"""Places in `SOURCES`."""


@dataclass(frozen=True)
class StoredRow:
    """Where a row lies, and what is known of its sample."""

    store: PredictionStore
    shard: Shard
    rollout: int
    """Place of its rollout in the shard."""
    slot: int
    epoch: int
    """In which it is read."""
    sample: Mapping[str, Any]

    def __str__(self) -> str:
        sample_id, variation, slot = self.key
        return f"row {slot} of sample {sample_id!r}, variation {variation}"

    @property
    def row(self) -> int:
        """Its place in the arrays of the shard."""
        return int(self.shard.offsets[self.rollout]) + self.slot

    @property
    def end(self) -> int:
        """Place of the last row of its rollout."""
        return int(self.shard.offsets[self.rollout + 1]) - 1

    @property
    def key(self) -> RowKey:
        """What names it in a store."""
        return (*self.shard.keys[self.rollout], self.slot)

    @property
    def source(self) -> int:
        """Place in `SOURCES` of what it is taught."""
        return SOURCES.index(self.sample["target"])

    @property
    def weight(self) -> float:
        """Weight of its sample and rollout."""
        return float(self.sample["weight"]) * float(self.shard.rollouts.weights[self.rollout])

    @property
    def level(self) -> tuple[float, float, float]:
        """Return t, alpha and sigma."""
        return self.column("t"), self.column("alpha"), self.column("sigma")

    @property
    def answered(self) -> bool:
        """Whether it has a target: a sample that is its own needs no prediction."""
        return self.source == DATA or self.column("status") in (OK, REPEATED)

    @property
    def ended(self) -> bool:
        """Whether its trajectory has come to an end."""
        return bool(self.column("status", self.end) == END)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its latents."""
        manifest, bucket = self.store.manifest, self.store.plan.bucket_of(self.shard.number)
        bearer = manifest.streams[0] if bucket is None else manifest.buckets[bucket]
        assert isinstance(bearer, Latent | Bucket)
        return bearer.shape

    @cached_property
    def image(self) -> Mapping[str, np.ndarray]:
        """Row of the table `latents`; raises `UserError` where it is of another shape."""
        found = self.store.table("latents")[self.drawn("latent")]
        wanted = {"latent": ("float16", self.shape)}
        if "mask" in found:
            wanted["mask"] = ("float16", (1, *self.shape[1:]))
        self.require(found, wanted, "latents")
        return found

    def require(
        self, found: Mapping[str, np.ndarray], wanted: Mapping[str, Described], table: str
    ) -> None:
        """Refuse tensors without those that are wanted, or of another type or shape."""
        given = {n: (v.dtype.name, v.shape) for n, v in found.items() if n in wanted}
        if given != wanted:
            raise UserError(
                f"{self}: the table {table!r} of {self.store.path} holds {given} for it, but "
                f"{dict(wanted)} are needed: restore the store from a copy, or record again"
            )

    def column(self, name: str, row: int | None = None) -> Any:
        """Return the number of a column at a place of the shard, its own if none is given."""
        return self.shard.arrays[f"{COLUMN}{name}"].item(self.row if row is None else row)

    def drawn(self, name: str) -> int:
        """Return what its variation drew."""
        return int(self.shard.rollouts.drawn[name][self.rollout])

    def noise(self) -> np.ndarray | None:
        """Return the noise [*shape] float16, where it is stored."""
        values = self.shard.arrays.get(f"{COLUMN}noise")
        return None if values is None else values[self.row, 0]

    def noised(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the latent that the teacher saw and its noise, [*shape] float32 each.

        The noise is the stored one or is drawn again from its key. Raises `UserError` where the
        checksum of the latent differs.
        """
        x0, stored = self.image["latent"], self.noise()
        if stored is not None:
            noise = stored.astype(np.float32)
        else:
            sample_id, _, slot = self.key
            variation = self.drawn("image_variation"), self.drawn("text_variation")
            seed = self.store.manifest.seed
            noise = row_noise(seed, sample_id, *variation, slot, x0.shape)
        x_t = noised(x0, noise, *self.level[1:])
        if not matches(x_t, self.column("x_t_crc"), self.column("x_t_sum")):
            origin = "as it is stored" if stored is not None else "drawn again from its key"
            raise UserError(
                f"{self} cannot be rebuilt: its latent and its noise, {origin}, do not give "
                "the noised latent that the teacher saw (its checksum differs). Either the store "
                "was altered: restore it from a copy; or this machine computes other numbers: "
                "record again with rows.store_noise: true, which stores the noise"
            )
        return x_t, noise

    def state(self, row: int) -> np.ndarray:
        """Return the state [*shape] float16 of its trajectory at a place of the shard.

        Raises `UserError` where its checksum differs.
        """
        state: np.ndarray = self.shard.arrays[f"{COLUMN}x_t"][row, 0]
        sums = self.column("x_t_crc", row), self.column("x_t_sum", row)
        if not matches(state, *sums):
            raise UserError(
                f"{self}: a state of its trajectory is not the one that was recorded (its checksum "
                f"differs): {self._remedy}"
            )
        return state

    def predicted(self) -> dict[str, np.ndarray]:
        """Return the parts [1, *shape] of its prediction by the names of their arrays, if any.

        Raises `UserError` where their checksum differs; for an SDXL prediction looking takes 20 µs,
        where drawing its noise takes 2 ms.
        """
        arrays = self.shard.arrays
        names = target_names(arrays)
        if target_crc(arrays, self.row) != self.column("target_crc"):
            raise UserError(
                f"{self}: its prediction is not the one that the teacher made (the checksum of "
                f"{', '.join(names)} differs): {self._remedy}"
            )
        return {name: arrays[name][self.row] for name in names}

    @property
    def _remedy(self) -> str:
        return (
            f"the shard {self.shard.number:05d} was altered; move it out of the store and run "
            "`foretell rollout` again"
        )
