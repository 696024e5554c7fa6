"""Settings of the stages: frozen records whose field docstrings are the help text.

Nothing here imports torch, so that reading a configuration stays fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, JsonValue, Tag, field_validator, model_validator

from store.schema import Fast, Full, Guidance, Profile, Record, Sampler, Target, TopK

FamilyName = Literal["codec_lm", "magpie"]

JudgeName = Literal["whisper", "pocketsphinx", "distillmos", "resemblyzer"]

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(gt=0.0)]
TokenId = Annotated[int, Field(ge=0)]
GuidanceScale = float | tuple[float, float]
Mean = Literal["predictions", "rollouts"]

DIVERGENCES = ("kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd")
"""Terms of the distillation loss that compare probabilities, and so have a temperature."""


class DatasetFacts(Record):
    """What a model must know of a dataset before it can be built."""

    alphabet: str
    """Characters that a text may hold, in id order."""
    speakers: tuple[str, ...]
    """Names of the speakers, in id order."""
    codebooks: Positive
    """Codebooks of the audio codec."""
    codes_per_codebook: Positive
    """Entries of each codebook."""
    frame_rate_hz: float
    """Codec frames per second of audio."""
    audio_codec: str
    """Fingerprint of the audio codec, hexadecimal."""
    context_frames: int = 0
    """Codec frames of the context clip of a sample; 0 when samples have none."""


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


class SpecialTokensConfig(Record):
    """Ids of the tokens that set off text and speech in a flat stream."""

    start_of_human: TokenId
    """Begins what is to be said."""
    end_of_text: TokenId
    """Ends the text."""
    end_of_human: TokenId
    """Ends what is to be said."""
    start_of_ai: TokenId
    """Begins the answer."""
    start_of_speech: TokenId
    """Begins the audio."""
    end_of_speech: TokenId
    """Ends the audio."""


class SlotLayoutConfig(Record):
    """How a language model's flat stream of tokens holds the levels of an audio codec.

    A frame is what one code of the slowest level spans. It is a fixed row of slots, and each slot
    has ids of its own: slot s those from `audio_base_id` + s · `codes_per_slot` on.
    """

    slots: Annotated[tuple[tuple[TokenId, TokenId], ...], Field(min_length=1)]
    """Per slot (level, place): which of the level's codes of the frame stands there, from 0."""
    codes_per_slot: Positive
    """Entries of each codebook."""
    audio_base_id: TokenId
    """Id of the first code of the first slot."""
    special: SpecialTokensConfig
    """Ids around the audio."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        places: dict[int, list[int]] = {}
        for level, place in self.slots:
            places.setdefault(level, []).append(place)
        whole = all(sorted(of_level) == [*range(len(of_level))] for of_level in places.values())
        if sorted(places) != [*range(len(places))] or not whole:
            raise ValueError(
                f"slots={[list(slot) for slot in self.slots]} must hold every place of every level "
                "once, counted from 0: [0, 0], [1, 0], [1, 1] for levels of one and two codes"
            )
        audio = range(
            self.audio_base_id, self.audio_base_id + len(self.slots) * self.codes_per_slot
        )
        within = {name: i for name, i in self.special.model_dump().items() if i in audio}
        if within:
            raise ValueError(
                f"special ids {within} lie among the audio's, {audio.start} to {audio.stop - 1}: "
                "correct them, or audio_base_id and codes_per_slot"
            )
        return self


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


class LocalTransformerConfig(Record):
    """The autoregressive transformer over the codebooks of one timestep."""

    d_model: Positive = 256
    """Width, in features."""
    layers: Positive = 1
    """Layers."""
    heads: Positive = 4
    """Attention heads."""


class ExpertsConfig(Record):
    """Mixture-of-experts feed-forward of the decoder."""

    experts: Annotated[int, Field(ge=2)] = 8
    """Experts per layer."""
    active: Positive = 2
    """Experts that each position visits."""
    routing: Literal["top_k", "sinkhorn"] = "top_k"
    """How training assigns positions to experts; inference always takes the top ones."""
    balance_weight: float = Field(0.01, ge=0.0)
    """Weight of the load-balancing loss (0 with sinkhorn)."""
    z_weight: float = Field(0.001, ge=0.0)
    """Weight of the router z loss."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.active > self.experts:
            raise ValueError(f"active={self.active} exceeds experts={self.experts}; lower it")
        if self.routing == "sinkhorn" and self.balance_weight > 0:
            raise ValueError(
                f"routing='sinkhorn' balances by itself, so balance_weight={self.balance_weight} "
                "must be 0; set it"
            )
        return self


