"""One system of an evaluation: how near it is to the guided teacher, what it says, and how fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor
from tqdm import tqdm

from stages.architecture import Architecture
from stages.audio import level_dbfs, write_wav
from stages.audio_codec import AudioCodec
from stages.data import rollout_batches
from stages.dataset import Dataset
from stages.errors import UserError
from stages.family import Family, Sample, has_linear_heads
from stages.frame_repetition import ends_in_loop, longest_run, repeated_ngrams
from stages.host_batches import TargetBatch, of_groups
from stages.paired import Axes, Paired, RolloutSums
from stages.publish import replace_file
from stages.rollout import finite_steps, policy_for, split
from stages.sampling import END
from stages.targets import DenseTarget, Forbidden, SparseTarget
from store import PredictionStore
from store.schema import Latent, Record, Stream

COMPARED_VALUES = 2**24
"""Logits that are compared at once; it bounds memory (64 MiB of float32)."""

SILENCE_DBFS = -60.0
"""Level below which a clip counts as silent, as `prepare` counts recordings."""


@dataclass(frozen=True)
class Contender:
    """A system to be measured; its model is loaded when its turn comes and freed after it."""

    name: str
    """Name in the report."""
    load: Callable[[], Family]
    """Loads the model."""
    cfg_scale: float
    """Guidance while it speaks and is compared; 1 for none."""
    architecture: Architecture | None = None
    """Its size, where the model that is loaded does not know it, being quantized."""

    @property
    def passes(self) -> int:
        """Forward passes per timestep."""
        return 1 if self.cfg_scale == 1 else 2


class Spoken(Record):
    """What one clip is like, before anyone listens to it."""

    audio_s: float
    """Seconds of audio."""
    sounds: bool
    """Whether there is audio that is finite everywhere and at least as loud as −60 dBFS."""
    longest_run: int
    """Frames of the longest run of one frame."""
    repeated_pairs: float
    """Share of the pairs of neighbouring frames that stood before in the clip."""
    repeated_fours: float
    """Share of the runs of four frames that stood before in the clip."""
    ends_in_loop: bool
    """Whether its last frames go round in a circle."""


class Measure(Record):
    """What was measured of a system, per sample in the order of the reference store."""

    name: str
    architecture: Architecture | None
    """Size and cost of the model; null where there is none."""
    passes: int
    decode_s: float
    """Seconds of generation of all samples in batches, audio codec left out."""
    single_s: tuple[float, ...] = ()
    """Seconds of generation of the first samples, each alone."""
    paired: tuple[Paired, ...] = ()
    """What the system predicts along the reference rollouts, beside the guided teacher."""
    spoken: tuple[Spoken, ...]
    """What the clips are like."""
    ended: tuple[bool, ...] = ()
    """Whether the rollout ended by itself."""

    @property
    def audio_s(self) -> tuple[float, ...]:
        """Seconds of audio of every clip."""
        return tuple(clip.audio_s for clip in self.spoken)


@torch.inference_mode()
def measure(
    contender: Contender,
    reference: PredictionStore,
    samples: Mapping[str, Sample],
    audio_codec: AudioCodec,
    folder: Path,
    *,
    batch_size: int,
    single_samples: int,
) -> Measure:
    """Compare a system with the reference store on the same codes, then let it speak.

    Writes one wav file per sample into `folder`. The first `single_samples` are generated once
    more, each alone, for their time. All systems draw with the same keyed uniform numbers, so
    differences between them are paired.
    """
    folder.mkdir(parents=True, exist_ok=True)
    family = contender.load()
    family.module.eval()
    keys, groups, axes = list(reference.keys()), _groups(family), Axes.of(reference)
    paired = tuple(
        rollout
        for batch in rollout_batches(
            reference, keys, batch_size, _device(family), groups, family.predicted
        )
        for rollout in _compare(family, contender.cfg_scale, reference, axes, batch)
    )
    said, decode_s = _speak(family, contender, reference, samples, batch_size)
    single_s = _single_times(family, contender, reference, samples, single_samples)
    spoken = tuple(
        _write_clip(folder / wav_name(index), frames.numpy(), audio_codec)
        for index, (frames, _) in enumerate(said)
    )
    return Measure(
        name=contender.name,
        architecture=contender.architecture or family.architecture(),
        passes=contender.passes,
        decode_s=decode_s,
        single_s=single_s,
        paired=paired,
        spoken=spoken,
        ended=tuple(ended for _, ended in said),
    )


def wav_name(index: int) -> str:
    """File of the sample with this place in the reference store; sample ids name no files."""
    return f"{index:05d}.wav"


def _write_clip(path: Path, frames: np.ndarray, audio_codec: AudioCodec) -> Spoken:
    """Write what frames [F, codebooks] sound like, and say what they are like."""
    waveform = audio_codec.decode(frames) if len(frames) else torch.zeros(0)
    finite = bool(waveform.isfinite().all())
    write_wav(path, waveform.nan_to_num(0, 0, 0), audio_codec.output_sample_rate_hz)
    return Spoken(
        audio_s=len(frames) / audio_codec.frame_rate_hz,
        sounds=finite and len(waveform) > 0 and level_dbfs(waveform) >= SILENCE_DBFS,
        longest_run=longest_run(frames),
        repeated_pairs=repeated_ngrams(frames, 2),
        repeated_fours=repeated_ngrams(frames, 4),
        ends_in_loop=ends_in_loop(frames, audio_codec.frame_rate_hz),
    )


def _device(family: Family) -> torch.device:
    return next(family.module.parameters()).device


def _groups(family: Family) -> set[str]:
    """Groups of its streams: of those that only the reference has, nothing can be compared."""
    streams: Sequence[Stream | Latent] = family.streams
    return {stream.group for stream in streams}


def _compare(
    family: Family, cfg_scale: float, reference: PredictionStore, axes: Axes, batch: TargetBatch
) -> Iterator[Paired]:
    """Yield how near the system is to the guided teacher on every rollout of a batch."""
    scores = family.score(
        batch.samples,
        batch.codes,
        batch.lengths,
        cfg_scale=cfg_scale,
        linear=has_linear_heads(family),
    )
    device, groups = batch.codes.device, _groups(family)
    forbidden = Forbidden.of(of_groups(reference.manifest, groups), device)
    places = [i for i, s in enumerate(reference.manifest.streams) if s.group in groups]
    steps, streams = batch.codes.shape[1:]
    block = max(COMPARED_VALUES // (streams * reference.manifest.vocabulary), 1)
    for row, length in enumerate(batch.lengths.tolist()):
        sums = RolloutSums(axes, length, places)
        for timesteps in torch.split(torch.arange(length, device=device), block):
            target = batch.target.rows(row * steps + timesteps)
            if not isinstance(target, DenseTarget | SparseTarget):
                raise UserError(
                    f"the reference store holds {reference.manifest.target.kind} targets, of which "
                    "no divergence can be measured: set evaluate.target to full, hidden or top_k"
                )
            student = forbidden.filled(scores.logits_at(row, timesteps).float())
            sums.add(timesteps, student, target, batch.predicted[row, timesteps])
        yield sums.paired()


def _speak(
    family: Family,
    contender: Contender,
    reference: PredictionStore,
    samples: Mapping[str, Sample],
    batch_size: int,
) -> tuple[list[tuple[Tensor, bool]], float]:
    """Return every sample's (frames [F, codebooks], ended) and the seconds of generation."""
    keys = list(reference.keys())
    spoken: list[tuple[Tensor, bool]] = []
    decode_s = 0.0
    _warm_up(family, contender, reference, samples)
    for batch in tqdm(list(split(keys, batch_size)), contender.name, unit="batch", disable=None):
        started = time.perf_counter()
        codes, ended = _generate(family, contender, reference, batch, samples)
        decode_s += time.perf_counter() - started
        spoken += [(family.frames(c), e) for c, e in zip(codes, ended, strict=True)]
    return spoken, decode_s


