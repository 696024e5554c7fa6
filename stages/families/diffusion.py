"""The family of diffusion models: the denoisers of diffusers' pipelines, and their like.

A denoiser is loaded alone, without text encoders or autoencoder (`diffusion_encoders`). What is
trained here is saved as stock diffusers reads it: a whole network in its own format, an adapter as
a LoRA.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import JsonValue
from safetensors.torch import save_file
from torch import Tensor, nn

from stages.architecture import Architecture, parameters_by_part
from stages.diffusion.denoiser import Conditions
from stages.diffusion.facts import ImageFacts, ScheduleFacts
from stages.diffusion.model_config import DenoiserConfig, DiffusionTeacher
from stages.diffusion.schedule import facts_of
from stages.errors import UserError
from stages.families import diffusion_adapters as adapters
from stages.families import diffusion_networks as networks
from stages.families.diffusion_networks import Kind, Settings
from stages.families.diffusion_schedules import predicting
from stages.families.diffusion_sources import (
    CONFIG_FILE,
    DTYPES,
    SCALING,
    WEIGHTS_FILE,
    Source,
    read_json,
)
from stages.families.weights import check_tensors, digest_tensors
from stages.publish import publish_file, replace_file
from stages.quantization import quantize
from stages.saved_model import OWN_KEY
from store.schema import Record

logger = logging.getLogger(__name__)

OWN_BASE = "base"
"""Folder, within that of an adapter, of a base which exists nowhere else."""
FULL_PRECISION = (
    "proj_in", "proj_out", "proj_out_1", "proj_out_2", "conv_in", "conv_out", "x_embedder",
    "context_embedder", "pos_embed.*", "time_embedding.*", "add_embedding.*", "time_text_embed.*",
    "*.emb.*", "*.lora_A.*", "*.lora_B.*",
)  # fmt: skip
"""Layers that take in and give out, and adapters: few weights, whose errors cost most."""


class Base(Record):
    """The frozen network under an adapter, as config.json of the adapter names it."""

    path: Path
    """Where its weights are: a saved model, a pipeline or a single file; `base` beside it."""
    config: Path | None = None
    """Folder with the configuration files of a single file."""
    digest: str
    """Sha256 over its tensors as they lie there."""


class Description(Record):
    """What a denoiser's config.json holds for this family."""

    config: DenoiserConfig
    facts: ImageFacts
    schedule: ScheduleFacts
    settings: dict[str, JsonValue]
    """Arguments of the network."""
    network: str
    """Its class."""
    condition_dropout: float | None
    architecture: Architecture
    base: Base | None = None
    """What the adapter is on; null of a whole network."""


@dataclass
class _Frozen:
    """What is under an adapter: where it lies, or its weights until they are saved."""

    path: Path | None
    """None where it lies nowhere yet."""
    config: Path | None
    """Folder with the configuration files of a single file."""
    digest: str
    """Sha256 over its tensors as they lie there."""
    tensors: Mapping[str, Tensor]
    """Its weights on the CPU, where they lie nowhere."""


