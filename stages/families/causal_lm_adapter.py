"""Low-rank adapters of language models (Hu et al., 2106.09685), in the files of stock peft.

An adapter adds ΔW = scale · B·A to the frozen weight of a linear layer: A [rank, in] is drawn, B
[out, rank] begins at 0, so that a fresh adapter changes nothing.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stages.causal_lm_config import LoraConfig
from stages.errors import UserError
from stages.families.hugging_face import (
    LoraLayer,
    PeftLoraConfig,
    PeftModel,
    PreTrainedModel,
    get_pattern_key,
    get_peft_model,
)
from stages.families.low_rank import Factors, truncate
from stages.families.weights import check_tensors
from stages.publish import publish_file, replace_file

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
"""What stock peft calls them."""
ADAPTER = "default"
"""What peft calls the one adapter of a model."""
BASE_KEY = "foretell_base"
"""Key of the weights' metadata that holds the fingerprint of the base."""
HARMLESS = {
    "auto_mapping", "peft_version", "revision", "inference_mode", "task_type", "runtime_config",
    "eva_config", "loftq_config", "megatron_core", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
"""Keys of peft's that say nothing about what an adapter adds."""

logger = logging.getLogger(__name__)


def attach(model: PreTrainedModel, config: LoraConfig, *, seed: int) -> PeftModel:
    """Freeze a model, quantized or not, and add fresh adapters that belong to `seed`.

    The model is changed in place. Raises UserError when a target names no linear layer, or the
    output head, whose weight the losses read.
    """
    _check_targets(model, config.targets)
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU, then moves
        torch.manual_seed(seed)
        adapted = _inject(
            model,
            PeftLoraConfig(
                task_type="CAUSAL_LM",
                r=config.rank,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules=list(config.targets),
            ),
        )
    logger.info(
        "LoRA: rank %d on %d layers, %d parameters trained",
        config.rank, len(_layers(adapted)), trained_parameters(adapted),
    )  # fmt: skip
    return adapted


def trained_parameters(model: nn.Module) -> int:
    """Count the parameters that training changes."""
    return sum(x.numel() for x in model.parameters() if x.requires_grad)


def save_adapter(model: PeftModel, folder: Path, *, base_path: Path, base_fingerprint: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors into `folder`, the weights last.

    Stock `PeftModel.from_pretrained(base, folder)` opens it. `base_fingerprint` is that of the base
    as it was before any quantization; it stands in the metadata of the weights.
    """
    settings = model.peft_config[ADAPTER]
    targets = settings.target_modules
    description = {
        "peft_type": "LORA",
        "peft_version": importlib.metadata.version("peft"),
        "task_type": "CAUSAL_LM",
        # Absolute, as whoever opens the adapter may stand elsewhere.
        "base_model_name_or_path": os.path.abspath(base_path),
        "inference_mode": True,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        **{name: getattr(settings, name) for name in AdapterConfig.model_fields if name in SHAPING},
    }
    text = json.dumps(description, indent=2, sort_keys=True) + "\n"
    replace_file(folder / CONFIG_FILE, text.encode())
    tensors = {name: x.detach().cpu().contiguous() for name, x in factors(model).items()}
    with publish_file(folder / WEIGHTS_FILE) as draft:
        save_file(tensors, draft, metadata={BASE_KEY: base_fingerprint})


def load_adapter(
    model: PreTrainedModel,
    folder: Path,
    *,
    base_path: Path,
    base_fingerprint: str,
    trainable: bool,
) -> PeftModel:
    """Add the adapter in `folder` to its base, which is frozen and changed in place.

    Reads safetensors only. Raises UserError for an adapter of another base (by its fingerprint
    where foretell wrote it, else by name), of another kind than plain LoRA, with unknown keys, or
    whose layers and shapes are not the model's.
    """
    saved = _read(folder)
    saved.require_base(base_path, base_fingerprint)
    targets = saved.config.target_modules
    if not isinstance(targets, str):
        _check_targets(model, targets, of=f"{folder / CONFIG_FILE}: target_modules")
    with torch.random.fork_rng(devices=[]):  # what is drawn is overwritten
        adapted = _inject(model, saved.config.as_peft(inference=not trainable))
    ours = factors(adapted)
    expected = {name: tuple(x.shape) for name, x in ours.items()}
    found = {name: tuple(x.shape) for name, x in saved.tensors.items()}
    check_tensors(folder / WEIGHTS_FILE, expected, found)
    with torch.no_grad():
        for name, x in ours.items():
            x.copy_(saved.tensors[name])
    return adapted


def start_from(model: PeftModel, folder: Path, *, base_path: Path, base_fingerprint: str) -> None:
    """Let the adapters of `model` begin as the best approximation of the adapter in `folder`.

    Ranks and scales stay those of `model`. Layers that only `model` adapts keep their fresh start,
    which adds nothing. Raises UserError as `load_adapter` does, when the adapter in `folder`
    changes a layer that `model` does not, and where its rank is lower.
    """
    saved = _read(folder)
    saved.require_base(base_path, base_fingerprint)
    sources, layers = saved.layers(), _layers(model)
    missing = sorted({name.rpartition(".")[2] for name in sources.keys() - layers.keys()})
    if missing:
        raise UserError(
            f"{folder} adapts {', '.join(missing)}, which the model does not everywhere: add them "
            "to lora.targets"
        )
    for name, source in sources.items():
        layer = layers[name]
        try:
            wanted = truncate(source, layer.r[ADAPTER], layer.scaling[ADAPTER])
        except UserError as error:
            raise UserError(f"{folder}: {name}: {error}") from None
        down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        if (down.shape, up.shape) != (wanted.down.shape, wanted.up.shape):
            raise UserError(
                f"{folder}: {name} goes from {wanted.down.shape[1]} to {wanted.up.shape[0]} "
                f"features, but the model's from {down.shape[1]} to {up.shape[0]}: give an "
                "adapter of this base"
            )
        with torch.no_grad():
            down.copy_(wanted.down)
            up.copy_(wanted.up)


def merge(model: PeftModel) -> PreTrainedModel:
    """Add the adapters to the weights and return the bare model, still frozen.

    The weights are changed in place. Raises UserError for a quantized base, which would have to be
    rounded again.
    """
    quantized = [name for name, layer in _layers(model).items() if not _is_plain(layer)]
    if quantized:
        raise UserError(
            f"adapters cannot be merged into quantized weights ({quantized[0]} and "
            f"{len(quantized) - 1} more): load the base without quantization, then the adapter, "
            "and merge these"
        )
    merged: PreTrainedModel = model.merge_and_unload()
    return merged


def named_base(folder: Path) -> Path:
    """Folder of the base that an adapter names; raises UserError where it is none here."""
    named = _read_config(folder / CONFIG_FILE).base_model_name_or_path
    if not named or not Path(named).is_dir():
        raise UserError(
            f"{folder / CONFIG_FILE} names the base {named!r} (base_model_name_or_path), which is "
            "no folder here: put the base there, or correct the name"
        )
    return Path(named)


class AdapterConfig(BaseModel):
    """What adapter_config.json says that foretell reads."""

    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: str
    base_model_name_or_path: str | None = None
    target_modules: list[str] | str
    r: int = Field(gt=0)
    lora_alpha: float
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    init_lora_weights: JsonValue = True

    def faults(self) -> list[str]:
        """Name all that is more, or other, than plain LoRA."""
        if self.peft_type != "LORA":
            return [f"peft_type is {self.peft_type!r}"]
        known = {name: field.default for name, field in _peft_fields().items()}
        given = self.model_extra or {}
        faults = [f"{name} is an unknown key" for name in sorted(given.keys() - known.keys())]
        faults += [
            f"{name} is {given[name]!r}"
            for name in sorted(given.keys() & known.keys() - HARMLESS)
            if given[name] and given[name] != known[name]
        ]
        # Other ways to begin change the base too, which the adapter then belongs to.
        if self.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
            faults.append(f"init_lora_weights is {self.init_lora_weights!r}")
        return faults

    def as_peft(self, *, inference: bool) -> PeftLoraConfig:
        """Return it as peft has it."""
        return PeftLoraConfig(
            task_type="CAUSAL_LM",
            inference_mode=inference,
            target_modules=self.target_modules,
            **{name: getattr(self, name) for name in SHAPING},
        )

    def scale(self, layer: str, rank: int) -> float:
        """Return what the product of a layer's factors is multiplied by."""
        key = get_pattern_key(self.alpha_pattern.keys(), layer)
        alpha = self.alpha_pattern.get(key, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


SHAPING = (
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
    "exclude_modules", "layers_to_transform", "layers_pattern",
)  # fmt: skip
"""Settings that foretell and peft call alike, and that say what an adapter is."""


@dataclass(frozen=True)
class _Saved:
    """An adapter as its folder has it."""

    folder: Path
    config: AdapterConfig
    tensors: Mapping[str, Tensor]
    base_fingerprint: str | None

    def require_base(self, path: Path, fingerprint: str) -> None:
        """Refuse an adapter that was trained on another base than the one at `path`."""
        named = self.config.base_model_name_or_path
        if self.base_fingerprint is not None:
            if self.base_fingerprint != fingerprint:
                raise UserError(
                    f"{self.folder} was trained on another base (foretell's fingerprint "
                    f"{self.base_fingerprint}, from {named}) than {path} ({fingerprint}): give "
                    "that base, or an adapter of this one"
                )
        elif named and not _same_base(named, path):
            raise UserError(
                f"{self.folder} was trained on {named!r} (base_model_name_or_path in "
                f"{CONFIG_FILE}), but the base is {path}: give that base, or correct the name if "
                "both are the same model"
            )

    def layers(self) -> dict[str, Factors]:
        """Return the factors by the layer's name in the model."""
        layers = {}
        for name, down in self.tensors.items():
            prefix, found, _ = name.partition(".lora_A.")
            up = self.tensors.get(f"{prefix}.lora_B.weight")
            if found and up is not None:
                layer = prefix.removeprefix("base_model.model.")
                layers[layer] = Factors(down, up, self.config.scale(layer, down.shape[0]))
        if 2 * len(layers) != len(self.tensors):
            raise UserError(
                f"{self.folder / WEIGHTS_FILE} holds other tensors than a lora_A and a lora_B per "
                f"layer ({len(self.tensors)} tensors for {len(layers)} such layers): save the "
                "adapter with peft again"
            )
        return layers


def _read(folder: Path) -> _Saved:
    """Read an adapter; raises UserError when it is missing, damaged or no plain LoRA."""
    config = _read_config(folder / CONFIG_FILE)
    weights = folder / WEIGHTS_FILE
    try:
        with safe_open(weights, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
            fingerprint = (file.metadata() or {}).get(BASE_KEY)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{weights} cannot be read as safetensors: {error}; save the adapter as safetensors"
        ) from error
    return _Saved(folder, config, tensors, fingerprint)


def _read_config(file: Path) -> AdapterConfig:
    try:
        config = AdapterConfig.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file} does not exist: give the folder of a LoRA adapter") from None
    except (OSError, ValidationError) as error:
        raise UserError(f"{file} is not the configuration of a LoRA adapter: {error}") from None
    faults = config.faults()
    if faults:
        raise UserError(
            f"{file} is refused: {'; '.join(faults)}. Only plain LoRA on linear layers is read; "
            "merge such an adapter into its base with peft and give the merged model"
        )
    return config


def _peft_fields() -> Mapping[str, Any]:
    fields: Mapping[str, Any] = PeftLoraConfig.__dataclass_fields__
    return fields


def _same_base(named: str, path: Path) -> bool:
    """Whether a base's name, from the hub or a folder elsewhere, may mean the folder at hand."""
    hub = "models--" + named.replace("/", "--")
    return Path(named).name == path.absolute().name or hub in path.absolute().parts


def _check_targets(
    model: PreTrainedModel, targets: list[str] | tuple[str, ...], of: str = "lora.targets"
) -> None:
    """Refuse targets that name no linear layer inside the model."""
    head = model.get_output_embeddings()
    names = [n for n, x in model.named_modules() if isinstance(x, nn.Linear) and x is not head]
    unknown = [t for t in targets if not any(n == t or n.endswith("." + t) for n in names)]
    if unknown:
        known = sorted({name.rpartition(".")[2] for name in names})
        raise UserError(
            f"{of} names {', '.join(map(repr, unknown))}, but the model's linear layers besides "
            f"its output head are called {', '.join(map(repr, known))}: name some of these"
        )


def _inject(model: PreTrainedModel, config: PeftLoraConfig) -> PeftModel:
    """Add peft's adapters; raises UserError where peft can not."""
    with warnings.catch_warnings():
        # Of a base that torchao quantized: merging is refused anyway.
        warnings.filterwarnings("ignore", ".*get_apply_tensor_subclass.*")
        # Of transformers, to peft: a name that they changed.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*")
        try:
            return get_peft_model(model, config)
        except (ValueError, TypeError) as error:
            raise UserError(f"peft cannot adapt this model: {error}") from error


def _layers(model: PeftModel) -> dict[str, LoraLayer]:
    """The adapted layers by their names in the model."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def factors(model: PeftModel) -> dict[str, nn.Parameter]:
    """The adapters' parameters by the names that peft's files have."""
    return {
        name.replace(f".{ADAPTER}.", "."): x
        for name, x in model.named_parameters()
        if f".lora_A.{ADAPTER}." in name or f".lora_B.{ADAPTER}." in name
    }


def _is_plain(layer: LoraLayer) -> bool:
    """Whether the weight of the layer below an adapter is a tensor of fractions as any other."""
    weight = layer.get_base_layer().weight
    plain = type(weight) is nn.Parameter and type(weight.data) is Tensor
    return plain and weight.is_floating_point()
