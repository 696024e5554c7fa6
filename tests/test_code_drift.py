"""An audit of a store of codes: what its teacher predicts passes, anything else is measured."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.code_drift import code_drift, require_same_codes
from stages.drift import DriftTally, StoreDrift, chosen_keys
from stages.drift_limits import limit_of, limits_of
from stages.errors import UserError
from stages.philox import uniforms
from stages.sampling import keyed_seed
from store import PredictionStore
from store.convert import convert
from store.plan import Key
from store.schema import Audit, Compact, Full, Guidance, Hidden, Quantization, TopK
from store.synthetic import synthetic_manifest
from tests.magpie_models import Models
from tests.rewritten import rewritten
from tests.test_magpie_loss import store_of as magpie_store
from tests.test_rollout import (
    VARIANTS,
    drawn_again,
    logprobs_again,
    restored_probabilities,
    samples_of,
    stored_logprobs,
    teacher_of,
    written,
)

pytestmark = pytest.mark.slow

TARGETS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full", "dtype": "float32"},
    "both branches": {"kind": "full", "branches": "both"},
    "top_k": {"kind": "top_k", "k": 5, "temperatures": [1.0, 2.0]},
    "hidden": {"kind": "hidden"},
    "hidden, both branches": {"kind": "hidden", "branches": "both"},
    "sampled": {"kind": "sampled", "draws": 30},
    "top_k with all": {
        "kind": "top_k", "k": 5, "temperatures": [1.0, 2.0], "moments": True, "tail_samples": 6
    },
    "full with levels": {"kind": "full", "levels": True},
}  # fmt: skip
FURTHER = {
    "top_k": ["kept_ids"],
    "top_k with all": ["kept_ids", "logit_mean", "logit_std", "tail_draws"],
    "full with levels": ["level"],
    "hidden": ["states"],
    "hidden, both branches": ["states"],
}
"""What of a target is compared beside its predictions."""


def drifts_of(store: PredictionStore, family: Any) -> list[StoreDrift]:
    return code_drift(family, store, list(store.keys()), batch_size=3)


def drift_of(store: PredictionStore, family: Any) -> StoreDrift:
    """Of the predictions alone."""
    return drifts_of(store, family)[0]


def perturbed(size: float = 0.05, **changes: Any) -> Any:
    """The teacher of the tests with its weights moved a little."""
    family = teacher_of(**changes)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in family.module.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    family.module.eval()
    return family


@pytest.mark.parametrize("source", ["teacher", "dataset"])
@pytest.mark.parametrize("target", TARGETS)
def test_an_untouched_store_is_within_what_rounding_explains(tmp_path, target, source):
    family, samples = teacher_of(**VARIANTS["all"]), samples_of(4)
    store = written(tmp_path / "store", family, samples, target=TARGETS[target], source=source)
    drifts, limits = drifts_of(store, family), limits_of(store.manifest, "fp32", quantized=False)
    for drift, explained in zip(drifts, limits, strict=True):
        assert drift.within(explained.value), (drift.measure, drift.largest_mean, explained)
        assert drift.above(explained.value) == ()
    found, limit = drifts[0], limits[0]
    assert [drift.measure for drift in drifts[1:]] == FURTHER.get(target, [])
    assert limit.value < 2e-4 or target == "sampled"
    each = sum(len(store[key]) for key in store)
    assert {part.predictions for part in found.parts} == {each}
    names = [stream.name for stream in store.manifest.streams]
    parts = {"guided", "cond", "uncond"} if "both" in target else {"guided"}
    assert {part.part for part in found.parts} == parts
    temperatures = {1.0, 2.0} if "top_k" in target else {1.0}
    assert {part.temperature for part in found.parts} == temperatures
    assert len(found.parts) == len(names) * len(parts) * len(temperatures)
    assert {part.name for part in found.parts} == set(names)


def test_what_compact_rounds_is_within_its_bound_and_beyond_that_of_fast(tmp_path):
    family, samples = teacher_of(), samples_of(4)
    target = {"kind": "full", "dtype": "float32"}
    fast = written(tmp_path / "fast", family, samples, target=target)
    convert(fast.path, tmp_path / "compact", Compact(loss_nats=1e-2))
    store = PredictionStore.open(tmp_path / "compact")
    found = drift_of(store, family)
    assert found.within(limit_of(store.manifest, "fp32", quantized=False).value)
    assert not found.within(limit_of(fast.manifest, "fp32", quantized=False).value)


def kl_by_hand(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL [T, C] of log-probabilities [T, C, V] in float64; of what is impossible nothing."""
    with np.errstate(invalid="ignore"):
        return np.where(p > -np.inf, np.exp(p) * (p - q), 0.0).sum(-1)


