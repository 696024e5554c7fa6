"""Settings of `prepare`: recordings or voices, the audio codec, what is accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.ranges import Positive, Share
from store.schema import Record


class VoiceConfig(Record):
    """One speaker of the demo corpus."""

    speaker: str = Field(pattern=r"^[a-z0-9_]+$")
    """Name in the speaker column: small letters, digits and underscores."""
    engine: Literal["hibari", "flite"] = "hibari"
    """Package that speaks: `hibari` comes with pip, `flite` with apt."""
    voice: str = "heart"
    """The engine's voice, such as hibari's `heart` or flite's `rms`."""
    pitch: float = Field(1.0, ge=0.5, le=2.0)
    """Factor on pitch and formants together; 0.8 makes another, larger person of the voice."""


class VoicesConfig(Record):
    """The demo corpus: sentences of a closed grammar, each spoken by every voice."""

    voices: Annotated[tuple[VoiceConfig, ...], Field(min_length=1)] = (
        VoiceConfig(speaker="heart"),
        VoiceConfig(speaker="deep", pitch=0.8),
    )
    """Who speaks."""
    sentences: Positive = 1300
    """Different sentences, over all splits."""
    seed: int = 0
    """Chooses the sentences and the voices' noise."""
    processes: Positive = 2
    """Processes that speak; they change nothing but the time."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        speakers = [voice.speaker for voice in self.voices]
        if len(set(speakers)) < len(speakers):
            raise ValueError(f"voices={speakers} names a speaker twice; give each its own name")
        return self


class SpectrumDecoderConfig(Record):
    """A small network from codec frames to the spectra that are made audible."""

    width: Positive = 256
    """Width, in features."""
    layers: Positive = 4
    """Convolutional blocks."""
    steps: Positive = 800
    """Optimizer steps."""
    batch_size: Positive = 24
    """Stretches of clips per optimizer step."""
    crop_frames: Positive = 48
    """Codec frames of a stretch."""
    learning_rate: float = Field(2e-3, gt=0)
    """Peak learning rate of AdamW."""
    codebook_dropout: Share = 0.3
    """Share of steps in which some of the last codebooks are left out."""
    sharpening: float = Field(1.2, ge=1.0)
    """Exponent on the predicted magnitudes before their phases are found."""


class FitAudioCodecConfig(Record):
    """A residual vector quantiser over log-mel spectra, fitted on the train split."""

    kind: Literal["fit"] = "fit"
    sample_rate_hz: Positive = 22050
    """Rate of the audio that is encoded and decoded."""
    hop: Positive = 256
    """Audio samples between two mel spectra."""
    mels: Positive = 80
    """Mel bands from 0 to 8 kHz, or to half the sample rate where that is less."""
    mels_per_frame: Positive = 2
    """Consecutive mel spectra that one codec frame holds."""
    floor: float = Field(1e-3, gt=0)
    """Least mel magnitude that is told from silence."""
    codebooks: Positive = 8
    """Codebooks, each on what the earlier ones left over."""
    codes_per_codebook: Annotated[int, Field(ge=2, le=65534)] = 256
    """Entries of each codebook."""
    iterations: Positive = 12
    """Rounds of k-means per codebook."""
    decoder: SpectrumDecoderConfig | None = SpectrumDecoderConfig()
    """The network that decodes; null inverts the mel filter bank, which sounds rough."""
    minutes: float = Field(30.0, gt=0)
    """Audio that is learned from, in minutes; a fixed choice of clips is taken from more."""
    seed: int = 0
    """Chooses the clips and the first centroids."""


class LoadAudioCodecConfig(Record):
    """An audio codec that was fitted before."""

    kind: Literal["load"]
    path: Path
    """Its folder, such as another dataset's `audio_codec`."""


