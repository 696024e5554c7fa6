"""Low-rank adapters of denoisers (Hu et al., 2106.09685), in the files of stock diffusers.

An adapter adds ΔW = scale · B·A to the frozen weight of a layer. In a file that this family saves
the scale is part of B, so that it means the same to every program, whatever it takes alpha to be.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from stages.diffusion.model_config import LoraConfig
from stages.errors import UserError
from stages.families.diffusion_library import (
    FluxPipeline,
    LoraLayer,
    PeftLoraConfig,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    get_peft_model_state_dict,
    reading,
    set_peft_model_state_dict,
)
from stages.families.weights import check_tensors
from stages.publish import publish_file
from stages.silence import silenced

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
"""What stock diffusers calls it."""
ADAPTER = "default"
"""What peft calls the one adapter of a network."""

logger = logging.getLogger(__name__)


def attach(network: Any, config: LoraConfig, targets: tuple[str, ...], *, seed: int) -> None:
    """Freeze a network, quantized or not, and put a fresh adapter in float32 on it.

    Its A belongs to `seed` and its B is 0, so that it changes nothing yet. Raises `UserError` where
    stock diffusers loads no adapter of this class of networks, or a target names no layer.
    """
    _pipeline(network)
    names = [name for name, _ in network.named_modules()]
    unknown = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in names)]
    if unknown:
        raise UserError(
            f"model.adapter.targets has {unknown}, which no layer's name ends in: take ends of "
            f"the names of linear layers or convolutions, such as {_suggestions(network)}"
        )
    network.requires_grad_(False)
    alpha = config.rank if config.alpha is None else config.alpha
    with reading("model.adapter", "take linear layers or convolutions as targets"):
        network.add_adapter(
            PeftLoraConfig(
                r=config.rank, lora_alpha=alpha, lora_dropout=config.dropout,
                target_modules=list(targets),
            ),
            ADAPTER,
        )  # fmt: skip
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in network.modules():
            if isinstance(layer, LoraLayer):
                # Drawn anew, because what peft drew was rounded to the type of the base.
                layer.reset_lora_parameters(ADAPTER, True)
    network.eval()


def _suggestions(network: nn.Module) -> str:
    ends = {n.rpartition(".")[2] for n, m in network.named_modules() if type(m) is nn.Linear}
    return ", ".join(sorted(end for end in ends if not end.isdigit()))


def state(network: Any) -> dict[str, Tensor]:
    """Return the adapter's tensors by their names, the scale being part of every B."""
    factors = {
        f"{name}.lora_B.weight": layer.scaling[ADAPTER]
        for name, layer in network.named_modules()
        if isinstance(layer, LoraLayer)
    }
    return {
        name: (tensor.detach() * factors.get(name, 1.0)).float().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(network, adapter_name=ADAPTER).items()
    }


def save(network: Any, folder: Path) -> None:
    """Write an adapter as a LoRA that stock diffusers loads (`load_lora_weights`)."""
    pipeline, component = _pipeline(network)
    layers: Any = {f"{component}_lora_layers": state(network)}
    with tempfile.TemporaryDirectory(dir=folder) as draft, publish_file(folder / WEIGHTS_FILE) as f:
        with silenced():
            pipeline.save_lora_weights(draft, weight_name=WEIGHTS_FILE, **layers)
        (Path(draft) / WEIGHTS_FILE).rename(f)


def load(
    network: Any, config: LoraConfig, targets: tuple[str, ...], folder: Path
) -> dict[str, Tensor]:
    """Put the adapter that `save` wrote on a network, and return its tensors as `state` does.

    Raises `UserError` if it does not fit.
    """
    file = folder / WEIGHTS_FILE
    with reading(file, "train the model again, or get it again"):
        tensors = load_file(file)
    _, component = _pipeline(network)
    found = {name.removeprefix(f"{component}."): tensor for name, tensor in tensors.items()}
    attach(network, config.model_copy(update={"alpha": None}), targets, seed=0)
    expected = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    check_tensors(file, _shapes(expected), _shapes(found))
    set_peft_model_state_dict(network, found, adapter_name=ADAPTER)
    return found