class CodecLMConfig(Record):
    """Architecture of the family `codec_lm`."""

    family: Literal["codec_lm"] = "codec_lm"
    d_model: Positive = 768
    """Width of encoder and decoder, in features."""
    heads: Positive = 12
    """Attention heads; must divide `d_model`."""
    text_layers: Positive = 6
    """Layers of the text encoder."""
    decoder_layers: Positive = 12
    """Layers of the causal decoder."""
    context_layers: Positive = 1
    """Layers of the context encoder; used when samples carry context codes."""
    feed_forward: Positive = 3072
    """Width of the feed-forward (of one expert when there are experts), in features."""
    dropout: Share = 0.1
    """Dropout share in training."""
    code_noise: Share = 0.0
    """Share of input codes replaced at random in training; 0 for students."""
    timestep_noise: Share = 0.0
    """Mean share of earlier timesteps hidden in training, so that the text is needed."""
    frames_per_step: Literal[1, 2, 4] = 1
    """Codec frames that one decoding step predicts (frame stacking)."""
    max_timesteps: Positive = 2048
    """Longest sequence, in decoding steps."""
    max_characters: Positive = 1024
    """Longest text, in characters."""
    local_transformer: LocalTransformerConfig | None = None
    """Autoregression over codebooks within a timestep; none when null."""
    experts: ExpertsConfig | None = None
    """Mixture of experts in place of the dense feed-forward; none when null."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.d_model % self.heads:
            raise ValueError(
                f"heads={self.heads} does not divide d_model={self.d_model}; choose a divisor"
            )
        if self.experts is not None and (self.d_model % 8 or self.feed_forward % 8):
            raise ValueError(
                f"with experts, d_model={self.d_model} and feed_forward={self.feed_forward} must "
                "be multiples of 8, because the grouped product reads blocks of 16 bytes"
            )
        return self


class MagpieSettings(Record):
    """What foretell must know of a MagpieTTS model beside NeMo's own configuration."""

    family: Literal["magpie"]
    tokenizer: str | None = None
    """Which of the model's text tokenizers reads the texts; null takes its first."""
    speakers: tuple[str, ...] = ()
    """Speakers of the baked context embeddings, in their order; none where contexts are codes."""
    local_streams: bool = True
    """Distil the local transformer too, where the model has one; it doubles the stored bytes."""
    history: Literal["backbone", "local"] = "backbone"
    """Whose draws continue a rollout: the decoder's own, drawn in parallel, as in NeMo's
    distillation, or the local transformer's, as in its inference."""

    @model_validator(mode="after")
    def _check_history(self) -> Self:
        if self.history == "local" and not self.local_streams:
            raise ValueError("history='local' needs the local transformer: set local_streams: true")
        return self


class MagpieConfig(MagpieSettings):
    """A MagpieTTS model to build: the family `magpie`."""

    nemo: Path
    """NeMo's model configuration: a .yaml, or a .nemo whose configuration alone is read."""
    overrides: dict[str, JsonValue] = Field(default_factory=dict)
    """Keys of that configuration to change, such as `decoder.n_layers: 6`."""


