"""Codes of a store of rollouts, for a teacher to score again without generating.

Another k, another guidance scale, another kind of target, with or without the local transformer,
or another teacher of the same codes: all of them need one parallel pass over codes that are known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from stages.config import RolloutConfig
from stages.errors import UserError
from stages.family import Family
from stages.rollout import GivenCodes, Key
from store import PredictionStore
from store.object_url import ObjectUrl
from store.schema import Dense, Latent, Manifest, Stream


class Replay(Mapping[Key, GivenCodes]):
    """The codes of a complete store with their stop reasons and weights, read when asked for."""

    def __init__(self, store: PredictionStore, columns: Sequence[int]) -> None:
        self.fingerprint = store.fingerprint
        self.manifest = store.manifest
        self._store, self._columns = store, list(columns)

    def __getitem__(self, key: Key) -> GivenCodes:
        rollout = self._store[key]
        codes = torch.from_numpy(rollout.codes[:, self._columns].astype(np.int64))
        return GivenCodes(codes, rollout.stop_reason, rollout.weight)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._store.keys())

    def __len__(self) -> int:
        return len(self._store)

    def longest(self) -> dict[str, int]:
        """Timesteps of the longest rollout of every sample."""
        found: dict[str, int] = {}
        lengths = np.concatenate(self._store.lengths()).tolist()
        for (sample_id, _), length in zip(self._store.keys(), lengths, strict=True):
            found[sample_id] = max(length, found.get(sample_id, 0))
        return found

    def settings(self, config: RolloutConfig) -> RolloutConfig:
        """Return `config` with what the codes were drawn with in place of what it says."""
        drawn = {"sampler": self.manifest.sampler, "split": self.manifest.split}
        return config.model_copy(update=drawn)


def open_replay(
    path: Path | ObjectUrl, family: Family, dataset_fingerprint: str, output: Path | ObjectUrl
) -> Replay:
    """Open the store at `path` for `family` to score its codes again.

    Raises `UserError` when it is the store `output` that is to be written, is incomplete, or was
    made of another dataset, tokenizer, audio codec, or codes, saying what differs, and
    `StoreError` when it cannot be read.
    """
    if _resolved(path) == _resolved(output):
        raise UserError(
            f"rollout.replay {path} is the store that would be written: give the run another name, "
            "or its store another folder (store)"
        )
    store = PredictionStore.open(path)
    manifest = store.manifest
    if isinstance(manifest.target, Dense):
        raise UserError(f"{path} holds continuous predictions and no codes that could be replayed")
    columns = _columns(family.streams, manifest.streams)
    differences = _differences(family, dataset_fingerprint, manifest)
    if columns is None:
        differences.append(
            f"streams: {_described(manifest.streams)}, not {_described(family.streams)}"
        )
    if differences or columns is None:
        raise UserError(
            f"the codes of {path} are not those of this teacher and dataset. The store's "
            f"{'; '.join(differences)}: replay a store of the same dataset, codebooks and tokenizer"
        )
    missing = store.missing()
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} of {store.planned_shards} shards (first: "
            f"{missing[0]:05d}): finish its rollout, then replay it"
        )
    return Replay(store, columns)


def _resolved(place: Path | ObjectUrl) -> str:
    return str(place.resolve() if isinstance(place, Path) else place)


def _differences(family: Family, dataset_fingerprint: str, manifest: Manifest) -> list[str]:
    stored = manifest.fingerprints
    pairs = {
        "family": (manifest.family, family.name),
        "forbidden ids": (manifest.forbidden, family.forbidden),
        "end id": (manifest.end_id, family.end_id),
        "dataset": (stored.dataset, dataset_fingerprint),
        "tokenizer": (stored.tokenizer, family.tokenizer_fingerprint()),
        "audio codec": (stored.audio_codec, family.facts.audio_codec),
    }
    return [f"{name}: {a!r}, not {b!r}" for name, (a, b) in pairs.items() if a != b]


AnyStreams = Sequence[Stream] | Sequence[Latent] | Sequence[Stream | Latent]


def _columns(ours: AnyStreams, theirs: AnyStreams) -> list[int] | None:
    """Which stored stream has the codes of each of our streams; None where they do not fit.

    A group of ours that the store lacks (a local transformer) takes the codes of its first group.
    """
    stored: dict[str, list[int]] = {}
    for column, stream in enumerate(theirs):
        stored.setdefault(stream.group, []).append(column)
    first = next(iter(stored.values()))
    taken: dict[str, Iterator[int]] = {}
    for group, count in Counter(stream.group for stream in ours).items():
        columns = stored.get(group, first)
        if len(columns) != count:
            return None
        taken[group] = iter(columns)
    found = [next(taken[stream.group]) for stream in ours]
    fits = (_size(a) == _size(theirs[column]) for a, column in zip(ours, found, strict=True))
    return found if all(fits) else None


def _size(stream: Stream | Latent) -> int:
    return stream.vocabulary if isinstance(stream, Stream) else 0


def _described(streams: AnyStreams) -> str:
    return ", ".join(f"{stream.name}:{_size(stream)}" for stream in streams)
