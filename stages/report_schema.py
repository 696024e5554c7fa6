"""The records of report.json: what an evaluation found, and nothing that only a page needs."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    JsonValue,
    field_validator,
    model_validator,
)

from stages.publish import replace_file
from stages.training_log import read_log
from store.schema import Record

SYSTEMS = ("codec_copy", "teacher_guided", "teacher_unguided", "student")
"""Systems with a fixed name, in the order in which they are shown."""

RECORDING = "recording"
"""Folder of the recordings themselves, beside those of the systems."""

NOT_LOSSES = ("step", "learning_rate", "gradient_norm", "steps_per_s")
"""Fields of a training log that are no loss terms; nor are shares of the time or of the rows."""


class Metric(Record):
    """A measured number with its 95 % interval, or an exact one without."""

    value: float
    """The number itself, over all samples."""
    low: float | None = None
    """Lower end of the interval; null where none makes sense."""
    high: float | None = None
    """Upper end of the interval; null where none makes sense."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.low is None) != (self.high is None):
            raise ValueError(f"low={self.low} with high={self.high}: give both ends or neither")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low={self.low} lies above high={self.high}; swap them")
        return self


class System(Record):
    """What was measured of one system; null where a metric does not apply or had no judge."""

    wer: Metric | None = None
    """Word error rate by the first recogniser: edits / reference words, over the corpus."""
    cer: Metric | None = None
    """Character error rate by the first recogniser."""
    wer_second: Metric | None = None
    """Word error rate by the second recogniser, of another family."""
    cer_second: Metric | None = None
    """Character error rate by the second recogniser."""
    mos: Metric | None = None
    """Predicted mean opinion score, 1 to 5."""
    speaker_similarity: Metric | None = None
    """Mean cosine between the speaker embeddings of the clip and of its recording."""
    speaker_contrast: Metric | None = None
    """Mean cosine between the embedding of the clip and recordings of the other speakers."""
    success: Metric | None = None
    """Share of samples whose rollout ended by itself, is heard and is of a plausible duration."""
    ended: Metric | None = None
    """Share of rollouts that ended by themselves."""
    silent: Metric | None = None
    """Share of clips that are empty, not finite, or below −60 dBFS."""
    duration_s: Metric | None = None
    """Mean duration of the clips, in seconds."""
    duration_p5_s: Metric | None = None
    """Duration that a twentieth of the clips fall short of, in seconds."""
    duration_median_s: Metric | None = None
    """Median duration of the clips, in seconds."""
    duration_p95_s: Metric | None = None
    """Duration that a twentieth of the clips exceed, in seconds."""
    duration_ratio: Metric | None = None
    """Seconds generated per second of the recordings, over the corpus."""
    duration_ratio_mean: Metric | None = None
    """Mean over clips of their seconds per second of their recording."""
    duration_ratio_p5: Metric | None = None
    """Ratio to the recording that a twentieth of the clips fall short of."""
    duration_ratio_median: Metric | None = None
    """Median ratio to the recording."""
    duration_ratio_p95: Metric | None = None
    """Ratio to the recording that a twentieth of the clips exceed."""
    longest_run_frames: Metric | None = None
    """Mean over clips of the longest run of one codec frame, in frames."""
    repeated_pairs: Metric | None = None
    """Mean over clips of the share of pairs of frames that stood before: seq-rep-2."""
    repeated_fours: Metric | None = None
    """Mean over clips of the share of runs of four frames that stood before: seq-rep-4."""
    looped: Metric | None = None
    """Share of clips that end in the same stretch three times over, for at least 0.5 s."""
    repetition: Metric | None = None
    """Words heard again directly after themselves, beyond the text's own, per reference word."""
    paired_kl: Metric | None = None
    """Mean KL(guided teacher ‖ system) per timestep and stream on the same codes, in nats."""
    paired_mse: Metric | None = None
    """Mean squared error of final latents to the guided teacher's from the same start noise."""
    frechet: Metric | None = None
    """Squared Fréchet distance between the images and the reference images."""
    frechet_to_guided: Metric | None = None
    """Squared Fréchet distance between the images and the guided teacher's."""
    accuracy: Metric | None = None
    """Share of images that the judge takes for what their condition asks for."""
    log_probability: Metric | None = None
    """Mean log-probability, in nats, that the judge gives to what the condition asks for."""
    class_spread: Metric | None = None
    """Root mean square deviation of images, in [−1, 1], from the mean image of their class."""
    seconds_per_image: Metric | None = None
    """Seconds of all solver steps per image, decoder left out, in batches of
    `evaluate.batch_size`."""
    calibration_error: Metric | None = None
    """Expected calibration error: mean distance, over bins of the probability that the system gives
    to its most probable id, to the probability that the guided teacher gives to the same id."""
    agreement: Metric | None = None
    """Share of predictions whose most probable id is that of the guided teacher."""
    rtf: Metric | None = None
    """Real-time factor: seconds of generation per second of audio made, audio codec left out, in
    batches of `evaluate.batch_size`."""
    rtf_single: Metric | None = None
    """The same of the first `evaluate.single_samples` samples, each generated alone."""
    parameters: Metric | None = None
    """Parameters of the model."""
    active_parameters: Metric | None = None
    """Parameters without those of experts that a position does not visit."""
    flops_per_timestep: Metric | None = None
    """FLOPs of one forward pass of one decoding step, as `Architecture` counts them."""
    dense_flops_per_timestep: Metric | None = None
    """The same with one dense feed-forward as wide as all experts of a layer together."""
    total_flops_per_timestep: Metric | None = None
    """FLOPs of all passes of one decoding or solver step: `flops_per_timestep` times `passes`."""
    passes: Metric | None = None
    """Forward passes per timestep, or per solver step."""


