"""The records a store is described by; `Record` is the base of every configuration and manifest."""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

FORMAT_VERSION = 1
MAX_STREAMS = 4096
MAX_VOCABULARY = 2**31
MAX_SAMPLE_ID_BYTES = 512
MAX_COLUMNS = 256
MAX_BUCKETS = 4096
MAX_LATENT_NUMBERS = 2**26
MAX_TABLES = 256
LEAST_HIDDEN_STEP = 2**-16
"""Finer than this, fp32 itself rounds the large features of a state by more than half a step."""


ROLLOUT_COLUMNS = frozenset(
    ("sample_id", "variation", "start", "length", "stop_reason", "weight", "seed")
)
"""Columns that every rollouts.parquet has."""

GROUP = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")


class Record(BaseModel):
    """A small frozen value that writes itself to JSON and back; unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        defer_build=True,  # a command builds the records that it reads, not all that are imported
    )

    @classmethod
    def completed(cls, content: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON of an earlier release's file with the fields that were added since."""
        return content


def require(valid: bool, name: str, value: object, limit: str, advice: str) -> None:
    """Refuse a value, naming it, its limit and what to do; raises ValueError."""
    if not valid:
        raise ValueError(f"{name} is {value!r} but must be {limit}: {advice}")


def _check_group(group: str) -> str:
    advice = "an array, and so a folder, may be named after it; rename the group"
    limit = "1 to 64 of the letters A-Z a-z 0-9 _ . - and not begin with a dot"
    require(bool(GROUP.fullmatch(group)), "group", group, limit, advice)
    return group


GroupName = Annotated[str, AfterValidator(_check_group)]


class Stream(Record):
    """One categorical output of the teacher per timestep."""

    kind: Literal["categorical"] = "categorical"
    name: str
    """Name of the stream, unique in a manifest, e.g. `backbone.3`."""
    group: GroupName
    """Streams of one group share a head and are weighted together, e.g. `backbone`."""
    vocabulary: int
    """V: number of ids, special ids included."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(bool(self.name), "stream name", self.name, "a non-empty string", "name the stream")
        require(
            2 <= self.vocabulary <= MAX_VOCABULARY,
            f"vocabulary of stream {self.name!r}",
            self.vocabulary,
            f"2 to {MAX_VOCABULARY}",
            "give the number of ids of the head",
        )
        return self


class Latent(Record):
    """One continuous output of the teacher per timestep."""

    kind: Literal["continuous"] = "continuous"
    name: str
    """Name of the stream, unique in a manifest, e.g. `noise`."""
    group: GroupName
    """Streams of one group are weighted together."""
    shape: tuple[Annotated[int, Field(ge=1)], ...]
    """Shape of one prediction, e.g. channels, height, width."""


AnyStream = Annotated[Stream | Latent, Field(discriminator="kind")]


class Column(Record):
    """One fact of every timestep beside its target, in the array `row.NAME`."""

    name: GroupName
    """Name of the column, unique in a manifest, e.g. `t`."""
    dtype: Literal["float64", "float32", "float16", "uint8", "uint32", "uint64", "int64"]
    """Type of its values; those of floats are finite."""
    latent: bool = False
    """Whether it is a tensor per stream, of its shape; a number otherwise."""


class Bucket(Record):
    """What all shards of one bucket hold: latents of one shape, with or without predictions."""

    shape: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(max_length=8)]
    """Shape of one prediction, e.g. channels, height, width."""
    predicted: bool = True
    """Whether the teacher was asked: without it the arrays of the target are left out."""

    @field_validator("shape")
    @classmethod
    def _check_shape(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        numbers, advice = math.prod(shape), "a prediction must fit into memory"
        limit = f"of at most {MAX_LATENT_NUMBERS} numbers"
        require(numbers <= MAX_LATENT_NUMBERS, "shape of a bucket", shape, limit, advice)
        return shape


Branches = Literal["guided", "both"]
FloatType = Literal["float16", "float32"]


class TopK(Record):
    """The k most probable ids per (timestep, stream) and the log mass of all the others."""

    kind: Literal["top_k"] = "top_k"
    k: int
    """K: kept ids per row; the drawn code and the end id are always among them."""
    temperatures: tuple[float, ...] = (1.0,)
    """Distillation temperatures at which the tail log-mass is stored, rising."""
    moments: bool = False
    """Also store mean and standard deviation of the guided logits (needed by NRMSE)."""
    tail_samples: int = Field(0, ge=0, le=1024)
    """Extra ids drawn from the tail at temperature 1, so that its shape is learned; 0 for none."""
    dtype: FloatType = "float16"
    """Type of the stored logits, relative to the row maximum."""

    @field_validator("k")
    @classmethod
    def _check_k(cls, k: int) -> int:
        require(k >= 1, "k", k, ">= 1", "keep at least one id, or use the target `full`")
        return k

    @field_validator("temperatures")
    @classmethod
    def _check_temperatures(cls, temperatures: tuple[float, ...]) -> tuple[float, ...]:
        rising = all(a < b for a, b in pairwise(temperatures))
        require(
            bool(temperatures) and rising and temperatures[0] > 0,
            "temperatures",
            temperatures,
            "rising numbers > 0",
            "list every temperature that training will use, each once",
        )
        return temperatures


class Full(Record):
    """All V logits per (timestep, stream); for small vocabularies and for reference."""

    kind: Literal["full"] = "full"
    branches: Branches = "guided"
    """`both` keeps the branches apart, so that stage two chooses the guidance scale."""
    dtype: FloatType = "float16"
    """Type of the stored logits, relative to the row maximum."""
    levels: bool = False
    """Also store the maximum of each row, so that logits are known absolutely; `guided` only."""

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        valid = not self.levels or self.branches == "guided"
        advice = "set branches: guided, or use the target `hidden`, whose logits are absolute"
        require(valid, "levels", self.levels, "false with branches: both", advice)
        return self

    @model_serializer(mode="wrap")
    def _leave_out_none(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without levels the record is spelled as before there were any."""
        document: dict[str, Any] = write(self)
        if not self.levels:
            del document["levels"]
        return document