def require_drift(
    found: StoreDrift, expected: np.ndarray, agreed: np.ndarray | None, part: str = "guided"
) -> None:
    """Compare what was found with drift [N, C], all rollouts laid end to end."""
    rows = [row for row in found.parts if row.part == part and row.temperature == 1.0]
    assert len(rows) == expected.shape[1]
    for stream, row in enumerate(rows):
        values = expected[:, stream]
        assert row.mean == pytest.approx(values.mean(), rel=1e-3, abs=1e-7)
        assert row.p99 == pytest.approx(np.quantile(values, 0.99), rel=1e-3, abs=1e-6)
        assert row.largest == pytest.approx(values.max(), rel=1e-3, abs=1e-6)
        if agreed is not None:
            assert row.agreement == pytest.approx(agreed[:, stream].mean())


def test_another_teachers_drift_is_the_divergence_from_what_is_stored(tmp_path):
    samples, family, other = samples_of(4), teacher_of(), perturbed()
    store = written(tmp_path / "store", family, samples, target=TARGETS["full"])
    pairs = [
        (stored_logprobs(store, key).numpy(), logprobs_again(other, store, key, samples, 2.5))
        for key in store
    ]
    kl = np.concatenate([kl_by_hand(p, q.numpy()) for p, q in pairs])
    agreed = np.concatenate([p.argmax(-1) == q.numpy().argmax(-1) for p, q in pairs])
    found = drift_of(store, other)
    require_drift(found, kl, agreed)
    assert not found.within(limit_of(store.manifest, "fp32", quantized=False).value)
    means = {
        key: kl_by_hand(*map(np.asarray, pair)).mean()
        for key, pair in zip(store, pairs, strict=True)
    }
    worst = sorted(means, key=lambda key: -means[key])[:3]
    assert [(each.sample_id, each.variation) for each in found.worst] == worst
    assert [each.mean for each in found.worst] == pytest.approx([means[k] for k in worst], rel=1e-3)


def test_kept_ids_are_compared_with_one_category_for_the_rest(tmp_path):
    samples, family, other = samples_of(4), teacher_of(), perturbed()
    target = {"kind": "top_k", "k": 4, "dtype": "float32"}
    store = written(tmp_path / "store", family, samples, target=target)
    kl = []
    for key in store:
        ids = store[key].arrays["top_k.ids"].astype(np.int64)

        def buckets(family: Any, key: Key = key, ids: np.ndarray = ids) -> np.ndarray:
            p = logprobs_again(family, store, key, samples, 2.5).exp().numpy()
            kept = np.take_along_axis(p, ids, -1)
            return np.log(np.concatenate([kept, 1 - kept.sum(-1, keepdims=True)], -1))

        kl.append(kl_by_hand(buckets(family), buckets(other)))
    require_drift(drift_of(store, other), np.concatenate(kl), None)


@pytest.mark.parametrize("kind", ["full", "hidden"])
def test_branches_that_are_stored_apart_are_compared_apart_too(tmp_path, kind):
    samples, family, other = samples_of(3), teacher_of(), perturbed()
    target = {"kind": kind, "branches": "both", "dtype": "float32"}
    store = written(tmp_path / "store", family, samples, target=target)
    found = drift_of(store, other)
    for part, scale in (("guided", 2.5), ("cond", 1.0), ("uncond", 0.0)):
        kl = []
        for key in store:
            with np.errstate(divide="ignore"):
                p = np.log(restored_probabilities(store, key, scale).numpy())
            kl.append(kl_by_hand(p, logprobs_again(other, store, key, samples, scale).numpy()))
        require_drift(found, np.concatenate(kl), None, part)