class Diffusion:
    """A denoising network of diffusers with its noise schedule."""

    name: Literal["diffusion"] = "diffusion"
    # Of its first block a DiT reads a part from outside.
    blocks: tuple[str, ...] = (
        "down_blocks.*", "mid_block", "up_blocks.*",
        "transformer_blocks.[1-9]*", "single_transformer_blocks.*",
    )  # fmt: skip

    def __init__(
        self,
        network: Any,
        config: DenoiserConfig,
        facts: ImageFacts,
        schedule: ScheduleFacts,
        settings: Settings,
        *,
        dtype: torch.dtype,
        digest: str | None = None,
        base: _Frozen | None = None,
        embedded_guidance: float | None = None,
    ) -> None:
        self.module: Any = network
        self.network: nn.Module = network
        self.config, self.facts, self.schedule = config, facts, schedule
        self.condition_dropout: float | None = None
        self.full_precision: tuple[str, ...] = FULL_PRECISION
        self._kind = networks.kind_of(type(network).__name__, "the network")
        self._settings, self.dtype, self._digest = dict(settings), dtype, digest
        self._network_config, self._base = network.config, base
        self.embedded_guidance = embedded_guidance
        self.takes_scale = networks.takes_scale(self._kind, network.config)
        networks.check(self._kind, network.config, facts, f"the {type(network).__name__}")

    @classmethod
    def build(
        cls,
        config: DenoiserConfig,
        facts: ImageFacts,
        *,
        seed: int,
        schedule: ScheduleFacts | None = None,
        weights: Path | None = None,
        weights_config: Path | None = None,
        device: str = "cpu",
    ) -> Self:
        """Build a denoiser that is to be trained on `device`.

        Its schedule is that of `config`, of its pipeline, or `schedule`, in this order. `weights`
        are a saved model's folder, a pipeline's or a single file's, copied into the network before
        its adapter is put on, quantized and moved; without them they are drawn from `seed`. Raises
        `UserError` where they are of another architecture, or of a pipeline whose latents are
        scaled otherwise, naming what differs; warns of weights that predict another type.
        """
        kind, settings, own_schedule = _architecture_of(config, facts)
        schedule = own_schedule or schedule
        if schedule is None:
            raise UserError(
                "the model has no noise schedule: set model.schedule, or model.pipeline to a "
                "folder with a scheduler"
            )
        schedule = predicting(schedule, config.prediction)
        if weights is None:
            network = networks.fresh(kind, settings, seed=seed)
        else:
            source = Source.find(weights, weights_config)
            _check_scaling(source, facts)
            _warn_of_another_type(source, facts, schedule)
            dtype = DTYPES[config.base_precision]
            network = _begun_as(weights, weights_config, kind, settings, seed, dtype)
        if config.adapter is None:
            network.requires_grad_(True)
            base = None
        else:
            base = _frozen_base(network, weights, weights_config)
            _hold(network, config, DTYPES[config.base_precision], device)
            adapters.attach(network, config.adapter, _targets(config, kind), seed=seed)
        network.to(device)
        if config.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        dtype = torch.float32 if base is None else DTYPES[config.base_precision]
        return cls(network, config, facts, schedule, settings, dtype=dtype, base=base)

    @classmethod
    def load(cls, path: Path, *, device: str, dtype: torch.dtype) -> Self:
        """Load what `save` wrote, its adapter on the base that config.json names."""
        found = _described(path)
        kind = networks.kind_of(found.network, path / CONFIG_FILE)
        if found.base is None:
            source = Source.find(path)
            network, base, digest = source.load(dtype), None, source.digest()
            networks.ready(network)
        else:
            network, base = _found_base(found, kind, path, dtype)
            tensors = _put_adapter(network, kind, found.config, path)
            digest = _digest(base.digest, _tensor_digest(tensors))
            networks.cast(network, dtype)
        network.requires_grad_(False)
        denoiser = cls(
            network.to(device), found.config, found.facts, found.schedule, found.settings,
            dtype=dtype, digest=digest, base=base,
        )  # fmt: skip
        denoiser.condition_dropout = found.condition_dropout
        return denoiser

    @classmethod
    def pretrained(
        cls, config: DiffusionTeacher, facts: ImageFacts, *, device: str, dtype: torch.dtype
    ) -> Self:
        """Load the denoiser alone of a pipeline; `adapter_off` can switch off its adapter."""
        source = Source.find(config.path, config.config)
        schedule = source.schedule(_tokens(facts))
        if schedule is None:
            raise UserError(
                f"{config.path} has no scheduler/scheduler_config.json, so how it was noised is "
                "not known: give the pipeline's folder whole"
            )
        network, digest = source.load(dtype).requires_grad_(False), source.digest()
        _check_scaling(source, facts)
        if config.adapter is not None:
            adapters.load_published(network, config.adapter, config.adapter_scale)
            digest = _digest(digest, _file_digest(config.adapter), config.adapter_scale)
        told = config.embedded_guidance
        if told is not None and not networks.takes_scale(source.kind, network.config):
            raise UserError(
                f"teacher.pretrained.embedded_guidance={told}: {config.path} is not told a "
                "guidance number; leave it out"
            )
        own = DenoiserConfig(pipeline=config.path, pipeline_config=config.config)
        return cls(
            network.to(device), own, facts, schedule, source.settings, dtype=dtype, digest=digest,
            embedded_guidance=told,
        )  # fmt: skip

    def save(self, path: Path) -> None:
        """Write config.json and then weights, as stock diffusers opens them.

        Of a whole network it is a folder to open as one; of an adapter it is a
        `pytorch_lora_weights.safetensors`, to load as a LoRA.
        """
        base = self._base and self._kept_base(path)
        description = Description(
            config=self.config,
            facts=self.facts,
            schedule=self.schedule,
            settings=self._settings,
            network=type(self.module).__name__,
            condition_dropout=self.condition_dropout,
            architecture=self.architecture(),
            base=base,
        )
        if base is None:
            self._write(path, self.module.state_dict(), description)
            return
        _describe(path, {}, description)
        adapters.save(self.module, path)

    def _kept_base(self, path: Path) -> Base:
        """Return the base as it lies on disk; one that lies nowhere is written below `path`."""
        base = self._base
        assert base is not None
        if base.path is not None:
            return Base(path=base.path.absolute(), config=base.config, digest=base.digest)
        self._write(path / OWN_BASE, base.tensors, None)
        return Base(path=Path(OWN_BASE), digest=base.digest)

    def _write(
        self, path: Path, tensors: Mapping[str, Tensor], description: Description | None
    ) -> None:
        """Write a whole network as diffusers does: configuration, then weights in one step."""
        config = json.loads(self.module.to_json_string())
        config.pop("_name_or_path", None)
        _describe(path, config, description)
        with publish_file(path / WEIGHTS_FILE) as draft:
            whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(whole, draft, metadata={"format": "pt"})

    def architecture(self) -> Architecture:
        """Return how large the model is and what a forward pass on its first bucket costs."""
        with torch.device("meta"):
            plain = self._kind.network.from_config(self._settings)
        sizes = [(name, parameter.numel()) for name, parameter in plain.named_parameters()]
        if self._base is not None or adapters.has_adapter(self.module):
            added = adapters.state(self.module).values()
            sizes.append(("adapter", sum(tensor.numel() for tensor in added)))
        parts = parameters_by_part(sizes)
        flops = networks.forward_flops(self._kind, self._settings, self.facts)
        return Architecture(
            parameters=sum(parts.values()),
            parts=parts,
            active_parameters=sum(parts.values()),
            flops_per_timestep=flops,
            dense_flops_per_timestep=flops,
        )

    def fingerprint(self) -> str:
        """Sha256 over configuration, schedule and weights, hexadecimal.

        Weights are taken as they lie in their files, or would: neither the type that they are
        loaded in nor quantization changes it.
        """
        return _digest(
            type(self.module).__name__,
            json.dumps(self._settings, sort_keys=True),
            json.dumps(self.schedule.model_dump(mode="json"), sort_keys=True),
            self.embedded_guidance,
            self._digest or self._trained_digest(),
        )

    def _trained_digest(self) -> str:
        if self._base is None:
            return _tensor_digest(self.module.state_dict())
        return _digest(self._base.digest, _tensor_digest(adapters.state(self.module)))

    def predict(
        self, x: Tensor, t: Tensor, conditions: Conditions, scale: Tensor | None = None
    ) -> Tensor:
        """Predict [b, *shape], in the type of the model, of noised latents `x` [b, *shape].

        `t` [b] float64 is time on the scale of the schedule, 0 to train_timesteps (what the network
        itself wants of it is the family's business); `scale` [b] float32 the guidance scale that a
        network with `takes_scale` is told, None for 1 or the teacher's `embedded_guidance`.
        """
        if scale is None:
            told = 1.0 if self.embedded_guidance is None else self.embedded_guidance
            scale = torch.full(x.shape[:1], told, device=x.device)
        return networks.predict(
            self._kind, self.network, self._network_config, x.to(self.dtype), t, conditions, scale
        )

    def adapter_off(self) -> AbstractContextManager[None]:
        """Predict without the adapter inside the block; raises `UserError` where there is none."""
        return adapters.switched_off(self.module)