class Sampled(Record):
    """Ids drawn from the guided distribution at temperature 1, without filters (2503.16870)."""

    kind: Literal["sampled"] = "sampled"
    draws: int = Field(50, ge=1, le=4096)
    """N: independent draws per (timestep, stream), with replacement."""


class Hidden(Record):
    """The states that the linear output heads read; the heads are stored once."""

    kind: Literal["hidden"] = "hidden"
    branches: Branches = "guided"
    """`both` keeps the branches apart, so that stage two chooses the guidance scale."""
    dtype: FloatType = "float16"
    """Type of the stored states."""


class Dense(Record):
    """Continuous predictions, of streams of the kind `continuous`."""

    kind: Literal["dense"] = "dense"
    branches: Branches = "both"
    """`both` stores the conditional prediction and its difference to the unconditional one."""
    dtype: FloatType = "float16"
    """Type of the stored predictions."""


Target = Annotated[TopK | Full | Sampled | Hidden | Dense, Field(discriminator="kind")]


class Head(Record):
    """A linear output head whose input states a `hidden` target stores."""

    group: GroupName
    """The group of streams that it predicts."""
    vectors: Annotated[int, Field(ge=1)]
    """H: states per timestep: 1 that all streams of the group share, or one for each stream."""
    width: Annotated[int, Field(ge=1)]
    """D: features of a state."""


class Fast(Record):
    """Uncompressed arrays, which a reader maps into memory."""

    kind: Literal["fast"] = "fast"


class Compact(Record):
    """The fewest bytes at a stated loss."""

    kind: Literal["compact"] = "compact"
    loss_nats: float = Field(3e-4, gt=0, le=1)
    """Bound on what rounding the logits costs, as KL per (timestep, stream) in nats."""
    hidden_step: float = 1 / 256
    """Step of rounded hidden states, as a share of the root mean square of each state."""

    @field_validator("hidden_step")
    @classmethod
    def _check_hidden_step(cls, step: float) -> float:
        advice = "a finer step needs the profile `fast`"
        valid = LEAST_HIDDEN_STEP <= step <= 1
        require(valid, "hidden_step", step, f"in [{LEAST_HIDDEN_STEP}, 1]", advice)
        return step


Profile = Annotated[Fast | Compact, Field(discriminator="kind")]