class StageCost(Record):
    """What a stage took; every stage is a process of its own."""

    wall_s: float = Field(ge=0)
    """Seconds from start to end, over all attempts and the jobs of an array."""
    peak_rss_bytes: int = Field(ge=0)
    """Most resident memory, in bytes, summed over processes that ran together."""
    peak_device_bytes: int = Field(0, ge=0)
    """Most accelerator memory, in bytes, summed likewise; 0 without an accelerator."""
    written_bytes: int | None = Field(None, ge=0)
    """Bytes that it left on disk; null where nothing is known of them."""
    made: int | None = Field(None, ge=0)
    """Units of work that it did; null where it has no unit."""
    unit: str | None = None
    """What these units are, such as `timesteps`; divided by `wall_s` they are its rate."""


class Comparison(Record):
    """A paired difference `system - against` of one metric, on the same samples."""

    metric: str
    """Name of the metric, a field of `System`."""
    system: str
    """Name of the system."""
    against: str
    """Name of the system that it is compared with."""
    difference: Metric
    """Difference with its paired interval; one that holds 0 shows no difference."""

    @field_validator("metric")
    @classmethod
    def _check_metric(cls, metric: str) -> str:
        if metric not in System.model_fields:
            raise ValueError(
                f"metric={metric!r} is not measured; choose from {', '.join(System.model_fields)}"
            )
        return metric


class JudgeUse(Record):
    """One judge that the configuration names."""

    name: str
    """Name of the judge."""
    measures: tuple[str, ...]
    """Metrics that it gives, fields of `System`."""
    reason: str | None = None
    """Why it gave none, such as a package that is not installed; null when it ran."""


def _check_file(file: str) -> str:
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or "\\" in file or not path.name:
        raise ValueError(f"file={file!r} must be a relative path below the report's folder")
    return file


ReportFile = Annotated[str, AfterValidator(_check_file)]
"""Path of a file below the folder of report.json."""


class AudioClip(Record):
    """One utterance of one system."""

    file: ReportFile
    """Path of the wav file below the folder of report.json."""
    heard: str | None = None
    """What the first recogniser heard; null when none ran."""
    edits: int | None = Field(None, ge=0)
    """Word edits between the text and what was heard."""


