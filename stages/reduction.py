"""From what a teacher predicts to what the store keeps, on whatever device the logits are on.

What is stored is the guided distribution before any sampling filter: forbidden ids masked,
normalised per stream, then reduced. Nothing here waits for the device, so a value that is not
finite is reported as a flag (`all_finite`) and refused by who reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from stages.family import Branches
from stages.guidance import guide
from stages.sampling import draw_many
from stages.targets import Forbidden
from store.encoding import array_specs
from store.schema import Dense, Full, Hidden, Manifest, Sampled, Target, TopK

Arrays = dict[str, Tensor]

DRAW_VALUES = (2**22, 2**18)
"""Weights whose cumulative sums are held at once (32 MiB of float64), and those on the CPU."""
LEAST_WEIGHT = 2e-35
"""Just over e^-80, which no tail and no draw ever notices."""
LEAST_LOGIT = -1e30
LEAST_STORED = -65504.0
"""What a logit further below its row's maximum is stored as: never, but finite. Below it float16
has only minus infinity, and two of float32's own least numbers would overflow when mixed."""


def of_branches(target: Target) -> bool:
    """Whether a target is made of the branches, and not of what they were mixed to."""
    return not isinstance(target, TopK | Sampled) and (isinstance(target, Hidden) or _both(target))


def ingredients(target: Target, logits: Tensor | None, branches: Branches | None) -> Arrays:
    """Return what a target is made of, by name and without copying whole predictions.

    `logits` [n, C, V], or [n, C, *shape] where streams are continuous, are the guided ones, which
    may be left out where `of_branches`, and `branches` what they were mixed from. The names are
    `logits`, or `cond` and `uncond`, or for hidden states `cond.GROUP` and `uncond.GROUP`.
    """
    if not of_branches(target):
        if logits is None:
            raise ValueError(f"target {target.kind!r} needs the guided logits, which are missing")
        return {"logits": logits}
    if branches is None:
        raise ValueError(
            f"target {target.kind!r} needs the branches, which the family gave none of"
        )
    parts = {"cond": branches.cond, "uncond": branches.uncond}
    given = {name: branch for name, branch in parts.items() if branch is not None}
    if not isinstance(target, Hidden):
        return {name: _joined(branch.logits) for name, branch in given.items()}
    return {
        f"{name}.{group}": _joined(states)
        for name, branch in given.items()
        for group, states in branch.hidden.items()
    }


def _both(target: Full | Hidden | Dense) -> bool:
    return target.branches == "both"


def guided_logits(branches: Branches, scale: float) -> Tensor:
    """Guide the logits [n, C, V] of both branches; the conditional ones where there are no others.

    Heads that were not applied yet are, here and for these timesteps.
    """
    cond = _joined(branches.cond.logits)
    if branches.uncond is None:
        return cond
    return guide(cond, _joined(branches.uncond.logits), scale)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def all_finite(values: Mapping[str, Tensor], forbidden: Forbidden) -> Tensor:
    """Return whether all ingredients are finite, as bool [] on their device.

    Forbidden ids, which logits [..., C, V] have and hidden states have not, may hold anything.
    """
    extremes: list[Tensor] = []
    for name, x in values.items():
        allowed = x.float() if "." in name else forbidden.filled(x.float(), 0.0)
        # NaN is an extreme too; isfinite of all values costs five times as much, and a sum of
        # logits that a model puts at the least number there is would overflow.
        extremes += torch.aminmax(allowed)
    return torch.stack(extremes).isfinite().all()


def reduce(
    logits: Tensor,
    codes: Tensor,
    target: TopK | Full | Sampled,
    forbidden: Forbidden,
    end_id: int | None,
    uniforms: Tensor | None = None,
) -> Arrays:
    """Reduce guided logits to the arrays of a target.

    `logits` is [..., C, V] of any floating dtype, `codes` [..., C] int64 the drawn ids, which are
    always kept, as is the end id in streams that have it; `uniforms` [..., C, draws] float64 in
    [0, 1) for targets that draw. Returns the arrays of `store.encoding` without their target
    prefix, on the device of `logits`.
    """
    relative = _relative(logits, forbidden)
    match target:
        case Full():
            arrays = {"logits": _storable_(relative, forbidden)}
            return arrays | ({"levels": _levels(logits, forbidden)} if target.levels else {})
        case Sampled():
            return {"ids": _draw_ids(relative, uniforms)}
        case TopK():
            return _reduce_top_k(relative, codes, target, forbidden, end_id, uniforms)


def _relative(logits: Tensor, forbidden: Forbidden) -> Tensor:
    """Logits [..., C, V] less their row's maximum, float32, -inf at forbidden ids; a new tensor."""
    masked = forbidden.filled(logits.float())
    return masked - masked.amax(-1, keepdim=True)


