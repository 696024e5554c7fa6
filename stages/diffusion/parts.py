"""The parts of a prediction: what is stored of both branches, and what they make together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stages.diffusion.denoiser import Conditions, Denoiser
from stages.diffusion.image_config import TargetSource
from stages.diffusion.predictions import over
from stages.diffusion.record_config import Contrast
from stages.guidance import guide
from store.schema import Dense

DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Asked:
    """Rows that a denoiser is asked of, on its device."""

    x: Tensor
    """[b, *shape] float32: noised latents."""
    t: Tensor
    """[b] float64: times."""
    conditions: Conditions
    unconditional: Conditions | None
    """Conditions of the same rows that stand for none; None where nobody asks for them."""
    scale: Tensor
    """[b] float32: guidance scale of each row."""

    def rows(self, index: Tensor) -> Asked:
        """Return some rows, of which `index` [n] int64 lies on the same device."""
        none = self.unconditional
        return Asked(
            self.x[index],
            self.t[index],
            {name: values[index] for name, values in self.conditions.items()},
            None if none is None else {name: values[index] for name, values in none.items()},
            self.scale[index],
        )


Passes = Literal["one", "unconditional", "adapter"]
"""Forward passes of a prediction: `one`, or a second one without the condition or the adapter."""


def passes_of(contrast: Contrast, target: Dense, scale: float) -> Passes:
    """Return the forward passes that one model is asked for.

    What is guided at a scale of 1 is the conditional prediction, which takes one.
    """
    match contrast.kind:
        case "model":
            return "one"
        case "adapter":
            return "adapter"
        case "unconditional":
            both = target.branches == "both" or scale != 1
            return "unconditional" if both else "one"


def scale_of(source: TargetSource, contrast: Contrast, scale: float) -> float:
    """Return the guidance scale of a sample's target.

    A target `prior` is what the model predicted before it learns: without guidance, and without
    the adapter, or as the other model, where the delta is to these.
    """
    if source != "prior":
        return scale
    return 1.0 if contrast.kind == "unconditional" else 0.0


def ask(denoiser: Denoiser, asked: Asked, passes: Passes) -> tuple[Tensor, Tensor | None]:
    """Return the prediction [b, *shape] of each row and the one it is compared with, in float32.

    With and without the condition are one forward pass of 2b rows: it loads the weights once and
    fills a device better than two would. Nothing is kept for gradients, so that the memory it
    takes is that of the widest layer, which the setting `batch_size` bounds.
    """
    if passes == "unconditional":
        assert asked.unconditional is not None
        pairs = {
            name: torch.cat([values, asked.unconditional[name]])
            for name, values in asked.conditions.items()
        }
        x, t = torch.cat([asked.x, asked.x]), torch.cat([asked.t, asked.t])
        cond, other = denoiser.predict(x, t, pairs).float().chunk(2)
        return cond, other
    cond = denoiser.predict(asked.x, asked.t, asked.conditions).float()
    if passes == "one":
        return cond, None
    with denoiser.adapter_off():
        return cond, denoiser.predict(asked.x, asked.t, asked.conditions).float()


def stored_parts(
    cond: Tensor, other: Tensor | None, scale: Tensor, target: Dense
) -> dict[str, Tensor]:
    """Return what a store keeps [b, *shape] of float32 predictions, by the names of its arrays.

    The difference is taken in float32 and rounded once: of parts so rounded the guided value at
    7.5 is six times as exact as of both branches. What is larger than the type holds is infinite.
    """
    dtype = DTYPES[target.dtype]
    if target.branches == "guided":
        return {"dense.guided": mixed(cond, other, scale).to(dtype)}
    assert other is not None
    return {"dense.cond": cond.to(dtype), "dense.delta": (cond - other).to(dtype)}


def mixed(cond: Tensor, other: Tensor | None, scale: Tensor) -> Tensor:
    """Return float32 predictions [b, *shape] guided at `scale` [b]; one alone is what it is."""
    return cond if other is None else guide(cond, other, over(scale, cond))


def guided_value(parts: Mapping[str, Tensor], scale: Tensor) -> Tensor:
    """Return the guided prediction [b, *shape] float32 that stored parts make."""
    if "dense.guided" in parts:
        return parts["dense.guided"].float()
    cond, delta = parts["dense.cond"].float(), parts["dense.delta"].float()
    return mixed(cond, cond - delta, scale)