def test_draws_are_drawn_again_with_their_own_random_numbers(tmp_path):
    samples, family, other = samples_of(4), teacher_of(), perturbed(0.02)
    store = written(tmp_path / "store", family, samples, target=TARGETS["sampled"])
    changed = []
    for key in store:
        again = logprobs_again(other, store, key, samples, 2.5).exp()
        drawn, ids = drawn_again(again, store, key, 30), store[key].arrays["sampled.ids"]
        counts = [(x[..., None] == np.arange(16)).sum(-2) for x in (drawn, ids)]
        changed.append(np.abs(counts[0] - counts[1]).sum(-1) / 60)
    found = drift_of(store, other)
    require_drift(found, np.concatenate(changed), None)
    assert found.measure == "redrawn"
    assert not found.within(limit_of(store.manifest, "fp32", quantized=False).value)


def test_a_rollout_whose_logits_were_altered_with_its_checksums_is_named(tmp_path):
    family, samples = teacher_of(), samples_of(4)
    store = written(tmp_path / "store", family, samples, target=TARGETS["full"])
    wrong = next(iter(store.plan[1]))

    def lowered(key: Key, arrays: dict[str, np.ndarray]) -> None:
        if key == wrong:
            arrays["full.logits"][..., 3] -= 0.5

    altered = rewritten(store, tmp_path / "altered", lowered)
    found = drift_of(altered, family)
    limit = limit_of(store.manifest, "fp32", quantized=False).value
    assert not found.within(limit)
    first, *others = found.worst
    assert (first.sample_id, first.variation) == wrong
    assert first.mean > limit > max(each.mean for each in others)


def tail_moved(arrays: dict[str, np.ndarray]) -> None:
    """Let the draws of stream 1 be the least id of the tail, whatever was drawn."""
    ids, drawn = arrays["top_k.ids"], arrays["top_k.tail_ids"]
    for timestep in range(len(ids)):
        kept = set(ids[timestep, 1].tolist())
        drawn[timestep, 1] = next(i for i in range(14) if i not in kept)


def added(array: str, place: tuple[Any, ...], amount: float) -> Callable[..., None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[array][place] += arrays[array].dtype.type(amount)

    return change


def state_moved(name: str) -> Callable[..., None]:
    """Move a state where no logit sees it: all of them by the same."""

    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name] += np.float16(0.02)

    return change


CORRUPTED: dict[str, tuple[str, str, str, Callable[..., None]]] = {
    "a mean": (
        "top_k with all", "logit_mean", "backbone.1",
        added("top_k.moments", (slice(None), 1, 0), 0.05),
    ),
    "a standard deviation": (
        "top_k with all", "logit_std", "backbone.0",
        added("top_k.moments", (slice(None), 0, 1), 0.05),
    ),
    "draws of the tail": ("top_k with all", "tail_draws", "backbone.1", tail_moved),
    "a level": (
        "full with levels", "level", "backbone.0", added("full.levels", (slice(None), 0), -0.05)
    ),
    "states": ("hidden", "states", "backbone", state_moved("hidden.backbone")),
    "states of a branch": (
        "hidden, both branches", "states", "backbone", state_moved("hidden.uncond.backbone")
    ),
}  # fmt: skip
"""What is corrupted: of which target, and what measure must name which stream."""


@pytest.mark.parametrize("rollouts", ["all", "one"])
@pytest.mark.parametrize("case", CORRUPTED)
def test_what_was_altered_beside_the_predictions_is_named(tmp_path, case, rollouts):
    target, measure, stream, change = CORRUPTED[case]
    family, samples = teacher_of(), samples_of(4)
    store = written(tmp_path / "store", family, samples, target=TARGETS[target])
    wrong = next(iter(store.plan[1]))

    def changed(key: Key, arrays: dict[str, np.ndarray]) -> None:
        if rollouts == "all" or key == wrong:
            change(arrays)

    altered = rewritten(store, tmp_path / "altered", changed)
    limits = limits_of(store.manifest, "fp32", quantized=False)
    judged = dict(
        zip(
            ["predictions", *FURTHER[target]],
            zip(drifts_of(altered, family), limits, strict=True),
            strict=True,
        )
    )
    for name, (drift, limit) in judged.items():
        within = drift.within(limit.value)
        if measure == "states" and name == "predictions":
            continue  # whose logits it may move too
        assert within == (name != measure), (name, drift.largest_mean, limit)
    drift, limit = judged[measure]
    if rollouts == "all":
        assert drift.above(limit.value) == (stream,)
    else:
        first, *others = drift.worst
        assert (first.sample_id, first.variation) == wrong
        assert first.mean > limit.value > max(each.mean for each in others)