def _levels(logits: Tensor, forbidden: Forbidden) -> Tensor:
    """That maximum [..., C], float32."""
    return forbidden.filled(logits.float()).amax(-1)


def _storable_(relative: Tensor, forbidden: Forbidden) -> Tensor:
    """Let nothing but forbidden ids become minus infinity when [..., C, V] are narrowed."""
    return forbidden.fill_(relative.clamp_min_(LEAST_STORED))


def reduce_branches(branches: Mapping[str, Tensor], forbidden: Forbidden) -> Arrays:
    """Reduce the logits `cond` and `uncond` [..., C, V] for `full`, each relative to its maximum.

    Constants of a row cancel when they are mixed, whatever the scale.
    """
    return {name: _storable_(_relative(x, forbidden), forbidden) for name, x in branches.items()}


def reduce_hidden(states: Mapping[str, Tensor], target: Hidden, scale: float) -> Arrays:
    """Reduce the states `cond.GROUP` and `uncond.GROUP` [..., H, D], in float32.

    A linear head commutes with guidance, so states are mixed as their logits would be; without
    unconditional ones the conditional are what is taught.
    """
    if _both(target):
        return {name: x.float() for name, x in states.items()}
    groups = [name.removeprefix("cond.") for name in states if name.startswith("cond.")]
    return {
        group: guide(states[f"cond.{group}"], states[f"uncond.{group}"], scale)
        if f"uncond.{group}" in states
        else states[f"cond.{group}"].float()
        for group in groups
    }


def reduce_dense(cond: Tensor, uncond: Tensor | None) -> Arrays:
    """Reduce continuous predictions [..., C, *shape] to `cond` and `delta`, in float32.

    The delta is conditional less unconditional, so the prediction at scale s is
    cond + (s − 1)·delta. Without an unconditional prediction there is no delta: ValueError.
    """
    if uncond is None:
        raise ValueError("branches: both needs the unconditional prediction, which is missing")
    return {"cond": cond.float(), "delta": cond.float() - uncond.float()}


