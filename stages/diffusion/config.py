"""Settings of a diffusion run's stages: frozen records whose field docstrings are the help text.

Nothing here imports torch, so that reading a configuration stays fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from stages.config import FREE_FLOOR, LoaderConfig, OptimizerConfig
from stages.ranges import GuidanceScale, Positive, Share
from store.schema import Dense, Fast, Guidance, Profile, QuantizationMethod, Record

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]
"""What a denoiser predicts of x_t = alpha·x0 + sigma·noise: the noise, alpha·noise − sigma·x0, x0,
or noise − x0."""
NetworkClass = Literal[
    "UNet2DModel",
    "UNet2DConditionModel",
    "DiTTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
]
ErrorName = Literal["mse", "l1", "huber", "log_cosh"]
WeightingName = Literal["constant", "min_snr", "soft_min_snr", "debiased", "p2"]
TargetSource = Literal["teacher", "data", "prior"]
StorageMethod = QuantizationMethod
Size = tuple[Positive, Positive]


# ------------------------------------------------------------------------------------- prepare


class DigitsConfig(Record):
    """The demo images: scikit-learn's 1,797 handwritten digits, 8×8, labelled 0 to 9."""

    seed: int = 0
    """Chooses the splits."""


class PixelsConfig(Record):
    """No autoencoder: the model works on the pixels themselves, scaled to [-1, 1]."""

    kind: Literal["pixels"] = "pixels"
    channels: Literal[1, 3] = 3
    """Grey or RGB."""


def require_quantizable(name: str, precision: str, quantization: str) -> None:
    """Raise ValueError for a type in which quantized layers do not compute, naming both settings.

    Said when a configuration is read: a model says it itself only when it is quantized, hours
    later.
    """
    if precision == "fp16":
        raise ValueError(
            f"{name} is fp16, but with {quantization} a model computes in fp32 or bf16: set "
            f"{name}: bf16, or leave {quantization} out"
        )


class PipelineEncoderConfig(Record):
    """Autoencoder and text encoders of a diffusers pipeline, loaded one after the other."""

    kind: Literal["pipeline"]
    path: Path
    """Local folder of the pipeline, or a single .safetensors checkpoint."""
    config: Path | None = None
    """Folder with the configuration files of a single-file checkpoint; a folder has its own."""
    posterior: Literal["sample", "mode"] = "sample"
    """Latents are drawn once from the autoencoder's posterior, by key, or are its mode."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Weights and arithmetic of the encoders."""
    quantization: dict[str, StorageMethod] = Field(default_factory=dict)
    """Component name, such as `text_encoder_2` → how its linear layers are held."""
    device: str = "auto"
    """Torch device that encodes; `auto` takes CUDA where it is present."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.quantization:
            require_quantizable("precision", self.precision, "quantization")
        return self


ImageEncoderConfig = Annotated[PixelsConfig | PipelineEncoderConfig, Field(discriminator="kind")]


class ImageBucketsConfig(Record):
    """Sizes that images are brought to; each image takes the one nearest to its aspect ratio."""

    sizes: Annotated[tuple[Size, ...], Field(min_length=1)]
    """(width, height) in pixels, multiples of what the autoencoder and the denoiser halve."""
    aspect_tolerance: float = Field(1.15, ge=1)
    """Reject an image whose aspect ratio is further than this factor from every bucket's."""
    largest_upscale: float = Field(1.25, ge=1)
    """Reject an image that would be enlarged by more than this factor to fill its bucket."""