class MagpieTeacher(MagpieSettings):
    """A trained MagpieTTS checkpoint of NeMo's."""

    path: Path
    """The checkpoint: a .nemo, or a .ckpt of NeMo's training."""
    nemo: Path | None = None
    """NeMo's model configuration (.yaml) of a .ckpt; a .nemo holds its own."""
    audio_codec: Path | None = None
    """The audio codec's .nemo; null takes the file that the model's configuration names."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.path.suffix not in (".nemo", ".ckpt"):
            raise ValueError(
                f"path={self.path} is no MagpieTTS checkpoint: give a .nemo, or a .ckpt with its "
                "configuration"
            )
        if (self.path.suffix == ".ckpt") != (self.nemo is not None):
            raise ValueError(
                f"path={self.path} with nemo={self.nemo}: a .ckpt needs the .yaml of its model in "
                "nemo, and a .nemo holds its own"
            )
        return self


ModelConfig = Annotated[CodecLMConfig | MagpieConfig, Field(discriminator="family")]
PretrainedConfig = MagpieTeacher


class OptimizerConfig(Record):
    """The training loop that `fit` and `train` share."""

    steps: Positive
    """Optimizer steps."""
    batch_size: Positive = 16
    """Sequences per optimizer step, over all processes and accumulation steps."""
    micro_batch_size: Positive | None = None
    """Sequences per forward pass and process; null takes the whole share of a process at once."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate of AdamW."""
    final_learning_rate_share: Share = 0.05
    """Share of the peak that the cosine ends at."""
    warmup_steps: int = Field(100, ge=0)
    """Optimizer steps of linear warm-up."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Moment decay of AdamW."""
    clip_norm: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay per step of an exponential moving average of the weights; the average is saved."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Arithmetic of the forward pass; weights and losses stay fp32. `auto` is bf16 where fast."""
    compile: bool = False
    """Compile the model with torch.compile."""
    checkpoint_every: Positive = 500
    """Optimizer steps between checkpoints."""
    log_every: Positive = 20
    """Optimizer steps between lines of the log."""
    processes: Positive = 1
    """Processes that `run` starts on this machine (data parallel)."""
    device: str = "auto"
    """Torch device; `auto` takes CUDA where it is present."""


class FitConfig(Record):
    """Training of a teacher by cross entropy on the dataset's own codes."""

    optimizer: OptimizerConfig
    """Steps, batches and learning rate."""
    condition_dropout: Share = 0.1
    """Share of samples trained without their conditions; guidance needs more than 0."""
    alignment_weight: float = Field(0.0, ge=0)
    """Weight of the diagonal attention loss that speeds up the alignment of text and codes."""
    alignment_steps: Positive | None = None
    """Optimizer steps after which the alignment loss is gone; null keeps it to the end."""
    codebook_weights: tuple[Weight, ...] = ()
    """Weight of each codebook, for every frame of a step; empty weighs all alike."""
    dev_batches: Positive = 4
    """Batches of the dev split whose loss is reported at every checkpoint."""


