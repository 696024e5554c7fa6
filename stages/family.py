"""What a model family must be able to do, and the one place that finds what lives in families/."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from stages.architecture import Architecture
from stages.config import DatasetFacts
from stages.errors import UserError
from stages.model_config import FamilyName

if TYPE_CHECKING:
    from stages.diffusion.denoiser import Denoiser, ImageEncoder
    from stages.sampling import RolloutPolicy
    from store.schema import Head, Latent, Record, Sampler, Stream

Sample = Mapping[str, Any]
"""One row of samples.parquet: `sample_id` and the conditioning columns that a family reads."""

Predicted = Callable[[Tensor], Tensor]
"""Of codes [..., T, C] int64 marks [..., T, C] bool those that a model predicts and is taught.

Later timesteps change nothing of earlier ones, so that what pads a batch never matters."""


@dataclass(frozen=True)
class LinearOutput:
    """Logits of a group of streams that are still to be computed: what its linear head reads."""

    states: Tensor
    """[..., H, D] in the type of the model, H being 1 or C_g."""
    weight: Tensor
    """[C_g, V, D]: the head of each stream of the group, in order."""
    bias: Tensor | None = None
    """[C_g, V]; None where the head has none."""

    def logits(self) -> Tensor:
        """Compute all logits [..., C_g, V], with gradients, in the wider of both types."""
        dtype = torch.promote_types(self.states.dtype, self.weight.dtype)
        states, weight = self.states.to(dtype), self.weight.to(dtype)
        shape = (*states.shape[:-2], *weight.shape[:2])
        if states.shape[-2] == 1:
            logits = (states[..., 0, :] @ weight.flatten(0, 1).T).view(shape)
        else:
            by_stream = torch.bmm(states.flatten(0, -3).transpose(0, 1), weight.transpose(1, 2))
            logits = by_stream.transpose(0, 1).reshape(shape)
        return logits if self.bias is None else logits + self.bias

    def at(self, *place: Any) -> LinearOutput:
        """Return the same head on `states[place]`, such as some timesteps of them."""
        return replace(self, states=self.states[place])


@dataclass(frozen=True)
class Branch:
    """What a model predicts with the conditions, or without them: references, no copies.

    Parts are joined along their axis of streams or states, and only by who needs them whole.
    """

    outputs: tuple[Tensor | LinearOutput, ...]
    """Parts of the streams in order: logits [..., c, V] in the type of the model, or a head that
    would give them; predictions [..., c, *shape] where streams are continuous."""
    hidden: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """By group, parts [..., h, D] of what the group's linear head reads, `Family.heads` in all."""

    @property
    def logits(self) -> tuple[Tensor, ...]:
        """The parts with every head applied; each call computes those that were not."""
        return tuple(x.logits() if isinstance(x, LinearOutput) else x for x in self.outputs)

    def at(self, *place: Any) -> Branch:
        """Return what is predicted at `place` of the axes before streams and states."""
        return Branch(
            tuple(x.at(*place) if isinstance(x, LinearOutput) else x[place] for x in self.outputs),
            {group: tuple(x[place] for x in parts) for group, parts in self.hidden.items()},
        )


@dataclass(frozen=True)
class Branches:
    """The two branches of guidance, before they are mixed."""

    cond: Branch
    uncond: Branch | None
    """None where it was not computed: at scale 1, unless both branches were asked for."""

    def at(self, *place: Any) -> Branches:
        """Return what both predict at `place` of the axes before streams and states."""
        return Branches(self.cond.at(*place), self.uncond and self.uncond.at(*place))


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

    def of_rows(self, kept: Tensor) -> Step:
        """Return what was predicted for the rows that are marked in `kept` [b] bool."""
        branches = self.branches and self.branches.at(kept)
        return Step(self.rows[kept], self.timestep, self.codes[kept], self.logits[kept], branches)


