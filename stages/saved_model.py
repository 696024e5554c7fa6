"""Folders of finished models, as far as they tell what they hold without loading it."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field, JsonValue

from stages.architecture import Architecture
from stages.errors import UserError
from stages.model_config import FamilyName, ModelConfig

WEIGHTS_FILES = (
    "model.safetensors", "model.nemo", "adapter_model.safetensors",
    "diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors",
)  # fmt: skip
"""What the families call the weights that they save."""


class SavedModel(BaseModel):
    """What every family says of a model in its config.json, beside what it alone reads."""

    config: ModelConfig
    """Its architecture's settings."""
    architecture: Architecture | None = None
    """How large it is; null where an earlier release saved it."""
    facts: dict[str, JsonValue] = Field(default_factory=dict)
    """The dataset's facts that it was built for."""


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
