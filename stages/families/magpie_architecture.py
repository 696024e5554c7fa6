"""How large a MagpieTTS model is, and what one decoding step of it costs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from stages.architecture import Architecture, feed_forward_flops, parameters_by_part
from stages.families.magpie_network import MagpieNetwork


def architecture_of(network: MagpieNetwork) -> Architecture:
    """How large a network is and what decoding a timestep costs, as `Architecture` defines it."""
    model: Any = network.model
    settings = model.cfg.decoder
    sparse = bool(settings.get("use_moe", False))
    experts = settings.get("num_experts", 8) if sparse else 0
    active = min(settings.get("top_k_experts", 2), experts)
    width, hidden, layers = settings.d_model, settings.d_ffn, settings.n_layers
    parts = parameters_by_part((name, x.numel()) for name, x in model.named_parameters())
    rest = sum(_attention_flops(layer) for layer in model.decoder.layers)
    rest += _flops([model.final_proj])
    if network.local:
        rest += _local_flops(network)
    fed = feed_forward_flops(width, hidden, experts=experts, active=active)
    dense = feed_forward_flops(width, max(experts, 1) * hidden)
    idle = layers * (experts - active) * 2 * width * hidden
    return Architecture(
        parameters=sum(parts.values()),
        parts=parts,
        active_parameters=sum(parts.values()) - idle,
        flops_per_timestep=rest + layers * fed,
        dense_flops_per_timestep=rest + layers * dense,
        experts=experts,
        active_experts=active,
    )


def _attention_flops(layer: Any) -> int:
    """Of one position; keys and values of the text are projected once per rollout."""
    products = [layer.self_attention.qkv_net, layer.self_attention.o_net]
    if layer.has_xattn:
        products += [layer.cross_attention.q_net, layer.cross_attention.o_net]
    return _flops(products)


def _local_flops(network: MagpieNetwork) -> int:
    """Of all streams of one timestep, one after the other."""
    model: Any = network.model
    products: list[nn.Module] = [model.local_transformer_in_projection]
    for layer in model.local_transformer.layers:
        products += [layer.self_attention.qkv_net, layer.self_attention.o_net]
        products += [layer.pos_ff.proj.conv, layer.pos_ff.o_net.conv]
    return network.streams * _flops(products) + _flops(model.local_transformer_out_projections)


def _flops(products: Iterable[nn.Module]) -> int:
    """Two per weight: every one is multiplied and added once."""
    weights = (getattr(product, "weight", None) for product in products)
    return sum(2 * weight.numel() for weight in weights if weight is not None)
