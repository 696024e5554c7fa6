"""Where trained denoisers lie: pipelines, single files, and what this family saved."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from stages.diffusion.facts import ScheduleFacts
from stages.errors import UserError
from stages.families.diffusion_library import reading
from stages.families.diffusion_networks import Kind, Settings, arguments, kind_of, ready
from stages.families.diffusion_schedules import schedule_of
from stages.families.weights import digest_tensors
from stages.saved_model import OWN_KEY

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
COMPONENTS = ("unet", "transformer")
"""What pipelines call their denoiser."""
WEIGHTS_NAME = re.compile(
    r"(diffusion_pytorch_model|model)(\.(?P<variant>[^.-]+))?(-\d{5}-of-\d{5})?\.safetensors"
)
SCALING = 0.18215
"""Scaling factor of an AutoencoderKL whose configuration has none, as diffusers takes it."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types by their names in configurations."""


@dataclass(frozen=True)
class WeightsFiles:
    """Files of the weights of one component of a pipeline."""

    paths: tuple[Path, ...]
    """In the order of their names."""
    variant: str | None
    """What stands in their names, such as `fp16`, where there are no others."""


def safetensors_in(folder: Path) -> WeightsFiles:
    """Find the weights of a component; raises `UserError` where there are none to read."""
    matches = [(file, WEIGHTS_NAME.fullmatch(file.name)) for file in sorted(folder.glob("*"))]
    found = [(file, match["variant"]) for file, match in matches if match is not None]
    if not found:
        pickled = ", ".join(file.name for file in sorted(folder.glob("*.bin")))
        raise UserError(
            f"{folder} has no weights in safetensors"
            + (
                f", only pickles, which run code ({pickled}): where you trust them, load the "
                "pipeline with `use_safetensors=False` and write it with `save_pretrained`"
                if pickled
                else ": get the folder whole"
            )
        )
    variants = {variant for _, variant in found}
    chosen = None if None in variants else min(v for v in variants if v is not None)
    return WeightsFiles(tuple(file for file, variant in found if variant == chosen), chosen)