def _architecture_of(
    config: DenoiserConfig, facts: ImageFacts
) -> tuple[Kind, Settings, ScheduleFacts | None]:
    """Return the class of a configured network, its arguments and its own schedule."""
    schedule = None if config.schedule is None else facts_of(config.schedule)
    given: Settings = config.settings
    if config.pipeline is None:
        kind = networks.kind_of(config.network, "model.network")
    else:
        source = Source.find(config.pipeline, config.pipeline_config)
        kind = networks.kind_of(config.network or source.kind.network.__name__, "model.network")
        schedule = schedule or source.schedule(_tokens(facts))
        if kind is source.kind:
            given = {**source.settings, **given}
    return kind, networks.settings_for(kind, given, facts, scale_input=config.scale_input), schedule


def _begun_as(
    weights: Path, weights_config: Path | None, kind: Kind, settings: Settings, seed: int,
    dtype: torch.dtype,
) -> Any:  # fmt: skip
    """Build a network with the weights at `weights`; raises `UserError` if they do not fit."""
    source, theirs = _whole(weights, weights_config, dtype)
    if kind is not source.kind:
        raise UserError(
            f"{weights} is a {source.kind.network.__name__}, and the model a "
            f"{kind.network.__name__}: set model.network to the teacher's, or init.kind to 'fresh'"
        )
    if networks.same(kind, settings, theirs.config):
        return theirs
    network = networks.cast(networks.fresh(kind, settings, seed=seed), dtype)
    expected, found = network.state_dict(), theirs.state_dict()
    new = {
        name: torch.zeros_like(tensor)
        for name, tensor in expected.items()
        if name.startswith(kind.scale_layers) and name not in found
    }
    check_tensors(weights, _shapes(expected), _shapes({**new, **found}))
    if new:
        networks.zero_scale_input(kind, network)
    network.load_state_dict({**network.state_dict(), **found})
    return network