class AudioSample(Record):
    """One held-out sentence as several systems speak it."""

    sample_id: str
    """Name of the sample."""
    text: str
    """Its text."""
    speaker: str | None = None
    """Its speaker."""
    clips: dict[str, AudioClip]
    """System name → what it said."""


class ImageSample(Record):
    """One condition as several systems draw it from the same start noise."""

    sample_id: str
    """Name of the sample whose condition it is."""
    text: str
    """Its caption, or the name of its label; empty without any."""
    reference: ReportFile | None = None
    """PNG of the sample's own image, where it was kept."""
    files: dict[str, ReportFile]
    """System name → PNG of what it drew."""


class SolverPath(Record):
    """How far systems are from the guided teacher on the way from noise to image."""

    steps: tuple[int, ...]
    """Solver steps after which the latents are compared, rising; the last is the image."""
    images: int = Field(ge=1)
    """Images of which the way is kept, the first of the evaluation."""
    systems: dict[str, tuple[Metric, ...]]
    """System → mean squared error of its latents to the guided teacher's after the same steps from
    the same noise, with its interval over images."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, values in self.systems.items():
            if len(values) != len(self.steps):
                raise ValueError(f"{name}: {len(values)} values after {len(self.steps)} steps")
        return self


class Images(Record):
    """What a report of images has beside its systems."""

    solver_steps: int = Field(ge=1)
    """Solver steps of the systems' numbers."""
    other_steps: dict[int, dict[str, System]] = Field(default_factory=dict)
    """Other numbers of solver steps → system → the same numbers there."""
    features: Literal["pixels", "areas"]
    """What the Fréchet distance is of: the pixels, or means over an 8×8 grid of every channel."""
    references: int = Field(ge=0)
    """Reference images that the Fréchet distance is to."""
    reference: System | None = None
    """What the reference images are like; their Fréchet distance is that between two halves."""
    path: SolverPath | None = None
    """The error to the guided teacher by solver step; null without that teacher."""
    samples: tuple[ImageSample, ...] = ()
    """A few conditions to look at."""


Axis = Literal["timestep", "share", "codebook"]
"""Along what a divergence is taken apart: timesteps from the start, shares of the length of every
rollout, or streams."""


class Bins(Record):
    """Means of one system, bin by bin."""

    values: tuple[Metric | None, ...]
    """Mean in each bin, with its interval over sentences; null where there is nothing."""
    predictions: tuple[int, ...]
    """Predictions in each bin; weighted by them, the means have the mean over all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.values) != len(self.predictions):
            raise ValueError(
                f"{len(self.values)} values with {len(self.predictions)} counts of predictions"
            )
        return self


class Divergence(Record):
    """`paired_kl` taken apart along one axis: every prediction lies in one bin."""

    axis: Axis
    """Along what."""
    bins: tuple[str, ...]
    """Names of the bins: `0–4` for timesteps, `0–10 %` for shares, names of streams."""
    systems: dict[str, Bins]
    """System → mean KL(guided teacher ‖ system) in nats, bin by bin."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, found in self.systems.items():
            if len(found.values) != len(self.bins):
                raise ValueError(f"{name}: {len(found.values)} values in {len(self.bins)} bins")
        return self


class Calibration(Record):
    """What a system's confidence is worth, bin by bin of its confidence.

    The reference is the probability that the guided teacher gives to the system's most probable id,
    before temperature and filters of the sampler: what the students learn. A system that holds the
    same distributions has confidence and reference equal in every bin.
    """

    edges: tuple[float, ...]
    """Ends of the bins of confidence, from 0 to 1: one more than there are bins."""
    confidence: tuple[float | None, ...]
    """Mean probability that the system gives to its most probable id in each bin."""
    reference: Bins
    """Mean probability that the guided teacher gives to the same ids."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        sizes = len(self.edges) - 1, len(self.confidence), len(self.reference.values)
        if len(set(sizes)) > 1:
            raise ValueError(
                f"{sizes[0]} bins between edges with {sizes[1]} confidences and {sizes[2]} "
                "references"
            )
        return self


class Points(Record):
    """A curve."""

    steps: tuple[int, ...]
    """Optimizer steps, rising."""
    values: tuple[float, ...]
    """One value per step."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.steps) != len(self.values):
            raise ValueError(f"{len(self.steps)} steps with {len(self.values)} values")
        return self