def test_ids_that_were_kept_in_place_of_likelier_ones_are_named(tmp_path):
    """Their probabilities are right, and so is that of the rest: no KL sees it."""
    family, samples = teacher_of(), samples_of(4)
    full = written(tmp_path / "full", family, samples, target=TARGETS["full"])
    target = {"kind": "top_k", "k": 5, "dtype": "float32"}
    store = written(tmp_path / "store", family, samples, target=target)
    gaps: list[np.ndarray] = []

    def keep_others(key: Key, arrays: dict[str, np.ndarray]) -> None:
        gaps.append(np.zeros(arrays["codes"].shape))
        for timestep, z in enumerate(full[key].arrays["full.logits"][:, 1].astype(np.float64)):
            kept = arrays["top_k.ids"][timestep, 1]
            free = set(kept.tolist()) - {int(arrays["codes"][timestep, 1]), family.end_id}
            tail = [i for i in np.flatnonzero(z > -np.inf) if i not in kept]
            gone, new = (
                max(free - {int(z.argmax())}, key=z.__getitem__),
                min(tail, key=z.__getitem__),
            )
            ids = np.sort([new if i == gone else i for i in kept])
            outside = [i for i in [*tail, gone] if i != new]
            arrays["top_k.ids"][timestep, 1] = ids
            arrays["top_k.logits"][timestep, 1] = z[ids]
            mass = np.exp(z[outside]).sum() / np.exp(z).sum()
            arrays["top_k.tail_logmass"][timestep, 1] = np.log(mass)
            gaps[-1][timestep, 1] = z[outside].max() - z[new]

    altered = rewritten(store, tmp_path / "altered", keep_others)
    predictions, kept = drifts_of(altered, family)
    explained, limit = limits_of(store.manifest, "fp32", quantized=False)
    assert predictions.within(explained.value)
    require_drift(kept, np.concatenate(gaps), None)
    assert not kept.within(limit.value)
    assert kept.above(limit.value) == ("backbone.1",)


def guided_again(family: Any, store: PredictionStore, key: Key, samples: list[dict]) -> np.ndarray:
    """Guided logits [T, C, V] float64 of a stored rollout, scored alone; forbidden ids −inf."""
    codes = torch.from_numpy(store[key].codes.astype(np.int64))[None]
    sample = next(sample for sample in samples if sample["sample_id"] == key[0])
    with torch.no_grad():
        scores = family.score([sample], codes, torch.tensor([codes.shape[1]]), cfg_scale=2.5)
    logits = scores.logits[0].double().numpy()
    logits[..., list(family.forbidden)] = -np.inf
    return logits


def test_moments_and_levels_drift_by_what_a_formula_says(tmp_path):
    samples, family, other = samples_of(4), teacher_of(), perturbed()
    stores = {
        target: written(tmp_path / target, family, samples, target=TARGETS[target])
        for target in ("top_k with all", "full with levels")
    }
    expected: dict[str, list[np.ndarray]] = {"logit_mean": [], "logit_std": [], "level": []}
    for key in stores["top_k with all"]:
        then = stores["top_k with all"][key].arrays["top_k.moments"].astype(np.float64)
        logits = guided_again(other, stores["top_k with all"], key, samples)
        allowed = [i for i in range(logits.shape[-1]) if i not in family.forbidden]
        values = logits[..., allowed] - logits.max(-1, keepdims=True)
        expected["logit_mean"].append(np.abs(values.mean(-1) - then[..., 0]))
        expected["logit_std"].append(np.abs(values.std(-1) - then[..., 1]))
    store = stores["full with levels"]
    for key in store:
        now = guided_again(other, store, key, samples).max(-1)
        expected["level"].append(np.abs(now - store[key].arrays["full.levels"]))
    for drift in drifts_of(stores["top_k with all"], other)[2:4] + drifts_of(store, other)[1:]:
        require_drift(drift, np.concatenate(expected[drift.measure]), None)
        assert drift.largest_mean > 0.05