class Ancestor(Record):
    """A store that the values of another one went through."""

    fingerprint: str
    """Checksum of its manifest."""
    profile: Profile
    """How its arrays are encoded, and so what its values may have lost."""


class Guidance(Record):
    """Classifier-free guidance `(1 − scale)·uncond + scale·cond` that made the targets."""

    scale: float = 1.0
    """1.0 is no guidance; above it the condition is amplified."""

    @field_validator("scale")
    @classmethod
    def _check_scale(cls, scale: float) -> float:
        require(scale >= 0, "cfg scale", scale, ">= 0", "use 1.0 for no guidance")
        return scale


class Sampler(Record):
    """How codes were drawn and rollouts ended; it never shapes the stored targets."""

    temperature: float = 1.0
    """Divides the guided logits before drawing."""
    top_k: int | None = None
    """Draw only among this many ids; null for all."""
    top_p: float | None = None
    """Draw only among the ids that hold this probability mass; null for all."""
    min_timesteps: int = 1
    """The end id cannot be drawn before this many timesteps."""
    max_timesteps: int = 2048
    """A rollout that has not ended by then is truncated."""
    end_on: Literal["any", "first", "majority"] = "any"
    """Which streams must draw the end id for a rollout to end."""
    reference_multiple: float | None = None
    """Truncate a rollout at this multiple of the reference length; null never does."""
    truncated_weight: float = 0.1
    """Weight in training of a rollout that was truncated at `reference_multiple`."""
    max_timesteps_weight: float = 0.1
    """Weight in training of a rollout that was truncated at `max_timesteps`."""
    too_short_multiple: float | None = None
    """Reject a rollout shorter than this multiple of the reference length; null never does."""
    too_short_weight: float = 0.0
    """Weight in training of a rollout that is too short; of several weights the least counts."""
    too_long_multiple: float | None = None
    """Reject a rollout longer than this multiple of the reference length; null never does."""
    too_long_weight: float = 0.0
    """Weight in training of a rollout that is too long; of several weights the least counts."""

    @field_validator("temperature")
    @classmethod
    def _check_temperature(cls, temperature: float) -> float:
        advice = "for greedy drawing set top_k: 1"
        require(temperature > 0, "temperature", temperature, "> 0", advice)
        return temperature

    @field_validator("top_k")
    @classmethod
    def _check_top_k(cls, top_k: int | None) -> int | None:
        advice = "use null to draw among all ids"
        require(top_k is None or top_k >= 1, "top_k", top_k, ">= 1", advice)
        return top_k

    @field_validator("top_p")
    @classmethod
    def _check_top_p(cls, top_p: float | None) -> float | None:
        valid = top_p is None or 0 < top_p <= 1
        require(valid, "top_p", top_p, "in (0, 1]", "use null to draw among all ids")
        return top_p

    @field_validator("reference_multiple", "too_short_multiple", "too_long_multiple")
    @classmethod
    def _check_multiple(cls, multiple: float | None) -> float | None:
        valid = multiple is None or multiple > 0
        require(valid, "multiple of the reference length", multiple, "> 0", "use null for none")
        return multiple

    @field_validator(
        "truncated_weight", "max_timesteps_weight", "too_short_weight", "too_long_weight"
    )
    @classmethod
    def _check_weight(cls, weight: float) -> float:
        require(0 <= weight <= 1, "weight", weight, "in [0, 1]", "use 0 to leave such rollouts out")
        return weight

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        low, high = self.min_timesteps, self.max_timesteps
        require(high >= 1, "max_timesteps", high, ">= 1", "allow at least one timestep")
        limit = f"in [0, max_timesteps = {high}]"
        require(0 <= low <= high, "min_timesteps", low, limit, "lower it or raise max_timesteps")
        short, long = self.too_short_multiple or 0.0, self.too_long_multiple or math.inf
        limit = f"< too_long_multiple = {self.too_long_multiple}"
        require(short < long, "too_short_multiple", short, limit, "every rollout would be rejected")
        return self


class Fingerprints(Record):
    """What the predictions depend on, by hash; an empty string where a family has no such part."""

    teacher: str
    tokenizer: str
    audio_codec: str
    dataset: str
    student: str = ""
    """The student that drew the codes, where the source is one."""
    codes: str = ""
    """The store that the codes were taken from, where the source is `replay`."""


