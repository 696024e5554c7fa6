"""What a student is taught of a row: stored parts, mixed and converted, from exactly one source.

A sample's `target` says from which: the teacher's stored prediction at the chosen scale, the image
itself, or what was predicted before anything was learned, which keeps what the student can do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.diffusion.conversion import Conversion
from stages.diffusion.denoiser import Conditions
from stages.diffusion.facts import Recording
from stages.diffusion.model_config import PredictionType
from stages.diffusion.predictions import of_pair, over
from stages.diffusion.rows import CONDITION, RowBatch
from stages.diffusion.stored_row import DATA, PRIOR
from stages.diffusion.target_sums import TARGET
from stages.diffusion.train_config import DiffusionLossConfig
from stages.guidance import guide
from stages.packed import Packed
from stages.targets import Mixture, read_scales
from store.schema import Manifest


@dataclass(frozen=True)
class Question:
    """What a student is asked, on its device."""

    x: Tensor
    """[b, *shape] float32: noised latents in its own schedule."""
    t: Tensor
    """[b] float64."""
    conditions: Conditions
    scale: Tensor | None
    """[b] float32: the guidance scale that it is told; None where it takes none."""


@dataclass(frozen=True)
class TaughtRows:
    """Rows of a micro-batch with their targets."""

    question: Question
    target: Tensor
    """[b, *shape] float32, in the student's type of prediction, always finite."""
    weights: Tensor
    """[b] float32: of the sample, and 0 where there is nothing to learn."""
    alpha: Tensor
    """[b] float64, of the student's schedule."""
    sigma: Tensor
    """[b] float64, likewise."""
    mask: Tensor | None
    """[b, 1, h, w], where masks count."""


Base = Callable[[Question], Tensor]
"""What the student predicts [b, *shape] without its adapter."""


class RowTargets:
    """Makes targets of the rows of one store for one student."""

    def __init__(
        self,
        manifest: Manifest,
        recording: Recording,
        conversion: Conversion,
        loss: DiffusionLossConfig,
        *,
        takes_scale: bool,
        seed: int,
        device: torch.device,
    ) -> None:
        self._conversion, self._loss = conversion, loss
        self._takes_scale, self._seed, self._device = takes_scale, seed, device
        self.transfers = transfers(manifest, recording, loss)
        """Whether what is stored is added to what the student predicts without its adapter."""
        self._off = 1.0 if recording.contrast.kind == "unconditional" else 0.0
        self._recorded_scale = manifest.guidance.scale
        self._embedded = recording.embedded_guidance

    def of(self, batch: RowBatch, base: Base) -> TaughtRows:
        """Move a micro-batch to the device and make its targets; `base` is asked for transfers."""
        arrays = batch.arrays.to(self._device)
        scale = self._scales(batch, arrays)
        question = self._question(arrays, scale)
        return TaughtRows(
            question=question,
            target=self._target(arrays, scale, question, base),
            weights=arrays["weight"],
            alpha=arrays["own_alpha"],
            sigma=arrays["own_sigma"],
            mask=arrays["mask"] if "mask" in arrays.fields else None,
        )

    def _scales(self, batch: RowBatch, arrays: Packed) -> Tensor:
        """[b] float32: the scale at which every row's parts are mixed; data are without any."""
        drawn = read_scales(self._loss.guidance_scale, self._seed, batch.keys, batch.epochs)
        if drawn is None:
            drawn = torch.full((len(batch.keys),), self._recorded_scale)
        source, scale = arrays["source"], drawn.to(self._device)
        scale = torch.where(source == PRIOR, self._off, scale)
        return torch.where(source == DATA, 1.0, scale)

    def _question(self, arrays: Packed, scale: Tensor) -> Question:
        x_t = arrays["x_t"]
        return Question(
            x=x_t * over(arrays["scale"].float(), x_t),
            t=arrays["t"],
            conditions={
                name.removeprefix(CONDITION): arrays[name]
                for name in arrays.fields
                if name.startswith(CONDITION)
            },
            scale=self._told(arrays, scale) if self._takes_scale else None,
        )

    def _told(self, arrays: Packed, scale: Tensor) -> Tensor:
        """[b] float32: the number of a teacher that was told one, whatever its parts are mixed at.

        Data are without guidance.
        """
        if self._embedded is None:
            return scale
        told = torch.full_like(scale, self._embedded)
        return torch.where(arrays["source"] == DATA, 1.0, told)

    def _target(self, arrays: Packed, scale: Tensor, question: Question, base: Base) -> Tensor:
        match self._loss.teaches:
            case "pairs":
                return self._of_pair(arrays)
            case "end":
                return self._converted(arrays, arrays["x0"], "sample")
        if not any(name.startswith(TARGET) for name in arrays.fields):
            return self._of_pair(arrays)
        if self.transfers:
            target = self._transferred(arrays, scale, base(question))
        else:
            target = self._converted(arrays, mixed(arrays, scale), None)
        if "x0" not in arrays.fields:
            return target
        source = arrays["source"]
        share = torch.where(source == PRIOR, 0.0, self._loss.data_share)
        share = torch.where(source == DATA, 1.0, share)
        return _blend(target, self._of_pair(arrays), share)

    def _of_pair(self, arrays: Packed) -> Tensor:
        own = arrays["own_alpha"], arrays["own_sigma"]
        return of_pair(arrays["x0"], arrays["noise"], *own, self._conversion.wanted)

    def _converted(self, arrays: Packed, value: Tensor, source: PredictionType | None) -> Tensor:
        levels = arrays["alpha"], arrays["sigma"], arrays["scale"]
        return self._conversion.converted(value, arrays["x_t"], *levels, source)

    def _transferred(self, arrays: Packed, scale: Tensor, base: Tensor) -> Tensor:
        """The student's own prediction without its adapter, and the teacher's difference to it."""
        levels = arrays["alpha"], arrays["sigma"], arrays["scale"]
        delta = arrays[f"{TARGET}delta"].squeeze(1).float()
        with_delta = base.float() + self._conversion.difference(delta, *levels)
        return guide(with_delta, base, over(scale, with_delta))


def transfers(manifest: Manifest, recording: Recording, loss: DiffusionLossConfig) -> bool:
    """Whether a difference is taught on top of the student's own prediction (not guidance)."""
    contrast = recording.contrast.kind != "unconditional"
    return contrast and manifest.branches == "both" and loss.teaches == "prediction"


def mixed(arrays: Packed, scale: Tensor) -> Tensor:
    """Return stored predictions [b, *shape], of both parts mixed at the scale [b] of each row."""
    if f"{TARGET}guided" in arrays.fields:
        return arrays[f"{TARGET}guided"].squeeze(1).float()
    cond, delta = arrays[f"{TARGET}cond"], arrays[f"{TARGET}delta"]
    every = torch.arange(len(scale), device=scale.device)
    return Mixture(cond, delta, scale.unsqueeze(1), differs=True).rows(every)


def _blend(one: Tensor, two: Tensor, share: Tensor) -> Tensor:
    """Return `one` [b, ...] with a share [b] of `two`; exactly one of them at 0 and 1."""
    wide = over(share, one)
    blended = torch.lerp(one, two, wide)
    return torch.where(wide == 0, one, torch.where(wide == 1, two, blended))