@dataclass(frozen=True)
class Scores:
    """Teacher-forced predictions of a batch."""

    outputs: Tensor | tuple[LinearOutput, ...]
    """Logits [B, T, C, V], of which `[:, t]` predict `codes[:, t]`, or the linear heads that would
    give them, one per group in the order of streams; predictions [B, T, C, *shape] where streams
    are continuous."""
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    """Auxiliary losses of the model itself, already weighted (mixture-of-experts balance, ...):
    means over the batch."""
    branches: Branches | None = None
    """What `outputs` were mixed from, [B, T, ...]."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """What the model reports beside its losses: scalars, means over the batch; only logged."""

    @property
    def logits(self) -> Tensor:
        """All logits [B, T, C, V]; where heads are left to the reader, each call computes them."""
        if isinstance(self.outputs, Tensor):
            return self.outputs
        parts = [output.logits() for output in self.outputs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -2)

    def logits_at(self, *place: Any) -> Tensor:
        """Logits [n, C, V] of n places of the batch; of heads, no others are computed."""
        if isinstance(self.outputs, Tensor):
            return self.outputs[place]
        return Scores(tuple(output.at(*place) for output in self.outputs)).logits


class Family(Protocol):
    """A model together with everything that only it knows: conditions, layout, decoding.

    Teacher and student are the same class; `load` and `build` decide dtype and device once.
    """

    name: FamilyName
    """What configurations and manifests call it."""
    network: nn.Module
    """What `score` calls, once per pass: the module, or its compiled or data-parallel form."""
    facts: DatasetFacts
    """What it was built for: alphabet, speakers, codes and the audio codec that makes them."""
    heads: tuple[Head, ...]
    """Its linear output heads, one per group of streams; none where a group's is not linear."""
    forbidden: tuple[int, ...]
    end_id: int | None
    timestep_s: float
    conditions: tuple[str, ...]
    condition_dropout: float
    """Share of training samples whose conditions were dropped; guidance needs more than 0."""
    full_precision: tuple[str, ...]
    """Patterns of the names of linear layers in `module` that are never quantized: output heads,
    and layers whose weight is read by other than their own forward."""
    blocks: tuple[str, ...]
    """Patterns of the names of parts of `module` that a training pass calls as modules, each whole:
    processes that share out the weights gather them block by block. None where only the network
    itself is called."""

    @property
    def module(self) -> nn.Module:
        """The bare model, whose parameters are saved."""
        ...

    @property
    def config(self) -> Record:
        """What it was built by: its architecture, or what is known of a pretrained one."""
        ...

    @property
    def streams(self) -> tuple[Stream, ...] | tuple[Latent, ...]:
        """What it predicts at every timestep, in the order of the axis C."""
        ...

    @property
    def predicted(self) -> Predicted | None:
        """What tells which codes count; None where all do, as with continuous streams.

        It travels to the processes that read batches, so it may hold settings but not the model.
        """
        ...

    @classmethod
    def build(
        cls, config: Any, facts: Mapping[str, Any], *, seed: int, device: str = "cpu"
    ) -> Self:
        """Build a model with fresh weights for a dataset's facts (alphabet, speakers, codes).

        It is to be trained on `device`, where what a family quantizes goes at once; the rest is on
        the CPU until its module is moved.
        """
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

    def inherit(self, path: Path, layers: Sequence[int] | None, *, merged: bool = False) -> None:
        """Copy weights from a teacher's folder, or pretrained file, without building its model.

        `merged` makes the teacher's adapters part of the weights that are copied, instead of the
        start of the student's; a family without adapters raises `UserError`.
        """
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

    def check(self, sampler: Sampler) -> None:
        """Refuse settings with which codes can be drawn of no sample; raises `UserError`."""
        ...

    def check_sample(self, sample: Sample, timesteps: int) -> None:
        """Refuse a sample that a rollout of up to `timesteps` would fail on; raises `Refused`.

        It is asked of every sample before the first shard, so that nothing fails hours into a run:
        are there conditions that the model reads, are the codes whole frames of its codebooks, is
        there room for so many timesteps?
        """
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
        linear: bool = False,
        local: bool = True,
    ) -> Scores:
        """Predict every timestep of given codes in one parallel pass.

        `codes` [B, T, C] int64, 0 for continuous streams, `lengths` [B] int64; what lies beyond a
        length is never read. With `cfg_scale` other than 1, or `both_branches`, both are computed
        and mixed (no gradients wanted); `unconditional` [B] bool drops the conditions of the marked
        samples (condition dropout); `alignment` asks for the loss "alignment", where the family has
        one. `linear`, which only families whose heads are all linear are asked for, leaves the
        heads to who reads the scores: `Scores.outputs` and those of the branches are
        `LinearOutput`; guided ones read mixed states, for guidance commutes with a linear head.
        Without `local` the group of this name, where there is one, is neither computed nor
        returned, and `codes` need none of it.
        """
        ...

    def local_parameters(self) -> Iterator[nn.Parameter]:
        """Yield what only the streams of the group `local` train; nothing where there are none."""
        ...