def _single_times(
    family: Family,
    contender: Contender,
    reference: PredictionStore,
    samples: Mapping[str, Sample],
    count: int,
) -> tuple[float, ...]:
    """Seconds that each of the first `count` samples takes when it is generated alone.

    Drawing is keyed, so these are the rollouts of the batches once more.
    """
    times = []
    for key in list(reference.keys())[:count]:
        started = time.perf_counter()
        _generate(family, contender, reference, [key], samples)
        times.append(time.perf_counter() - started)
    return tuple(times)


def _warm_up(
    family: Family,
    contender: Contender,
    reference: PredictionStore,
    samples: Mapping[str, Sample],
) -> None:
    """Generate one rollout untimed: first calls allocate and choose kernels."""
    _generate(family, contender, reference, list(reference.keys())[:1], samples)


def _generate(
    family: Family,
    contender: Contender,
    reference: PredictionStore,
    keys: Sequence[tuple[str, int]],
    samples: Mapping[str, Sample],
) -> tuple[list[Tensor], list[bool]]:
    batch = [samples[sample_id] for sample_id, _ in keys]
    policy = policy_for(family, reference.manifest, keys, [family.timesteps(s) for s in batch])
    drawn: list[list[Tensor]] = [[] for _ in keys]
    for step in finite_steps(family.rollout(batch, policy, contender.cfg_scale), policy, keys):
        for row, codes in zip(step.rows.tolist(), step.codes.cpu(), strict=True):
            drawn[row].append(codes)
    return [torch.stack(codes) for codes in drawn], (policy.stop == END).tolist()


def measure_copy(samples: Sequence[Sample], audio_codec: AudioCodec, folder: Path) -> Measure:
    """Decode the recordings' own codes: the ceiling of what any system can sound like."""
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    spoken = []
    for index, sample in enumerate(tqdm(samples, "codec copy", unit="clip", disable=None)):
        frames = np.asarray(sample["codes"], np.int64).reshape(-1, audio_codec.codebooks)
        spoken.append(_write_clip(folder / wav_name(index), frames, audio_codec))
    return Measure(
        name="codec_copy",
        architecture=None,
        passes=0,
        decode_s=time.perf_counter() - started,
        spoken=tuple(spoken),
    )


def write_recordings(dataset: Dataset, samples: Sequence[Sample], folder: Path) -> None:
    """Write the recordings themselves, for the judges that compare with them."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, sample in enumerate(samples):
        write_wav(folder / wav_name(index), *dataset.reference(sample["sample_id"]))


def write_measure(path: Path, result: Measure) -> None:
    """Write a measure in one step: its presence says that the system is done."""
    replace_file(path, result.model_dump_json().encode())


def read_measure(path: Path) -> Measure | None:
    """Read a measure; None where there is none, or one of another version of this program.

    Measuring again costs time and changes nothing but what is kept.
    """
    try:
        return Measure.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