def _draw_ids(logits: Tensor, uniforms: Tensor | None) -> Tensor:
    """Draw ids [..., draws], rising with repeats, from softmax(logits) of [..., V]."""
    if uniforms is None:
        raise ValueError("this target draws ids, so it needs uniform numbers")
    vocabulary, draws = logits.shape[-1], uniforms.shape[-1]
    rows = max(1, DRAW_VALUES[logits.device.type == "cpu"] // vocabulary)
    blocks = zip(
        torch.split(logits.reshape(-1, vocabulary), rows),
        torch.split(uniforms.reshape(-1, draws), rows),
        strict=True,
    )
    drawn = [draw_many(draw_weights(x), u) for x, u in blocks]
    return torch.cat(drawn).view(uniforms.shape)


def draw_weights(logits: Tensor) -> Tensor:
    """Return what ids are drawn by, [..., V]: their probability over that of the likeliest."""
    # Relative to the row's own maximum, a weight is 1 even where all others have the mass.
    return _weights(logits, logits.amax(-1, keepdim=True), 1.0)


def _weights(logits: Tensor, peak: Tensor, temperature: float) -> Tensor:
    """exp((logits − peak) / temperature), 0 below e^-80: denormal numbers take a hundred times."""
    exponents = logits - peak
    if temperature != 1.0:
        exponents = exponents.div_(temperature)
    return torch.threshold_(exponents.clamp_min_(-80.0).exp_(), LEAST_WEIGHT, 0.0)


def _reduce_top_k(
    relative: Tensor,
    codes: Tensor,
    target: TopK,
    forbidden: Forbidden,
    end_id: int | None,
    uniforms: Tensor | None,
) -> Arrays:
    ids = _kept_ids(relative, codes, target.k, end_id)
    values = relative.gather(-1, ids).clamp_min_(LEAST_STORED)
    arrays = {"ids": ids, "logits": values}
    if target.moments:
        arrays["moments"] = moments(relative, forbidden)
    outside = without(relative, ids)
    if target.tail_samples:
        arrays["tail_ids"] = _draw_ids(outside, uniforms)
    tails = [_tail_logmass(outside, values, temperature) for temperature in target.temperatures]
    return arrays | {"tail_logmass": torch.stack(tails, -1)}


def without(logits: Tensor, ids: Tensor) -> Tensor:
    """Return logits [..., V] with minus infinity at `ids` [..., K]: those of the tail."""
    return logits.scatter(-1, ids, float("-inf"))


def _kept_ids(relative: Tensor, codes: Tensor, k: int, end_id: int | None) -> Tensor:
    """Rising ids [..., k] of the largest logits, the codes and the end id always among them.

    Of equal logits the lower ids are kept, on every machine.
    """
    forced = relative.scatter(-1, codes.unsqueeze(-1), float("inf"))
    if end_id is not None:  # -inf where it is beyond the vocabulary of the stream
        has_end = relative[..., end_id] > float("-inf")
        forced[..., end_id].masked_fill_(has_end, float("inf"))
    if forced.device.type == "cpu":
        rows = forced.flatten(0, -2).numpy()
        return torch.from_numpy(_largest(rows, k)).view(*forced.shape[:-1], k)
    # CUDA's topk fills up with equal ones in the order of their ids, as a test holds it to.
    return forced.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values


def _largest(rows: np.ndarray, k: int) -> np.ndarray:
    """Rising places [n, k] of the largest values of rows [n, V]; of equal ones the first."""
    # NumPy parts and sorts such rows four times as fast as torch, the least of the k in front.
    places = np.argpartition(rows, -k, axis=-1)[:, -k:]
    values = np.take_along_axis(rows, places, -1)
    least = values[:, :1]
    chosen, ties = values == least, np.flatnonzero(rows == least)
    # Which of equal values it takes depends on the processor: only where some were left out.
    if len(ties) > np.count_nonzero(chosen):
        row, place = np.divmod(ties, rows.shape[-1])
        before = np.arange(len(ties)) - np.searchsorted(row, row)
        places[chosen] = place[before < chosen.sum(-1)[row]]  # both lie row by row
    return np.sort(places, axis=-1)


def _tail_logmass(outside: Tensor, kept: Tensor, temperature: float) -> Tensor:
    """Log of the probability of `outside` [..., V] among itself and `kept` [..., K], [...].

    Both are logits, -inf where there is none. By logsumexp over the complement: one less the mass
    of what is kept would lose all digits of a small tail.
    """
    # Finite even where nothing is outside.
    peak = outside.amax(-1, keepdim=True).clamp_min(LEAST_LOGIT)
    mass = _weights(outside, peak, temperature).sum(-1, keepdim=True)
    tail = mass.log() + peak / temperature
    # Not logaddexp, whose last bit depends on where in a tensor a row lies.
    return (tail - torch.cat([kept / temperature, tail], -1).logsumexp(-1, keepdim=True))[..., 0]


def moments(relative: Tensor, forbidden: Forbidden) -> Tensor:
    """Return mean and population standard deviation [..., C, 2] of the allowed of [..., C, V].

    They are of the logits as they are stored, so that one that is never meant stays finite.
    """
    count = forbidden.allowed(relative)
    logits = forbidden.fill_(relative.clamp_min(LEAST_STORED), 0.0)
    mean = logits.sum(-1, keepdim=True) / count
    centred = forbidden.fill_(logits.sub_(mean), 0.0)
    std = (centred.square_().sum(-1, keepdim=True) / count).sqrt()
    return torch.cat([mean, std], -1)


def stored_arrays(
    manifest: Manifest, codes: Tensor, values: Mapping[str, Tensor], uniforms: Tensor | None
) -> Arrays:
    """Return the arrays of a store, named and typed as it wants them, for n timesteps.

    `codes` [n, C], `values` what `ingredients` names, [n, ...], `uniforms` [n, C, draws] where the
    target draws. Narrowed here, on the device: an id takes a quarter of its int64 in the store.
    """
    reduced = _reduced(manifest, codes, values, uniforms)
    named = {f"{manifest.target.kind}.{name}": array for name, array in reduced.items()}
    named["codes"] = codes
    return {
        name: named[name].to(getattr(torch, spec.dtype.name))
        for name, spec in array_specs(manifest).items()
    }


def _reduced(
    manifest: Manifest, codes: Tensor, values: Mapping[str, Tensor], uniforms: Tensor | None
) -> Arrays:
    target, forbidden = manifest.target, Forbidden.of(manifest, codes.device)
    match target:
        case Hidden():
            return reduce_hidden(values, target, manifest.guidance.scale)
        case Dense():
            if _both(target):
                return reduce_dense(values["cond"], values.get("uncond"))
            return {"guided": values["logits"]}
        case Full() if _both(target):
            return reduce_branches(values, forbidden)
        case _:
            logits = values["logits"]
            return reduce(logits, codes, target, forbidden, manifest.end_id, uniforms)


def draws_of(target: Target) -> int:
    """Return how many uniform numbers a target takes per timestep and stream."""
    match target:
        case Sampled():
            return target.draws
        case TopK():
            return target.tail_samples
        case _:
            return 0
