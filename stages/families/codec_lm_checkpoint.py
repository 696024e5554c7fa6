"""Checkpoints of `codec_lm`: config.json and model.safetensors in one folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stages.config import DatasetFacts
from stages.errors import UserError
from stages.families.weights import check_tensors, kept_layers
from stages.model_config import CodecLMConfig
from stages.publish import publish_file, replace_file

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
DECODER_LAYER = re.compile(r"decoder\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose configuration has been read and whose weights have not."""

    path: Path
    config: CodecLMConfig
    facts: DatasetFacts
    condition_dropout: float

    def tensors(self, network: nn.Module, *, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Read the weights of `network`; raises UserError if a name or shape is not its own."""
        weights = self.path / WEIGHTS_FILE
        expected = {name: tuple(x.shape) for name, x in network.state_dict().items()}
        with open_weights(weights) as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
            check_tensors(weights, expected, found)
            return {name: file.get_tensor(name).to(device, dtype) for name in expected}


def write_checkpoint(
    path: Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write the files of a checkpoint into the folder `path`, which is made if need be.

    Each file appears whole, the weights last: where they are, the checkpoint is finished.
    """
    text = json.dumps(description, indent=2, sort_keys=True) + "\n"
    replace_file(path / CONFIG_FILE, text.encode())
    with publish_file(path / WEIGHTS_FILE) as draft:
        save_file({name: x.detach().contiguous() for name, x in tensors.items()}, draft)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the configuration of a checkpoint folder; raises UserError if it is missing or wrong."""
    file = path / CONFIG_FILE
    try:
        description = json.loads(file.read_text())
        return Checkpoint(
            path=path,
            config=CodecLMConfig.model_validate(description["config"]),
            facts=DatasetFacts.model_validate(description["facts"]),
            condition_dropout=float(description["condition_dropout"]),
        )
    except FileNotFoundError:
        raise UserError(
            f"{file} does not exist: give a folder that `fit` or `train` wrote"
        ) from None
    except (ValidationError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not the configuration of a codec_lm checkpoint: {error}; restore the file "
            "or train the model again"
        ) from error


@contextmanager
def open_weights(file: Path) -> Iterator[Any]:
    """Open a safetensors file for reading single tensors; raises UserError naming the file."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(
            f"{file} cannot be read as safetensors: {error}; restore the file or train again"
        ) from error


def inherited_tensors(
    path: Path, layers: Sequence[int] | None, network: nn.Module, facts: DatasetFacts
) -> dict[str, Tensor]:
    """Read the tensors of a (deeper) model that `network` inherits, decoder layers renumbered.

    Reads one tensor after the other and never builds the other model. Raises UserError if the
    facts, the layers, a name or a shape do not fit.
    """
    checkpoint = read_checkpoint(path)
    weights = path / WEIGHTS_FILE
    _check_facts(checkpoint, facts)
    expected = network.state_dict()
    with open_weights(weights) as file:
        kept = kept_layers(weights, layers, _depth(list(file.keys())), _depth(list(expected)))
        sources = _sources(list(file.keys()), kept)
        found = {
            name: tuple(file.get_slice(source).get_shape()) for name, source in sources.items()
        }
        check_tensors(weights, {name: tuple(x.shape) for name, x in expected.items()}, found)
        return {name: file.get_tensor(sources[name]).to(x) for name, x in expected.items()}


def _check_facts(checkpoint: Checkpoint, facts: DatasetFacts) -> None:
    """Refuse to inherit from a model whose ids mean something else."""
    theirs, ours = checkpoint.facts.model_dump(), facts.model_dump()
    different = [name for name in ours if ours[name] != theirs[name]]
    if different:
        listed = "; ".join(f"{name}: {theirs[name]!r}, not {ours[name]!r}" for name in different)
        raise UserError(
            f"{checkpoint.path / CONFIG_FILE} describes a model of another dataset ({listed}): "
            "inherit from a model of this dataset, or start fresh"
        )


def _depth(names: Sequence[str]) -> int:
    matches = (DECODER_LAYER.fullmatch(name) for name in names)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def _sources(names: Sequence[str], kept: Sequence[int]) -> dict[str, str]:
    """Map each name of the new model to the name it is copied from."""
    sources = {name: name for name in names if not DECODER_LAYER.fullmatch(name)}
    suffixes = sorted({match[2] for name in names if (match := DECODER_LAYER.fullmatch(name))})
    for new, old in enumerate(kept):
        sources |= {f"decoder.{new}.{x}": f"decoder.{old}.{x}" for x in suffixes}
    return sources