def test_draws_of_the_tail_are_as_far_off_as_their_numbers_lie_from_their_mass(tmp_path):
    samples, family, other = samples_of(4), teacher_of(), perturbed()
    store = written(tmp_path / "store", family, samples, target=TARGETS["top_k with all"])
    distances = []
    for key in store:
        arrays, seed = store[key].arrays, keyed_seed(store.manifest.seed, "target draws", *key)
        steps = torch.arange(len(arrays["codes"]))
        numbers = uniforms(torch.full_like(steps, seed), steps, 2, 6).numpy()
        p = np.exp(guided_again(other, store, key, samples))
        np.put_along_axis(p, arrays["top_k.ids"].astype(int), 0, -1)
        p /= p.sum(-1, keepdims=True)
        rows = []
        for t, c in np.ndindex(p.shape[:2]):
            edges = np.concatenate([[0], p[t, c].cumsum()])
            places = zip(np.sort(numbers[t, c]), arrays["top_k.tail_ids"][t, c], strict=True)
            rows.append([max(edges[i] - u, u - edges[i + 1], 0) for u, i in places])
        distances.append(np.mean(rows, -1).reshape(p.shape[:2]))
    found = drifts_of(store, other)[-1]
    assert found.measure == "tail_draws"
    require_drift(found, np.concatenate(distances), None)
    assert not found.within(limits_of(store.manifest, "fp32", quantized=False)[-1].value)
    again = drifts_of(store, family)[-1]
    assert again.largest_mean < 1e-6, "the same numbers draw the same"


@pytest.mark.parametrize("variant", ["plain", "all"])
@pytest.mark.parametrize("branches", ["guided", "both"])
def test_states_drift_by_their_squared_error_head_by_head(tmp_path, branches, variant):
    samples, family = samples_of(3), teacher_of(**VARIANTS[variant])
    other = perturbed(**VARIANTS[variant])
    target = {"kind": "hidden", "branches": branches, "dtype": "float32"}
    store = written(tmp_path / "store", family, samples, target=target)
    squares: dict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
    for key in store:
        then, now = stored_states(store, key), states_by_hand(other, store, key, samples)
        for (part, group), state in then.items():
            difference = now[part, group] - state
            pair = np.stack([np.square(difference).sum(-1), np.square(state).sum(-1)])
            streams = [s.name for s in store.manifest.streams if s.group == group]
            for place, name in enumerate(streams if state.shape[1] > 1 else [group]):
                squares[part, name].append(pair[..., place])
    found = drifts_of(store, other)[-1]
    assert found.measure == "states"
    assert {(part.part, part.name) for part in found.parts} == set(squares)
    for part in found.parts:
        error, power = np.concatenate(squares[part.part, part.name], -1)
        assert part.mean == pytest.approx(error.sum() / power.sum(), rel=1e-3)
        assert part.largest == pytest.approx((error / power).max(), rel=1e-3)
    assert not found.within(limits_of(store.manifest, "fp32", quantized=False)[-1].value)


States = dict[tuple[str, str], np.ndarray]
"""States [T, H, D] float64 by part and group."""


def stored_states(store: PredictionStore, key: Key) -> States:
    arrays = {n: x.astype(np.float64) for n, x in store[key].arrays.items() if n != "codes"}
    found: States = {}
    for head in store.manifest.heads:
        if store.manifest.branches == "guided":
            found["guided", head.group] = arrays[f"hidden.{head.group}"]
            continue
        cond, uncond = (arrays[f"hidden.{part}.{head.group}"] for part in ("cond", "uncond"))
        found |= mixed_by_hand(head.group, cond, uncond)
    return found


def states_by_hand(family: Any, store: PredictionStore, key: Key, samples: list[dict]) -> States:
    codes = torch.from_numpy(store[key].codes.astype(np.int64))[None]
    sample = next(sample for sample in samples if sample["sample_id"] == key[0])
    with torch.no_grad():
        scores = family.score([sample], codes, torch.tensor([codes.shape[1]]), cfg_scale=2.5)
    found: States = {}
    for group in scores.branches.cond.hidden:
        cond, uncond = (
            torch.cat(list(branch.hidden[group]), -2)[0].double().numpy()
            for branch in (scores.branches.cond, scores.branches.uncond)
        )
        found |= mixed_by_hand(group, cond, uncond)
    return found


def mixed_by_hand(group: str, cond: np.ndarray, uncond: np.ndarray) -> States:
    guided = 2.5 * cond - 1.5 * uncond
    return {("guided", group): guided, ("cond", group): cond, ("uncond", group): uncond}