class UnconditionalConfig(Record):
    """What stands for no condition: of texts; with labels it is the label after the last one."""

    kind: Literal["zeros", "empty", "negative"] = "empty"
    """Zeros, as SDXL's pipeline has it; the encoded empty text; or an encoded negative prompt."""
    text: str | None = None
    """The negative prompt."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "negative") != (self.text is not None):
            raise ValueError(
                f"kind={self.kind!r} with text={self.text!r}: give a text exactly for 'negative'"
            )
        return self


class ImagesConfig(Record):
    """From a folder of images with captions or labels to latents and encoded conditions."""

    source: Path | None = None
    """Folder with metadata.jsonl or metadata.csv: file_name, and text, texts or label."""
    digits: DigitsConfig | None = None
    """The demo images where there is no `source`."""
    classes: Positive | None = None
    """Number of labels, for sources that number them; null takes the largest label plus one."""
    encoder: ImageEncoderConfig = PixelsConfig()
    """What makes latents of images and conditions of captions."""
    buckets: ImageBucketsConfig
    """Sizes that images are brought to."""
    image_variations: Positive = 1
    """Draws of crop and flip per image."""
    text_variations: Positive = 1
    """Draws of caption and order of tags per image."""
    crop: Literal["center", "random"] = "center"
    """Where an image that is larger than its bucket is cut out."""
    flip: Share = 0.0
    """Probability that an image variation is mirrored."""
    shuffle_tags: bool = False
    """Shuffle the comma-separated tags of a caption, in every text variation anew."""
    keep_tags: int = Field(0, ge=0)
    """First tags that stay in front."""
    unconditional: UnconditionalConfig = UnconditionalConfig()
    """What stands for no condition."""
    dev_images: int = Field(0, ge=0)
    """Images of the dev split."""
    test_images: int = Field(0, ge=0)
    """Images of the test split, whose conditions `evaluate` draws images for."""
    batch_size: Positive = 8
    """Images, or captions, that are encoded together."""
    seed: int = 0
    """Chooses splits, crops, flips, captions and posterior draws."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.source is None) == (self.digits is None):
            raise ValueError(
                "give exactly one of source (a folder of images) and digits (the demo)"
            )
        return self


# -------------------------------------------------------------------------------------- models


class ScheduleConfig(Record):
    """The noise schedule of a model that is trained here."""

    kind: Literal["ddpm", "flow"] = "ddpm"
    """Variance preserving steps, or the straight line between data and noise."""
    prediction: PredictionType = "v_prediction"
    """What the model predicts."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    """Schedule of betas, as diffusers names it; `ddpm` only."""
    train_timesteps: Positive = 1000
    """Number of steps, which the time that the model is told runs over."""
    zero_terminal_snr: bool = False
    """Rescale the betas so that the last step is pure noise; `ddpm` only."""
    shift: float = Field(1.0, gt=0)
    """Shift of the flow's time towards noise; `flow` only."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "flow") != (self.prediction == "flow"):
            raise ValueError(
                f"kind={self.kind!r} with prediction={self.prediction!r}: flow predicts 'flow', "
                "and nothing else does"
            )
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError(
                "zero_terminal_snr with prediction='epsilon': at the last step the noise is the "
                "input, so nothing would be learned; use v_prediction"
            )
        return self


class LoraConfig(Record):
    """A low-rank adapter on a frozen denoiser (peft)."""

    rank: Positive = 16
    """Rank of the update."""
    alpha: float | None = Field(None, gt=0)
    """The update is scaled by alpha / rank; null takes the rank."""
    dropout: Share = 0.0
    """Dropout before the update."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Ends of the names of the layers that are adapted."""