class Report(Record):
    """report.json: one key per system (further students as `student_<name>`) and the rest."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, System]

    format_version: Literal[1] = 1
    """Version of this layout."""
    run: str
    """Name of the run."""
    samples: int = Field(ge=0)
    """Held-out samples that every system spoke, or images that it drew."""
    sentences: int = Field(ge=0)
    """Different texts among them, the units that the bootstrap draws; of images their different
    conditions, where it draws images."""
    codec_copy: System | None = None
    """The recordings through the audio codec: the ceiling of everything else."""
    teacher_guided: System | None = None
    """The teacher as it was distilled."""
    teacher_unguided: System | None = None
    """The same teacher without guidance."""
    student: System | None = None
    """The first student."""
    stages: dict[str, StageCost] = Field(default_factory=dict)
    """Stage name → cost, in the order in which they ran."""
    comparisons: tuple[Comparison, ...] = ()
    """Paired differences."""
    judges: tuple[JudgeUse, ...] = ()
    """Judges that were asked for, first recogniser first."""
    divergences: tuple[Divergence, ...] = ()
    """`paired_kl` by timestep, by share of the rollout and by codebook; empty of images."""
    calibration: dict[str, Calibration] = Field(default_factory=dict)
    """System → what its confidence is worth; empty where the reference store does not hold the
    probabilities of all ids."""
    audio: tuple[AudioSample, ...] = ()
    """A few samples to listen to."""
    images: Images | None = None
    """What a report of images has beside; null of speech."""
    losses: dict[str, dict[str, Points]] = Field(default_factory=dict)
    """Training run (`teacher`, `student`, ...) → loss term → curve."""
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    """The configuration of the run."""
    fingerprints: dict[str, str] = Field(default_factory=dict)
    """Hashes of teacher, tokenizer, audio codec, dataset, students."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Machine and versions on which times were taken."""
    warnings: tuple[str, ...] = ()
    """What a reader must know before believing the numbers."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.__pydantic_extra__:
            if not name.startswith("student_"):
                raise ValueError(
                    f"unknown key {name!r}: a system is one of {', '.join(SYSTEMS)} or "
                    "student_<name>"
                )
        return self

    @property
    def systems(self) -> dict[str, System]:
        """Systems that were evaluated, in the order in which they are shown."""
        named = {name: getattr(self, name) for name in SYSTEMS}
        return {name: system for name, system in named.items() if system} | self.__pydantic_extra__

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read report.json; raises pydantic's ValidationError where it has another shape."""
        return cls.model_validate_json(path.read_bytes())

    def write(self, path: Path) -> None:
        """Write report.json at once or not at all; what does not exist is left out."""
        absent = {name for name in (*SYSTEMS, "images") if getattr(self, name) is None}
        replace_file(path, f"{self.model_dump_json(indent=1, exclude=absent)}\n".encode())


def read_losses(path: Path, points: int = 300) -> dict[str, Points]:
    """Read the loss terms of a training log, each thinned to at most `points` mean values.

    `path` is a file of JSON lines with `step` and numbers; a missing file gives no curves.
    """
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in read_log(path):
        for name, value in line.items():
            if name not in NOT_LOSSES and not name.endswith("_share") and _is_finite(value):
                curves[name].append((int(line["step"]), float(value)))
    return {name: _thin(curve, points) for name, curve in curves.items()}


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _thin(curve: list[tuple[int, float]], points: int) -> Points:
    """Average runs of neighbours so that a long log stays small in a page."""
    width = -(-len(curve) // points)
    runs = [curve[start : start + width] for start in range(0, len(curve), width)]
    return Points(
        steps=tuple(run[-1][0] for run in runs),
        values=tuple(math.fsum(value for _, value in run) / len(run) for run in runs),
    )