class RolloutConfig(Record):
    """Stage one: what the teacher predicts, and how it is stored."""

    source: Literal["teacher", "dataset", "student", "replay"] = "teacher"
    """Whose codes are scored: the teacher's, the recording's, a student's, or another store's."""
    student: Path | None = None
    """Folder of the student that draws the codes when `source` is `student`."""
    replay: Path | None = None
    """Store whose codes, samples and variations are taken when `source` is `replay`."""
    split: str = "train"
    """Split of the dataset that is rolled out."""
    samples: Positive | None = None
    """Samples taken from the split, from its start; null takes all."""
    variations: Positive = 1
    """Rollouts per sample."""
    first_variation: int = Field(0, ge=0)
    """Index of the first variation; a later on-policy round starts after the earlier ones."""
    guidance: Guidance = Guidance(scale=2.5)
    """Guidance of drawing when the source is the teacher, and of targets that are not `both`."""
    sampler: Sampler
    """How codes are drawn; it never changes the stored targets."""
    target: Target = TopK(kind="top_k", k=64)
    """What is stored per timestep and stream."""
    profile: Profile = Fast()
    """How it is encoded: `fast` is mapped into memory, `compact` takes the fewest bytes."""
    rollouts_per_shard: Positive = 256
    """Rollouts per shard, the unit of commit and of resumption."""
    batch_size: Positive = 32
    """Rollouts generated together; part of the plan of a reproducible store."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Weights and arithmetic of the teacher."""
    processes: Positive = 1
    """Processes that `run` starts on this machine."""
    device: str = "auto"
    """Torch device; `auto` takes CUDA where it is present."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.source == "student") != (self.student is not None):
            raise ValueError(
                f"source={self.source!r} with student={self.student}: name the student exactly "
                "when source is 'student'"
            )
        if (self.source == "replay") != (self.replay is not None):
            raise ValueError(
                f"source={self.source!r} with replay={self.replay}: name the store exactly when "
                "source is 'replay'"
            )
        multiple = self.sampler.reference_multiple
        if multiple is not None and multiple < 1:
            raise ValueError(
                f"sampler.reference_multiple={multiple} would truncate rollouts shorter than the "
                "recording: give at least 1, or null to truncate none"
            )
        return self


class LossConfig(Record):
    """Terms of the distillation loss; a weight of 0 leaves a term out."""

    kl: float = Field(1.0, ge=0)
    """Weight of the forward KL, exact over the kept ids and their tail."""
    tail_share: Share = 0.0
    """Weight, within `kl`, of the shape of the tail; a `top_k` store needs `tail_samples`."""
    reverse_kl: float = Field(0.0, ge=0)
    """Weight of the reverse KL."""
    reverse_kl_top_k: Positive | None = None
    """Take it over the student's k likeliest ids and the rest; null takes the teacher's ids."""
    jsd: float = Field(0.0, ge=0)
    """Weight of the generalised Jensen-Shannon divergence."""
    jsd_beta: float = Field(0.5, gt=0, lt=1)
    """Share of the teacher in its mixture: near 0 it acts like the forward KL."""
    skew_kl: float = Field(0.0, ge=0)
    """Weight of the forward KL to a mixture of both."""
    skew_reverse_kl: float = Field(0.0, ge=0)
    """Weight of the reverse KL to a mixture of both."""
    skew_alpha: float = Field(0.1, gt=0, lt=1)
    """Share of the model itself that these two mix into the other one."""
    tvd: float = Field(0.0, ge=0)
    """Weight of the total variation distance."""
    ce: float = Field(0.0, ge=0)
    """Weight of the cross entropy on the drawn codes."""
    soft_ce: float = Field(0.0, ge=0)
    """Weight of the cross entropy on the draws of a `sampled` store."""
    nrmse: float = Field(0.0, ge=0)
    """Weight of the normalised error of the logits; a `top_k` store needs `moments`."""
    logit_mse: float = Field(0.0, ge=0)
    """Weight of the mean square error of the centred logits; of the kept ones in `top_k`."""
    mse: float = Field(0.0, ge=0)
    """Weight of the mean square error of continuous predictions."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of the divergences, times its square; a `top_k` manifest must list it."""
    joint: bool = False
    """NeMo 3.0.0's `kl`, `ce` and `nrmse` to the letter, for comparison: codebooks compete."""
    guidance_scale: GuidanceScale | None = None
    """Scale, or (low, high) to draw it from per rollout and epoch, of a store of both branches."""
    codebook_weights: tuple[Weight, ...] = ()
    """Weight of each codebook, for every frame of a step; empty weighs all alike."""
    local_share: Share = 0.5
    """Share of the local transformer's streams in the loss; the decoder's own have the rest."""
    local_start_step: int = Field(0, ge=0)
    """Optimizer step at which the local transformer's loss begins."""
    local_ramp_steps: int = Field(0, ge=0)
    """Optimizer steps over which it grows from nothing to its share."""
    auxiliary: float = Field(1.0, ge=0)
    """Weight of the model's own losses, such as the balance of its experts."""
    mean: Mean = "predictions"
    """Over which a batch's loss is a mean: all predictions by weight, or the means of its rollouts,
    each times its weight, over their number."""

    @cached_property
    def terms(self) -> dict[str, float]:
        """Weights of the active terms by the names they have in the log."""
        names = (*DIVERGENCES, "ce", "soft_ce", "nrmse", "logit_mse", "mse")
        weights = {name: float(getattr(self, name)) for name in names}
        weights["kl_tail"] = self.kl * self.tail_share
        return {name: weight for name, weight in weights.items() if weight > 0}

    @field_validator("guidance_scale")
    @classmethod
    def _check_scale(cls, scale: GuidanceScale | None) -> GuidanceScale | None:
        low, high = scale if isinstance(scale, tuple) else (scale, scale)
        if low is not None and high is not None and not 0 <= low <= high:
            raise ValueError(
                f"guidance_scale={scale} must be a number of at least 0, or (low, high) with "
                "0 <= low <= high; 1 is no guidance"
            )
        return scale

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.terms:
            raise ValueError("all terms of the loss weigh 0, so nothing would be learned; set one")
        for name, of in (("tail_share", "kl"), ("reverse_kl_top_k", "reverse_kl")):
            if getattr(self, name) and not getattr(self, of):
                raise ValueError(
                    f"{name}={getattr(self, name)} belongs to {of}, whose weight is 0; "
                    f"set {of}, or leave {name} out"
                )
        others = sorted(self.terms.keys() - {"kl", "ce", "nrmse"})
        if self.joint and others:
            raise ValueError(
                f"joint={self.joint} knows the terms kl, ce and nrmse, and not {others}: set their "
                "weights to 0, or joint to false"
            )
        return self

    @property
    def terms_config(self) -> LossConfig:
        """Return the terms and weights themselves: this."""
        return self