class DenoiserConfig(Record):
    """Architecture of a denoiser: the family `diffusion`."""

    family: Literal["diffusion"] = "diffusion"
    pipeline: Path | None = None
    """Local diffusers folder, or a single .safetensors file, whose denoiser and scheduler are
    taken; null builds `network`."""
    pipeline_config: Path | None = None
    """Folder with the configuration files of a single-file checkpoint."""
    network: NetworkClass | None = None
    """Class of the network that is built; null takes the pipeline's."""
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    """Arguments of the network by diffusers' names; beside a pipeline only those that change."""
    schedule: ScheduleConfig | None = None
    """Noise schedule; null takes the pipeline's, or for a student that of the store."""
    prediction: PredictionType | None = None
    """What a student predicts, where that is not what its teacher did."""
    adapter: LoraConfig | None = None
    """Train a low-rank adapter on the frozen network; null trains all weights."""
    scale_input: bool = False
    """Tell the model the guidance scale (`time_cond_proj_dim`), so that one student has many."""
    gradient_checkpointing: bool = False
    """Compute activations again on the way back instead of keeping them."""
    base_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of frozen weights under an adapter; what is trained is fp32."""
    base_quantization: StorageMethod | None = None
    """How the linear layers of the frozen network under an adapter are held."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pipeline is None and self.network is None:
            raise ValueError(
                "give pipeline (a local folder) or network (a class to build), or both"
            )
        frozen = self.base_precision != "fp32" or self.base_quantization is not None
        if frozen and self.adapter is None:
            raise ValueError(
                "base_precision and base_quantization hold frozen weights, but without an adapter "
                "all weights are trained: give an adapter, or leave them out"
            )
        if self.base_quantization is not None:
            require_quantizable("base_precision", self.base_precision, "base_quantization")
        return self


class DiffusionTeacher(Record):
    """A trained pipeline of diffusers'."""

    family: Literal["diffusion"] = "diffusion"
    path: Path
    """Local folder of the pipeline, or a single .safetensors checkpoint."""
    config: Path | None = None
    """Folder with the configuration files of a single-file checkpoint."""
    adapter: Path | None = None
    """LoRA file of the teacher, in diffusers' or kohya's format."""
    adapter_scale: float = 1.0
    """Factor on the adapter's update, applied once."""
    embedded_guidance: float | None = Field(None, ge=0)
    """Guidance number that a model conditioned on it, such as FLUX.1-dev, is told."""

    @property
    def weights(self) -> Path:
        """What a student that begins as its teacher reads."""
        return self.path


class TimestepsConfig(Record):
    """Which noise levels are drawn: one stratum of the distribution per slot and variation."""

    distribution: Literal["uniform", "logit_normal"] = "uniform"
    """Of the share of the schedule, 0 being clean and 1 pure noise."""
    mean: float = 0.0
    """Mean of the logit; `logit_normal` only."""
    std: float = Field(1.0, gt=0)
    """Standard deviation of the logit; `logit_normal` only."""
    low: Share = 0.0
    """Least share of the schedule."""
    high: Share = 1.0
    """Largest share of the schedule."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low={self.low} must lie below high={self.high}")
        return self


class DenoisingFitConfig(Record):
    """Training of a teacher on the images themselves."""

    optimizer: OptimizerConfig
    """Steps, batches and learning rate."""
    condition_dropout: Share = 0.1
    """Share of images trained without their condition; guidance needs more than 0."""
    timesteps: TimestepsConfig = TimestepsConfig()
    """Which noise levels are drawn."""
    weighting: WeightingName = "constant"
    """Weight of the loss by noise level."""
    gamma: float = Field(5.0, gt=0)
    """Bound on the signal-to-noise ratio of `min_snr` and `soft_min_snr`."""
    exponent: float = Field(1.0, gt=0)
    """Exponent of `p2`."""

    @property
    def weighting_number(self) -> float:
        """Return the number that the weighting has."""
        return self.exponent if self.weighting == "p2" else self.gamma


# --------------------------------------------------------------------------------------- stage one


class ForwardRows(Record):
    """Rows of images with noise added (Meng et al. 2210.03142, stage one)."""

    kind: Literal["forward"] = "forward"
    slots: Positive = 8
    """Noise levels per variation, drawn from as many strata."""
    timesteps: TimestepsConfig = TimestepsConfig()
    """Which noise levels are drawn."""
    store_noise: bool = False
    """Store the noise instead of drawing it again from its key: half as many bytes more."""


class TrajectoryRows(Record):
    """Rows along guided trajectories from noise to image (DDIM, or Euler for flow models)."""

    kind: Literal["trajectory"]
    steps: Annotated[int, Field(ge=2)] = 25
    """Solver steps."""
    keep: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Steps whose states are stored, rising; null keeps all. The end is always stored."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        kept = self.keep
        if kept is not None and (
            list(kept) != sorted(set(kept)) or not kept or kept[-1] >= self.steps
        ):
            raise ValueError(
                f"keep={list(kept)} must be rising steps in [0, steps={self.steps}); null keeps all"
            )
        return self


Rows = Annotated[ForwardRows | TrajectoryRows, Field(discriminator="kind")]


class UnconditionalContrast(Record):
    """The delta is to the same model without the condition: classifier-free guidance."""

    kind: Literal["unconditional"] = "unconditional"


class AdapterContrast(Record):
    """The delta is what the teacher's own adapter changes."""

    kind: Literal["adapter"]


