"""Distillation losses on stored targets: weighted sums over timesteps and streams.

Loss and gradient are computed together, a block of timesteps at a time, so that no float32 tensor
of all logits is ever held: neither the teacher's (a hidden target becomes logits within a block)
nor the student's, where its heads are linear (`stages.student_logits`). Forbidden ids are masked on
the student's side as the targets do on the teacher's. What a store cannot teach is refused by
`require_supported`, before training starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from stages.divergences import (
    AllIds,
    Distribution,
    Divergence,
    KeptIds,
    bucketed,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    total_variation,
)
from stages.errors import UserError
from stages.family import Family, LinearOutput
from stages.joint_losses import joint_losses
from stages.loss_config import ByEntropy, LossConfig
from stages.student_logits import HeadedLogits, StudentLogits, WholeLogits
from stages.support import Held, require
from stages.targets import (
    BranchedTarget,
    ContinuousTarget,
    DenseTarget,
    Forbidden,
    HiddenTarget,
    RestoredTarget,
    Rows,
    SampledTarget,
    SparseTarget,
)

BLOCK_VALUES = {"cpu": 2**18, "cuda": 2**24}
"""Logits of a block: on a CPU what its cache holds, on an accelerator what fills it."""
HEADED_BLOCK_VALUES = {"cpu": 2**21, "cuda": 2**24}
"""The same where heads compute them: a product of few rows waits for the weights, at 2^18 logits of
16 × 2024 ids three times as long as it computes."""

Terms = dict[str, Tensor]
Pass = Callable[[Tensor], tuple[Terms, Tensor]]
"""Student logits [n, C, V], which it may use up → values [n, C] by term, gradient [n, C, V]."""


def distillation_loss(
    outputs: Tensor | Sequence[LinearOutput],
    target: RestoredTarget,
    codes: Tensor,
    element_weights: Tensor,
    forbidden: Forbidden,
    config: LossConfig,
    block_values: int | None = None,
    groups: Sequence[int] = (),
) -> tuple[Tensor, Terms]:
    """Return the loss summed over a batch and each of its terms, not yet divided by the weights.

    `outputs` are logits [B, T, C, V] of any floating dtype (for continuous streams the predictions
    [B, T, C, *shape]), or the linear heads that give them, one per group in the order of streams:
    then states, weights and biases get the gradients, and the logits are never whole. `codes`
    [B, T, C] int64, `element_weights` [B, T, C] float32, 0 beyond the end of a rollout. Positions
    of weight 0 are never read. The loss is a scalar to differentiate, once; the terms, scalars by
    name, are not multiplied by their own weights and carry no gradient. `block_values` bounds the
    logits that are held in float32 at a time. `groups`, the streams of each group in order, are
    what `config.joint` normalises together. Raises `UserError` for a term that the target cannot
    support.
    """
    require(config, _held(target))
    if config.joint and sum(groups) != codes.shape[-1]:
        raise ValueError(f"joint needs the groups of {codes.shape[-1]} streams, not {groups}")
    whole = isinstance(outputs, Tensor)
    sizes = BLOCK_VALUES if whole else HEADED_BLOCK_VALUES
    values = block_values or sizes.get(codes.device.type, 2**22)
    wanted = torch.is_grad_enabled()
    batch = _Batch(target, codes, element_weights, forbidden, config, values, wanted, groups)
    heads = () if isinstance(outputs, Tensor) else outputs
    parts = [part for head in heads for part in (head.states, head.weight, head.bias)]
    total, *terms = _Blockwise.apply(batch, *([outputs] if whole else parts))
    return total, dict(zip(config.terms, terms, strict=True))


def _held(target: RestoredTarget) -> Held:
    """Return what a target in memory holds."""
    match target:
        case SparseTarget():
            drawn = target.tail_ids is not None
            return Held("top_k", target.temperatures, target.moments is not None, drawn)
        case SampledTarget():
            return Held("sampled")
        case ContinuousTarget():
            return Held("continuous")
        case DenseTarget():
            return Held("distribution", absolute=target.levels is not None)
        case BranchedTarget():
            return Held("distribution")
        case HiddenTarget():
            return Held("distribution", absolute=True)


@dataclass(frozen=True)
class _Batch:
    """What `_Blockwise` needs besides the student's outputs."""

    target: RestoredTarget
    codes: Tensor
    weights: Tensor
    forbidden: Forbidden
    config: LossConfig
    block_values: int
    differentiated: bool
    """Whether gradients are wanted: autograd does not tell, where parameters are used without."""
    groups: Sequence[int]


