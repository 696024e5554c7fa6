"""The frozen model under adapters, and the whole models that adapters can be merged into."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from stages.causal_lm_config import BaseQuantization, CausalLMConfig
from stages.config import DatasetFacts
from stages.errors import UserError
from stages.families import causal_lm_adapter as adapter
from stages.families import causal_lm_checkpoint as checkpoint
from stages.families.hugging_face import PeftModel, PreTrainedModel
from stages.families.weights import check_tensors, kept_layers
from stages.quantization import quantize

OWN_BASE = "base"
"""Folder, within that of an adapter, of a base which exists nowhere else."""
LAYER = re.compile(r"(.*\.layers\.)(\d+)(\..+)")
"""Name of a tensor of a decoder layer."""


@dataclass(frozen=True)
class Base:
    """Where the frozen model under adapters comes from."""

    folder: Path
    """Its folder; where `merged`, that of an adapter which was merged into its own base."""
    merged: bool = False
    """Whether it is a model that lies nowhere, until it is saved with the adapters on it."""

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 over the files of its weights, whatever they are loaded as, hexadecimal."""
        digest = hashlib.sha256()
        for file in sorted(self.folder.glob("*.safetensors")):
            digest.update(file.name.encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        return digest.hexdigest()

    def kept_in(self, folder: Path) -> Base:
        """Return it as it lies on disk; one that lies nowhere is written into `folder`."""
        if not self.merged:
            return self
        own = folder / OWN_BASE
        model, _ = whole_model(self.folder)
        checkpoint.write_description(own, {}, model)
        checkpoint.write_weights(own, model)
        return Base(own)


@dataclass(frozen=True)
class Saved:
    """What `save` wrote beside weights and tokenizer."""

    folder: Path
    config: CausalLMConfig
    facts: DatasetFacts
    condition_dropout: float
    base: Path | None
    """Folder of the base of adapters; None for a whole model."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read config.json of a folder; raises UserError where `save` did not write it."""
        file = folder / checkpoint.CONFIG_FILE
        try:
            description = json.loads(file.read_text(encoding="utf-8"))
            base = description.get("base")
            return cls(
                folder,
                CausalLMConfig.model_validate(description["config"]),
                DatasetFacts.model_validate(description["facts"]),
                float(description["condition_dropout"]),
                folder / OWN_BASE if base == OWN_BASE else base and Path(base),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} is not the configuration of a causal_lm checkpoint: {error}; give a "
                "folder that `fit` or `train` wrote"
            ) from error

    def found_base(self) -> Path | None:
        """Return the base's folder, or None for a whole model; raises UserError if it is gone."""
        if self.base is not None and not self.base.is_dir():
            raise UserError(
                f"{self.folder / checkpoint.CONFIG_FILE} names the base {self.base}, which is no "
                "folder here: put the base back there, or correct the name"
            )
        return self.base


def whole_model(
    folder: Path, *, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, bool]:
    """Load the model of a folder with its adapters merged; and whether there were any.

    The folder is one that `save` wrote, one of transformers', or an adapter of peft's whose base is
    a folder here. Raises UserError when it cannot be read.
    """
    if not (folder / adapter.CONFIG_FILE).is_file():
        return checkpoint.load_model(folder, dtype=dtype), False
    ours = (folder / checkpoint.CONFIG_FILE).is_file()
    base = Saved.read(folder).found_base() if ours else None
    base = base or adapter.named_base(folder)
    return merged(checkpoint.load_model(base, dtype=dtype), folder, base), True


def frozen(
    model: PreTrainedModel, quantization: BaseQuantization | None, device: str
) -> PreTrainedModel:
    """Put a model into the form that adapters are trained on; one that is quantized goes there."""
    if quantization is None:
        return model
    model.to(torch.bfloat16)
    if quantization != "bf16":
        head = model.get_output_embeddings()
        keep = [name for name, layer in model.named_modules() if layer is head]
        quantize(model, quantization, device=device, keep=keep)
    return model


def merged(model: PreTrainedModel, folder: Path, base: Path) -> PreTrainedModel:
    """Merge the adapter in `folder` into its base, the model at `base`; raises UserError."""
    return adapter.merge(adapted(model, folder, Base(base)))


def adapted(model: PreTrainedModel, folder: Path, base: Base) -> PeftModel:
    """Add the adapter in `folder` to its base; raises UserError where it belongs to another."""
    return adapter.load_adapter(
        model, folder, base_path=base.folder, base_fingerprint=base.fingerprint, trainable=False
    )


def require_architecture(model: PreTrainedModel, other: PreTrainedModel, folder: Path) -> None:
    """Refuse to put a model in the place of another kind of model; `folder` is the new one's."""
    ours, theirs = checkpoint.computing(model), checkpoint.computing(other)
    different = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
    if different:
        told = "; ".join(f"{k}: {theirs.get(k)!r}, not {ours.get(k)!r}" for k in different)
        raise UserError(
            f"{folder} holds another kind of model than model.path ({told}): give the teacher's "
            "own base there"
        )


def inherited(
    model: PreTrainedModel, source: PreTrainedModel, folder: Path, layers: Sequence[int] | None
) -> None:
    """Copy the weights of a model that may have more layers; `folder` is what errors call it.

    `layers` names those to keep, in order; None spreads them evenly. Raises UserError if a name or
    shape does not fit.
    """
    expected, theirs = model.state_dict(), source.state_dict()
    kept = kept_layers(folder, layers, _depth(theirs), _depth(expected))
    names = {
        name: LAYER.sub(lambda part: f"{part[1]}{kept[int(part[2])]}{part[3]}", name)
        for name in expected
    }
    found = {name: theirs[other] for name, other in names.items() if other in theirs}
    check_tensors(folder, _shapes(expected), _shapes(found))
    model.load_state_dict(found)


def _depth(names: Iterable[str]) -> int:
    matches = (LAYER.fullmatch(name) for name in names)
    return 1 + max((int(match[2]) for match in matches if match), default=-1)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in tensors.items()}
