"""What the codes of a store sound like: audio of its rollouts, and of the recordings behind them.

torch and the audio codec are loaded when the first clip is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.causal_lm_config import CausalLMSettings, SlotLayoutConfig
from stages.config import DatasetFacts
from stages.errors import UserError
from stages.saved_model import is_saved, saved_model
from store import PredictionStore
from store.schema import Latent, Manifest

if TYPE_CHECKING:
    from stages.audio_codec import AudioCodec

AUDIO_CODEC = "audio_codec"
"""Folder of the audio codec in that of a dataset."""


class Waveform(NamedTuple):
    """A clip and its rate."""

    samples: np.ndarray
    """[samples] float32, nominally in -1..1; none where there is not a whole codec frame."""
    rate_hz: int


@dataclass(frozen=True)
class StoredAudio:
    """A store beside the audio codec that its codes are of; threads may share it."""

    store: PredictionStore
    dataset: Path
    """Folder of the dataset, or of any other with that audio codec."""
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    @classmethod
    def open(cls, store: PredictionStore, dataset: Path | None = None) -> StoredAudio:
        """Find the audio codec of a store; loads neither it nor torch.

        Without `dataset` it is looked for beside the store, where a run has it. Raises `UserError`
        for a store without codes of audio, and where no audio codec or another one is found.
        """
        manifest = store.manifest
        if isinstance(manifest.streams[0], Latent):
            raise UserError(
                f"{store.path} is a store of images, of which there is nothing to hear: "
                f"`foretell inspect {store.path}` says what is in it"
            )
        folder = dataset or _beside(store)
        found, wanted = _fingerprint(folder / AUDIO_CODEC), manifest.fingerprints.audio_codec
        if found != wanted:
            raise UserError(
                f"the codes of {store.path} are of audio codec {wanted} (manifest.json), but that "
                f"in {folder / AUDIO_CODEC} is {found}, with which they would sound wrong: name "
                "the dataset that the store was made of (--dataset)"
            )
        return cls(store, folder)

    @property
    def manifest(self) -> Manifest:
        """The store's."""
        return self.store.manifest

    def waveform(self, sample_id: str, variation: int) -> Waveform:
        """Decode the stored codes of a rollout.

        Raises `RolloutNotFound`, `ShardError`, and `UserError` where a package of the audio codec
        is not installed, its files are damaged, or the codes are none of its own.
        """
        import torch  # noqa: PLC0415, a second that only who listens waits for

        from stages.stored_frames import stored_frames  # noqa: PLC0415

        codes = torch.from_numpy(self.store[sample_id, variation].codes.astype(np.int64))
        frames = stored_frames(self.manifest, codes, self._layout).numpy()
        return self._decoded(frames, f"{sample_id!r} variation {variation} of {self.store.path}")

    def recording(self, sample_id: str) -> Waveform:
        """Decode the codes of a sample's own recording: what the audio codec makes of it.

        Raises `UserError` where the folder is not that of the store's dataset or lacks the sample,
        and as `waveform` does.
        """
        found, wanted = self._dataset_fingerprint(), self.manifest.fingerprints.dataset
        if found != wanted:
            raise UserError(
                f"{self.dataset} holds dataset {found}, but {self.store.path} was made of "
                f"{wanted} (manifest.json): name that one (--dataset)"
            )
        codes = self._recorded_codes(sample_id)
        return self._decoded(codes, f"the recording {sample_id!r} of {self.dataset}")

    def _recorded_codes(self, sample_id: str) -> np.ndarray:
        path, named = self.dataset / "samples.parquet", pc.field("sample_id") == sample_id
        try:
            rows = pq.read_table(path, columns=["codes"], filters=named).column("codes")
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{path} cannot be read: {error}; prepare it again") from error
        if not len(rows):
            raise UserError(f"{path} has no sample {sample_id!r}")
        facts = DatasetFacts.model_validate(self.manifest.conditioning)
        return np.asarray(rows[0].values, np.int64).reshape(-1, facts.codebooks)

    def _decoded(self, frames: np.ndarray, what: str) -> Waveform:
        with self._lock:  # loaded once, and models are not made for two threads
            rate_hz = self._audio_codec.output_sample_rate_hz
            if not len(frames):
                return Waveform(np.zeros(0, np.float32), rate_hz)
            try:
                samples = self._audio_codec.decode(frames)
            except ValueError as error:
                raise UserError(f"{what} cannot be decoded: {error}") from error
        return Waveform(samples.nan_to_num(0, 0, 0).cpu().numpy(), rate_hz)

    @cached_property
    def _layout(self) -> SlotLayoutConfig | None:
        """Which ids are audio, where codes are ids and the manifest does not say it."""
        from stages.stored_frames import (  # noqa: PLC0415, it needs torch
            fits,
            holds_vocabulary_ids,
            recorded_layout,
        )

        if not holds_vocabulary_ids(self.manifest) or recorded_layout(self.manifest) is not None:
            return None
        said = {layout for layout in _layouts_beside(self.store) if fits(layout, self.manifest)}
        if len(said) != 1:
            raise UserError(
                f"the codes of {self.store.path} are ids of a language model's whole vocabulary "
                "(vocabulary: full), of which its manifest does not say which are audio, for an "
                f"earlier release wrote it; and of the models of its run, teacher and student* "
                f"beside the store, {'none says' if not said else 'some disagree about'} it. Put "
                "the store into the folder of its run, or roll it out again"
            )
        return said.pop()

    @cached_property
    def _audio_codec(self) -> AudioCodec:
        from stages.audio_codec import load_audio_codec  # noqa: PLC0415, it needs torch

        return load_audio_codec(self.dataset / AUDIO_CODEC)

    def _dataset_fingerprint(self) -> str:
        from stages.dataset import read_header  # noqa: PLC0415, it needs torch

        return read_header(self.dataset).fingerprint


def _beside(store: PredictionStore) -> Path:
    """Folder of the dataset of the run that a store lies in, or that its report does."""
    if store.is_remote or not isinstance(store.path, Path):
        raise UserError(
            f"{store.path} is in object storage, and no audio codec is: name the folder of the "
            "dataset that it was made of (--dataset)"
        )
    looked = [parent / "dataset" for parent in list(store.path.parents)[:2]]
    for folder in looked:
        if (folder / AUDIO_CODEC).is_dir():
            return folder
    raise UserError(
        f"no audio codec is beside the store: neither {looked[0]} nor {looked[-1]} has a folder "
        f"{AUDIO_CODEC}; name the folder of the dataset that it was made of (--dataset)"
    )


def _layouts_beside(store: PredictionStore) -> Iterator[SlotLayoutConfig]:
    """Which ids are audio, by every language model of the run that a store lies in."""
    if store.is_remote or not isinstance(store.path, Path):
        return
    run = store.path.parent
    for folder in (run / "teacher", *sorted(run.glob("student*"))):
        if is_saved(folder):
            config = saved_model(folder).config
            if isinstance(config, CausalLMSettings):
                yield config.layout


def _fingerprint(folder: Path) -> str:
    """Return what the header of an audio codec says it is; raises `UserError`."""
    path = folder / "audio_codec.json"
    try:
        return str(json.loads(path.read_bytes())["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"no audio codec can be read from {folder} ({error!r}): name the folder of a prepared "
            "dataset (--dataset)"
        ) from None