def _whole(path: Path, config: Path | None, dtype: torch.dtype) -> tuple[Source, Any]:
    """Load the whole network at `path`; an adapter of ours is merged into its base."""
    source = Source.find(path, config)
    if not source.adapter:
        return source, source.load(dtype)
    found = _described(path)
    kind = networks.kind_of(found.network, path / CONFIG_FILE)
    network, base = _found_base(found, kind, path, torch.float32)
    _put_adapter(network, kind, found.config, path)
    adapters.merge(network)
    assert base.path is not None
    return Source.find(base.path, base.config), networks.cast(network, dtype)


def _put_adapter(network: Any, kind: Kind, config: DenoiserConfig, path: Path) -> dict[str, Tensor]:
    """Put the adapter that was saved in `path` on its base, and return its tensors as they lie."""
    assert config.adapter is not None
    return adapters.load(network, config.adapter, _targets(config, kind), path)


def _found_base(
    found: Description, kind: Kind, path: Path, dtype: torch.dtype
) -> tuple[Any, _Frozen]:
    """Load the base of an adapter; raises `UserError` if it is gone or has changed."""
    assert found.base is not None
    folder = path / OWN_BASE if found.base.path == Path(OWN_BASE) else found.base.path
    source = Source.find(folder, found.base.config)
    if source.digest() != found.base.digest:
        raise UserError(
            f"{path / CONFIG_FILE} names the base {folder}, whose weights are others than those "
            "that the adapter was trained on: put them back, or correct the path"
        )
    network = _begun_as(folder, found.base.config, kind, found.settings, 0, dtype)
    return network, _Frozen(folder.absolute(), found.base.config, found.base.digest, {})