def has_linear_heads(family: Family) -> bool:
    """Whether all streams come from linear heads, so that `score` may leave them to its caller."""
    return {head.group for head in family.heads} == {stream.group for stream in family.streams}


def load_family(name: FamilyName) -> type[Family]:
    """Import the family `name`; raises `UserError` with the pip command if a package is missing."""
    family: type[Family] = _find(f"family {name!r}", *FAMILIES[name])
    return family


def load_audio_codec_class(kind: str) -> Any:
    """Import the class of the audio codecs of a kind that lives among the families.

    Raises `UserError` when there is none of this kind, or with the pip command.
    """
    if kind not in AUDIO_CODECS:
        raise UserError(
            f"audio codec of kind {kind!r}: this release knows residual_mel and "
            f"{', '.join(AUDIO_CODECS)}"
        )
    return _find(f"audio codec of kind {kind!r}", *AUDIO_CODECS[kind])


def load_denoiser() -> type[Denoiser]:
    """Import the family of diffusion models; raises `UserError` with the pip command."""
    denoiser: type[Denoiser] = _find(
        "family 'diffusion'", "stages.families.diffusion", "Diffusion", "diffusion"
    )
    return denoiser


def load_image_encoder() -> type[ImageEncoder]:
    """Import the encoders of diffusers' pipelines; raises `UserError` with the pip command."""
    encoder: type[ImageEncoder] = _find(
        "an encoder of kind 'pipeline'",
        "stages.families.diffusion_encoders",
        "PipelineEncoder",
        "diffusion",
    )
    return encoder


def _find(what: str, module_name: str, class_name: str, extra: str | None) -> Any:
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        if extra is None:
            raise
        absent = isinstance(error, ModuleNotFoundError)
        trouble = (
            f"needs the package {error.name!r}, which is not installed"
            if absent
            else f"cannot be imported ({error}), for its packages do not fit together"
        )
        raise UserError(f"{what} {trouble}: pip install 'foretell[{extra}]'") from error
    return getattr(module, class_name)


FAMILIES: dict[FamilyName, tuple[str, str, str | None]] = {
    "causal_lm": ("stages.families.causal_lm", "CausalLM", "orpheus"),
    "codec_lm": ("stages.families.codec_lm", "CodecLM", None),
    "magpie": ("stages.families.magpie", "Magpie", "magpie"),
}
"""Family → module, class, and the extra of foretell that installs what it imports."""

AUDIO_CODECS: dict[str, tuple[str, str, str]] = {
    "nemo": ("stages.families.nemo_codec", "NemoCodec", "magpie"),
    "snac": ("stages.families.snac_codec", "SnacCodec", "orpheus"),
}
"""Kind of audio codec → the same; the module of a package's codecs stands beside its models."""