@dataclass(frozen=True)
class Source:
    """The weights of a denoiser, its configuration, and its scheduler where it has one."""

    path: Path
    """Folder or single file, as it was given."""
    folder: Path
    """Folder with the configuration; `path` itself, or that of a single file."""
    component: str | None
    """Folder of the denoiser in a pipeline; None where `folder` is the denoiser's own."""

    @classmethod
    def find(cls, path: Path, config: Path | None = None) -> Source:
        """Look what lies at `path`, without loading it; raises `UserError` if that is no model.

        `config` is the folder with the configuration files of a single file.
        """
        require_there(path)
        if path.is_file():
            return cls._single(path, config)
        if (path / "model_index.json").is_file():
            return cls(path, path, _component(path))
        if (path / CONFIG_FILE).is_file():
            return cls(path, path, None)
        raise UserError(
            f"{path} holds no diffusion model here: give a local folder of diffusers' (with "
            "model_index.json), a .safetensors checkpoint, or a folder that `fit` or `train` wrote"
        )

    @classmethod
    def _single(cls, path: Path, config: Path | None) -> Source:
        if path.suffix != ".safetensors":
            raise UserError(
                f"{path} is refused: only .safetensors is read, because other checkpoints are "
                "pickles, which run code; get or convert it as .safetensors"
            )
        if config is None:
            raise UserError(
                f"{path} is a single file, which does not say its architecture, and nothing is "
                "downloaded: give the folder with its configuration files (model_index.json, "
                "unet/config.json, scheduler/scheduler_config.json, ...) beside it"
            )
        return cls(path, config, _component(config))

    @property
    def single(self) -> bool:
        """Whether the weights are one file of a whole checkpoint."""
        return self.path.is_file()

    @property
    def place(self) -> Path:
        """Folder of the denoiser's configuration."""
        return self.folder if self.component is None else self.folder / self.component

    @cached_property
    def description(self) -> dict[str, Any]:
        """The denoiser's config.json; raises `UserError` if it is not to be read."""
        return read_json(self.place / CONFIG_FILE)

    @property
    def adapter(self) -> bool:
        """Whether it is a folder of ours with an adapter, whose base lies elsewhere."""
        described = self.description
        return self.component is None and OWN_KEY in described and "_class_name" not in described

    @property
    def kind(self) -> Kind:
        """The class of its network; raises `UserError` for one unknown."""
        if self.adapter:
            raise UserError(
                f"{self.path} holds an adapter alone: give the pipeline that it was trained on, "
                "and its pytorch_lora_weights.safetensors as the adapter"
            )
        return kind_of(self.description.get("_class_name"), self.place)

    @property
    def settings(self) -> Settings:
        """Arguments of its network; what else its file has, diffusers does not read either."""
        known = arguments(self.kind)
        return {name: value for name, value in self.description.items() if name in known}

    def schedule(self, tokens: int) -> ScheduleFacts | None:
        """Return its noise schedule; None of a network that stands alone."""
        own = self.description.get(OWN_KEY)
        if own is not None:
            return ScheduleFacts.model_validate(own["schedule"])
        file = self.folder / "scheduler" / "scheduler_config.json"
        if self.component is None or not file.is_file():
            return None
        return schedule_of(read_json(file), tokens, source=file)

    def load(self, dtype: torch.dtype) -> Any:
        """Load the network alone, whole, on the CPU; raises `UserError` if that fails."""
        advice = "get it again, or give the configuration that it was trained with"
        with reading(self.path, advice):
            if self.single:
                network = self.kind.network.from_single_file(
                    str(self.path), config=str(self.folder), subfolder=self.component,
                    local_files_only=True, dtype=dtype,
                )  # fmt: skip
                missing = [name for name, p in network.named_parameters() if p.is_meta]
            else:
                network, found = self.kind.network.from_pretrained(
                    self.place, local_files_only=True, use_safetensors=True, dtype=dtype,
                    variant=self.files.variant, output_loading_info=True,
                )  # fmt: skip
                missing = [*found["missing_keys"], *found["unexpected_keys"]]
        if missing:
            raise UserError(
                f"{self.path} is not the network that {self.place / CONFIG_FILE} describes: "
                f"{', '.join(sorted(missing))} are missing or unknown; {advice}"
            )
        return ready(network)

    @cached_property
    def files(self) -> WeightsFiles:
        """Files of the weights; raises `UserError` where there are none to read."""
        return WeightsFiles((self.path,), None) if self.single else safetensors_in(self.place)

    def digest(self) -> str:
        """Sha256 over the tensors of its files as they lie there, hexadecimal."""
        digest = hashlib.sha256()
        digest_tensors(digest, self.tensors())
        return digest.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """Read the tensors of its files."""
        tensors: dict[str, Tensor] = {}
        for file in self.files.paths:
            with reading(file, "get it again"):
                tensors |= load_file(file)
        return tensors


def require_there(path: Path) -> None:
    """Refuse a path at which there is nothing, such as the name of a model elsewhere."""
    if not path.exists():
        raise UserError(
            f"{path} does not exist here: names of models on a hub are not looked up, and nothing "
            "is downloaded; give the local folder of a pipeline, or a .safetensors checkpoint"
        )


def read_json(file: Path) -> dict[str, Any]:
    """Read a configuration file; raises `UserError` when that fails."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}; get the folder whole") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no settings by name; get the folder whole")
    return content


def _component(folder: Path) -> str:
    found = [name for name in COMPONENTS if (folder / name / CONFIG_FILE).is_file()]
    if len(found) != 1:
        raise UserError(
            f"{folder} is no pipeline of diffusers with one denoiser: of unet/config.json and "
            f"transformer/config.json it has {len(found)}; give the folder of a text-to-image or "
            "class-conditional pipeline"
        )
    return found[0]
