"""How large a model is, and what one decoding step of it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from pydantic import Field

from store.schema import Record


class Architecture(Record):
    """Size of a model, and the cost of decoding one timestep once, for one sample.

    FLOPs are those of the matrix products of decoder, heads and local transformer, a multiply-add
    being two, and of the router and the active experts. Left out is what grows with the length of
    history and conditions (attention over them), what runs once per rollout (encoders, keys and
    values of the conditions), and what costs next to nothing (norms, activations, embeddings).
    Guidance doubles them: it takes two passes. A timestep of a diffusion model is one pass over an
    image of the first bucket: convolutions and attention within the image are counted too.
    """

    parameters: int = Field(ge=0)
    """Parameters of the whole model, without the audio codec."""
    parts: dict[str, int]
    """Parameters by part of the model; they add up to `parameters`."""
    active_parameters: int = Field(ge=0)
    """Parameters without those of the experts that a position does not visit."""
    flops_per_timestep: int = Field(ge=0)
    """FLOPs of one forward pass of one decoding step."""
    dense_flops_per_timestep: int = Field(ge=0)
    """The same with one dense feed-forward as wide as all experts of a layer together."""
    experts: int = Field(0, ge=0)
    """Experts per layer of the decoder; 0 where its feed-forward is dense."""
    active_experts: int = Field(0, ge=0)
    """Experts that a position visits; 0 where the feed-forward is dense."""


def parameters_by_part(sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Add up the sizes of parameters by the first part of their dotted names."""
    parts: Counter[str] = Counter()
    for name, size in sizes:
        parts[name.partition(".")[0]] += size
    return dict(parts)


def product_flops(*matrices: tuple[int, int]) -> int:
    """FLOPs of multiplying one vector with each of some matrices, given by their shapes."""
    return sum(2 * inputs * outputs for inputs, outputs in matrices)


def feed_forward_flops(d_model: int, width: int, *, experts: int = 0, active: int = 0) -> int:
    """FLOPs of one position in a feed-forward of two maps, or in a layer of experts of that width.

    With experts the router's product and one comparison per expert to find the top ones are
    counted, as NeMo 3.0 does (`compute_ffn_flops_per_token` of magpietts_inference).
    """
    maps = product_flops((d_model, width), (width, d_model))
    if not experts:
        return maps
    return active * maps + product_flops((d_model, experts)) + experts