def _frozen_base(network: Any, weights: Path | None, weights_config: Path | None) -> _Frozen:
    """Say where a network lies to which an adapter is to be added."""
    source = None if weights is None else Source.find(weights, weights_config)
    if source is None or source.adapter:
        tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        return _Frozen(None, None, _tensor_digest(tensors), tensors)
    return _Frozen(weights, weights_config, source.digest(), {})


def _hold(network: Any, config: DenoiserConfig, dtype: torch.dtype, device: str) -> None:
    """Put a frozen network into the type and the quantization that adapters are trained on."""
    networks.cast(network, dtype)
    if config.base_quantization is not None:
        quantize(network, config.base_quantization, device=device, keep=FULL_PRECISION)


def _targets(config: DenoiserConfig, kind: Kind) -> tuple[str, ...]:
    """Layers to adapt; the input of the scale begins at zero, and must be among them to be read."""
    assert config.adapter is not None
    if not config.scale_input:
        return config.adapter.targets
    if not kind.scale_targets:
        raise UserError(
            f"model.scale_input with model.adapter: an adapter of a {kind.network.__name__} does "
            "not reach a new input for the guidance scale; leave scale_input out (a base that has "
            "the input is told the scale anyway), or leave adapter out to train all weights"
        )
    return (*config.adapter.targets, *kind.scale_targets)


def _described(path: Path) -> Description:
    """Read config.json of a folder; raises `UserError` where `save` did not write it."""
    own = read_json(path / CONFIG_FILE).get(OWN_KEY)
    try:
        return Description.model_validate_json(json.dumps(own))
    except ValueError as error:
        raise UserError(
            f"{path / CONFIG_FILE} is not the configuration of a diffusion model that foretell "
            f"saved: {error}; give a folder that `fit` or `train` wrote"
        ) from error


def _describe(path: Path, config: Mapping[str, Any], description: Description | None) -> None:
    own = {} if description is None else {OWN_KEY: description.model_dump(mode="json")}
    text = json.dumps({**config, **own}, indent=2, sort_keys=True)
    replace_file(path / CONFIG_FILE, text.encode())


def _check_scaling(source: Source, facts: ImageFacts) -> None:
    """Refuse a dataset of latents that are scaled otherwise than the pipeline's autoencoder's."""
    file = source.folder / "vae" / CONFIG_FILE
    if source.component is None or not file.is_file():
        return
    found = read_json(file)
    theirs = found.get("scaling_factor", SCALING), found.get("shift_factor") or 0.0
    if theirs != (facts.scaling, facts.shift):
        raise UserError(
            f"{file} has scaling_factor={theirs[0]} and shift_factor={theirs[1]}, and the latents "
            f"of the dataset {facts.scaling} and {facts.shift}: prepare it with this pipeline's "
            "encoder"
        )


def _warn_of_another_type(source: Source, facts: ImageFacts, schedule: ScheduleFacts) -> None:
    """Say it where a student begins with weights that predict something else than it is to."""
    theirs = source.schedule(_tokens(facts))
    if theirs is None or theirs.prediction == schedule.prediction:
        return
    logger.warning(
        "%s predicts %r, and the student that begins with its weights is to predict %r: what they "
        "answer at first is of the wrong type, so the loss begins high, and part of the training, "
        "most of it with an adapter, goes into learning the other type. To keep the type leave out "
        "model.prediction and model.schedule, or set them to it",
        source.path, theirs.prediction, schedule.prediction,
    )  # fmt: skip


def _tokens(facts: ImageFacts) -> int:
    """Length of the sequence that a transformer makes of the first bucket: patches are 2×2."""
    _, height, width = facts.buckets[0]
    return (height // 2) * (width // 2)


def _digest(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    digest_tensors(digest, tensors)
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
