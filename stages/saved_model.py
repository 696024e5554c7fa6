"""Folders of finished models, as far as they tell what they hold without loading it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, JsonValue, ValidationError

from stages.architecture import Architecture
from stages.causal_lm_config import CausalLMConfig
from stages.diffusion.model_config import DenoiserConfig
from stages.errors import UserError
from stages.model_config import CodecLMConfig, FamilyName, MagpieConfig

WEIGHTS_FILES = (
    "model.safetensors", "model.nemo", "adapter_model.safetensors",
    "diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors",
)  # fmt: skip
"""What the families call the weights that they save."""
OWN_KEY = "_foretell"
"""Where in a config.json that another package reads too, and is strict about, ours stands."""


class SavedModel(BaseModel):
    """What every family says of a model in its config.json, beside what it alone reads."""

    config: Annotated[
        CodecLMConfig | MagpieConfig | CausalLMConfig | DenoiserConfig,
        Field(discriminator="family"),
    ]
    """Its architecture's settings."""
    architecture: Architecture | None = None
    """How large it is; null where an earlier release saved it."""
    facts: dict[str, JsonValue] = Field(default_factory=dict)
    """The dataset's facts that it was built for."""


def saved_family(folder: Path) -> FamilyName:
    """Return which family of speech models wrote a model folder, from its config.json."""
    family = saved_model(folder).config.family
    if family == "diffusion":
        raise UserError(
            f"{folder} holds a diffusion model, and this is a run of speech: give a folder of a "
            "speech model, or put `kind: diffusion` on top of the configuration"
        )
    return family


def saved_model(folder: Path) -> SavedModel:
    """Read the config.json of a model folder; raises `UserError` where there is none."""
    try:
        description = json.loads((folder / "config.json").read_bytes())
        return SavedModel.model_validate_json(json.dumps(description.get(OWN_KEY, description)))
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        reason = f"config.json is none of foretell's: {'.'.join(map(str, fault['loc']))}: "
        reason += fault["msg"]
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error)
    raise UserError(
        f"{folder} holds no finished model ({reason}): give a folder that `fit` or `train` wrote, "
        "or run that stage first"
    )


def is_saved(folder: Path) -> bool:
    """Whether `folder` holds a finished model: its weights, which are written last."""
    return any((folder / name).exists() for name in WEIGHTS_FILES)


def weights_fingerprint(folder: Path) -> str | None:
    """Hexadecimal sha256 over the files of a model's weights; None before it is finished."""
    if not is_saved(folder):
        return None
    digest = hashlib.sha256()
    for path in (folder / name for name in WEIGHTS_FILES):
        if path.exists():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