def test_a_teacher_that_is_not_finite_is_no_teacher_that_agrees(tmp_path):
    family, samples = teacher_of(), samples_of(3)
    store = written(tmp_path / "store", family, samples, target=TARGETS["full"])
    score = family.score

    def broken(*arguments: Any, **keywords: Any) -> Any:
        scores = score(*arguments, **keywords | {"linear": False})
        scores.branches.cond.outputs[0][:, 0, :, 2] = torch.nan
        return scores

    family.score = broken
    found = drift_of(store, family)
    assert found.not_finite == len(store) * len(store.manifest.streams)
    assert not found.within(math.inf)


def test_a_limit_counts_guidance_storage_and_what_stage_one_measured():
    full = synthetic_manifest(Full())
    limits = {
        scale: limit_of(
            full.model_copy(update={"guidance": Guidance(scale=scale)}), "fp32", quantized=False
        )
        for scale in (1.0, 2.5)
    }
    stored = (2.0**-11 * math.log(full.vocabulary)) ** 2 / 2
    for scale, gain in ((1.0, 1.0), (2.5, 4.0)):
        computed = (gain * 1e-3) ** 2 / 2
        together = (math.sqrt(computed) + math.sqrt(stored)) ** 2
        assert limits[scale].value == pytest.approx(together)
    assert limits[2.5].origin.startswith("fp32 arithmetic guided at 2.5: 8.0e-06 nats; full ")
    bf16 = limit_of(full, "bf16", quantized=False).value
    assert limit_of(full, "fp32", quantized=True).value == bf16 > 1e-4
    found = Audit(samples=1, predictions=9, kl_mean=1e-5, kl_p99=1e-4, kl_largest=2e-5)
    record = Quantization(method="none", dtype="bfloat16", audit=found)
    audited = full.model_copy(update={"quantization": record})
    measured = limit_of(audited, "bf16", quantized=False)
    assert measured.value == pytest.approx((math.sqrt(8e-5) + math.sqrt(stored)) ** 2)
    assert "stage one measured" in measured.origin
    lossy = full.model_copy(update={"profile": Compact(loss_nats=1e-3)})
    assert limit_of(lossy, "fp32", quantized=False).value > 1e-3


def test_limits_beside_the_predictions_follow_from_the_error_of_a_logit():
    for scale, gain in ((1.0, 1.0), (2.5, 4.0)):
        for precision, error in (("fp32", 1e-3), ("bf16", 2.0**-5), ("fp16", 2.0**-8)):
            guidance = {"guidance": Guidance(scale=scale)}
            target = TopK(k=3, moments=True, tail_samples=2)
            top_k = synthetic_manifest(target).model_copy(update=guidance)
            kept, mean, std, tail = limits_of(top_k, precision, quantized=False)[1:]
            e = gain * error
            assert (kept.value, mean.value, std.value) == pytest.approx((2 * e, 2 * e, e))
            # The worst that logits off by e do to a mass: ids of mass x gain, all others lose.
            masses = [np.exp(e) * x / (np.exp(e) * x + np.exp(-e) * (1 - x)) - x
                      for x in np.linspace(0, 1, 2001)]  # fmt: skip
            assert tail.value == pytest.approx(max(masses), rel=1e-3)
            assert precision in tail.origin
    hidden = synthetic_manifest(Hidden()).model_copy(update={"guidance": Guidance(scale=1.0)})
    limit = limits_of(hidden, "fp32", quantized=False)[1]
    assert limit.value == pytest.approx((1e-4 + 2.0**-11) ** 2)
    compact = hidden.model_copy(update={"profile": Compact(hidden_step=1 / 64)})
    limit = limits_of(compact, "fp32", quantized=False)[1]
    assert limit.value == pytest.approx((1e-4 + 2.0**-11 + 1 / 128) ** 2)
    assert len(limits_of(synthetic_manifest(Full()), "fp32", quantized=False)) == 1


