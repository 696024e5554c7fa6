"""An audit of a store of codes: what its teacher predicts passes, anything else is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.code_drift import code_drift, require_same_codes
from stages.drift import DriftTally, StoreDrift, chosen_keys, limit_of
from stages.errors import UserError
from store import PredictionStore
from store.convert import convert
from store.plan import Key
from store.schema import Audit, Compact, Full, Guidance, Quantization
from store.synthetic import synthetic_manifest
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

TARGETS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full", "dtype": "float32"},
    "both branches": {"kind": "full", "branches": "both"},
    "top_k": {"kind": "top_k", "k": 5, "temperatures": [1.0, 2.0]},
    "hidden": {"kind": "hidden"},
    "hidden, both branches": {"kind": "hidden", "branches": "both"},
    "sampled": {"kind": "sampled", "draws": 30},
}


def drift_of(store: PredictionStore, family: Any, keys: Sequence[Key] | None = None) -> StoreDrift:
    return code_drift(family, store, list(store.keys()) if keys is None else keys, batch_size=3)


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
    found, limit = drift_of(store, family), limit_of(store.manifest, "fp32", quantized=False)
    assert found.within(limit.value), (found.largest_mean, limit)
    assert limit.value < 2e-4 or target == "sampled"
    each = sum(len(store[key]) for key in store)
    assert {part.predictions for part in found.parts} == {each}
    names = [stream.name for stream in store.manifest.streams]
    parts = {"guided", "cond", "uncond"} if "both" in target else {"guided"}
    assert {part.part for part in found.parts} == parts
    temperatures = {1.0, 2.0} if target == "top_k" else {1.0}
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
    altered = PredictionStore.create(
        tmp_path / "altered", store.manifest.model_copy(update={"files": {}}), store.plan,
        store.samples,
    )  # fmt: skip
    wrong = next(iter(store.plan[1]))
    for shard in range(store.planned_shards):
        with altered.writer(shard) as writer:
            for key in store.plan[shard]:
                rollout = store[key]
                arrays = {name: np.array(values) for name, values in rollout.arrays.items()}
                if key == wrong:
                    arrays["full.logits"][..., 3] -= 0.5
                writer.append(
                    *key, arrays, stop_reason=rollout.stop_reason, weight=1.0, seed=rollout.seed
                )
            writer.commit()
    found = drift_of(PredictionStore.open(altered.path), family)
    limit = limit_of(store.manifest, "fp32", quantized=False).value
    assert not found.within(limit)
    first, *others = found.worst
    assert (first.sample_id, first.variation) == wrong
    assert first.mean > limit > max(each.mean for each in others)


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
    one, many = (code_drift(other, store, keys, batch_size=size) for size in (1, 8))
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