QuantizationMethod = Literal["int8", "int4", "fp8"]
DTypeName = Literal["float32", "bfloat16"]


class Audit(Record):
    """How far a teacher is from itself in float32 and not quantized, on recordings' own codes.

    Both were teacher-forced and guided at the store's scale.
    """

    samples: int = Field(ge=1)
    """Recordings that were scored."""
    predictions: int = Field(ge=1)
    """Timesteps × streams of them."""
    kl_mean: float | None = None
    """Mean KL(float32 ‖ teacher) of a prediction, in nats; null where streams are continuous."""
    kl_p99: float | None = None
    """Its 99th percentile over the predictions."""
    kl_largest: float | None = None
    """Its mean over the recording where that is largest."""
    agreement: float | None = Field(None, ge=0, le=1)
    """Share of the predictions whose most probable id is the same."""
    mse: float | None = Field(None, ge=0)
    """Mean squared difference of continuous predictions; null where streams are categorical."""
    mse_share: float | None = Field(None, ge=0)
    """It as a share of the mean square of the float32 predictions."""


class Quantization(Record):
    """In which precision the teacher held its weights, and what that cost."""

    method: Literal["none", "int8", "int4", "fp8"]
    """What the weights of `layers` were quantized to; `none` where only the type is not float32."""
    dtype: DTypeName
    """Type of all other weights, and of the arithmetic."""
    backend: str = ""
    """The package that quantized."""
    backend_version: str = ""
    """Its version."""
    layers: tuple[str, ...] = ()
    """Names of the linear layers that were quantized."""
    kept: dict[str, str] = Field(default_factory=dict)
    """Names of the linear layers that were not, and why."""
    audit: Audit | None = None
    """What it cost; null where nothing was measured."""


class FileSum(Record):
    """Size and hash of a file that lies beside the manifest."""

    bytes: int
    xxh3: str
    """XXH3-128 in lower-case hex, its canonical (big-endian) form."""