def load_published(network: Any, file: Path, scale: float) -> None:
    """Put a LoRA in diffusers' or kohya's format on a network, frozen, its update times `scale`.

    Raises `UserError` where it holds nothing for this network, or layers that the network lacks.
    What it holds for text encoders is another's to load, and is logged.
    """
    if not file.is_file() or file.suffix != ".safetensors":
        raise UserError(
            f"{file} is no LoRA here: give a local .safetensors file (others are pickles, which "
            "run code)"
        )
    pipeline, component = _pipeline(network)
    advice = "give a LoRA of this model, in diffusers' or kohya's format"
    options: Any = {"weight_name": file.name, "local_files_only": True, "use_safetensors": True}
    options |= {"return_lora_metadata": True}
    with reading(file, advice):
        if component == "unet":
            tensors, alphas, metadata = pipeline.lora_state_dict(
                str(file.parent), unet_config=network.config, **options
            )
        elif pipeline is FluxPipeline:
            tensors, alphas, metadata = pipeline.lora_state_dict(
                str(file.parent), return_alphas=True, **options
            )
        else:
            tensors, metadata = pipeline.lora_state_dict(str(file.parent), **options)
            alphas = None
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{component}.")}
        network.load_lora_adapter(
            own, prefix=component, network_alphas=alphas or None, adapter_name=ADAPTER,
            metadata=metadata,
        )  # fmt: skip
    wanted = sum(name.endswith(UPS) for name in own)
    layers = [m for m in network.modules() if isinstance(m, LoraLayer)]
    _check_plain(file, own)
    if not layers or len(layers) != wanted:
        raise UserError(
            f"{file} changes {wanted} layers of the {component}, and {len(layers)} of them are in "
            f"this network; {advice}"
        )
    if len(own) < len(tensors):
        logger.warning(
            "%s holds %d tensors for other than the %s, such as text encoders: prepare reads "
            "captions without them", file, len(tensors) - len(own), component,
        )  # fmt: skip
    dtype = network.dtype
    for layer in layers:
        layer.set_scale(ADAPTER, scale)
        for parameter in layer.parameters():
            parameter.data = parameter.data.to(dtype)
    network.requires_grad_(False).eval()


def _check_plain(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse what diffusers would leave out of an adapter that is more than low-rank factors."""
    with safe_open(file, "pt") as content:
        odd = [name for name in content.keys() if "dora_scale" in name]  # noqa: SIM118
    odd += [name for name in tensors if "lora" not in name and not name.endswith("alpha")]
    if odd:
        raise UserError(
            f"{file} is more than a LoRA: it has {', '.join(sorted(odd)[:3])}, which diffusers "
            "would leave out; merge it into the pipeline's weights and give these"
        )


UPS = ("lora_B.weight", "lora.up.weight", "lora_up.weight", ".up.weight")
"""Ends of the names of B in the formats that diffusers' loaders give back."""


def has_adapter(network: nn.Module) -> bool:
    """Whether there is an adapter on a network."""
    return any(isinstance(module, LoraLayer) for module in network.modules())


@contextmanager
def switched_off(network: nn.Module) -> Iterator[None]:
    """Let a network be what it is without its adapter inside the block."""
    layers = [module for module in network.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise UserError(
            "the model has no adapter to compare with: give teacher.pretrained.adapter, or another "
            "contrast than 'adapter'"
        )
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        network.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


def merge(network: Any) -> None:
    """Make an adapter part of the weights."""
    with silenced():
        network.fuse_lora()
        network.unload_lora()


def _pipeline(network: Any) -> tuple[Any, str]:
    """Return the pipeline whose LoRA files fit a network, and its name in them."""
    name = type(network).__name__
    if name == "UNet2DConditionModel":
        sizes = network.config.addition_embed_type == "text_time"
        return (StableDiffusionXLPipeline if sizes else StableDiffusionPipeline), "unet"
    if name in ("SD3Transformer2DModel", "FluxTransformer2DModel"):
        flux = name == "FluxTransformer2DModel"
        return (FluxPipeline if flux else StableDiffusion3Pipeline), "transformer"
    raise UserError(
        f"an adapter on {name}: diffusers has no LoRA files of it; leave out the adapter, which "
        "trains all weights"
    )


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
