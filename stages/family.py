"""What a model family must be able to do, and the one place that finds a family by name."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from pydantic import BaseModel, Field, JsonValue

from stages.architecture import Architecture
from stages.config import DatasetFacts, FamilyName, ModelConfig
from stages.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from stages.sampling import RolloutPolicy
    from store.schema import Head, Latent, Stream

Sample = Mapping[str, Any]
"""One row of samples.parquet: `sample_id` and the conditioning columns that a family reads."""


class SavedModel(BaseModel):
    """What every family says of a model in its config.json, beside what it alone reads."""

    config: ModelConfig
    """Its architecture's settings."""
    architecture: Architecture | None = None
    """How large it is; null where an earlier release saved it."""
    facts: dict[str, JsonValue] = Field(default_factory=dict)
    """The dataset's facts that it was built for."""


@dataclass(frozen=True)
class Branch:
    """What a model predicts with the conditions, or without them: references, no copies.

    Parts are joined along their axis of streams or states, and only by who needs them whole.
    """

    logits: tuple[Tensor, ...]
    """Parts [..., c, V] of the streams in order, in the type of the model; predictions
    [..., c, *shape] where streams are continuous."""
    hidden: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """By group, parts [..., h, D] of what the group's linear head reads, `Family.heads` in all."""


@dataclass(frozen=True)
class Branches:
    """The two branches of guidance, before they are mixed."""

    cond: Branch
    uncond: Branch | None
    """None where it was not computed: at scale 1, unless both branches were asked for."""


@dataclass(frozen=True)
class Step:
    """What a teacher predicted at one timestep for the rollouts that are still running."""

    rows: Tensor
    """[b] int64: which samples of the batch these are."""
    timestep: int
    """Decoding step, counted from 0."""
    codes: Tensor
    """[b, C] int64: the codes drawn; 0 for continuous streams."""
    logits: Tensor
    """[b, C, V] float32: guided, before forbidden ids are masked and before any filter. What
    stands beyond the vocabulary of a stream is not read. Continuous: predictions [b, C, *shape]."""
    branches: Branches | None = None
    """What `logits` were mixed from, [b, ...]."""


@dataclass(frozen=True)
class Scores:
    """Teacher-forced predictions of a batch."""

    logits: Tensor
    """[B, T, C, V]: `logits[:, t]` predicts `codes[:, t]`; [B, T, C, *shape] where streams are
    continuous."""
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    """Auxiliary losses of the model itself, already weighted (mixture-of-experts balance, ...)."""
    branches: Branches | None = None
    """What `logits` were mixed from, [B, T, ...]."""