class ModelContrast(Record):
    """The delta is to another model of the same kind, which takes turns on the device."""

    kind: Literal["model"]
    other: DiffusionTeacher
    """What is subtracted."""


Contrast = Annotated[
    UnconditionalContrast | AdapterContrast | ModelContrast, Field(discriminator="kind")
]


class PreviewConfig(Record):
    """Images at fixed seeds that the teacher makes once, to stand beside the student's."""

    samples: Positive = 8
    """Images, of the conditions of as many samples."""
    steps: Positive = 25
    """Solver steps."""
    split: str = "dev"
    """Split of the dataset whose conditions they have."""
    seed: int = 0
    """Seed of the start noise."""


class RecordConfig(Record):
    """Stage one: what the teacher predicts, and how it is stored."""

    split: str = "train"
    """Split of the dataset that is recorded."""
    samples: Positive | None = None
    """Samples taken from the split, from its start; null takes all."""
    rows: Rows = ForwardRows()
    """Where the model is asked: on noised images, or along trajectories."""
    contrast: Contrast = UnconditionalContrast()
    """What the stored delta is to."""
    guidance: Guidance = Guidance(scale=7.5)
    """Guidance of trajectories and previews, and of targets that are not `both`."""
    target: Dense = Dense()
    """Both parts, or `branches: guided` for one prediction, as of models without a second pass."""
    profile: Profile = Fast()
    """How it is encoded."""
    rollouts_per_shard: Positive = 64
    """Variations per shard, the unit of commit and of resumption."""
    batch_size: Positive = 8
    """Rows of a forward pass, with both branches twice as many."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Weights and arithmetic of the teacher; a row that is not finite is repeated in fp32."""
    quantization: StorageMethod | None = None
    """How the linear layers of the denoiser are held."""
    keep: tuple[str, ...] = ()
    """Layers that are not quantized, by name or pattern."""
    previews: PreviewConfig | None = None
    """Images that are rendered once."""
    disk_check: bool = True
    """Refuse to begin where the disk will not hold what is missing; false begins nevertheless."""
    free_floor: int = Field(FREE_FLOOR, ge=0)
    """Bytes that stay free on the store's disk: with less no shard is begun, and stage one ends."""
    processes: Positive = 1
    """Processes that `run` starts on this machine."""
    device: str = "auto"
    """Torch device; `auto` takes CUDA where it is present."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.quantization is not None:
            require_quantizable("precision", self.precision, "quantization")
        return self


# --------------------------------------------------------------------------------------- stage two


class MaskConfig(Record):
    """How masks of the dataset weigh the error; images without a mask count whole."""

    unmasked_weight: Share = 0.1
    """Weight of what lies outside the mask."""
    normalize_area: bool = False
    """Divide by the mean of the mask, so that small masks weigh as much as large ones."""


class DiffusionLossConfig(Record):
    """What a student minimises: one value per row."""

    error: ErrorName = "mse"
    """Error of an element of the prediction."""
    delta: float = Field(1.0, gt=0)
    """Where the Huber error turns linear; scale of log-cosh."""
    guidance_scale: GuidanceScale | None = None
    """Scale, or (low, high) to draw it from per row and epoch, of a store of both branches."""
    data_share: Share = 0.0
    """Share of the image itself in the target of teacher samples; the prediction has the rest."""
    teaches: Literal["prediction", "end", "pairs"] = "prediction"
    """Of trajectories: the prediction at a state, the end that it leads to, or the straight line
    between both ends (reflow)."""
    weighting: WeightingName = "constant"
    """Weight by noise level, in the student's own type of prediction."""
    gamma: float = Field(5.0, gt=0)
    """Bound on the signal-to-noise ratio of `min_snr` and `soft_min_snr`."""
    exponent: float = Field(1.0, gt=0)
    """Exponent of `p2`."""
    mask: MaskConfig | None = None
    """Weigh the error by the masks of the dataset; null ignores them."""
    largest_factor: float = Field(64.0, gt=1)
    """Leave out rows whose target would be amplified more by conversion to the student's type."""

    @property
    def weighting_number(self) -> float:
        """Return the number that the weighting has."""
        return self.exponent if self.weighting == "p2" else self.gamma

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data_share and self.teaches != "prediction":
            raise ValueError(
                f"data_share={self.data_share} with teaches={self.teaches!r}: trajectories begin "
                "in noise and have no image; leave it out"
            )
        return self


