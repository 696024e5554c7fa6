"""Converting a store to another profile, and measuring what that cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from store.chunk_codec import ChunkCodec
from store.encoding import Array, array_specs
from store.errors import StoreError, explain_os_errors
from store.layout import Layout, shard_name
from store.logits_codec import Logits
from store.reader import PredictionStore
from store.schema import Ancestor, Compact, Manifest, Profile, Record, Stream
from store.shard import Shard
from store.shard_folder import ROLLOUTS_FILE, ShardFolder
from store.zarr_codecs import LogMass, Rounded, States, compact_codec

BLOCK_NUMBERS = 2**20
"""Numbers compared at once, in double precision."""

HEAD_TIMESTEPS = 32
"""Timesteps of each shard at which states are compared through their heads."""


class ArrayLoss(Record):
    """What converting did to one array."""

    exact: bool
    """Whether every bit of it is as it was."""
    mean_kl: float | None = None
    """KL from the source in nats, mean over the rows; null where there is no distribution.

    Of logits T²·KL at the listed temperature at which a row loses most.
    """
    max_kl: float | None = None
    """KL of the worst row in nats."""


class Conversion(Record):
    """What `convert` did, over all shards that both stores now hold."""

    profile: Profile
    """Profile of the destination."""
    lineage: tuple[Ancestor, ...]
    """The stores that the values went through before, the first one first."""
    shards: int
    """Shards that were compared."""
    written: int
    """Of these, shards that this call wrote."""
    missing: int
    """Planned shards that the source does not hold."""
    rollouts: int
    """Rollouts in the shards."""
    timesteps: int
    """Timesteps in the shards."""
    bytes_before: int
    """Bytes of the shards' files in the source."""
    bytes_after: int
    """Bytes of the shards' files in the destination."""
    losses: dict[str, ArrayLoss]
    """By array."""
    mean_kl: float
    """Largest `mean_kl` of an array; 0 where all are exact."""
    max_kl: float
    """Largest `max_kl` of an array; 0 where all are exact."""
    stated_nats: float
    """KL per row of logits, in nats, that this profile and those of the lineage allow together."""
    stated_rms: float
    """Error of a state that they allow together, as a share of its root mean square."""


