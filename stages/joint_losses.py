"""The losses of NeMo 3.0.0's online distillation of the same arrays, for comparison with it.

They differ from those of `stages.losses` in what they normalise: one softmax runs over the ids of
all streams of a group at a timestep, so that streams compete for probability; the student's
forbidden ids take part in it; and errors of logits are not centred.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stages.loss_config import LossConfig

LEAST_STD = 1e-8
"""Below it the spread of a teacher's logits is taken for this."""

Terms = dict[str, Tensor]


def joint_losses(
    student: Tensor,
    teacher: Tensor,
    codes: Tensor,
    weights: Tensor,
    groups: Sequence[int],
    config: LossConfig,
) -> tuple[Terms, Tensor]:
    """Return the values [n, C] of the active terms and the gradient [n, C, V] of their sum.

    `student` and `teacher` are logits [n, C, V] at their absolute height, -inf where the teacher
    may not go; `codes` and `weights` [n, C], `groups` the streams of each group in order. Within a
    group either all streams weigh something or none does. Source: the classes KLDivergenceLoss,
    CodesCrossEntropyLoss and NRMSELogitsLoss of NeMo 3.0.0.
    """
    known: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
        "kl": _kl,
        "ce": _cross_entropy,
        "nrmse": _nrmse,
    }
    (temperature,) = config.temperatures  # `LossConfig` refuses one for each prediction
    values: dict[str, list[Tensor]] = {name: [] for name in config.terms}
    gradients = []
    by_group = [x.split_with_sizes(list(groups), 1) for x in (student, teacher, codes, weights)]
    for ours, theirs, drawn, weighed in zip(*by_group, strict=True):
        gradient = torch.zeros_like(ours)
        for name, factor in config.terms.items():
            # Only the divergence is raised again to the size that it has at temperature 1.
            size = temperature**2 if name == "kl" else 1.0
            value, slope = known[name](ours / temperature, theirs / temperature, drawn, weighed)
            values[name].append(value * size)
            gradient += slope * (factor * size / temperature)
        gradients.append(gradient)
    return {name: torch.cat(parts, 1) for name, parts in values.items()}, torch.cat(gradients, 1)


def _kl(student: Tensor, teacher: Tensor, _: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Each stream's part of KL(teacher ‖ student) over the ids of all streams together."""
    log_q, log_p = (x.flatten(1).log_softmax(-1).view_as(x) for x in (student, teacher))
    p = log_p.exp()
    value = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    pulled = p * weights.unsqueeze(-1)
    return value, log_q.exp() * pulled.sum((1, 2), keepdim=True) - pulled


def _cross_entropy(
    student: Tensor, _: Tensor, codes: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross entropy of each stream's drawn code; forbidden ids take probability too."""
    log_q, ids, rows = student.log_softmax(-1), codes.unsqueeze(-1), weights.unsqueeze(-1)
    gradient = log_q.exp().mul_(rows).scatter_add_(-1, ids, -rows)
    return -log_q.gather(-1, ids).squeeze(-1), gradient


def _nrmse(student: Tensor, teacher: Tensor, _: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Root mean square of the error over the teacher's spread; 0 where a logit is infinite."""
    infinite = student.isinf() | teacher.isinf()
    theirs = teacher.masked_fill(infinite, 0.0)
    error = student.masked_fill(infinite, 0.0) - theirs
    root = error.square().mean(-1).sqrt()
    std = theirs.std(-1).clamp_min(LEAST_STD)
    # Where there is no error there is none to divide, and no direction.
    slope = weights / (root.clamp_min(torch.finfo(root.dtype).tiny) * std * error.shape[-1])
    return root / std, error * slope.unsqueeze(-1)