class _Blockwise(torch.autograd.Function):
    """Computes the gradient with the loss, so that the way back only scales it.

    The gradient takes the place of all that autograd would keep.
    """

    @staticmethod
    def forward(ctx: Any, batch: _Batch, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        factors = batch.config.terms
        wanted = [batch.differentiated and needed for needed in ctx.needs_input_grad[1:]]
        counts = batch.weights.flatten(0, 1) > 0  # [B·T, C]
        counted = counts.any(-1)
        student, uneven = _student(tensors, counts, counted, wanted)
        sums = torch.zeros(len(factors), dtype=torch.float64, device=counts.device)
        for rows in _split(counted.nonzero().squeeze(1), batch.block_values // student.row_values):
            values, gradient = _block(student.rows(rows), batch, rows, uneven)
            sums += torch.stack([values[name] for name in factors])
            if any(wanted):
                student.take_gradient(rows, gradient)
        ctx.gradients = student.gradients() if any(wanted) else None
        total = (sums * sums.new_tensor(list(factors.values()))).sum()
        dtype = torch.promote_types(student.dtype, torch.float32)
        terms = sums.to(dtype).unbind()
        ctx.mark_non_differentiable(*terms)
        return total.to(dtype), *terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("a distillation loss can be differentiated once: compute it again")
        gradients, ctx.gradients = ctx.gradients, None
        return None, *(None if gradient is None else gradient.mul_(total) for gradient in gradients)


def _student(
    tensors: Sequence[Tensor | None], counts: Tensor, counted: Tensor, wanted: Sequence[bool]
) -> tuple[StudentLogits, bool]:
    """Return the student's logits, and whether streams count nothing where others do.

    `counts` [B·T, C] says which predictions count, `counted` [B·T] where any does. The device is
    waited for once.
    """
    uneven = (counts.all(-1) != counted).any()
    if len(tensors) == 1:
        assert tensors[0] is not None
        return WholeLogits(tensors[0], counted, wanted[0]), bool(uneven)
    heads = [LinearOutput(*tensors[i : i + 3]) for i in range(0, len(tensors), 3)]  # type: ignore[arg-type]
    by_head = torch.split(counts, [len(head.weight) for head in heads], -1)
    flags = torch.stack([uneven, *(part.any() for part in by_head)]).tolist()
    return HeadedLogits(heads, flags[1:], wanted), flags[0]


def _split(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    return torch.split(rows, max(size, 1)) if len(rows) else ()


def _block(student: Tensor, batch: _Batch, rows: Tensor, uneven: bool) -> tuple[Terms, Tensor]:
    """Return the weighted sum of every term over timesteps `rows` [n], and their gradient.

    `student` [n, ...] are their logits, which may be used up. With `uneven`, some streams of them
    weigh nothing: these get no gradient, not even NaN.
    """
    weights = batch.weights.flatten(0, 1).index_select(0, rows)
    codes = batch.codes.flatten(0, 1).index_select(0, rows)
    target = batch.target.rows(rows)
    passes = list(_passes(target, codes, weights, batch))
    values, gradient = passes[0](student.clone() if len(passes) > 1 else student)
    for number, further in enumerate(passes[1:], start=2):
        more, addition = further(student.clone() if number < len(passes) else student)
        values, gradient = values | more, gradient.add_(addition)
    present = weights > 0
    sums = {
        name: (torch.where(present, value, 0.0) * weights).sum(dtype=torch.float64)
        for name, value in values.items()
    }
    if not isinstance(target, ContinuousTarget) and not batch.config.joint:
        batch.forbidden.fill_(gradient, 0.0)
    # Few blocks hold such a stream; asking an accelerator which would wait for it.
    if uneven and not (present.is_cpu and bool(present.all())):
        mask = ~present[(...,) + (None,) * (gradient.dim() - present.dim())]
        gradient.masked_fill_(mask, 0.0)
    return sums, gradient


def _passes(target: Rows, codes: Tensor, weights: Tensor, batch: _Batch) -> Iterator[Pass]:
    """Yield what must be computed of a block; each pass normalises the student in its own way."""
    config, forbidden = batch.config, batch.forbidden
    if isinstance(target, ContinuousTarget):
        yield lambda student: _mse(student, target, weights, config)
        return
    if config.joint:
        assert isinstance(target, DenseTarget)  # `stages.support` refuses others
        yield lambda student: joint_losses(
            student, target.logits, codes, weights, batch.groups, config
        )
        return
    k, divergences = config.reverse_kl_top_k, _divergences(config)
    temperature = _temperature(target, config) if divergences else 1.0
    draws = list(_draws(target, codes, config))
    if k is not None and "reverse_kl" in divergences:
        reverse = {"reverse_kl": divergences.pop("reverse_kl")}
        yield lambda student: _at_student_top_k(
            student, target, reverse, k, weights, forbidden, temperature
        )
    together = draws if _is_one(temperature) else []
    if divergences or together:
        yield lambda student: _compared(
            student, target, divergences, together, weights, forbidden, temperature
        )
    if draws and not together:
        yield lambda student: _compared(student, target, {}, draws, weights, forbidden, 1.0)
    if config.nrmse:
        yield lambda student: _nrmse(student, target, weights, forbidden, config)
    if config.logit_mse:
        yield lambda student: _logit_mse(student, target, weights, forbidden, config)


def _temperature(target: Rows, config: LossConfig) -> float | Tensor:
    """The temperature of the divergences, or one for each prediction [n, C, 1].

    Where the teacher is sure, a temperature above 1 brings out what it thinks of the other ids;
    where it is not, that is in plain sight, and a high one would flatten it (as in 2605.20357).
    """
    rule = config.temperature
    if not isinstance(rule, ByEntropy):
        return rule
    assert isinstance(target, DenseTarget | SparseTarget)  # `stages.support` refuses others
    nats = entropy(target)
    chosen = torch.full_like(nats, rule.temperatures[0])
    for threshold, temperature in rule.by_entropy[1:]:
        chosen = torch.where(nats >= threshold, temperature, chosen)
    return chosen.unsqueeze(-1)


def entropy(target: DenseTarget | SparseTarget) -> Tensor:
    """Return the teacher's entropy [..., C] at temperature 1, in nats.

    Of a sparse target it is that of K + 1 categories, the last being everything else: it falls
    short by the tail's mass times the entropy within the tail, which was not stored.
    """
    if isinstance(target, DenseTarget):
        teacher = _whole(target, 1.0)
    else:
        teacher = Distribution.of(target.logprobs(1.0))
    return -(teacher.shares * teacher.logs).sum(-1)


Divergences = Mapping[str, tuple[float, Divergence]]
"""By the name of its term: weight and function."""


def _divergences(config: LossConfig) -> dict[str, tuple[float, Divergence]]:
    known: dict[str, Divergence] = {
        "kl": forward_kl,
        "reverse_kl": reverse_kl,
        "jsd": jensen_shannon(config.jsd_beta),
        "skew_kl": skew_kl(config.skew_alpha),
        "skew_reverse_kl": skew_reverse_kl(config.skew_alpha),
        "tvd": total_variation,
    }
    return {name: (config.terms[name], known[name]) for name in known if name in config.terms}


@dataclass(frozen=True)
class _Draws:
    """A cross entropy with ids that were drawn, all of the same weight."""

    name: str
    factor: float
    """Weight of the term."""
    ids: Tensor
    """[n, C, m] int64, with repeats."""
    tail_mass: Tensor | None = None
    """[n, C, 1] where the ids were drawn outside the kept ones: what those leave to be drawn."""


def _draws(target: Rows, codes: Tensor, config: LossConfig) -> Iterator[_Draws]:
    terms = config.terms
    if "ce" in terms:
        yield _Draws("ce", terms["ce"], codes.unsqueeze(-1))
    if "soft_ce" in terms and isinstance(target, SampledTarget):
        yield _Draws("soft_ce", terms["soft_ce"], target.ids)
    if "kl_tail" in terms and isinstance(target, SparseTarget) and target.tail_ids is not None:
        mass = target.logprobs(1.0)[..., -1:].exp()
        yield _Draws("kl_tail", terms["kl_tail"], target.tail_ids, mass)


def _compared(
    student: Tensor,
    target: Rows,
    divergences: Divergences,
    draws: Sequence[_Draws],
    weights: Tensor,
    forbidden: Forbidden,
    temperature: float | Tensor,
) -> tuple[Terms, Tensor]:
    """Compare the student with the teacher's probabilities, and with ids drawn from them."""
    logits = _tempered(forbidden.fill_(student), temperature)
    ids, teacher = None, None
    if divergences and isinstance(target, SparseTarget):
        ids, teacher = target.ids, Distribution.of(target.logprobs(temperature))
    elif divergences and isinstance(target, DenseTarget):
        teacher = _whole(target, temperature)
    return _distances(logits, ids, teacher, divergences, draws, weights, temperature)


def _at_student_top_k(
    student: Tensor,
    target: Rows,
    divergences: Divergences,
    k: int,
    weights: Tensor,
    forbidden: Forbidden,
    temperature: float | Tensor,
) -> tuple[Terms, Tensor]:
    """Compare over the student's own k likeliest ids and one category for the rest."""
    assert isinstance(target, DenseTarget)  # `stages.support` refuses others
    logits = _tempered(forbidden.fill_(student), temperature)
    ids = logits.topk(min(k, logits.shape[-1])).indices
    teacher = Distribution.of(bucketed(_whole(target, temperature).logs, ids))
    return _distances(logits, ids, teacher, divergences, (), weights, temperature)


def _is_one(temperature: float | Tensor) -> bool:
    return isinstance(temperature, float) and temperature == 1.0


def _tempered(logits: Tensor, temperature: float | Tensor) -> Tensor:
    return logits if _is_one(temperature) else logits.div_(temperature)


def _whole(target: DenseTarget, temperature: float | Tensor) -> Distribution:
    """The teacher's distribution over all ids."""
    logits = target.logits if _is_one(temperature) else target.logits / temperature
    return AllIds(logits).distribution()


def _distances(
    logits: Tensor,
    ids: Tensor | None,
    teacher: Distribution | None,
    divergences: Divergences,
    draws: Sequence[_Draws],
    weights: Tensor,
    temperature: float | Tensor,
) -> tuple[Terms, Tensor]:
    """Values [n, C] and gradient [n, C, V] of divergences and draws; `logits` is used up.

    `teacher` is over all V ids, or over `ids` [n, C, K] and the rest. Divergences are multiplied by
    T² (each by its own where `temperature` is [n, C, 1]), so that their gradients do not shrink
    with the temperature (1503.02531); draws are compared at temperature 1.
    """
    means = [logits.gather(-1, draw.ids).mean(-1, keepdim=True) for draw in draws]
    student = AllIds(logits) if ids is None else KeptIds(logits, ids)
    values: Terms = {}
    slopes: list[Tensor] = []
    rows = weights.unsqueeze(-1)
    if teacher is not None:
        ours = student.distribution()
        t = temperature.squeeze(-1) if isinstance(temperature, Tensor) else temperature
        for name, (factor, divergence) in divergences.items():
            value, slope = divergence(teacher, ours)
            values[name] = value * t**2
            # Of T² the division of the logits by T takes back one.
            slopes.append(slope.mul_(rows * (factor * temperature)))
    shares: list[Tensor] = []
    for draw, mean in zip(draws, means, strict=True):
        surprise, share = student.normaliser - mean, rows * draw.factor
        if draw.tail_mass is not None and isinstance(student, KeptIds):
            # Given that the id is none of the kept: the part of KL that the K + 1 categories miss.
            surprise = draw.tail_mass * (surprise + student.distribution().logs[..., -1:])
            share = share * draw.tail_mass
            slopes.append(functional.pad(share, (student.k, 0)))
        values[draw.name] = surprise.squeeze(-1)
        shares.append(share)
    derivative = sum(slopes[1:], slopes[0]) if slopes else None
    gradient = student.gradient(derivative, -sum(shares) if shares else 0.0)
    for draw, share in zip(draws, shares, strict=True):
        each = -share.to(gradient.dtype) / draw.ids.shape[-1]
        gradient.scatter_add_(-1, draw.ids, each.expand(draw.ids.shape))
    return values, gradient


def _nrmse(
    student: Tensor, target: Rows, weights: Tensor, forbidden: Forbidden, config: LossConfig
) -> tuple[Terms, Tensor]:
    """The root mean square error of the logits over the teacher's standard deviation.

    Both sides are centred first, so a constant added to a row changes nothing. Over a sparse target
    the ids outside the kept ones are compared with the teacher's mean there, known from the stored
    moments: the spread of the teacher's tail is not seen, and the loss pulls the student's tail
    towards flat. Source: NeMo's MagpieTTS distillation, there uncentred.
    """
    allowed = forbidden.allowed(student)
    if isinstance(target, SparseTarget):
        assert target.moments is not None  # `stages.support` refuses others
        mean, std = target.moments.unsqueeze(-1).unbind(-2)
        teacher = _with_flat_tail(target, mean, allowed, student.shape)
    else:
        assert isinstance(target, DenseTarget)
        teacher = target.logits
        spread = _centred(teacher, forbidden, allowed)
        std = (spread.square().sum(-1, keepdim=True) / allowed).sqrt()
    error, std = _centred(student - teacher, forbidden, allowed), std.clamp_min(1e-6)
    root = (error.square().sum(-1, keepdim=True) / allowed + 1e-12).sqrt()
    factor = config.nrmse * weights.unsqueeze(-1) / (allowed * root * std)
    return {"nrmse": (root / std).squeeze(-1)}, error.mul_(factor)


def _centred(values: Tensor, forbidden: Forbidden, allowed: Tensor) -> Tensor:
    """Values [n, C, V] less their mean over the allowed ids, 0 at the forbidden ones."""
    filled = forbidden.fill_(values.clone(), 0.0)
    mean = filled.sum(-1, keepdim=True) / allowed
    return forbidden.fill_(filled.sub_(mean), 0.0)


def _with_flat_tail(
    target: SparseTarget, mean: Tensor, allowed: Tensor, shape: torch.Size
) -> Tensor:
    outside = (allowed - target.ids.shape[-1]).clamp_min(1.0)
    tail = (mean * allowed - target.logits.sum(-1, keepdim=True)) / outside
    return tail.expand(shape).scatter(-1, target.ids, target.logits)


def _logit_mse(
    student: Tensor, target: Rows, weights: Tensor, forbidden: Forbidden, config: LossConfig
) -> tuple[Terms, Tensor]:
    """The mean square error of the logits, centred over the ids that are compared.

    Over a sparse target these are the kept ids alone: it says nothing about the rest, so a term
    with a tail belongs beside it. Source: Kim et al. (2105.08919).
    """
    factor = 2 * config.logit_mse * weights.unsqueeze(-1)
    if isinstance(target, SparseTarget):
        difference = student.gather(-1, target.ids) - target.logits
        error = difference - difference.mean(-1, keepdim=True)
        gradient = torch.zeros_like(student)
        gradient.scatter_(-1, target.ids, error * factor / error.shape[-1])
        return {"logit_mse": error.square().mean(-1)}, gradient
    assert isinstance(target, DenseTarget)
    allowed = forbidden.allowed(student)
    error = _centred(student - target.logits, forbidden, allowed)
    value = error.square().sum(-1) / allowed.squeeze(-1)
    return {"logit_mse": value}, error.mul_(factor / allowed)


def _mse(
    student: Tensor, target: ContinuousTarget, weights: Tensor, config: LossConfig
) -> tuple[Terms, Tensor]:
    """The mean square error of continuous predictions [n, C, *shape]."""
    assert isinstance(target.values, Tensor)
    error = student - target.values
    flat = error.flatten(2)
    factor = 2 * config.mse / flat.shape[-1] * weights
    return {"mse": flat.square().mean(-1)}, (flat * factor.unsqueeze(-1)).view_as(error)


@torch.no_grad()
def kl_divergence(
    student: Tensor, target: DenseTarget | SparseTarget, temperature: float = 1.0
) -> Tensor:
    """Return T²·KL(teacher ‖ student) [...], exact over what the target holds, without gradient.

    `student` is [..., V] logits with -inf at forbidden ids. A dense target gives the full
    divergence; a sparse one the divergence over K + 1 categories, the last being everything else,
    which never exceeds the full one and is 0 only where the student agrees on all of them. Source:
    Hinton et al. (1503.02531); the tail category as in Megatron-LM's ghost token.
    """
    logits = student.clone() if temperature == 1.0 else student / temperature
    if isinstance(target, DenseTarget):
        teacher, ours = _whole(target, temperature), AllIds(logits).distribution()
        return forward_kl(teacher, ours)[0] * temperature**2
    teacher = Distribution.of(target.logprobs(temperature))
    ours = KeptIds(logits, target.ids.long()).distribution()
    return forward_kl(teacher, ours)[0] * temperature**2


def cross_entropy(student: Tensor, codes: Tensor) -> Tensor:
    """Return −log q(code): `student` [..., V] float32 logits, `codes` [...] int64; gives [...]."""
    flat = functional.cross_entropy(
        student.reshape(-1, student.shape[-1]), codes.reshape(-1), reduction="none"
    )
    return flat.reshape(codes.shape)


def element_weights(
    lengths: Tensor,
    rollout_weights: Tensor,
    stream_weights: Tensor,
    timesteps: int,
    predicted: Tensor | None = None,
) -> Tensor:
    """Return the weight [B, T, C] of every prediction: rollout × stream, 0 beyond the length.

    Where `predicted` [B, T, C] is given, only what it marks counts.
    """
    valid = torch.arange(timesteps, device=lengths.device) < lengths.unsqueeze(1)
    per_rollout = (valid * rollout_weights.unsqueeze(1)).unsqueeze(-1)
    weights = per_rollout * stream_weights
    return weights if predicted is None else weights * predicted


def stream_weights(
    codebook_weights: Sequence[float], family: Family, local_share: float = 0.5
) -> Tensor:
    """Return the weight [C] of every stream of a family, of mean 1.

    Streams lie frame by frame and group by group, so the weights of a frame's codebooks repeat
    within each group; no weights mean equal ones. The group `local` has the share given and all
    others have the rest, however many streams they are; a share of nothing else is all, but for a
    share of 0, which makes all weights 0. Raises `UserError` when the codebook weights do not fit.
    """
    streams = len(family.streams)
    given = list(codebook_weights) or [1.0]
    if streams % len(given):
        raise UserError(
            f"{len(given)} codebook_weights do not fit {streams} streams: give one weight for "
            "each codebook of the audio codec"
        )
    weights = torch.tensor(given).repeat(streams // len(given))
    local = torch.tensor([stream.group == "local" for stream in family.streams])
    share = local_share if local.any() else 0.0
    for group, of_group in ((local, share), (~local, 1 - share)):
        weights[group] *= of_group / weights[group].sum()
    return weights / weights.mean() if weights.any() else weights
