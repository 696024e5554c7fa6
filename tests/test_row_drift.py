"""An audit of a diffusion store: a denoiser is asked at the stored states, level by level."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch

from stages.diffusion.facts import Recording
from stages.diffusion.noise import row_noise
from stages.diffusion.row_drift import predicted_keys, require_recorded, row_drift
from stages.drift import StoreDrift, chosen_keys
from stages.drift_limits import limit_of
from stages.errors import UserError
from store import PredictionStore
from store.schema import Dense
from tests.recorded import FakeDenoiser, by_hand, images, written

pytestmark = pytest.mark.slow

FORWARD = {"kind": "forward", "slots": 3}
TRAJECTORY = {"kind": "trajectory", "steps": 5}
BOTH = {"kind": "dense", "branches": "both", "dtype": "float32"}
GUIDED = BOTH | {"branches": "guided"}
OTHER = {"family": "diffusion", "path": "other"}
SCALE = 3.0


def drift_of(store: PredictionStore, denoiser: Any, batch_size: int = 2, **more: Any) -> StoreDrift:
    keys = predicted_keys(store)
    return row_drift(denoiser, store, keys, batch_size=batch_size, **more)


def moved(dataset: Any, **changes: Any) -> FakeDenoiser:
    """The denoiser of the tests with a gain and a bias of its own."""
    denoiser = FakeDenoiser(dataset.facts, **changes)
    with torch.no_grad():
        denoiser.module.gain.mul_(1.1)
        denoiser.module.bias[1] += 0.2
    return denoiser


@pytest.mark.parametrize(("branches", "dtype"), [("both", "float16"), ("guided", "float32")])
@pytest.mark.parametrize("rows", [FORWARD, FORWARD | {"store_noise": True}, TRAJECTORY])
def test_an_untouched_store_is_within_what_rounding_explains(tmp_path, rows, branches, dtype):
    forward = rows["kind"] == "forward"
    # A trajectory has no image of the data.
    dataset = images(tmp_path / "images", ["teacher", "prior", "data" if forward else "teacher"])
    denoiser = FakeDenoiser(dataset.facts)
    target = {"kind": "dense", "branches": branches, "dtype": dtype}
    store = written(tmp_path / "store", dataset, denoiser, rows=rows, target=target)
    found = drift_of(store, denoiser)
    assert found.within(limit_of(store.manifest, "fp32", quantized=False).value)
    assert found.largest_mean < 1e-12
    predicted = 4 * (2 if forward else 3)  # an image that is its own target is not asked for
    levels = rows["slots"] if forward else rows["steps"]
    assert {part.predictions for part in found.parts} == {predicted}
    parts = {"guided", "cond", "uncond"} if branches == "both" else {"guided"}
    assert {(part.name, part.part) for part in found.parts} == {
        (f"slot {slot}", part) for slot in range(levels) for part in parts
    }


def test_another_denoisers_drift_is_the_error_at_the_state_that_was_seen(tmp_path):
    dataset = images(tmp_path / "images")
    denoiser, other = FakeDenoiser(dataset.facts), moved(dataset)
    store = written(tmp_path / "store", dataset, denoiser, target=BOTH)
    errors: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for key in predicted_keys(store):
        rollout, sample = store[key], store.sample(key[0])
        image, text = divmod(key[1], 2)
        x0 = store.table("latents")[rollout.drawn["latent"]]["latent"].astype(np.float32)
        label = int(store.table("conditions")[rollout.drawn["condition"]]["class_labels"])
        scale = 1.0 if sample["target"] == "prior" else SCALE
        for slot in range(3):
            row = {name: values[slot] for name, values in rollout.arrays.items()}
            noise = row_noise(7, key[0], image, text, slot, x0.shape)
            x = row["row.alpha"] * x0 + row["row.sigma"] * noise
            then, now = (
                {"cond": by_hand(model, x, row["row.t"], label),
                 "uncond": by_hand(model, x, row["row.t"], 3)}
                for model in (denoiser, other)
            )  # fmt: skip
            for values in (then, now):
                values["guided"] = values["uncond"] + scale * (values["cond"] - values["uncond"])
            for part, value in then.items():
                squares = ((now[part] - value) ** 2).sum(), (value**2).sum()
                errors[f"slot {slot}", part].append(squares)
    found = drift_of(store, other)
    assert len(found.parts) == len(errors) == 9
    for part in found.parts:
        error, power = np.array(errors[part.name, part.part]).T
        assert part.mean == pytest.approx(error.sum() / power.sum(), rel=1e-4)
        assert part.largest == pytest.approx((error / power).max(), rel=1e-4)
        assert part.p99 == pytest.approx(np.quantile(error / power, 0.99), rel=1e-4)
    assert not found.within(limit_of(store.manifest, "fp32", quantized=False).value)


def test_along_a_trajectory_no_error_adds_up(tmp_path):
    dataset = images(tmp_path / "images", ["teacher"] * 2)
    denoiser, other = FakeDenoiser(dataset.facts), FakeDenoiser(dataset.facts)
    with torch.no_grad():
        other.module.gain.mul_(1.1)
        for each in (denoiser, other):
            each.module.bias.zero_()
    store = written(tmp_path / "store", dataset, denoiser, rows=TRAJECTORY, target=BOTH)
    found = drift_of(store, other)
    # Of gain·x with a tenth more gain the error is a tenth at every state, however far along.
    assert [part.mean for part in found.parts] == pytest.approx([0.01] * len(found.parts), rel=1e-2)


@pytest.mark.parametrize("branches", ["both", "guided"])
def test_what_an_adapter_changes_is_asked_with_and_without_it(tmp_path, branches):
    dataset = images(tmp_path / "images", ["teacher", "prior"])
    adapted = FakeDenoiser(dataset.facts, adapted=True)
    target, contrast = BOTH | {"branches": branches}, {"kind": "adapter"}
    store = written(tmp_path / "store", dataset, adapted, target=target, contrast=contrast)
    assert drift_of(store, adapted).largest_mean < 1e-12
    with torch.no_grad():
        adapted.module.adapter.mul_(1.2)
    found = {(part.name, part.part): part.mean for part in drift_of(store, adapted).parts}
    assert found["slot 0", "guided"] > 1e-6
    if branches == "both":
        assert found["slot 0", "cond"] > 1e-6
        assert found["slot 0", "uncond"] < 1e-12


@pytest.mark.parametrize("changed", ["first", "second", "neither"])
def test_of_two_models_each_answers_for_its_part(tmp_path, changed):
    dataset = images(tmp_path / "images", ["teacher", "prior"])
    models = FakeDenoiser(dataset.facts), FakeDenoiser(dataset.facts, seed=1)
    store = written(
        tmp_path / "store", dataset, models[0], other=models[1], target=BOTH,
        contrast={"kind": "model", "other": OTHER},
    )  # fmt: skip
    if changed != "neither":
        with torch.no_grad():
            models[changed == "second"].module.gain.mul_(1.1)
    found = drift_of(store, models[0], other=models[1])
    mean = {part.part: part.mean for part in found.parts if part.name == "slot 1"}
    assert (mean["cond"] > 1e-6) == (changed == "first")
    assert (mean["uncond"] > 1e-6) == (changed == "second")
    assert (mean["guided"] > 1e-6) == (changed != "neither")
    with pytest.raises(UserError, match="contrast 'model'"):
        require_recorded(store, None)


def test_a_denoiser_that_is_not_finite_is_none_that_agrees(tmp_path):
    dataset = images(tmp_path / "images", ["teacher"])
    denoiser = FakeDenoiser(dataset.facts)
    store = written(tmp_path / "store", dataset, denoiser)
    denoiser.broken = lambda t, _: t > 500
    found = drift_of(store, denoiser)
    late = sum(int((store[key].arrays["row.t"] > 500).sum()) for key in store)
    assert found.not_finite == 3 * late > 0
    assert not found.within(math.inf)


def test_batches_and_shards_do_not_move_what_is_found(tmp_path):
    dataset = images(tmp_path / "images")
    denoiser, other = FakeDenoiser(dataset.facts), moved(dataset)
    stores = [
        written(tmp_path / f"{size}", dataset, denoiser, rollouts_per_shard=size) for size in (3, 9)
    ]
    chosen = [chosen_keys(predicted_keys(store), 0.3, 1) for store in stores]
    assert sorted(chosen[0]) == sorted(chosen[1])
    found = [
        row_drift(other, store, keys, batch_size=size)
        for store, keys, size in zip(stores, chosen, (1, 8), strict=True)
    ]
    means = [{(p.name, p.part): p.mean for p in each.parts} for each in found]
    assert means[0] == pytest.approx(means[1], rel=1e-6)
    assert found[0].worst == found[1].worst


def test_samples_that_are_their_own_target_are_never_chosen(tmp_path):
    dataset = images(tmp_path / "images")
    store = written(tmp_path / "store", dataset, FakeDenoiser(dataset.facts))
    assert isinstance(store.manifest.target, Dense)
    assert Recording.of(store.manifest).rows.kind == "forward"
    data = {row["sample_id"] for row in dataset.rows if row["target"] == "data"}
    assert {key[0] for key in predicted_keys(store)} == {k[0] for k in store} - data