class DenoiserInitConfig(Record):
    """Where the weights of a student come from."""

    kind: Literal["fresh", "teacher", "pipeline", "checkpoint"] = "teacher"
    """`fresh` draws them, `teacher` copies the teacher's, `pipeline` those of `model.pipeline`, and
    `checkpoint` loads `path`."""
    path: Path | None = None
    """Folder of a finished model, for `checkpoint`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "checkpoint") != (self.path is not None):
            raise ValueError(
                f"kind={self.kind!r} with path={self.path}: give a path exactly for 'checkpoint'"
            )
        return self


class StudentPreviews(Record):
    """Images during training, with the seeds and conditions of the teacher's."""

    every: Positive = 500
    """Optimizer steps between two grids."""
    guidance_scale: float | None = None
    """Scale that a student conditioned on it is told; null takes the teacher's."""


class DistilConfig(Record):
    """Stage two: one student and how it learns from the store."""

    model: DenoiserConfig
    """Architecture of the student."""
    init: DenoiserInitConfig = DenoiserInitConfig()
    """Where its weights come from."""
    loss: DiffusionLossConfig = DiffusionLossConfig()
    """What it minimises."""
    optimizer: OptimizerConfig
    """Steps, batches (in rows) and learning rate."""
    variations: Literal["all", "one"] = "all"
    """Rows of a sample in an epoch: `all`, or `one` that the epoch draws."""
    buffer_shards: Positive = 4
    """Shards that are shuffled together, and held in memory by each loader process."""
    loader: LoaderConfig = LoaderConfig()
    """How batches are read ahead."""
    previews: StudentPreviews | None = None
    """Images during training."""


# --------------------------------------------------------------------------------------- evaluate


class ImageEvaluateConfig(Record):
    """Comparison of guided and unguided teacher and students from the same start noise."""

    split: Literal["train", "dev", "test"] = "test"
    """Split whose conditions are drawn and whose images the Fréchet distance is to."""
    samples: Positive = 500
    """Images per system; conditions are taken in turn."""
    steps: Annotated[tuple[Positive, ...], Field(min_length=1)] = (25,)
    """Solver steps; the first leads the report."""
    guidance_scale: float | None = None
    """Scale of the guided teacher; null takes that of `rollout`."""
    judge: Literal["digits"] | None = None
    """Classifier of generated images: a support vector machine on the digits; null has none."""
    images: int = Field(10, ge=0)
    """Conditions whose images the report shows."""
    bootstrap_draws: Annotated[int, Field(ge=100)] = 2000
    """Draws of the 95 % intervals, over images."""
    seed: int = Field(0, ge=0)
    """Seed of the start noise and of the bootstrap."""
    batch_size: Positive = 64
    """Images made together."""
    device: str = "auto"
    """Torch device; `auto` takes CUDA where it is present."""
