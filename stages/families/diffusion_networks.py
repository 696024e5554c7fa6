"""How the networks of diffusers are built for a dataset, and called as its pipelines call them."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stages.diffusion.denoiser import Conditions
from stages.diffusion.facts import ImageFacts
from stages.errors import UserError
from stages.families.diffusion_library import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    LabelEmbedding,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    reading,
)
from stages.silence import silenced

Settings = Mapping[str, JsonValue]

SCALE_FEATURES = 256
"""Features that a guidance scale is embedded in where a student is to be told it; as LCMs have."""


@dataclass(frozen=True)
class Kind:
    """What is to be known of a class of networks."""

    network: Any
    """Class of diffusers."""
    call: Callable[[nn.Module, Any, Tensor, Tensor, Conditions, Tensor], Tensor]
    """Of (network, its configuration, x, t, conditions, scale): what it predicts."""
    takes: tuple[str, ...]
    """Conditions that it reads."""
    widths: Callable[[ImageFacts], dict[str, JsonValue]]
    """Arguments of the class that follow from a dataset."""
    halvings: Callable[[Any], int]
    """Of its configuration: what sides of a latent must be multiples of."""
    scale_input: tuple[str, JsonValue] | None = None
    """Argument that gives it an input for the guidance scale, and its value."""
    scale_targets: tuple[str, ...] = ()
    """Layers that an adapter must reach for it to be read; none where no adapter does."""
    scale_layers: tuple[str, ...] = ()
    """Beginnings of the names of tensors that come with it; the last is zero in a network that is
    to begin as one without it."""


def kind_of(name: object, source: object) -> Kind:
    """Return what is known of a class by its name; raises `UserError` for one unknown."""
    if name not in KINDS:
        raise UserError(
            f"{source} is a {name}, which is not supported: the networks known are "
            f"{', '.join(KINDS)}"
        )
    return KINDS[str(name)]


def settings_for(kind: Kind, given: Settings, facts: ImageFacts, *, scale_input: bool) -> Settings:
    """Return all arguments of a network: those given, and what follows from the dataset.

    Raises `UserError` for one that the class does not have, and for `scale_input` where it has no
    such input.
    """
    name, known = kind.network.__name__, arguments(kind)
    unknown = sorted(given.keys() - known)
    if unknown:
        raise UserError(
            f"model.settings has {unknown}, which {name} does not take: its arguments are "
            f"{', '.join(sorted(known))}"
        )
    settings = kind.widths(facts) | dict(given)
    if scale_input:
        if kind.scale_input is None:
            raise UserError(
                f"model.scale_input: {name} has no input for the guidance scale; leave it out, or "
                "use UNet2DConditionModel or FluxTransformer2DModel"
            )
        argument, value = kind.scale_input
        settings[argument] = settings.get(argument) or value
    return settings


def arguments(kind: Kind) -> set[str]:
    """Names of the arguments of a class of networks."""
    return inspect.signature(kind.network.__init__).parameters.keys() - {"self"}


def fresh(kind: Kind, settings: Settings, *, seed: int) -> Any:
    """Build a network whose weights belong to `seed`; raises `UserError` for impossible settings.

    It is in the mode of evaluation, float32, on the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with reading(f"model.settings of {kind.network.__name__}", "correct them"):
            network = kind.network.from_config(dict(settings))
    return ready(network)


def ready(network: Any) -> Any:
    """Put a network into the mode of evaluation, and switch off what drops labels by itself.

    Which labels are dropped in training is the trainer's to decide; DiT would drop a tenth more.
    """
    for module in network.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return network.eval()


def same(kind: Kind, settings: Settings, config: Any) -> bool:
    """Whether a network of these arguments is the same as one of a configuration."""
    with torch.device("meta"):
        wanted = kind.network.from_config(dict(settings)).config
    return _public(wanted) == _public(config)


def _public(config: Mapping[str, Any]) -> str:
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    return json.dumps(settings, sort_keys=True)


def cast(network: Any, dtype: torch.dtype) -> Any:
    """Put a network into a type."""
    with silenced():  # it tells of modules to keep in float32 where there are none
        return network.to(dtype)


