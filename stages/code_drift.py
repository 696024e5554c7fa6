"""A teacher is asked again what it predicted of the codes in a store, and the two are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.dataset import Dataset
from stages.drift import (
    DriftTally,
    Further,
    Part,
    StoreDrift,
    differing,
    further_of,
    measure_of,
    method_of,
)
from stages.errors import UserError
from stages.family import Family, Scores, has_linear_heads
from stages.further_drift import Place, logits_drift, states_again, states_drift
from stages.host_batches import Span, TargetBatch, host_batch, restored_batch
from stages.host_memory import HostMemory
from stages.losses import kl_divergence
from stages.quantization import Quantized
from stages.reduction import guided_logits, reduce
from stages.targets import (
    DenseTarget,
    Forbidden,
    HiddenTarget,
    SampledTarget,
    SparseTarget,
    load_heads,
)
from store import PredictionStore
from store.plan import Key
from store.schema import Latent, Manifest, Sampled, Stream, TopK

COMPARED_VALUES = 2**23
"""Logits that are compared at once; it bounds memory (32 MiB of float32 for each of a few)."""
SCORED_ROLLOUTS = 8
"""Rollouts that are scored together, at most."""


@torch.inference_mode()
def code_drift(
    family: Family,
    store: PredictionStore,
    keys: Sequence[Key],
    *,
    batch_size: int,
    done: Callable[[int], object] = lambda _: None,
) -> list[StoreDrift]:
    """Score the stored codes of `keys` again, as the manifest says, and compare.

    Targets that keep ids are compared over these and one category for all others, at every
    temperature that they list; `full` and `hidden` over all ids, of both branches each alone too
    where they are stored apart; draws by drawing again with the store's own random numbers. That is
    the first of what is returned; behind it comes what `further_of` names.
    `done` is told how many rollouts were compared.
    """
    family.module.eval()
    manifest = store.manifest
    tallies = {measure: DriftTally(measure) for measure in further_of(manifest)}
    tally = DriftTally(measure_of(manifest))
    for batches in _batches(family, store, keys, min(batch_size, SCORED_ROLLOUTS)):
        first = batches[0].batch
        scores = family.score(
            first.samples,
            first.codes,
            first.lengths,
            cfg_scale=manifest.guidance.scale,
            both_branches=manifest.branches == "both",
            linear=has_linear_heads(family),
        )
        for compared in batches:
            for row in range(len(first.keys)):
                _compare(manifest, scores, compared, row, tally, tallies)
        done(len(first.keys))
    return [each.result() for each in (tally, *tallies.values())]


@dataclass(frozen=True)
class _Compared:
    """Rollouts with one part of what is stored of them."""

    batch: TargetBatch
    part: Part
    scale: float
    """At which branches are mixed to it."""


def parts_of(manifest: Manifest) -> dict[Part, float]:
    """Return what is compared, and at which guidance scale that is predicted."""
    scale = manifest.guidance.scale
    if manifest.branches == "both":
        return {"guided": scale, "cond": 1.0, "uncond": 0.0}
    return {"guided": scale}


def _batches(
    family: Family, store: PredictionStore, keys: Sequence[Key], size: int
) -> Iterator[list[_Compared]]:
    """Yield the rollouts of `keys` in order, with every part of their targets."""
    device = next(family.module.parameters()).device
    manifest, memory = store.manifest, HostMemory()
    heads = load_heads(store.heads, device) if manifest.heads else None
    both = manifest.branches == "both"
    for start in range(0, len(keys), size):
        rollouts = [store[key] for key in keys[start : start + size]]
        samples = store.samples_of([rollout.sample_id for rollout in rollouts])
        spans = [Span.of(rollout) for rollout in rollouts]
        host = host_batch(
            manifest, spans, samples, [0] * len(spans), memory, predicted=family.predicted
        )
        yield [
            _Compared(
                restored_batch(host, manifest, heads, device, scale if both else None), part, scale
            )
            for part, scale in parts_of(manifest).items()
        ]


def _compare(
    manifest: Manifest,
    scores: Scores,
    compared: _Compared,
    row: int,
    tally: DriftTally,
    tallies: Mapping[Further, DriftTally],
) -> None:
    """Compare what is stored of one rollout, a block of timesteps at a time."""
    batch, device = compared.batch, compared.batch.codes.device
    steps, streams = batch.codes.shape[1:]
    block = max(COMPARED_VALUES // (streams * manifest.vocabulary), 1)
    for timesteps in torch.split(torch.arange(int(batch.lengths[row]), device=device), block):
        stored = batch.target.rows(row * steps + timesteps)
        logits = _logits(scores, row, timesteps, compared.scale)
        counted = batch.predicted[row, timesteps]
        if isinstance(stored, SampledTarget):
            drift = _redrawn(manifest, batch, row, timesteps, logits, stored)
            _add(tally, manifest, compared, row, drift, counted)
            continue
        assert isinstance(stored, DenseTarget | SparseTarget)
        allowed = Forbidden.of(manifest, device).fill_(logits)
        lost = ~_finite(allowed)
        agreed = allowed.argmax(-1) == likeliest(stored)
        for temperature in _temperatures(manifest):
            # Whose logits are not finite has no divergence, whatever the formula makes of it.
            drift = kl_divergence(allowed, stored, temperature).masked_fill(lost, float("nan"))
            _add(tally, manifest, compared, row, drift, counted, agreed, temperature)
        place = Place(manifest, batch.keys[row], timesteps)
        for measure, further in tallies.items():
            if measure == "states":
                _add_states(further, manifest, scores, compared, row, timesteps)
                continue
            codes = batch.codes[row, timesteps]
            drift = logits_drift(measure, place, codes, allowed, stored)
            drift = drift.masked_fill(lost, float("nan"))
            _add(further, manifest, compared, row, drift, counted)


def _add_states(
    tally: DriftTally,
    manifest: Manifest,
    scores: Scores,
    compared: _Compared,
    row: int,
    timesteps: Tensor,
) -> None:
    """Compare the states of one rollout, head by head, where codes of its streams are predicted."""
    batch, target = compared.batch, compared.batch.target
    assert isinstance(target, HiddenTarget)
    assert scores.branches is not None
    rows = torch.full_like(timesteps, row)
    now = states_again(scores.branches.at(rows, timesteps), compared.scale)
    stored = target.states_at(row * batch.codes.shape[1] + timesteps)
    predicted = batch.predicted[row, timesteps]
    for head, then, linear in zip(manifest.heads, stored, target.heads, strict=True):
        share, power = states_drift(now[head.group], then)
        names = [manifest.streams[place].name for place in linear.streams]
        counted = predicted[:, list(linear.streams)]
        if head.vectors == 1:
            names, counted = [head.group], counted.any(-1, keepdim=True)
        for place, name in enumerate(names):
            kept = counted[:, place]
            tally.add(
                batch.keys[row], name, share[kept, place].cpu().numpy(),
                part=compared.part, weights=power[kept, place].cpu().numpy(),
            )  # fmt: skip


def _logits(scores: Scores, row: int, timesteps: Tensor, scale: float) -> Tensor:
    """Return logits [n, C, V] float32 of a rollout, mixed as stage one does, to be changed."""
    rows = torch.full_like(timesteps, row)
    if scores.branches is None:
        return scores.logits_at(rows, timesteps).float().clone()
    return guided_logits(scores.branches.at(rows, timesteps), scale).float().clone()


def _finite(allowed: Tensor) -> Tensor:
    """Which of [..., V] hold neither NaN nor infinity, but for −inf at forbidden ids."""
    return ~(allowed.isnan() | allowed.isposinf()).any(-1) & allowed.isfinite().any(-1)


def _temperatures(manifest: Manifest) -> tuple[float, ...]:
    return manifest.target.temperatures if isinstance(manifest.target, TopK) else (1.0,)


def _add(
    tally: DriftTally,
    manifest: Manifest,
    compared: _Compared,
    row: int,
    drift: Tensor,
    counted: Tensor,
    agreed: Tensor | None = None,
    temperature: float = 1.0,
) -> None:
    """Take the drift [n, C] of one rollout, stream by stream, where codes are predicted."""
    drift, counted = drift.cpu(), counted.cpu()
    agreed = None if agreed is None else agreed.cpu()
    for place, stream in enumerate(manifest.streams):
        count = counted[:, place]
        tally.add(
            compared.batch.keys[row],
            stream.name,
            drift[count, place].numpy(),
            part=compared.part,
            temperature=temperature,
            agreed=None if agreed is None else int(agreed[count, place].sum()),
        )


def likeliest(target: DenseTarget | SparseTarget) -> Tensor:
    """Ids [...] of the largest stored logit."""
    places = target.logits.argmax(-1, keepdim=True)
    ids = places if isinstance(target, DenseTarget) else target.ids.gather(-1, places)
    return ids.squeeze(-1)


def _redrawn(
    manifest: Manifest,
    batch: TargetBatch,
    row: int,
    timesteps: Tensor,
    logits: Tensor,
    stored: SampledTarget,
) -> Tensor:
    """Share [n, C] of the draws that are others when the same random numbers draw them again."""
    target, forbidden = manifest.target, Forbidden.of(manifest, logits.device)
    assert isinstance(target, Sampled)
    numbers = Place(manifest, batch.keys[row], timesteps).numbers()
    codes = batch.codes[row, timesteps]
    drawn = reduce(logits, codes, target, forbidden, manifest.end_id, numbers)["ids"]
    ours, theirs = (_counts(ids, manifest.vocabulary) for ids in (drawn, stored.ids))
    changed = (ours - theirs).abs().sum(-1) / (2 * target.draws)
    finite = _finite(forbidden.fill_(logits))
    return changed.masked_fill(~finite, float("nan"))


def _counts(ids: Tensor, vocabulary: int) -> Tensor:
    """How often each id [..., V] is among ids [..., N]."""
    counts = torch.zeros(*ids.shape[:-1], vocabulary, device=ids.device)
    return counts.scatter_add_(-1, ids.long(), torch.ones_like(ids, dtype=counts.dtype))


def require_same_codes(family: Family, store: PredictionStore) -> None:
    """Refuse a teacher that predicts other streams or ids than the store holds."""
    manifest = store.manifest
    pairs = {
        "family": (manifest.family, family.name),
        "streams": (_spelled(manifest.streams), _spelled(family.streams)),
        "forbidden ids": (manifest.forbidden, family.forbidden),
        "end id": (manifest.end_id, family.end_id),
    }
    different = [f"{name}: {a}, not {b}" for name, (a, b) in pairs.items() if a != b]
    if different:
        raise UserError(
            f"the predictions of {store.path} cannot be those of this teacher, for they are of "
            f"other codes. The store's {'; '.join(different)}: audit with the configuration that "
            "wrote it"
        )


def _spelled(streams: Sequence[Stream] | Sequence[Latent] | Sequence[Stream | Latent]) -> str:
    return ", ".join(
        f"{stream.name}:{stream.vocabulary}" if isinstance(stream, Stream) else stream.name
        for stream in streams
    )


def code_differences(
    store: PredictionStore, family: Family, quantized: Quantized | None, dataset: Dataset
) -> dict[str, tuple[str, str]]:
    """Return what of a store's predictions depends on something else than what was loaded."""
    manifest, stored = store.manifest, store.manifest.fingerprints
    teacher = family.fingerprint() if quantized is None else quantized.fingerprint
    record = None if quantized is None else quantized.record
    return differing(
        {
            "teacher": (stored.teacher, teacher),
            "quantization": (method_of(manifest.quantization), method_of(record)),
            "tokenizer": (stored.tokenizer, family.tokenizer_fingerprint()),
            "audio codec": (stored.audio_codec, dataset.facts.audio_codec),
            "dataset": (stored.dataset, dataset.header.fingerprint),
        }
    )