class TableFacts(Record):
    """How many rows a side table has, and how they lie in its files."""

    rows: int = Field(ge=0, lt=2**31)
    """Rows of the table."""
    rows_per_part: int = Field(ge=1, lt=2**31)
    """Rows of every file but the last one, which may hold fewer."""

    @property
    def parts(self) -> int:
        """Files of the table."""
        return -(-self.rows // self.rows_per_part)


class Manifest(Record):
    """The immutable, self-describing header of a store; holds no time and no host name."""

    format_version: int = Field(FORMAT_VERSION, ge=1, le=FORMAT_VERSION)
    """Version of the bytes on disk (docs/format.md)."""
    family: str
    """Name of the model family that knows teacher and student."""
    streams: tuple[AnyStream, ...]
    """C streams per timestep, in the order of the axis C; all of one kind."""
    forbidden: tuple[int, ...] = ()
    """Ids masked on the teacher's and the student's side, in every stream, rising."""
    end_id: int | None = None
    """Id that ends a rollout; null where the length is given."""
    target: Target
    """What is stored per (timestep, stream)."""
    heads: tuple[Head, ...] = ()
    """The output heads in heads/, where the target is `hidden`."""
    profile: Profile = Fast()
    """How the arrays are encoded."""
    lineage: tuple[Ancestor, ...] = ()
    """The stores that this one was converted from, the first one first; none for a rollout's."""
    guidance: Guidance
    """Guidance of the drawn codes, and of the stored targets unless they keep both branches."""
    sampler: Sampler
    """How the codes were drawn."""
    source: Literal["teacher", "dataset", "student", "replay"]
    """Where the codes come from."""
    seed: int
    """Seed of the run; each rollout's own seed derives from it, its sample and its variation."""
    split: str
    """Split of the dataset that the samples come from."""
    timestep_s: float | None
    """Seconds of audio per timestep; null where it is not audio."""
    conditions: tuple[str, ...]
    """Columns of samples.parquet that the family needs."""
    fingerprints: Fingerprints
    """Hashes of what the predictions depend on."""
    conditioning: dict[str, JsonValue] = Field(default_factory=dict)
    """Facts of the dataset needed to build a student: alphabet, speakers and the like."""
    architecture: dict[str, JsonValue] = Field(default_factory=dict)
    """Size of the teacher and what it computes per timestep; none in older stores."""
    quantization: Quantization | None = None
    """Precision of the teacher's weights, where they were quantized or what that cost was measured;
    what a null would say, as in older stores, is not written."""
    columns: Annotated[tuple[Column, ...], Field(max_length=MAX_COLUMNS)] = ()
    """Facts of every timestep beside a `dense` target."""
    drawn: Annotated[tuple[GroupName, ...], Field(max_length=MAX_COLUMNS)] = ()
    """Further int64 columns of every rollouts.parquet: what a variation drew, by name."""
    buckets: Annotated[tuple[Bucket, ...], Field(max_length=MAX_BUCKETS)] = ()
    """What the shards of a `dense` target hold, where they differ: every shard is of one bucket."""
    tables: Annotated[dict[GroupName, TableFacts], Field(max_length=MAX_TABLES)] = Field(
        default_factory=dict
    )
    """Side tables by name: tensors that many rollouts share, in tables/."""
    recording: dict[str, JsonValue] = Field(default_factory=dict)
    """How the timesteps were made, where that takes more than the fields above."""
    files: dict[str, FileSum] = Field(default_factory=dict)
    """plan.parquet, samples.parquet, rejected.parquet, heads and the files of tables, where they
    are; filled in when the store is created."""

    @classmethod
    def completed(cls, content: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON of an earlier release's manifest as this release writes it.

        Anything else comes back as it is, for the checks of the fields to refuse.
        """
        sampler, fingerprints = content.get("sampler"), content.get("fingerprints")
        if isinstance(sampler, dict):
            content = content | {"sampler": _with_weights_apart(sampler)}
        if isinstance(fingerprints, dict):
            content = content | {"fingerprints": {"codes": ""} | fingerprints}
        return {"architecture": {}} | content

    @model_serializer(mode="wrap")
    def _leave_out_none(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what was added later the record is spelled as before there was any."""
        document: dict[str, Any] = write(self)
        if self.quantization is None:
            del document["quantization"]
        for name in ("columns", "drawn", "buckets", "tables", "recording"):
            if not document[name]:
                del document[name]
        return document

    @property
    def vocabularies(self) -> tuple[int, ...]:
        """Vocabulary of each stream; 0 for a continuous one."""
        return tuple(s.vocabulary if isinstance(s, Stream) else 0 for s in self.streams)

    @property
    def vocabulary(self) -> int:
        """V: the largest vocabulary of the streams; 0 where they are continuous."""
        return max(self.vocabularies)

    @property
    def branches(self) -> Branches:
        """Whether the targets are guided, or both branches apart."""
        return getattr(self.target, "branches", "guided")

    @model_validator(mode="after")
    def _check_streams(self) -> Self:
        count = len(self.streams)
        limit = f"1 to {MAX_STREAMS}"
        advice = "give one stream per codebook of a timestep"
        require(1 <= count <= MAX_STREAMS, "number of streams", count, limit, advice)
        names = Counter(stream.name for stream in self.streams)
        twice = [name for name, times in names.items() if times > 1]
        require(not twice, "stream names given twice", twice, "unique", "rename the streams")
        return self

    @model_validator(mode="after")
    def _check_ids(self) -> Self:
        ids, size = self.forbidden, self.vocabulary
        valid = all(a < b for a, b in pairwise(ids))
        valid = valid and all(0 <= i < size for i in ids)
        limit = f"rising ids in [0, {size})"
        require(valid, "forbidden", ids, limit, "list each id once, below the vocabulary")
        end = self.end_id
        valid = end is None or (0 <= end < size and end not in ids)
        require(valid, "end_id", end, f"an id in [0, {size}) that is not forbidden", "correct it")
        return self

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        continuous = {isinstance(stream, Latent) for stream in self.streams}
        kinds = sorted({stream.kind for stream in self.streams})
        require(len(continuous) == 1, "kinds of streams", kinds, "one", "use two stores")
        dense = isinstance(self.target, Dense)
        advice = "use `dense` for continuous streams, and only for them"
        require(continuous == {dense}, "target", self.target.kind, f"one for {kinds}", advice)
        if dense:
            shapes = sorted({s.shape for s in self.streams if isinstance(s, Latent)})
            require(len(shapes) == 1, "shapes of the streams", shapes, "equal", "use two stores")
        if isinstance(self.target, TopK):
            for stream, vocabulary in zip(self.streams, self.vocabularies, strict=True):
                allowed = vocabulary - sum(i < vocabulary for i in self.forbidden)
                limit = f"<= {allowed}, the allowed ids of stream {stream.name!r}"
                advice = "lower k, or use the target `full`"
                require(self.target.k <= allowed, "k", self.target.k, limit, advice)
                tail = bool(self.target.tail_samples)
                advice = "set it to 0: with every allowed id kept there is no tail to draw from"
                valid = not tail or self.target.k < allowed
                require(valid, "tail_samples", self.target.tail_samples, "0", advice)
        return self

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        groups = Counter(stream.group for stream in self.streams)
        given = [head.group for head in self.heads]
        expected = sorted(groups) if isinstance(self.target, Hidden) else []
        advice = "give one head per group of streams with a `hidden` target, else none"
        require(sorted(given) == expected, "groups of the heads", given, f"{expected}", advice)
        for head in self.heads:
            limit = f"1 or {groups[head.group]}, the streams of group {head.group!r}"
            valid = head.vectors in (1, groups[head.group])
            require(valid, "vectors of a head", head.vectors, limit, "correct the head")
        return self

    @model_validator(mode="after")
    def _check_rows(self) -> Self:
        dense = isinstance(self.target, Dense)
        for name, given in (("columns", self.columns), ("buckets", self.buckets)):
            advice = "use the target `dense`, or leave them out"
            require(dense or not given, name, given, "empty", advice)
        for name, names in (("columns", [c.name for c in self.columns]), ("drawn", self.drawn)):
            twice = [name for name, times in Counter(names).items() if times > 1]
            require(not twice, f"names of {name} given twice", twice, "unique", "rename them")
        taken = sorted(ROLLOUT_COLUMNS & set(self.drawn))
        limit = f"other names than {sorted(ROLLOUT_COLUMNS)}"
        require(not taken, "drawn", taken, limit, "rename them")
        if not self.buckets:
            return self
        shape = next(s.shape for s in self.streams if isinstance(s, Latent))
        first, advice = self.buckets[0].shape, "give the streams the shape of the first bucket"
        require(first == shape, "shape of bucket 0", first, f"{shape}, the streams'", advice)
        bare = [bucket for bucket in self.buckets if not bucket.predicted]
        advice = "a shard needs an array; give a column"
        require(bool(self.columns) or not bare, "buckets", bare, "predicted", advice)
        return self

    @model_validator(mode="after")
    def _check_numbers(self) -> Self:
        advice = "give a non-negative 63-bit integer"
        require(0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2**63)", advice)
        advice = "give the seconds of audio per decoding step, or null where it is not audio"
        valid = self.timestep_s is None or self.timestep_s > 0
        require(valid, "timestep_s", self.timestep_s, "> 0", advice)
        return self


def _with_weights_apart(sampler: dict[str, Any]) -> dict[str, Any]:
    """Spell the one weight of rejected rollouts, and that of truncated ones, for each reason."""
    apart = {"too_short_weight", "too_long_weight", "max_timesteps_weight"}
    if apart & sampler.keys() or not {"rejected_weight", "truncated_weight"} <= sampler.keys():
        return sampler
    rest = {name: value for name, value in sampler.items() if name != "rejected_weight"}
    rejected, truncated = sampler["rejected_weight"], sampler["truncated_weight"]
    return rest | {
        "too_short_weight": rejected,
        "too_long_weight": rejected,
        "max_timesteps_weight": truncated,
    }


def changed_fields(ours: Record, theirs: Record) -> dict[str, tuple[Any, Any]]:
    """Top-level fields in which two records of one class differ, with both JSON values."""
    mine, other = ours.model_dump(mode="json"), theirs.model_dump(mode="json")
    return {name: (mine[name], other[name]) for name in mine if mine[name] != other[name]}