class Family(Protocol):
    """A model together with everything that only it knows: conditions, layout, decoding.

    Teacher and student are the same class; `load` and `build` decide dtype and device once.
    """

    name: FamilyName
    """What configurations and manifests call it."""
    module: nn.Module
    """The bare model, whose parameters are saved."""
    network: nn.Module
    """What `score` calls, once per pass: the module, or its compiled or data-parallel form."""
    config: ModelConfig
    """Its architecture."""
    facts: DatasetFacts
    """What it was built for: alphabet, speakers, codes and the audio codec that makes them."""
    streams: tuple[Stream, ...] | tuple[Latent, ...]
    heads: tuple[Head, ...]
    """Its linear output heads, one per group of streams; none where a group's is not linear."""
    forbidden: tuple[int, ...]
    end_id: int | None
    timestep_s: float
    conditions: tuple[str, ...]
    condition_dropout: float
    """Share of training samples whose conditions were dropped; guidance needs more than 0."""

    @classmethod
    def build(cls, config: Any, facts: Mapping[str, Any], *, seed: int) -> Self:
        """Build a model with fresh weights for a dataset's facts (alphabet, speakers, codes)."""
        ...

    @classmethod
    def load(cls, path: Path, *, device: str, dtype: torch.dtype) -> Self:
        """Load what `save` wrote."""
        ...

    @classmethod
    def pretrained(
        cls, config: Any, facts: DatasetFacts, *, device: str, dtype: torch.dtype
    ) -> Self:
        """Load a teacher that was trained elsewhere, by its record in `teacher.pretrained`.

        `facts` are those of the prepared dataset; raises `UserError` that says what of the
        checkpoint does not match them.
        """
        ...

    def save(self, path: Path) -> None:
        """Write configuration (config.json) and then weights into the folder `path`.

        Weights are one of `WEIGHTS_FILES` and nothing pickled; where they lie, the model is whole.
        """
        ...

    def inherit(self, path: Path, layers: Sequence[int] | None) -> None:
        """Copy weights from a teacher's folder, or pretrained file, without building its model."""
        ...

    def architecture(self) -> Architecture:
        """Return how large the model is and what decoding a timestep costs."""
        ...

    def adopt_codebooks(self, vectors: Tensor) -> None:
        """Start from what the audio codec's codes mean: `vectors` [codebooks, V, D] float32."""
        ...

    def fingerprint(self) -> str:
        """Sha256 over configuration and weights, hexadecimal."""
        ...

    def tokenizer_fingerprint(self) -> str:
        """Sha256 over whatever turns conditions into ids, hexadecimal."""
        ...

    def timesteps(self, sample: Sample) -> int:
        """Timesteps that the sample's own recording has, end block included."""
        ...

    def reference_codes(self, sample: Sample) -> Tensor:
        """[T, C] int64: the recording's own codes with the end block, in this family's layout.

        0 for continuous streams, whose T is all that it says.
        """
        ...

    def frames(self, codes: Tensor) -> Tensor:
        """[F, codebooks] int64: the audio codec's frames of `codes` [T, C], without the end."""
        ...

    def head_weights(self) -> dict[str, np.ndarray]:
        """Return `GROUP.weight` [C, V, D] and `GROUP.bias` [C, V], float32, of every head.

        The logits of a stream are its weight times the state that `Branch.hidden` holds, plus its
        bias, which is 0 where the head has none.
        """
        ...

    def rollout(
        self,
        samples: Sequence[Sample],
        policy: RolloutPolicy,
        cfg_scale: float,
        *,
        both_branches: bool = False,
    ) -> Iterator[Step]:
        """Generate under guidance, one `Step` per timestep; finished rows leave the batch.

        `both_branches` computes the unconditional branch at scale 1 too, for who keeps it.
        """
        ...

    def score(
        self,
        samples: Sequence[Sample],
        codes: Tensor,
        lengths: Tensor,
        *,
        cfg_scale: float = 1.0,
        both_branches: bool = False,
        unconditional: Tensor | None = None,
        alignment: bool = False,
    ) -> Scores:
        """Predict every timestep of given codes in one parallel pass.

        `codes` [B, T, C] int64, 0 for continuous streams, `lengths` [B] int64; what lies beyond a
        length is never read. With `cfg_scale` other than 1, or `both_branches`, both are computed
        and mixed (no gradients wanted); `unconditional` [B] bool drops the conditions of the marked
        samples (condition dropout); `alignment` asks for the loss "alignment", where the family has
        one.
        """
        ...


def load_family(name: FamilyName) -> type[Family]:
    """Import the family `name`; raises `UserError` with the pip command if a package is missing."""
    module_name, class_name, extra = FAMILIES[name]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if extra is None:
            raise
        raise UserError(
            f"family {name!r} needs the package {error.name!r}, which is not installed: "
            f"pip install 'foretell[{extra}]'"
        ) from error
    family: type[Family] = getattr(module, class_name)
    return family


def saved_family(folder: Path) -> FamilyName:
    """Return which family wrote a model folder, from its config.json."""
    return saved_model(folder).config.family


def saved_model(folder: Path) -> SavedModel:
    """Read the config.json of a model folder; raises `UserError` where there is none."""
    try:
        return SavedModel.model_validate_json((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} holds no finished model ({error}): give a folder that `fit` or `train` "
            "wrote, or run that stage first"
        ) from None


def is_saved(folder: Path) -> bool:
    """Whether `folder` holds a finished model: its weights, which are written last."""
    return any((folder / name).exists() for name in WEIGHTS_FILES)


WEIGHTS_FILES = ("model.safetensors", "model.nemo")
"""What the families call the weights that they save."""

FAMILIES: dict[FamilyName, tuple[str, str, str | None]] = {
    "codec_lm": ("stages.families.codec_lm", "CodecLM", None),
    "magpie": ("stages.families.magpie", "Magpie", "magpie"),
}
"""Family → module, class, and the extra of foretell that installs what it imports."""
