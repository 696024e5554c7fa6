"""Feed-forward of a transformer layer: dense, or a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.model_config import ExpertsConfig
from stages.modules.grouped_matmul import grouped_matmul

SINKHORN_ITERATIONS = 8
"""Rounds of row and column normalisation; the assignment changes little after the first few."""


class FeedForward(nn.Module):
    """Two linear maps with a GELU between."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, width, bias=False)
        self.down = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., E] to [..., E]."""
        y: Tensor = self.down(F.gelu(self.up(x)))
        return y


class Routing(NamedTuple):
    """How a router spread the valid positions over its experts: float32 scalars."""

    loss: Tensor
    """Weighted auxiliary loss."""
    least: Tensor
    """Share of the assignments that the least used expert got; without gradient."""
    most: Tensor
    """That of the most used one."""
    entropy: Tensor
    """Mean entropy of the router's probabilities, in nats; without gradient."""

    @classmethod
    def of_layers(cls, layers: Sequence[Routing]) -> Routing:
        """Sum the losses of some layers and average the rest."""
        losses, *others = (torch.stack(values) for values in zip(*layers, strict=True))
        return cls(losses.sum(), *(values.mean() for values in others))


class Experts(nn.Module):
    """Sparse mixture of experts with stacked weights and dropless, sort-based dispatch.

    Positions are sorted by expert and multiplied in one grouped product per layer, so that every
    weight takes part in every backward pass and no shape depends on the routing.
    """

    def __init__(self, d_model: int, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(d_model, config.experts, bias=False)
        self.up = nn.Parameter(torch.empty(config.experts, d_model, width))
        self.down = nn.Parameter(torch.empty(config.experts, width, d_model))

    def forward(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Routing]:
        """Map `x` [..., E] to [..., E] and return how it was routed beside it.

        `valid` [...] bool says which positions count in that and in Sinkhorn's balance; None is
        all of them. Padding is mapped too, and never influences another position.
        """
        flat = x.reshape(-1, x.shape[-1])
        kept = torch.ones_like(flat[:, 0], dtype=torch.bool) if valid is None else valid.flatten()
        logits = F.linear(flat.float(), self.router.weight.float())
        gates, chosen = self._route(logits, kept)
        if torch.is_autocast_enabled(flat.device.type):
            flat = flat.to(torch.get_autocast_dtype(flat.device.type))
        y = dispatch(flat, gates.to(flat.dtype), chosen, self.up, self.down)
        return y.reshape(x.shape), self._routing(logits, chosen, kept)

    def _route(self, logits: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts for router logits [N, X]: gates [N, A] summing to 1, and ids [N, A]."""
        active = self.config.active
        if self.training and self.config.routing == "sinkhorn":
            chosen = sinkhorn(logits.detach(), valid).topk(active, dim=-1).indices
        else:
            chosen = logits.topk(active, dim=-1).indices
        probabilities = logits.softmax(-1).gather(-1, chosen)
        if active == 1:
            return probabilities, chosen
        return probabilities / probabilities.sum(-1, keepdim=True), chosen

    def _routing(self, logits: Tensor, chosen: Tensor, valid: Tensor) -> Routing:
        weights = valid.float()
        total = weights.sum().clamp(min=1.0)
        balance = load_balance(logits, chosen, weights, total)
        z = (logits.logsumexp(-1).square() * weights).sum() / total
        loss = self.config.balance_weight * balance + self.config.z_weight * z
        usage = expert_shares(chosen, logits.shape[-1], weights, total)
        logprobs = logits.detach().log_softmax(-1)
        entropies = -(logprobs.exp() * logprobs).sum(-1)
        return Routing(loss, usage.amin(), usage.amax(), (entropies * weights).sum() / total)


def expert_shares(chosen: Tensor, experts: int, weights: Tensor, total: Tensor) -> Tensor:
    """Share of the assignments [N, A] that each expert got, [X]; `weights` as in `load_balance`."""
    visits = F.one_hot(chosen, experts).sum(1) * weights.unsqueeze(-1)
    return visits.sum(0) / (total * chosen.shape[-1])


def load_balance(logits: Tensor, chosen: Tensor, weights: Tensor, total: Tensor) -> Tensor:
    """How unevenly one layer's router spreads its positions: 1 when even, X at worst.

    `logits` [N, X], `chosen` [N, A], `weights` [N] 0 or 1 with sum `total`. It is
    X · sum_x share_x · probability_x, over one layer: averaging layers first would let their
    imbalances cancel. Source: Fedus et al., Switch Transformers (2101.03961), eq. 4.
    """
    experts = logits.shape[-1]
    shares = expert_shares(chosen, experts, weights, total)
    probabilities = (logits.softmax(-1) * weights.unsqueeze(-1)).sum(0) / total
    return experts * (shares * probabilities).sum()


def sinkhorn(logits: Tensor, valid: Tensor) -> Tensor:
    """Balance router logits [N, X] so that the valid rows spread evenly over the experts.

    Returns log assignment scores [N, X] float32. Rows that are not valid keep their own logits and
    weigh nothing. Source: Sinkhorn (1967), as in BASE layers (2103.16716), in the log domain.
    """
    scores = logits.float()
    outside = ~valid.unsqueeze(-1)
    for _ in range(SINKHORN_ITERATIONS):
        scores = scores - scores.logsumexp(-1, keepdim=True)
        column = scores.masked_fill(outside, float("-inf")).logsumexp(0, keepdim=True)
        scores = scores - torch.where(torch.isfinite(column), column, 0.0)
    return scores


def dispatch(x: Tensor, gates: Tensor, chosen: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Send each row of `x` [N, E] through its experts and mix the answers.

    `gates` and `chosen` are [N, A]; `up` [X, E, W] and `down` [X, W, E] are the stacked weights.
    Rows are sorted by expert (a stable sort), multiplied group by group and put back.
    """
    active = chosen.shape[-1]
    order = chosen.flatten().argsort(stable=True)
    source = order // active
    counts = F.one_hot(chosen.flatten(), up.shape[0]).sum(0)
    ends = counts.cumsum(0).to(torch.int32)
    hidden = F.gelu(grouped_matmul(x[source], up.to(x.dtype), ends))
    answers = grouped_matmul(hidden, down.to(x.dtype), ends)
    weighted = answers * gates.flatten()[order].unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, source, weighted)