def zero_scale_input(kind: Kind, network: nn.Module) -> None:
    """Make the guidance scale change nothing, so that a student begins as one without it."""
    for name, parameter in network.named_parameters():
        if kind.scale_layers and name.startswith(kind.scale_layers[-1]):
            nn.init.zeros_(parameter)


def takes_scale(kind: Kind, config: Any) -> bool:
    """Whether a network of this configuration is told a guidance scale."""
    return kind.scale_input is not None and bool(config.get(kind.scale_input[0]))


def check(kind: Kind, config: Any, facts: ImageFacts, source: object) -> None:
    """Compare a network with the dataset; raises `UserError` that names what does not fit."""
    faults = [f"it reads no {name!r}" for name in facts.conditions if name not in kind.takes]
    for name, wanted in kind.widths(facts).items():
        if not _fits(name, config.get(name), wanted):
            faults.append(f"{name}={config.get(name)}, and the dataset needs {wanted}")
    faults += _input_faults(config, facts)
    multiple = kind.halvings(config)
    for channels, height, width in facts.buckets:
        if height % multiple or width % multiple:
            faults.append(
                f"latents of {channels}×{height}×{width} are no multiples of {multiple} on each "
                "side"
            )
        elif kind.network is DiTTransformer2DModel and height != width:
            faults.append(f"latents of {channels}×{height}×{width} are not square")
    if faults:
        raise UserError(
            f"{source} does not fit the dataset: {'; '.join(faults)}. Prepare the dataset with the "
            "model's own encoder and sizes, or change model.settings"
        )


def _fits(name: str, found: Any, wanted: Any) -> bool:
    if name == "sample_size":  # of the images that it was trained on; others fit too
        return True
    if name in ("num_class_embeds", "num_embeds_ada_norm"):
        return found is not None and found >= wanted
    if name == "out_channels":  # twice as many, where the variance was learned
        return found in (None, wanted, 2 * wanted)
    return bool(found == wanted)


def _input_faults(config: Any, facts: ImageFacts) -> list[str]:
    """Inputs of a network that the dataset does not fill."""
    names = [n for n in ("num_class_embeds", "num_embeds_ada_norm") if config.get(n) is not None]
    if names and "class_labels" not in facts.conditions:
        return [f"it wants labels ({names[0]}={config.get(names[0])}), and the images have none"]
    odd = [n for n in ("encoder_hid_dim_type", "class_embed_type") if config.get(n)]
    odd += ["addition_embed_type"] if config.get("addition_embed_type", "") in OTHER_INPUTS else []
    if odd:
        return [f"it has an input that no dataset has: {n}={config.get(n)!r}" for n in odd]
    if config.get("addition_embed_type") == "text_time":
        wanted = _width(facts, "pooled_prompt_embeds") + 6 * config.addition_time_embed_dim
        if config.projection_class_embeddings_input_dim != wanted:
            return [
                "projection_class_embeddings_input_dim="
                f"{config.projection_class_embeddings_input_dim}, and the dataset needs {wanted}"
            ]
    return []


OTHER_INPUTS = ("text", "text_image", "image", "image_hint")
"""What else UNet2DConditionModel may be told."""


def predict(
    kind: Kind, network: nn.Module, config: Any, x: Tensor, t: Tensor, conditions: Conditions,
    scale: Tensor,
) -> Tensor:  # fmt: skip
    """Predict [b, *shape] of `x` [b, *shape] in its type; `t` [b] float64, `scale` [b] float32.

    Of a network that learned the variance too, the mean is taken.
    """
    floats = {n: c.to(x.dtype) if c.is_floating_point() else c for n, c in conditions.items()}
    return kind.call(network, config, x, t, floats, scale)[:, : x.shape[1]]