def convert(
    source: str | Path,
    destination: str | Path,
    profile: Profile,
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Conversion:
    """Write the committed shards of a store into a store of another profile, and compare them.

    The destination is made if need be; shards that it holds already are only compared, so that an
    interrupted conversion goes on where it ended. Keys, codes, ids, weights, stop reasons and seeds
    must come out equal, and what the profile rounds within its stated loss. States are compared
    through their heads at a few timesteps of each shard. The source joins the destination's
    lineage, so that what it lost is not forgotten. `progress` may wrap the list of shards (tqdm).
    The source is only read.

    Raises StoreError when either store lies within the other, the destination is another store, a
    shard of the source is damaged, or one comes out otherwise than it may.
    """
    _refuse_overlap(Layout.at(source).root, Layout.at(destination).root)
    ours = PredictionStore.open(source, cached_shards=1)
    manifest = _manifest(ours, profile)
    for name in manifest.tables:
        ours.table(name).check()
    theirs = PredictionStore.create(
        destination,
        manifest,
        ours.plan,
        ours.samples,
        ours.heads,
        ours.rejected,
        {name: ours.table(name).folder for name in manifest.tables},
    )
    tally = _Tally(theirs.manifest, ours.heads)
    written = 0
    for number in progress(ours.committed):
        shard = ours.shard(number)
        if not theirs.is_committed(number):
            written += _write(theirs, shard)
        tally.compare(shard, theirs.folder(number))
        tally.bytes_before += _bytes(ours.folder(number))
        tally.bytes_after += _bytes(theirs.folder(number))
    return tally.result(written, len(ours.missing()))


def _manifest(source: PredictionStore, profile: Profile) -> Manifest:
    ancestor = Ancestor(fingerprint=source.fingerprint, profile=source.manifest.profile)
    lineage = (*source.manifest.lineage, ancestor)
    return source.manifest.model_copy(update={"profile": profile, "lineage": lineage, "files": {}})


def stated_loss(manifest: Manifest) -> tuple[float, float]:
    """What all roundings of a store's values may have cost by the profiles that made them.

    KL per row of logits in nats, and the error of a state as a share of its root mean square; 0
    where no such array was rounded. Errors add, and so do the square roots of the divergences: to
    leading order a divergence is the square of a distance.
    """
    profiles = [*(ancestor.profile for ancestor in manifest.lineage), manifest.profile]
    roots, rms = [0.0], [0.0]
    for spec in array_specs(manifest).values():
        codecs = [compact_codec(spec, p) for p in profiles if isinstance(p, Compact)]
        roots.append(sum(math.sqrt(c.loss_nats) for c in codecs if isinstance(c, Logits)))
        rms.append(sum(c.step / 2 for c in codecs if isinstance(c, States)))
    return max(roots) ** 2, max(rms)


def _refuse_overlap(source: Path, destination: Path) -> None:
    with explain_os_errors(f"look up {destination}"):
        one, two = source.resolve(), destination.resolve()
    if one == two or one in two.parents or two in one.parents:
        raise StoreError(
            f"cannot convert {source} into {destination}: one lies within the other; choose a "
            "folder beside it"
        )


def _write(store: PredictionStore, shard: Shard) -> bool:
    with store.writer(shard.number) as writer:
        for rollout in shard:
            writer.append(
                rollout.sample_id,
                rollout.variation,
                rollout.arrays,
                stop_reason=rollout.stop_reason,
                weight=rollout.weight,
                seed=rollout.seed,
                drawn=rollout.drawn,
            )
        return writer.commit()


def _bytes(folder: ShardFolder) -> int:
    return sum(entry.bytes for entry in folder.record().files.values())


@dataclass
class _Divergences:
    """Whether an array is exact so far, and mean and maximum of KL over its rows."""

    exact: bool = True
    rows: int = 0
    total: float = 0.0
    largest: float = 0.0

    def add(self, exact: bool, kl: Array | None) -> None:
        self.exact &= exact
        if kl is not None:
            self.rows += kl.size
            self.total += float(kl.sum())
            self.largest = max(self.largest, float(kl.max(initial=0.0)))

    def loss(self) -> ArrayLoss:
        if not self.rows:
            return ArrayLoss(exact=self.exact)
        return ArrayLoss(exact=self.exact, mean_kl=self.total / self.rows, max_kl=self.largest)


@dataclass
class _Tally:
    """What was compared so far."""

    manifest: Manifest
    heads: dict[str, Array]
    arrays: dict[str, _Divergences] = field(default_factory=dict)
    shards: int = 0
    rollouts: int = 0
    timesteps: int = 0
    bytes_before: int = 0
    bytes_after: int = 0

    def compare(self, shard: Shard, folder: ShardFolder) -> None:
        """Compare a shard with what became of it; raises StoreError naming the first difference."""
        found = folder.open().load()
        for name in ("offsets", "stop_reasons", "weights", "seeds"):
            if not np.array_equal(getattr(shard.rollouts, name), getattr(found.rollouts, name)):
                raise StoreError(
                    f"{_place(folder, ROLLOUTS_FILE)} holds other {name} of the rollouts than the "
                    "source: move the shard away and convert again"
                )
        for name, numbers in shard.rollouts.drawn.items():
            if not np.array_equal(numbers, found.rollouts.drawn[name]):
                raise StoreError(
                    f"{_place(folder, ROLLOUTS_FILE)} holds another {name} of the rollouts than "
                    "the source: move the shard away and convert again"
                )
        for name, files in folder.files.items():
            divergences = self.arrays.setdefault(name, _Divergences())
            for start, block, other in _blocks(shard.arrays[name], found.arrays[name]):
                wrong, kl = _compare(files.codec, block, other)
                divergences.add(bool(_same_bits(block, other).all()), kl)
                if wrong.any():
                    timestep = start + int(np.unravel_index(int(wrong.argmax()), wrong.shape)[0])
                    raise _difference(shard, folder, name, timestep)
            if name in self.groups:
                divergences.add(True, self._through_head(name, shard, found))
        self.shards += 1
        self.rollouts += len(shard)
        self.timesteps += int(shard.offsets[-1])

    def result(self, written: int, missing: int) -> Conversion:
        """The record of all that was compared."""
        losses = {name: divergences.loss() for name, divergences in self.arrays.items()}
        stated_nats, stated_rms = stated_loss(self.manifest)
        return Conversion(
            profile=self.manifest.profile,
            lineage=self.manifest.lineage,
            shards=self.shards,
            written=written,
            missing=missing,
            rollouts=self.rollouts,
            timesteps=self.timesteps,
            bytes_before=self.bytes_before,
            bytes_after=self.bytes_after,
            losses=losses,
            mean_kl=max((loss.mean_kl or 0.0 for loss in losses.values()), default=0.0),
            max_kl=max((loss.max_kl or 0.0 for loss in losses.values()), default=0.0),
            stated_nats=stated_nats,
            stated_rms=stated_rms,
        )

    @cached_property
    def groups(self) -> dict[str, str]:
        """Arrays of states, and the group of streams whose head reads each."""
        parts = ("",) if self.manifest.branches == "guided" else ("cond.", "uncond.")
        groups = [head.group for head in self.manifest.heads]
        return {f"hidden.{part}{group}": group for part in parts for group in groups}

    def _through_head(self, name: str, shard: Shard, found: Shard) -> Array:
        """KL [streams, timesteps] between the predictions of both stores' states."""
        states, others = shard.arrays[name], found.arrays[name]
        chosen = np.linspace(0, len(states) - 1, min(HEAD_TIMESTEPS, len(states))).astype(np.int64)
        group = self.groups[name]
        weights, biases = self.heads[f"{group}.weight"], self.heads[f"{group}.bias"]
        streams = [s for s in self.manifest.streams if s.group == group]
        rows = []
        for place, (weight, bias, stream) in enumerate(zip(weights, biases, streams, strict=True)):
            vector = place if states.shape[1] > 1 else 0
            allowed = np.arange(len(bias)) < (
                stream.vocabulary if isinstance(stream, Stream) else 0
            )
            allowed[list(self.manifest.forbidden)] = False
            one, two = (
                part[chosen, vector].astype(np.float32) @ weight[allowed].T + bias[allowed]
                for part in (states, others)
            )
            rows.append(_kl(one, two))
        return np.stack(rows)


def _blocks(source: Array, found: Array) -> Iterator[tuple[int, Array, Array]]:
    """Parts of two arrays [N, …] that fit into a cache, and where they begin."""
    height = max(1, BLOCK_NUMBERS // int(np.prod(source.shape[1:])))
    for start in range(0, len(source), height):
        yield start, source[start : start + height], found[start : start + height]


def _compare(codec: ChunkCodec | None, source: Array, found: Array) -> tuple[Array, Array | None]:
    """Where values [T, …] differ more than their codec may make them, and KL where it rounds."""
    match codec:
        case Logits(loss_nats=limit, temperatures=temperatures):
            one, two = source.astype(np.float64), found.astype(np.float64)
            losses = [t**2 * _kl(one / t, two / t) for t in temperatures]
            kl = np.max(losses, axis=0)
        case LogMass(step=step):
            kl, limit = _kl(_two_way(source), _two_way(found)), step**2 / 32
        case States(step=step):
            states, others = source.astype(np.float64), found.astype(np.float64)
            scales = step * np.sqrt((states**2).mean(-1, keepdims=True))
            half_ulp = np.spacing(np.abs(source)).astype(np.float64)
            return np.abs(states - others) > 0.501 * scales + half_ulp, None
        case Rounded(bits=bits):
            return np.abs(source - found) > np.abs(source) * 2.0 ** -(bits + 1), None
        case _:
            return ~_same_bits(source, found), None
    return ~(kl <= limit * (1 + 1e-6) + 1e-9), kl


def _same_bits(source: Array, found: Array) -> Array:
    """Which bytes [T, …] are equal; the values may be one number per timestep."""
    one, two = (values.reshape(len(values), -1).view(np.uint8) for values in (source, found))
    same: Array = one == two
    return same


def _kl(logits: Array, others: Array) -> Array:
    """KL(softmax(logits), softmax(others)) over the last axis, in nats."""
    one, two = _logprobs(logits), _logprobs(others)
    with np.errstate(invalid="ignore"):  # -inf - -inf, where the probability is 0
        gaps = np.where(one > -np.inf, one - two, 0.0)
    kl: Array = (np.exp(one) * gaps).sum(-1)
    return np.maximum(kl, 0.0)  # by rounding it may fall below


def _logprobs(logits: Array) -> Array:
    relative = logits.astype(np.float64)
    relative -= relative.max(-1, keepdims=True)
    logprobs: Array = relative - np.log(np.exp(relative).sum(-1, keepdims=True))
    return logprobs


def _two_way(logmass: Array) -> Array:
    """Log probabilities [..., 2] of a tail and of all else, from its log mass."""
    inside = np.minimum(logmass.astype(np.float64), 0.0)
    with np.errstate(divide="ignore"):
        return np.stack([inside, np.log(-np.expm1(inside))], -1)


def _difference(shard: Shard, folder: ShardFolder, name: str, timestep: int) -> StoreError:
    row = shard.rollouts.row_of(timestep)
    sample_id, variation = shard.keys[row]
    return StoreError(
        f"{_place(folder, folder.files[name].data)} (array {name!r}), sample {sample_id!r}, "
        f"variation {variation}, timestep {timestep - int(shard.offsets[row])} differs more from "
        "the source than its profile allows: move the shard away and convert again"
    )


def _place(folder: ShardFolder, file: str) -> str:
    return f"shard {shard_name(folder.number)} of {folder.path.parent.parent}, file {file!r}"