class NemoAudioCodecConfig(Record):
    """An audio codec of NeMo's, as MagpieTTS speaks it."""

    kind: Literal["nemo"]
    path: Path
    """Its .nemo file; the dataset keeps a copy."""
    device: str = "auto"
    """Torch device that encodes; `auto` takes CUDA where it is present."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.path.suffix != ".nemo":
            raise ValueError(
                f"path={self.path} is no file of NeMo's: give the audio codec's .nemo, or kind: "
                "load for the folder of a prepared dataset's"
            )
        return self


class SnacAudioCodecConfig(Record):
    """A SNAC audio codec, as Orpheus speaks it."""

    kind: Literal["snac"]
    path: Path
    """Its folder: config.json with model.safetensors or pytorch_model.bin; the dataset keeps a
    copy."""
    device: str = "auto"
    """Torch device that encodes; `auto` takes CUDA where it is present."""


AudioCodecConfig = Annotated[
    FitAudioCodecConfig | LoadAudioCodecConfig | NemoAudioCodecConfig | SnacAudioCodecConfig,
    Field(discriminator="kind"),
]


class TrimConfig(Record):
    """Which silence is cut from both ends of a clip."""

    below_peak_db: float = Field(40.0, gt=0)
    """Speech is what comes this close to the loudest 10 ms of the clip, in dB."""
    keep_s: float = Field(0.05, ge=0)
    """Seconds kept before and after the speech."""


class PrepareConfig(Record):
    """From a recorded folder, or the demo corpus, to a dataset of codes."""

    source: Path | None = None
    """Folder with metadata.csv or .parquet, a .parquet, or NeMo's .json; null takes `voices`."""
    audio_root: Path | None = None
    """Folder that audio paths start from and may not leave; null takes the folder of the table."""
    voices: VoicesConfig | None = None
    """The demo corpus to speak where there is no `source`."""
    single_speaker: str | None = None
    """Speaker of every clip; null reads the speaker column of the source."""
    audio_codec: AudioCodecConfig = FitAudioCodecConfig()
    """The audio codec: fitted here, loaded, NeMo's or SNAC."""
    lower_case: bool = True
    """Lower-case the texts; false for a model whose tokenizer tells capitals apart."""
    alphabet: str | None = None
    """Characters that a normalised text may hold; null takes those of the train texts."""
    min_duration_s: float = Field(0.3, gt=0)
    """Shortest clip that is accepted, in seconds after trimming."""
    max_duration_s: float = Field(20.0, gt=0)
    """Longest clip that is accepted, in seconds after trimming."""
    silence_dbfs: float = -60.0
    """Clips whose level lies below are rejected as silent, in dB of full scale."""
    duration_tolerance_s: float | None = Field(None, ge=0)
    """Seconds that the duration a row declares may differ from its audio's; null compares none."""
    max_clipped_share: Share | None = None
    """Largest share of samples at full scale that is accepted; null accepts any."""
    min_snr_db: float | None = None
    """Least estimated ratio of speech to noise that is accepted, in dB; null accepts any."""
    trim: TrimConfig | None = TrimConfig()
    """Silence cut from both ends; null keeps it."""
    level_dbfs: float | None = Field(-23.0, lt=0)
    """RMS level that clips are brought to, in dB of full scale; null keeps their own."""
    dev_texts: int = Field(40, ge=0)
    """Different texts whose clips form the dev split."""
    test_texts: int = Field(60, ge=0)
    """Different texts whose clips form the test split."""
    context_s: float = Field(0.0, ge=0)
    """Seconds of a row's context clip, or else another clip of the speaker, per sample; 0: none."""
    context_repeat: bool = False
    """Repeat a shorter context clip until it is that long, as NeMo's data loader does."""
    seed: int = 0
    """Chooses the splits and the context clips."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.source is None) == (self.voices is None):
            raise ValueError("give exactly one of source (a recorded folder) and voices (the demo)")
        if self.audio_root is not None and self.source is None:
            raise ValueError(
                f"audio_root={self.audio_root} goes with a source; leave it out, for voices are "
                "spoken into a folder of their own"
            )
        if self.max_duration_s <= self.min_duration_s:
            raise ValueError(
                f"max_duration_s={self.max_duration_s} must be above "
                f"min_duration_s={self.min_duration_s}"
            )
        return self