def forward_flops(kind: Kind, settings: Settings, facts: ImageFacts) -> int:
    """Count the FLOPs of one forward pass on a latent of the first bucket, a multiply-add as two.

    Products, convolutions and attention are counted; nothing is computed, whatever the size.
    """
    meta = torch.device("meta")
    with meta:
        network = kind.network.from_config(dict(settings))
        x = torch.empty(1, *facts.buckets[0])
        ones = torch.ones(1)
        conditions = {
            name: torch.zeros(1, *c.shape, dtype=getattr(torch, c.dtype))
            for name, c in facts.conditions.items()
        }
        conditions.setdefault("time_ids", torch.zeros(1, 6))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        predict(kind, network.eval(), network.config, x, ones.double(), conditions, ones)
    return int(counter.get_total_flops())


def _unet(
    network: nn.Module, config: Any, x: Tensor, t: Tensor, conditions: Conditions, scale: Tensor
) -> Tensor:
    times = t.long() if config.time_embedding_type == "learned" else t.float()
    labels = conditions.get("class_labels") if config.num_class_embeds else None
    prediction: Tensor = network(x, times, class_labels=labels, return_dict=False)[0]
    return prediction


def _text_unet(
    network: nn.Module, config: Any, x: Tensor, t: Tensor, conditions: Conditions, scale: Tensor
) -> Tensor:
    told = config.time_cond_proj_dim
    added = None
    if config.addition_embed_type == "text_time":
        added = {
            "text_embeds": conditions["pooled_prompt_embeds"],
            "time_ids": conditions["time_ids"],
        }
    prediction: Tensor = network(
        x,
        t.float(),
        encoder_hidden_states=conditions["prompt_embeds"],
        timestep_cond=None if told is None else scale_embedding(scale - 1, told).to(x.dtype),
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return prediction


def scale_embedding(scale: Tensor, features: int) -> Tensor:
    """Embed a guidance scale less one [b] as [b, features] float32.

    Source: `get_guidance_scale_embedding` of diffusers' pipelines, after VDM's time embedding.
    """
    half = features // 2
    steps = torch.arange(half, dtype=torch.float32, device=scale.device)
    waves = 1000.0 * scale.float()[:, None] * torch.exp(steps * -(math.log(10000.0) / (half - 1)))
    embedded = torch.cat([waves.sin(), waves.cos()], dim=1)
    return nn.functional.pad(embedded, (0, features % 2))


def _dit(
    network: nn.Module, config: Any, x: Tensor, t: Tensor, conditions: Conditions, scale: Tensor
) -> Tensor:
    prediction: Tensor = network(
        x, timestep=t.float(), class_labels=conditions["class_labels"], return_dict=False
    )[0]
    return prediction


def _sd3(
    network: nn.Module, config: Any, x: Tensor, t: Tensor, conditions: Conditions, scale: Tensor
) -> Tensor:
    prediction: Tensor = network(
        hidden_states=x,
        timestep=t.float(),
        encoder_hidden_states=conditions["prompt_embeds"],
        pooled_projections=conditions["pooled_prompt_embeds"],
        return_dict=False,
    )[0]
    return prediction


def _flux(
    network: nn.Module, config: Any, x: Tensor, t: Tensor, conditions: Conditions, scale: Tensor
) -> Tensor:
    embeds, (_, _, height, width) = conditions["prompt_embeds"], x.shape
    packed: Tensor = network(
        hidden_states=pack(x),
        timestep=t.float().to(x.dtype) / 1000,  # of any schedule: the network multiplies by it
        guidance=scale if config.guidance_embeds else None,
        encoder_hidden_states=embeds,
        pooled_projections=conditions["pooled_prompt_embeds"],
        txt_ids=torch.zeros(embeds.shape[1], 3, dtype=x.dtype, device=x.device),
        img_ids=positions(height // 2, width // 2, x),
        return_dict=False,
    )[0]
    return unpack(packed, height, width)


def pack(x: Tensor) -> Tensor:
    """Latents [b, c, h, w] as the sequence [b, h/2 · w/2, 4c] of their 2×2 squares, as Flux has."""
    return nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpack(x: Tensor, height: int, width: int) -> Tensor:
    """Sequences [b, h/2 · w/2, 4c] as the latents [b, c, h, w] that `pack` made them of."""
    squares = x.transpose(1, 2).reshape(len(x), -1, height // 2, width // 2)
    return nn.functional.pixel_shuffle(squares, 2)


def positions(height: int, width: int, like: Tensor) -> Tensor:
    """(0, row, column) [height · width, 3] of the places of a sequence, on the device of `like`."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=like.device),
        torch.arange(width, device=like.device),
        indexing="ij",
    )
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).to(like.dtype)


def _sides(facts: ImageFacts) -> JsonValue:
    _, height, width = facts.buckets[0]
    return height if height == width else [height, width]


def _width(facts: ImageFacts, condition: str) -> int:
    """Features of an encoded text; of an image without one, what fits no network."""
    found = facts.conditions.get(condition)
    return found.shape[-1] if found is not None and found.shape else 0


def _labels(facts: ImageFacts) -> int:
    return len(facts.classes) + (facts.unconditional == "label")


def _unet_widths(facts: ImageFacts) -> dict[str, JsonValue]:
    labels: dict[str, JsonValue] = {}
    if "class_labels" in facts.conditions:
        labels["num_class_embeds"] = _labels(facts)
    return {
        "sample_size": _sides(facts),
        "in_channels": facts.latent_channels,
        "out_channels": facts.latent_channels,
        **labels,
    }


def _text_unet_widths(facts: ImageFacts) -> dict[str, JsonValue]:
    return {
        "sample_size": _sides(facts),
        "in_channels": facts.latent_channels,
        "out_channels": facts.latent_channels,
        "cross_attention_dim": _width(facts, "prompt_embeds"),
    }


def _dit_widths(facts: ImageFacts) -> dict[str, JsonValue]:
    return {
        "sample_size": facts.buckets[0][1],
        "in_channels": facts.latent_channels,
        "out_channels": facts.latent_channels,
        "num_embeds_ada_norm": len(facts.classes),  # and one more, which is no label
    }


def _sd3_widths(facts: ImageFacts) -> dict[str, JsonValue]:
    return {
        "sample_size": facts.buckets[0][1],
        "in_channels": facts.latent_channels,
        "out_channels": facts.latent_channels,
        "joint_attention_dim": _width(facts, "prompt_embeds"),
        "pooled_projection_dim": _width(facts, "pooled_prompt_embeds"),
    }


def _flux_widths(facts: ImageFacts) -> dict[str, JsonValue]:
    return {
        "in_channels": 4 * facts.latent_channels,
        "joint_attention_dim": _width(facts, "prompt_embeds"),
        "pooled_projection_dim": _width(facts, "pooled_prompt_embeds"),
    }


def _of_blocks(config: Any) -> int:
    return 1 << (len(config.down_block_types) - 1)


def _of_patches(config: Any) -> int:
    return int(config.patch_size)


KINDS: dict[str, Kind] = {
    "UNet2DModel": Kind(UNet2DModel, _unet, ("class_labels",), _unet_widths, _of_blocks),
    "UNet2DConditionModel": Kind(
        UNet2DConditionModel, _text_unet, ("prompt_embeds", "pooled_prompt_embeds"),
        _text_unet_widths, _of_blocks, ("time_cond_proj_dim", SCALE_FEATURES),
        ("time_embedding.cond_proj",), ("time_embedding.cond_proj.",),
    ),
    "DiTTransformer2DModel": Kind(
        DiTTransformer2DModel, _dit, ("class_labels",), _dit_widths, _of_patches
    ),
    "SD3Transformer2DModel": Kind(
        SD3Transformer2DModel, _sd3, ("prompt_embeds", "pooled_prompt_embeds"), _sd3_widths,
        _of_patches,
    ),
    "FluxTransformer2DModel": Kind(
        FluxTransformer2DModel, _flux, ("prompt_embeds", "pooled_prompt_embeds"), _flux_widths,
        lambda config: 2, ("guidance_embeds", True), (),
        ("time_text_embed.guidance_embedder.linear_1.",
         "time_text_embed.guidance_embedder.linear_2."),
    ),
}  # fmt: skip
"""Class of diffusers → what is known of it; the keys are `NetworkClass` of the settings."""