def test_what_compact_rounds_beside_the_predictions_is_no_drift(tmp_path):
    family, samples = teacher_of(), samples_of(4)
    for target, most in (("top_k with all", 1e-5), ("full with levels", 1e-5), ("hidden", None)):
        name = target.replace(" ", "_")
        fast = written(tmp_path / name, family, samples, target=TARGETS[target])
        convert(fast.path, tmp_path / f"{name}.compact", Compact())
        store = PredictionStore.open(tmp_path / f"{name}.compact")
        limits = limits_of(store.manifest, "fp32", quantized=False)
        for drift, limit in zip(drifts_of(store, family)[1:], limits[1:], strict=True):
            assert drift.largest_mean <= (most or limit.value), drift.measure
        if target == "top_k with all":
            rounded, exact = (s[next(iter(s))].arrays["top_k.moments"] for s in (store, fast))
            assert np.abs(rounded - exact).mean() > 1e-5, "rounding is more than what is left"


def test_what_is_chosen_follows_from_seed_and_keys_alone():
    keys = [(f"clip/{i}", variation) for i in range(300) for variation in range(2)]
    chosen = chosen_keys(keys, 0.05, 3)
    assert len(chosen) == 30
    shuffled = [keys[i] for i in np.random.default_rng(0).permutation(len(keys))]
    again = chosen_keys(shuffled, 0.05, 3)
    assert sorted(again) == sorted(chosen)
    places = [shuffled.index(key) for key in again]
    assert places == sorted(places), "read in the store's order"
    assert set(chosen_keys(keys, 0.05, 4)) != set(chosen)
    assert set(chosen) < set(chosen_keys(keys, 0.2, 3)), "more are the same and others"
    assert len(chosen_keys(keys, 1e-9, 3)) == 1
    assert chosen_keys(keys, 1.0, 3) == keys
    # By chance no sample is favoured for where it stands.
    places = [keys.index(key) for key in chosen_keys(keys, 0.5, 5)]
    assert 0.4 < np.mean(places) / len(keys) < 0.6


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, math.nan])
def test_a_share_that_is_none_is_refused(fraction):
    with pytest.raises(UserError, match="--fraction"):
        chosen_keys([("a", 0)], fraction, 0)


def test_nothing_to_compare_is_refused_and_not_passed():
    with pytest.raises(UserError, match="holds no prediction"):
        chosen_keys([], 0.5, 0)
    with pytest.raises(UserError, match="raise --fraction"):
        DriftTally("kl").result()


def test_the_size_of_batches_moves_last_bits_only(tmp_path):
    family, samples = teacher_of(**VARIANTS["stacked"]), samples_of()
    store = written(tmp_path / "store", family, samples, target=TARGETS["top_k"])
    other, keys = perturbed(**VARIANTS["stacked"]), list(store.keys())
    one, many = (code_drift(other, store, keys, batch_size=size)[0] for size in (1, 8))
    for mine, theirs in zip(one.parts, many.parts, strict=True):
        assert (mine.name, mine.part, mine.predictions) == (
            theirs.name, theirs.part, theirs.predictions
        )  # fmt: skip
        for number in ("mean", "p99", "largest", "agreement"):
            assert getattr(mine, number) == pytest.approx(getattr(theirs, number), rel=1e-3)
    assert [(r.sample_id, r.variation) for r in one.worst] == [
        (r.sample_id, r.variation) for r in many.worst
    ]


def test_a_teacher_of_other_codes_is_refused(tmp_path: Path) -> None:
    store = written(tmp_path / "store", teacher_of(), samples_of(3))
    with pytest.raises(UserError, match=r"streams: backbone\.0:16, backbone\.1:16, not"):
        require_same_codes(teacher_of(frames_per_step=2), store)


@pytest.mark.parametrize(
    "target", ["hidden", "hidden, both branches", "top_k with all", "full with levels"]
)
@pytest.mark.parametrize("shape", [{}, {"frame_stacking": 2, "experts": 3}])
def test_all_that_a_magpie_store_holds_is_what_its_teacher_says(require, tmp_path, target, shape):
    require("nemo", "pip install 'foretell[magpie]'")
    models = Models(tmp_path / "models")
    teacher = models.teacher(models.archive(**shape))
    store = magpie_store(models, teacher, tmp_path / "store", TARGETS[target])
    drifts, manifest = drifts_of(store, teacher), store.manifest
    for drift, limit in zip(drifts, limits_of(manifest, "fp32", quantized=False), strict=True):
        assert drift.within(limit.value), (drift.measure, drift.largest_mean, limit)
    shared = {head.group for head in manifest.heads if head.vectors == 1}
    names = {s.group if s.group in shared else s.name for s in manifest.streams}
    assert {part.name for part in drifts[1].parts} == names
