"""Distillation losses per timestep and stream, and their weighted mean over a batch.

Every loss masks the ids that the store forbids, in fp32, on the student's side as the targets do
on the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from stages.config import LossConfig
from stages.errors import UserError
from stages.family import Family
from stages.reduction import moments
from stages.sampling import mask_forbidden
from stages.targets import DenseTarget, SparseTarget

# Stands in for -inf where a whole row may be masked: the gradient of logsumexp stays finite.
MASKED = -1e30


def kl_divergence(
    student: Tensor, target: DenseTarget | SparseTarget, temperature: float = 1.0
) -> Tensor:
    """Return T²·KL(teacher ‖ student), exact over what the target holds.

    `student` is [..., V] float32 logits with -inf at forbidden ids. A dense target gives the full
    divergence; a sparse one the divergence over K + 1 categories, the last being everything else,
    which never exceeds the full one and is 0 only where the student agrees on all of them. Returns
    [...] float32. Source: Hinton et al. (1503.02531); the tail category as in Megatron-LM's
    ghost token.
    """
    scaled = student if temperature == 1.0 else student / temperature
    if isinstance(target, DenseTarget):
        teacher = (target.logits / temperature).log_softmax(-1)
        divergence = _cross(teacher, scaled.log_softmax(-1)).sum(-1)
    else:
        teacher, teacher_tail = target.logprobs(temperature)
        normaliser = scaled.logsumexp(-1)
        kept = scaled.gather(-1, target.ids) - normaliser.unsqueeze(-1)
        tail = scaled.scatter(-1, target.ids, MASKED).logsumexp(-1) - normaliser
        divergence = _cross(teacher, kept).sum(-1) + _cross(teacher_tail, tail)
    return divergence * temperature**2


def _cross(teacher: Tensor, student: Tensor) -> Tensor:
    """Return p·(log p − log q) elementwise, 0 where p is 0, from log-probabilities."""
    present = teacher > float("-inf")
    difference = torch.where(present, teacher, 0.0) - torch.where(present, student, 0.0)
    return teacher.exp() * difference


def cross_entropy(student: Tensor, codes: Tensor) -> Tensor:
    """Return −log q(code): `student` [..., V] float32 logits, `codes` [...] int64; gives [...]."""
    flat = functional.cross_entropy(
        student.reshape(-1, student.shape[-1]), codes.reshape(-1), reduction="none"
    )
    return flat.reshape(codes.shape)


def nrmse(student: Tensor, target: DenseTarget | SparseTarget, forbidden: Sequence[int]) -> Tensor:
    """Return the root mean square error of the logits over the teacher's standard deviation.

    Both sides are centred first, so a constant added to a row of logits changes nothing. Over a
    sparse target the ids outside the kept ones are compared with the teacher's mean there, known
    from the stored moments; the spread of the teacher's tail is not seen, and the loss pulls the
    student's tail towards flat. `student` is [..., V]; returns [...] float32. Raises `UserError`
    for a sparse target without moments. Source: NeMo's MagpieTTS distillation, there uncentred.
    """
    allowed = torch.ones(student.shape[-1], dtype=torch.bool, device=student.device)
    allowed[list(forbidden)] = False
    if isinstance(target, DenseTarget):
        teacher, stats = target.logits, moments(target.logits, forbidden)
    else:
        teacher, stats = _with_flat_tail(student, target, allowed), _stored_moments(target)
    mean, std = stats[..., 0], stats[..., 1]
    difference = student[..., allowed] - teacher[..., allowed]
    centred = difference - (student[..., allowed].mean(-1) - mean).unsqueeze(-1)
    return (centred.square().mean(-1) + 1e-12).sqrt() / std.clamp_min(1e-6)


def _stored_moments(target: SparseTarget) -> Tensor:
    if target.moments is None:
        raise UserError(
            "the nrmse loss needs the moments of the logits, and this top_k store was written "
            "without them: set loss.nrmse to 0, or roll out with target.moments: true"
        )
    return target.moments


def _with_flat_tail(student: Tensor, target: SparseTarget, allowed: Tensor) -> Tensor:
    count = int(allowed.sum())
    total = _stored_moments(target)[..., 0] * count
    outside = max(count - target.ids.shape[-1], 1)
    tail_mean = (total - target.logits.sum(-1)) / outside
    flat = tail_mean.unsqueeze(-1).expand(student.shape)
    return flat.scatter(-1, target.ids, target.logits)


def distillation_terms(
    logits: Tensor,
    target: DenseTarget | SparseTarget,
    codes: Tensor,
    element_weights: Tensor,
    forbidden: Sequence[int],
    config: LossConfig,
) -> dict[str, Tensor]:
    """Return the weighted sum of every active term over a batch, not yet divided by the weights.

    `logits` [B, T, C, V], `codes` [B, T, C], `element_weights` [B, T, C] float32, 0 beyond the end
    of a rollout. Positions of weight 0 are left out before anything is computed, so what lies
    there is never read. Terms are keyed by name; each is a float32 scalar.
    """
    chosen = element_weights > 0
    student = mask_forbidden(logits[chosen].float(), forbidden)
    teacher, drawn, weights = select(target, chosen), codes[chosen], element_weights[chosen]
    terms = {}
    if config.kl:
        terms["kl"] = (kl_divergence(student, teacher, config.temperature) * weights).sum()
    if config.ce:
        terms["ce"] = (cross_entropy(student, drawn) * weights).sum()
    if config.nrmse:
        terms["nrmse"] = (nrmse(student, teacher, forbidden) * weights).sum()
    return terms


def select(target: DenseTarget | SparseTarget, chosen: Tensor) -> DenseTarget | SparseTarget:
    """Return the target's rows where `chosen` [B, T, C] is true, flattened to one axis."""
    if isinstance(target, DenseTarget):
        return DenseTarget(target.logits[chosen])
    return SparseTarget(
        ids=target.ids[chosen],
        logits=target.logits[chosen],
        tail_logmass=target.tail_logmass[chosen],
        temperatures=target.temperatures,
        moments=None if target.moments is None else target.moments[chosen],
    )


def element_weights(
    lengths: Tensor, rollout_weights: Tensor, stream_weights: Tensor, timesteps: int
) -> Tensor:
    """Return the weight [B, T, C] of every prediction: rollout × stream, 0 beyond the length."""
    valid = torch.arange(timesteps, device=lengths.device) < lengths.unsqueeze(1)
    per_rollout = (valid * rollout_weights.unsqueeze(1)).unsqueeze(-1)
    return per_rollout * stream_weights


def stream_weights(codebook_weights: Sequence[float], family: Family, local: float = 1.0) -> Tensor:
    """Return the weight [C] of every stream of a family, of mean 1.

    Streams lie frame by frame and group by group, so the weights of a frame's codebooks repeat; no
    weights mean equal ones. Streams of the group `local` count `local` times as much. Raises
    `UserError` when the weights do not fit.
    """
    streams = len(family.streams)
    given = list(codebook_weights) or [1.0]
    if streams % len(given):
        raise UserError(
            f"{len(given)} codebook_weights do not fit {streams} streams: give one weight for "
            "each codebook of the audio codec"
        )
    groups = torch.tensor([local if s.group == "local" else 1.0 for s in family.streams])
    weights = torch.tensor(given).repeat(streams // len(given)) * groups
    return weights / weights.mean()
