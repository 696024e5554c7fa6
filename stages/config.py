"""Settings of the stages: frozen records whose field docstrings are the help text.

Nothing here imports torch, so that reading a configuration stays fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from stages.loss_config import LossConfig, LossForm
from stages.model_config import ModelConfig
from stages.ranges import Positive, Share, Weight
from store.object_url import Place
from store.schema import (
    Fast,
    Full,
    Guidance,
    Profile,
    QuantizationMethod,
    Record,
    Sampler,
    Target,
    TopK,
)

AUDIT_SAMPLES = 8
"""Recordings on which a quantized teacher is compared with itself, unless told otherwise."""

FREE_FLOOR = 2**30
"""Bytes that stage one leaves free, unless told otherwise."""

JudgeName = Literal["whisper", "pocketsphinx", "distillmos", "resemblyzer"]


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
    slots: tuple[tuple[int, int], ...] = ()
    """Per code of a frame (level, place): which of the level's codes it is; empty where the audio
    codec has one rate, so that a frame has one code of each codebook."""

    @model_serializer(mode="wrap")
    def _without_none(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out slots where there are none, as before there were any.

        Fingerprints of models and manifests of stores have the facts in them.
        """
        content: dict[str, Any] = serialise(self)
        if not self.slots:
            content.pop("slots", None)
        return content


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
    keep_checkpoints: Positive = 2
    """Newest checkpoints that are kept; of a single one, damage cannot be made good."""
    log_every: Positive = 20
    """Optimizer steps between lines of the log."""
    tensorboard: bool | None = None
    """Write the log for TensorBoard too; null does where its package is installed."""
    processes: Positive = 1
    """Processes that `run` starts on this machine (data parallel)."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What data-parallel processes hold: each the whole model, or each its share of the weights,
    gradients and moments (FSDP2), for models whose training does not fit on one device."""
    device: str = "auto"
    """Torch device; `auto` takes CUDA where it is present."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.compile and self.parallel == "fsdp":
            raise ValueError(
                "compile=True with parallel='fsdp': a compiled pass knows nothing of weights that "
                "are shared out; set compile: false, or parallel: ddp"
            )
        return self


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


class QuantizationConfig(Record):
    """Weights of the teacher's linear layers in fewer bits; needs `foretell[orpheus]`."""

    method: QuantizationMethod
    """`int8`, or `int4`: nf4 in blocks of 64 weights."""
    keep: tuple[str, ...] = ()
    """Linear layers that stay as they are, by name or a pattern like `*.down`; heads do anyway."""


class RolloutConfig(Record):
    """Stage one: what the teacher predicts, and how it is stored."""

    source: Literal["teacher", "dataset", "student", "replay"] = "teacher"
    """Whose codes are scored: the teacher's, the recording's, a student's, or another store's."""
    student: Path | None = None
    """Folder of the student that draws the codes when `source` is `student`."""
    replay: Place | None = None
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
    quantization: QuantizationConfig | None = None
    """Holds its linear layers in fewer bits; arithmetic stays that of `precision`."""
    audit_samples: int | None = Field(None, ge=0)
    """Recordings on which the teacher is compared with itself in fp32; null: 8 if quantized."""
    disk_check: bool = True
    """Refuse to begin where the disk will not hold what is missing; false begins nevertheless."""
    free_floor: int = Field(FREE_FLOOR, ge=0)
    """Bytes that stay free on the store's disk: with less no shard is begun, and stage one ends."""
    processes: Positive = 1
    """Processes that `run` starts on this machine."""
    device: str = "auto"
    """Torch device; `auto` takes CUDA where it is present."""

    @property
    def audited(self) -> int:
        """Recordings of the audit, by what is asked for."""
        if self.audit_samples is not None:
            return self.audit_samples
        return 0 if self.quantization is None else AUDIT_SAMPLES

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


class InitConfig(Record):
    """Where the weights of a student come from."""

    kind: Literal["fresh", "checkpoint", "teacher", "merged"] = "fresh"
    """`fresh` draws them, `checkpoint` loads `path`, `teacher` copies from the teacher's file, and
    `merged` too, whose adapters become part of the weights, below fresh ones."""
    path: Path | None = None
    """Checkpoint folder, for `checkpoint`."""
    layers: tuple[int, ...] | None = None
    """Decoder layers of the teacher to keep, in order; null spreads them evenly."""

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
    round: str | None = None
    """Round of stage one whose store it learns from, of `rounds`; null is the run's own."""
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
    """Rollouts decoded together; the real-time factor `rtf` is taken at this size."""
    single_samples: int = Field(8, ge=0)
    """Samples generated once more, each alone, for the real-time factor `rtf_single`."""
    plausible_duration: tuple[float, float] = (0.5, 2.0)
    """Least and most seconds per second of the recording for a rollout to be a success."""
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

    @field_validator("plausible_duration")
    @classmethod
    def _check_duration(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if not 0 < bounds[0] <= 1 <= bounds[1]:
            raise ValueError(
                f"plausible_duration={list(bounds)} does not hold the recording's own duration: "
                "give a number above 0 and at most 1, and one of at least 1"
            )
        return bounds