class NemoLossConfig(Record):
    """The loss of NeMo's online distillation of MagpieTTS in its own terms, with its defaults."""

    recipe: Literal["nemo"]
    """Chooses this form of the section."""
    alpha: Share = 0.3
    """Share of the cross entropy on the drawn codes; the KL has the rest."""
    beta: float = Field(2.0, ge=0)
    """Weight of the normalised error of the logits."""
    temperature: float = Field(1.0, gt=0)
    """Distillation temperature; a `top_k` manifest must list it."""
    kl: Literal["per_codebook", "joint"] = "per_codebook"
    """`joint` is that of NeMo 3.0.0, over all codebooks together, and needs absolute logits."""
    local_share: Share = 0.1
    """Share of the local transformer's streams in the loss (lt_loss_weight)."""
    local_start_step: int = Field(3000, ge=0)
    """Optimizer step at which their loss begins (lt_distillation_start_step)."""
    local_ramp_steps: int = Field(2000, ge=0)
    """Optimizer steps over which it grows to its share (lt_distillation_ramp_len)."""
    auxiliary: float = Field(1.0, ge=0)
    """Weight of the model's own losses (moe_loss_weight)."""
    guidance_scale: GuidanceScale | None = None
    """Scale, or (low, high) to draw it from per rollout and epoch, of a store of both branches."""
    codebook_weights: tuple[Weight, ...] = ()
    """Weight of each codebook, for every frame of a step; empty weighs all alike."""

    @cached_property
    def terms_config(self) -> LossConfig:
        """Return the terms and weights that the recipe stands for."""
        same = {"recipe", "alpha", "beta", "kl"}
        return LossConfig(
            kl=1 - self.alpha,
            ce=self.alpha,
            nrmse=self.beta,
            joint=self.kl == "joint",
            mean="rollouts",
            **self.model_dump(exclude=same),
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        _ = self.terms_config  # whose own checks hold here too
        return self


LOSS_FORMS: dict[str, type[Record]] = {"plain loss": LossConfig, "nemo loss": NemoLossConfig}
"""The forms of the section `loss` by tags, which are no words of a configuration."""


def _loss_form(value: Any) -> str:
    named = "recipe" in value if isinstance(value, Mapping) else isinstance(value, NemoLossConfig)
    return "nemo loss" if named else "plain loss"


LossForm = Annotated[
    Annotated[LossConfig, Tag("plain loss")] | Annotated[NemoLossConfig, Tag("nemo loss")],
    Discriminator(_loss_form),
]


class InitConfig(Record):
    """Where the weights of a student come from."""

    kind: Literal["fresh", "checkpoint", "teacher"] = "fresh"
    """`fresh` draws them, `checkpoint` loads `path`, `teacher` copies from the teacher's file."""
    path: Path | None = None
    """Checkpoint folder, for `checkpoint`."""
    layers: tuple[int, ...] | None = None
    """Decoder layers of the teacher to keep, in order, for `teacher`; null spreads them evenly."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "checkpoint") != (self.path is not None):
            raise ValueError(
                f"kind={self.kind!r} with path={self.path}: give a path exactly for 'checkpoint'"
            )
        return self


class LoaderConfig(Record):
    """How training reads ahead; none of it changes what a batch holds."""

    workers: int = Field(0, ge=0)
    """Processes that read and pad batches; 0 takes a thread of the training process."""
    prefetch: Positive = 4
    """Batches that each of them, or the thread, reads ahead; they bound the memory."""
    start_method: Literal["fork", "spawn", "forkserver"] = "forkserver"
    """How the processes begin; `fork` shares the open store, with the others each opens it."""
    pin_memory: bool = True
    """Prepare batches in page-locked memory, which a CUDA device copies while it computes."""


class TrainConfig(Record):
    """Stage two: one student and how it learns from the store."""

    model: ModelConfig
    """Architecture of the student; codebooks and frame stacking must be the teacher's."""
    init: InitConfig = InitConfig()
    """Where its weights come from."""
    loss: LossForm = LossConfig()
    """What it minimises: its terms by weight, or a `recipe`."""
    optimizer: OptimizerConfig
    """Steps, batches and learning rate."""
    variations: Literal["all", "one"] = "all"
    """Rollouts of a sample in an epoch: `all` its variations, or `one` that the epoch draws."""
    buffer_shards: Positive = 4
    """Shards that are shuffled together, and held in memory by each loader process."""
    neighbours: Positive = 64
    """Rollouts alike in length that stay together; a multiple of the batch size pads least."""
    loader: LoaderConfig = LoaderConfig()
    """How batches are read ahead."""


class EvaluateConfig(Record):
    """Comparison of codec copy, guided and unguided teacher and students on held-out samples."""

    split: Literal["dev", "test"] = "test"
    """Split of the dataset that is spoken and judged."""
    samples: Positive | None = 120
    """Samples taken from the split, from its start; null takes all."""
    target: Target = Full(dtype="float32")
    """What the reference store keeps of the guided teacher; `full` makes the divergence exact."""
    judges: tuple[JudgeName, ...] = ("whisper", "pocketsphinx", "distillmos", "resemblyzer")
    """Judges of the audio; the first recogniser gives `wer` and `cer`, the second `wer_second`."""
    audio_samples: int = Field(10, ge=0)
    """Samples to listen to in the report."""
    bootstrap_draws: Annotated[int, Field(ge=100)] = 2000
    """Draws of the 95 % intervals, over sentences."""
    seed: int = Field(0, ge=0)
    """Seed of the rollouts and of the bootstrap."""
    batch_size: Positive = 32
    """Rollouts decoded together; real-time factors are taken at this size."""
    processes: Positive = 2
    """Processes of one thread each that judge; they change nothing but the time."""
    device: str = "auto"
    """Torch device; `auto` takes CUDA where it is present."""

    @field_validator("judges")
    @classmethod
    def _check_judges(cls, judges: tuple[JudgeName, ...]) -> tuple[JudgeName, ...]:
        if len(set(judges)) < len(judges):
            raise ValueError(f"judges={list(judges)} names a judge twice; name each once")
        return judges
