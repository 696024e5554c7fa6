"""Stage zero: a recorded folder becomes a dataset of checked texts and audio codes."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue
from torch import Tensor
from tqdm import trange

from stages.audio import encode_wav
from stages.audio_codec import BATCH_CLIPS, AudioCodec, ResidualMel, load_audio_codec
from stages.config import DatasetFacts
from stages.dataset import (
    DATASET_VERSION,
    REFERENCE,
    REJECTED,
    SAMPLES,
    Dataset,
    DatasetHeader,
    fingerprint,
    read_header,
)
from stages.dataset_folder import SPLITS, refuse_other_settings
from stages.distributed import choose_device
from stages.encoded_parts import EncodedParts, parts_folder, remove_parts
from stages.errors import UserError
from stages.family import load_audio_codec_class
from stages.prepare_config import (
    AudioCodecConfig,
    FitAudioCodecConfig,
    LoadAudioCodecConfig,
    PrepareConfig,
    VoicesConfig,
)
from stages.publish import publish_folder
from stages.recordings import find_table
from stages.rejections import kind_of, rejection_table
from stages.screening import (
    Clip,
    Screened,
    Stretch,
    choose_splits,
    keyed,
    screen,
    strange_characters,
)
from stages.voices import make_corpus
from store.errors import explain_os_errors

logger = logging.getLogger(__name__)


def prepare(config: PrepareConfig, out: Path, corpus: Path | None = None) -> Dataset:
    """Check, resample and encode the recordings of a source into the dataset folder `out`.

    The demo's voices, if configured, first speak into `corpus` (beside `out` unless given).
    A rejected recording is listed in rejected.parquet and stops nothing. A dataset that the same
    settings made from the same table is opened as it is. The folder appears whole or not at all;
    what an interrupted run encoded is not encoded again.
    Raises UserError when the source cannot be used, when nothing is accepted, or when `out` was
    made otherwise; StoreError when the disk fails.
    """
    if out.exists():
        dataset = _reopen(config, out)
        remove_parts(out)
        return dataset
    with explain_os_errors(f"prepare {out}"):
        source = config.source
        if config.voices is not None:
            source = make_corpus(config.voices, corpus or out.with_name("corpus"))
        assert source is not None
        with publish_folder(out) as draft:
            _write_dataset(config, find_table(source), draft, parts_folder(out))
    dataset = Dataset.open(out)
    remove_parts(out)
    _tell(dataset)
    return dataset


def _tell(dataset: Dataset) -> None:
    """Log what was accepted, and a table of what was not."""
    header = dataset.header
    accepted, left_out = sum(header.samples.values()), sum(header.rejected.values())
    splits = ", ".join(
        f"{split} {header.samples[split]} ({header.duration_s[split] / 60:.1f} min)"
        for split in SPLITS
    )
    logger.info(
        "%s: %d of %d recordings accepted: %s", dataset.path, accepted, accepted + left_out, splits
    )
    if left_out:
        table = rejection_table(dataset.rejected())
        logger.info("%d rejected, each with its reason in rejected.parquet:\n%s", left_out, table)


def _reopen(config: PrepareConfig, out: Path) -> Dataset:
    """Open a finished dataset; raises UserError when other settings or another table made it."""
    header = read_header(out)
    asked = _settings(config)
    # A setting that is younger than the dataset had its default there.
    made = _settings(PrepareConfig(voices=VoicesConfig())) | header.config
    different = [key for key in asked if made[key] != asked[key]]
    if config.source is not None and config.source.exists():
        different += ["source"] * (header.source_sha256 != _sha256(find_table(config.source)))
    if config.audio_codec.kind != "fit" and config.audio_codec.path.exists():
        given = _open_audio_codec(config.audio_codec)
        assert not isinstance(given, FitAudioCodecConfig)
        different += ["audio_codec"] * (given.fingerprint() != header.facts.audio_codec)
    refuse_other_settings(out, different)
    return Dataset.open(out)


def _settings(config: PrepareConfig) -> dict[str, JsonValue]:
    """The settings that decide a dataset's content."""
    exclude: Any = {
        "source": True,
        "audio_root": True,
        "voices": {"processes"},
        "audio_codec": {"path", "device"},
    }
    return config.model_dump(mode="json", exclude=exclude)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_dataset(config: PrepareConfig, table: Path, draft: Path, parts: Path) -> None:
    spilled = draft / "audio.pcm"
    asked = _open_audio_codec(config.audio_codec)
    screened = screen(config, table, asked.sample_rate_hz, spilled)
    splits = choose_splits([clip.text for clip in screened.clips], config)
    alphabet, speakers = _keep_trainable(screened, splits, config)
    if not any(splits[clip.text] == "train" for clip in screened.clips):
        raise UserError(_nothing_left(table, screened, config))
    audio_codec = _fitted(asked, screened, splits)
    samples = _encode(screened, splits, EncodedParts(parts, audio_codec), config)
    references = _references(screened, splits, audio_codec.sample_rate_hz)
    rejected = [dict(zip(REJECTED.names, pair, strict=True)) for pair in screened.rejected]
    audio_codec.save(draft / "audio_codec")
    pq.write_table(samples, draft / "samples.parquet")
    pq.write_table(references, draft / "reference.parquet")
    pq.write_table(pa.Table.from_pylist(rejected, REJECTED), draft / "rejected.parquet")
    spilled.unlink()
    facts = DatasetFacts(
        alphabet=alphabet,
        speakers=speakers,
        codebooks=audio_codec.codebooks,
        codes_per_codebook=audio_codec.codes_per_codebook,
        frame_rate_hz=audio_codec.frame_rate_hz,
        audio_codec=audio_codec.fingerprint(),
        context_frames=round(config.context_s * audio_codec.frame_rate_hz),
        slots=audio_codec.slots,
    )
    header = _header(config, table, samples, screened, facts, audio_codec.sample_rate_hz)
    (draft / "dataset.json").write_text(header.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _open_audio_codec(asked: AudioCodecConfig) -> AudioCodec | FitAudioCodecConfig:
    """Open the audio codec that is given; one that is to be fitted remains its settings."""
    if isinstance(asked, FitAudioCodecConfig):
        return asked
    if isinstance(asked, LoadAudioCodecConfig):
        return load_audio_codec(asked.path)
    opened: AudioCodec = load_audio_codec_class(asked.kind).open(
        asked.path, choose_device(asked.device)
    )
    return opened


def _fitted(
    asked: AudioCodec | FitAudioCodecConfig, screened: Screened, splits: dict[str, str]
) -> AudioCodec:
    if not isinstance(asked, FitAudioCodecConfig):
        return asked
    train = [clip for clip in screened.clips if splits[clip.text] == "train"]
    return ResidualMel.fit(asked, _choose_clips(train, asked, screened))


def _choose_clips(
    train: list[Clip], asked: FitAudioCodecConfig, screened: Screened
) -> list[Tensor]:
    """Waveforms of train clips, in a keyed order, up to `minutes` of audio."""
    chosen, seconds = [], 0.0
    for clip in sorted(train, key=lambda clip: keyed(asked.seed, "audio codec", clip.sample_id)):
        if seconds < 60 * asked.minutes:
            chosen.append(screened.waveform(clip))
            seconds += clip.length / asked.sample_rate_hz
    return chosen


def _keep_trainable(
    screened: Screened, splits: dict[str, str], config: PrepareConfig
) -> tuple[str, tuple[str, ...]]:
    """Drop clips whose speaker or characters the train split lacks; returns what it has."""
    train = [clip for clip in screened.clips if splits[clip.text] == "train"]
    clips_of = Counter(clip.speaker for clip in train)

    def lacks_speaker(clip: Clip) -> str | None:
        count = clips_of[clip.speaker]
        least = 2 if config.context_s > 0 and clip.context is None else 1
        if count >= least:
            return None
        return f"speaker without train clips: {clip.speaker!r} has {count}, {least} are needed"

    screened.drop(lacks_speaker)
    texts = [clip.text for clip in screened.clips if splits[clip.text] == "train"]
    alphabet = "".join(sorted(set(config.alphabet or "".join(texts))))
    screened.drop(lambda clip: strange_characters(clip.text, alphabet))
    return alphabet, tuple(sorted({clip.speaker for clip in screened.clips}))


def _nothing_left(table: Path, screened: Screened, config: PrepareConfig) -> str:
    kinds = ", ".join(f"{kind}: {count}" for kind, count in _kinds(screened).items()) or "none"
    return (
        f"no recording of {table} is left for the train split; rejected {kinds}; "
        f"{len(screened.clips)} accepted, with prepare.test_texts={config.test_texts} and "
        f"prepare.dev_texts={config.dev_texts} held out"
    )


def _kinds(screened: Screened) -> dict[str, int]:
    return dict(sorted(Counter(kind_of(reason) for _, reason in screened.rejected).items()))


def _encode(
    screened: Screened, splits: dict[str, str], parts: EncodedParts, config: PrepareConfig
) -> pa.Table:
    """The samples table, in the source's order."""
    clips, audio_codec = screened.clips, parts.audio_codec
    codes = _encode_stretches(clips, screened, parts, "encoding")
    named = list(dict.fromkeys(clip.context for clip in clips if clip.context is not None))
    heard = dict(
        zip(named, _encode_stretches(named, screened, parts, "encoding contexts"), strict=True)
    )
    contexts = _contexts(clips, codes, heard, splits, audio_codec.frame_rate_hz, config)
    return pa.table(
        {
            "sample_id": [clip.sample_id for clip in clips],
            "text": [clip.text for clip in clips],
            "speaker": [clip.speaker for clip in clips],
            "split": [splits[clip.text] for clip in clips],
            "duration_s": [clip.length / audio_codec.sample_rate_hz for clip in clips],
            "n_frames": [len(each) for each in codes],
            "codes": [each.reshape(-1) for each in codes],
            "context_codes": [each.reshape(-1) for each in contexts],
        },
        schema=SAMPLES,
    )


def _encode_stretches(
    stretches: Sequence[Stretch], screened: Screened, parts: EncodedParts, progress: str
) -> list[np.ndarray]:
    """Codes [F, C] of stretches of the spilled audio, in order."""
    codes: list[np.ndarray] = []
    for start in trange(0, len(stretches), BATCH_CLIPS, desc=progress, unit="batch", disable=None):
        batch = stretches[start : start + BATCH_CLIPS]
        codes += parts.encode([screened.waveform(stretch) for stretch in batch])
    return codes


def _contexts(
    clips: list[Clip],
    codes: list[np.ndarray],
    heard: Mapping[Stretch, np.ndarray],
    splits: dict[str, str],
    frame_rate_hz: float,
    config: PrepareConfig,
) -> Iterator[np.ndarray]:
    """First frames [≤ F, C] of every clip's context, or of another train clip of its speaker."""
    frames = round(config.context_s * frame_rate_hz)
    train: dict[str, list[int]] = {}
    for index, clip in enumerate(clips):
        if splits[clip.text] == "train":
            train.setdefault(clip.speaker, []).append(index)
    for index, clip in enumerate(clips):
        if frames == 0:
            yield codes[index][:0]
            continue
        if clip.context is not None:
            yield _filled(heard[clip.context], frames, config)
            continue
        others = [other for other in train[clip.speaker] if other != index]
        other = others[keyed(config.seed, "context", clip.sample_id) % len(others)]
        yield _filled(codes[other], frames, config)


def _filled(codes: np.ndarray, frames: int, config: PrepareConfig) -> np.ndarray:
    """The first `frames` of codes [F, C]; a shorter clip is repeated where that is asked for."""
    if config.context_repeat and 0 < len(codes) < frames:
        codes = np.tile(codes, (-(-frames // len(codes)), 1))
    return codes[:frames]


def _references(screened: Screened, splits: dict[str, str], rate_hz: int) -> pa.Table:
    held_out = [clip for clip in screened.clips if splits[clip.text] != "train"]
    files = [encode_wav(screened.waveform(clip), rate_hz) for clip in held_out]
    ids = [clip.sample_id for clip in held_out]
    return pa.table({"sample_id": ids, "audio": files}, schema=REFERENCE)


def _header(
    config: PrepareConfig,
    table: Path,
    samples: pa.Table,
    screened: Screened,
    facts: DatasetFacts,
    rate_hz: int,
) -> DatasetHeader:
    counts = Counter(samples.column("split").to_pylist())
    seconds: Counter[str] = Counter()
    for split, duration_s in zip(
        samples.column("split").to_pylist(), samples.column("duration_s").to_pylist(), strict=True
    ):
        seconds[split] += duration_s
    return DatasetHeader(
        version=DATASET_VERSION,
        fingerprint=fingerprint(samples, facts.audio_codec),
        facts=facts,
        sample_rate_hz=rate_hz,
        samples={split: counts[split] for split in SPLITS},
        duration_s={split: round(seconds[split], 3) for split in SPLITS},
        rejected=_kinds(screened),
        source_sha256=_sha256(table),
        config=_settings(config),
    )
