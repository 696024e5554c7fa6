"""Stage one of diffusion: a store holds what a denoiser predicts, whoever writes it and when."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch

from stages.diffusion import full_precision
from stages.diffusion.facts import ImageFacts, Recording
from stages.diffusion.noise import row_noise
from stages.diffusion.record import record
from stages.diffusion.record_plan import create_record_store, lay_out_records
from stages.diffusion.schedule import Schedule
from stages.diffusion.shard_work import refuse_failed
from stages.errors import UserError
from stages.interruption import StopRequest
from stages.quantization import Quantized
from stages.rollout import NotFinite
from stages.sampling import keyed_seed
from store import PredictionStore, StoreError, verify
from store.schema import Quantization
from tests.recorded import (
    PLAIN,
    SHAPES,
    FakeDenoiser,
    by_hand,
    bytes_of,
    config_of,
    facts_of_images,
    images,
    planned,
    written,
)
from tests.stopping import StopAfter

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
BOTH, GUIDED = ("dense.cond", "dense.delta"), ("dense.guided",)
WIDE = {"kind": "dense", "branches": "both", "dtype": "float32"}


def rows_of(store: PredictionStore, dataset):
    """Every row of a store: sample, what was drawn, slot, arrays, and x_t worked out again."""
    by_id = {sample["sample_id"]: sample for sample in dataset.rows}
    schedule = Schedule(Recording.of(store.manifest).schedule)
    rows = store.manifest.recording["rows"]
    config = Recording.of(store.manifest).rows.timesteps
    for key in store:
        rollout, sample = store[key], by_id[key[0]]
        image, text = divmod(key[1], 2)
        times = schedule.draw(config, rows["slots"], 7, key[0], image, text)
        assert len(rollout) == rows["slots"]
        assert dict(rollout.drawn) == {
            "image_variation": image, "text_variation": text,
            "latent": sample["latents"][image], "condition": sample["conditions"][text],
        }  # fmt: skip
        x0 = store.table("latents")[rollout.drawn["latent"]]["latent"].astype(np.float32)
        for slot, t in enumerate(times):
            row = {name: values[slot] for name, values in rollout.arrays.items()}
            noise = row_noise(7, key[0], image, text, slot, x0.shape)
            if rows["store_noise"]:
                noise = noise.astype(np.float16).astype(np.float32)
            alpha, sigma = schedule.at(np.array([t]))
            x = np.float32(alpha[0]) * x0 + np.float32(sigma[0]) * noise
            assert (row["row.t"], row["row.alpha"], row["row.sigma"]) == (t, alpha[0], sigma[0])
            yield sample, rollout.drawn, slot, row, noise, x


def label_of(store, drawn) -> int:
    return int(store.table("conditions")[drawn["condition"]]["class_labels"])


@pytest.mark.parametrize("store_noise", [False, True])
@pytest.mark.parametrize("prediction", ["v_prediction", "flow"])
def test_every_row_holds_what_was_asked_and_both_parts_of_the_answer(
    tmp_path, prediction, store_noise
):
    dataset = images(tmp_path / "images")
    denoiser = FakeDenoiser(dataset.facts, prediction=prediction)
    rows = {"kind": "forward", "slots": 3, "store_noise": store_noise}
    store = written(tmp_path / "store", dataset, denoiser, rows=rows)
    assert verify(tmp_path / "store").ok
    assert len(store) == 7 * 4
    asked = 0
    for sample, drawn, _, row, noise, x in rows_of(store, dataset):
        assert row["row.x_t_crc"] == google_crc32c.value(x.astype("<f2").tobytes())
        if store_noise:
            np.testing.assert_array_equal(row["row.noise"][0], noise.astype(np.float16))
        if sample["target"] == "data":
            assert row["row.status"] == 4
            assert row["row.target_crc"] == 0
            assert not set(row) & {*BOTH, *GUIDED}
            continue
        asked += 1
        cond = by_hand(denoiser, x, row["row.t"], label_of(store, drawn))
        uncond = by_hand(denoiser, x, row["row.t"], 3)
        half = 2.0**-11 * (np.abs(cond) + 1)
        assert (np.abs(row["dense.cond"][0] - cond) < half).all()
        assert (np.abs(row["dense.delta"][0] - (cond - uncond)) < half).all()
        parts = b"".join(row[name].tobytes() for name in BOTH)
        assert row["row.target_crc"] == google_crc32c.value(parts)
        assert row["row.status"] == 0
    assert asked == 6 * 4 * 3


def test_the_difference_is_rounded_once_and_so_is_small_where_the_branches_are_large(tmp_path):
    dataset = images(tmp_path / "images", ["teacher"])
    denoiser = FakeDenoiser(dataset.facts)
    with torch.no_grad():
        denoiser.module.gain.fill_(1000.0)
    store = written(tmp_path / "store", dataset, denoiser)
    for _, drawn, _, row, _, x in rows_of(store, dataset):
        label = label_of(store, drawn)
        delta = by_hand(denoiser, x, row["row.t"], label) - by_hand(denoiser, x, row["row.t"], 3)
        # Of rounded branches it would be off by up to half a unit of 2048, which is 1.
        np.testing.assert_allclose(row["dense.delta"][0], delta, atol=2e-3)


def test_a_guided_store_is_at_its_scale_and_prior_samples_are_not_guided(tmp_path):
    dataset = images(tmp_path / "images")
    denoiser = FakeDenoiser(dataset.facts)
    target = WIDE | {"branches": "guided"}
    store = written(tmp_path / "store", dataset, denoiser, target=target)
    seen = Counter()
    for sample, drawn, _, row, _, x in rows_of(store, dataset):
        if sample["target"] == "data":
            continue
        cond = by_hand(denoiser, x, row["row.t"], label_of(store, drawn))
        uncond = by_hand(denoiser, x, row["row.t"], 3)
        scale = 1.0 if sample["target"] == "prior" else 3.0
        np.testing.assert_allclose(
            row["dense.guided"][0], uncond + scale * (cond - uncond), atol=2e-5
        )
        seen[sample["target"]] += 1
    assert seen == {"teacher": 5 * 12, "prior": 12}


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_a_scale_below_one_is_guidance_too(tmp_path, scale):
    dataset = images(tmp_path / "images", ["teacher"])
    denoiser = FakeDenoiser(dataset.facts)
    store = written(
        tmp_path / "store", dataset, denoiser,
        target=WIDE | {"branches": "guided"}, guidance={"scale": scale},
    )  # fmt: skip
    for _, drawn, _, row, _, x in rows_of(store, dataset):
        cond = by_hand(denoiser, x, row["row.t"], label_of(store, drawn))
        uncond = by_hand(denoiser, x, row["row.t"], 3)
        expected = uncond + scale * (cond - uncond)
        np.testing.assert_allclose(row["dense.guided"][0], expected, atol=1e-5)


@pytest.mark.parametrize("embedded", [False, True])
def test_without_guidance_a_prediction_takes_one_pass(tmp_path, embedded):
    dataset = images(tmp_path / "images", ["teacher"])
    denoiser = FakeDenoiser(dataset.facts, takes_scale=embedded)
    store = written(
        tmp_path / "store", dataset, denoiser,
        target=WIDE | {"branches": "guided"}, guidance={"scale": 1},
    )  # fmt: skip
    assert denoiser.batches == [5, 5, 2]  # 4 variations of 3 slots, and no second branch
    for _, drawn, _, row, _, x in rows_of(store, dataset):
        cond = by_hand(denoiser, x, row["row.t"], label_of(store, drawn))
        np.testing.assert_allclose(row["dense.guided"][0], cond, atol=1e-5)


def test_both_branches_are_one_forward_pass(tmp_path):
    dataset = images(tmp_path / "images", ["teacher"])
    denoiser = FakeDenoiser(dataset.facts)
    written(tmp_path / "store", dataset, denoiser)
    assert denoiser.batches == [10, 10, 4]


def test_the_delta_to_the_model_without_its_adapter(tmp_path):
    dataset = images(tmp_path / "images", ["teacher", "prior"])
    denoiser = FakeDenoiser(dataset.facts, adapted=True)
    store = written(
        tmp_path / "store", dataset, denoiser, contrast={"kind": "adapter"}, target=WIDE
    )
    for _, drawn, _, row, _, x in rows_of(store, dataset):
        label = label_of(store, drawn)
        cond = by_hand(denoiser, x, row["row.t"], label, adapted=True)
        np.testing.assert_allclose(row["dense.cond"][0], cond, atol=1e-5)
        np.testing.assert_allclose(row["dense.delta"][0], 0.25, atol=1e-5)


def test_prior_samples_of_a_guided_store_of_an_adapter_are_without_it(tmp_path):
    dataset = images(tmp_path / "images", ["prior"])
    denoiser = FakeDenoiser(dataset.facts, adapted=True)
    target = WIDE | {"branches": "guided"}
    contrast = {"kind": "adapter"}
    store = written(tmp_path / "store", dataset, denoiser, contrast=contrast, target=target)
    for _, drawn, _, row, _, x in rows_of(store, dataset):
        base = by_hand(denoiser, x, row["row.t"], label_of(store, drawn))
        np.testing.assert_allclose(row["dense.guided"][0], base, atol=1e-5)


MODEL = {"kind": "model", "other": {"path": "somewhere/else"}}


class Watched(FakeDenoiser):
    """Knows whether its weights are where it was told to compute."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.moves: list[str] = []
        move = self.module.to

        def noted(place, *more, **named):
            self.moves.append(str(place))
            return move(place, *more, **named)

        self.module.to = noted  # type: ignore[method-assign]


def test_the_delta_to_another_model_whose_turns_are_whole_shards(tmp_path):
    dataset = images(tmp_path / "images")
    denoiser, other = Watched(dataset.facts), Watched(dataset.facts, seed=1)
    changes = {"contrast": MODEL, "target": WIDE, "rollouts_per_shard": 8}
    store = written(tmp_path / "store", dataset, denoiser, other=other, **changes)
    for sample, drawn, _, row, _, x in rows_of(store, dataset):
        if sample["target"] == "data":
            continue
        label = label_of(store, drawn)
        cond, without = (by_hand(m, x, row["row.t"], label) for m in (denoiser, other))
        np.testing.assert_allclose(row["dense.cond"][0], cond, atol=1e-5)
        np.testing.assert_allclose(row["dense.delta"][0], cond - without, atol=1e-5)
    assert denoiser.batches == other.batches
    # Each is asked for a shard, then the other; the next shard begins with the one that is there.
    shards = sum(store.manifest.buckets[b].predicted for b in store.plan.buckets)
    assert len(denoiser.moves) == len(other.moves) == 2 * shards + 1
    recording = Recording.of(store.manifest)
    assert recording.contrast_fingerprint == "denoiser 1"
    assert "somewhere" not in (tmp_path / "store" / "manifest.json").read_text(encoding="utf-8")


def test_the_store_says_what_it_is_of(tmp_path):
    dataset = images(tmp_path / "images")
    denoiser = FakeDenoiser(dataset.facts)
    store = written(tmp_path / "store", dataset, denoiser)
    manifest, recording = store.manifest, Recording.of(store.manifest)
    assert (manifest.family, manifest.timestep_s, manifest.source) == ("diffusion", None, "teacher")
    assert [bucket.shape for bucket in manifest.buckets] == [*SHAPES, *SHAPES]
    assert [bucket.predicted for bucket in manifest.buckets] == [True, True, False, False]
    assert manifest.fingerprints.dataset == "dataset"
    assert recording.schedule == denoiser.schedule
    assert recording.noise == "philox4x64-boxmuller-f32"
    assert recording.versions["torch"] == torch.__version__.partition("+")[0]
    assert store.sample("image/2")["target"] == "prior"
    assert store.sample("image/2")["weight"] == 2.5


def test_the_plan_holds_every_key_once_and_is_shuffled_within_one_bucket_a_shard(tmp_path):
    dataset = images(tmp_path / "images", ["teacher"] * 12 + ["data"] * 4)
    store, _ = planned(tmp_path / "store", dataset, FakeDenoiser(dataset.facts))
    keys = [key for shard in store.plan for key in shard]
    assert sorted(keys) == sorted((f"image/{n}", v) for n in range(16) for v in range(4))
    by_id = {sample["sample_id"]: sample for sample in dataset.rows}
    for number, shard in enumerate(store.plan):
        buckets = {by_id[k[0]]["bucket"] + 2 * (by_id[k[0]]["target"] == "data") for k in shard}
        assert buckets == {store.plan.bucket_of(number)}
        assert len({key[0] for key in shard}) > 1
    assert list(store.plan.buckets) != sorted(store.plan.buckets)
    other, _ = planned(tmp_path / "other", dataset, FakeDenoiser(dataset.facts))
    assert other.plan == store.plan


def test_every_rollout_says_which_seed_is_its_own(tmp_path):
    dataset = images(tmp_path / "images")
    store = written(tmp_path / "store", dataset, FakeDenoiser(dataset.facts))
    seeds = {key: store[key].seed for key in store}
    assert seeds == {key: keyed_seed(7, *key) for key in store}
    assert len(set(seeds.values())) == len(seeds)


@pytest.mark.parametrize("targets", [["teacher"] * 2, ["teacher", "data"]])
def test_only_samples_that_are_their_own_target_have_buckets_without_predictions(tmp_path, targets):
    dataset = images(tmp_path / "images", targets)
    store, _ = planned(tmp_path / "store", dataset, FakeDenoiser(dataset.facts))
    found = [(bucket.shape, bucket.predicted) for bucket in store.manifest.buckets]
    bare = [(shape, False) for shape in SHAPES] if "data" in targets else []
    assert found == [(shape, True) for shape in SHAPES] + bare


def test_samples_are_taken_from_the_start_of_the_split(tmp_path):
    dataset = images(tmp_path / "images")
    store, _ = planned(tmp_path / "store", dataset, FakeDenoiser(dataset.facts), samples=2)
    assert {key[0] for shard in store.plan for key in shard} == {"image/0", "image/1"}


def test_an_interrupted_recording_that_others_resume_ends_with_the_same_bytes(tmp_path):
    dataset = images(tmp_path / "images")
    whole = written(tmp_path / "whole", dataset, FakeDenoiser(dataset.facts))
    store, config = planned(tmp_path / "parts", dataset, FakeDenoiser(dataset.facts))
    done: list[int] = []
    for questions in (4, 1, 6, 0, 9):
        denoiser = FakeDenoiser(dataset.facts)
        store = PredictionStore.open(tmp_path / "parts")
        stop = StopAfter(questions)
        assert not record(denoiser, store, dataset, store.missing(), config, stop=stop)
        done.append(len(PredictionStore.open(tmp_path / "parts").committed))
    assert done == sorted(done)
    assert 0 < done[-1] < len(store.plan)
    store = PredictionStore.open(tmp_path / "parts")
    missing = store.missing()
    for worker in (missing[1::2], missing):  # a second worker, and then one that does the rest
        assert record(
            FakeDenoiser(dataset.facts), store, dataset, worker, config, stop=StopRequest()
        )
    assert bytes_of(PredictionStore.open(tmp_path / "parts")) == bytes_of(whole)


def test_a_shard_that_was_asked_for_whole_is_committed_when_a_stop_is_requested(tmp_path):
    dataset = images(tmp_path / "images", ["teacher"] * 4, shapes=SHAPES[:1])
    store, config = planned(tmp_path / "store", dataset, FakeDenoiser(dataset.facts))
    # A shard is 12 rows in 3 batches: the stop comes before the second one of the second shard.
    stop = StopAfter(4)
    assert not record(FakeDenoiser(dataset.facts), store, dataset, [2, 0, 1], config, stop=stop)
    assert list(PredictionStore.open(tmp_path / "store").committed) == [2]


def test_two_models_resume_exactly_too(tmp_path):
    dataset = images(tmp_path / "images", ["teacher"] * 6)
    models = [FakeDenoiser(dataset.facts), FakeDenoiser(dataset.facts, seed=1)]
    whole = written(tmp_path / "whole", dataset, models[0], other=models[1], contrast=MODEL)
    store, config = planned(tmp_path / "parts", dataset, models[0], other=models[1], contrast=MODEL)
    for questions in (3, 11):
        store = PredictionStore.open(tmp_path / "parts")
        assert not record(
            models[0], store, dataset, store.missing(), config, stop=StopAfter(questions),
            other=models[1],
        )  # fmt: skip
    assert 0 < len(PredictionStore.open(tmp_path / "parts").committed) < len(store.plan)
    missing = PredictionStore.open(tmp_path / "parts").missing()
    # From the other end, so that other shards begin with the second model.
    assert record(
        models[0], store, dataset, missing[::-1], config, stop=StopRequest(), other=models[1]
    )
    assert bytes_of(PredictionStore.open(tmp_path / "parts")) == bytes_of(whole)


@pytest.mark.slow
def test_a_process_that_is_killed_in_the_middle_loses_its_shard_alone(tmp_path):
    command = [sys.executable, "-m", "tests.recorded", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT)
    shards = tmp_path / "store" / "shards"
    while not (shards.is_dir() and len(list(shards.iterdir())) >= 2):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    store = PredictionStore.open(tmp_path / "store")
    assert 2 <= len(store.committed) < len(store.plan)
    dataset = images(tmp_path / "again")
    denoiser = FakeDenoiser(dataset.facts)
    assert record(denoiser, store, dataset, store.missing(), config_of(), stop=StopRequest())
    whole = written(tmp_path / "whole", dataset, FakeDenoiser(dataset.facts))
    assert bytes_of(PredictionStore.open(tmp_path / "store")) == bytes_of(whole)
    assert verify(tmp_path / "store").ok


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_neighbours_in_a_batch_have_no_influence(tmp_path, batch_size):
    dataset = images(tmp_path / "images")
    one = written(tmp_path / "one", dataset, FakeDenoiser(dataset.facts), target=WIDE)
    two = written(
        tmp_path / "two", dataset, FakeDenoiser(dataset.facts), target=WIDE, batch_size=batch_size
    )
    for key in one:
        for name, values in one[key].arrays.items():
            if name.startswith("dense."):
                np.testing.assert_allclose(two[key].arrays[name], values, rtol=1e-5, atol=1e-6)
            elif name != "row.target_crc":
                np.testing.assert_array_equal(two[key].arrays[name], values)


def test_a_shard_that_another_worker_has_committed_is_left_to_it(tmp_path):
    dataset = images(tmp_path / "images")
    store, config = planned(tmp_path / "store", dataset, FakeDenoiser(dataset.facts))
    mine = PredictionStore.open(tmp_path / "store")
    first = FakeDenoiser(dataset.facts)
    assert record(first, store, dataset, store.missing(), config, stop=StopRequest())
    second = FakeDenoiser(dataset.facts)
    assert record(second, mine, dataset, mine.missing(), config, stop=StopRequest())
    assert first.batches
    assert not second.batches


def broken_at(times, *dtypes):
    """A fault at some times, in these types only."""

    def broken(t, dtype):
        hit = torch.isin(t, torch.tensor(sorted(times), dtype=torch.float64))
        return hit if dtype in dtypes else torch.zeros_like(hit)

    return broken


def times_of(store: PredictionStore) -> list[tuple[tuple, int, float]]:
    return [
        (key, slot, float(t)) for key in store for slot, t in enumerate(store[key].arrays["row.t"])
    ]


ONE_SHAPE = {"shapes": SHAPES[:1]}
LARGE = {"rollouts_per_shard": 12, "rows": {"kind": "forward", "slots": 4}}


@pytest.fixture
def faulty(tmp_path):
    """A dataset, a sound store of it, and a time that one row alone has."""
    dataset = images(tmp_path / "images", ["teacher"] * 6, **ONE_SHAPE)
    sound = written(tmp_path / "sound", dataset, FakeDenoiser(dataset.facts), **LARGE)
    counts = Counter(t for _, _, t in times_of(sound))
    key, slot, t = next(row for row in times_of(sound) if counts[row[2]] == 1)
    return dataset, sound, key, slot, t


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_a_row_that_is_not_finite_in_a_short_type_is_repeated_in_fp32(
    tmp_path, faulty, caplog, precision, dtype
):
    dataset, sound, key, slot, t = faulty
    denoiser = FakeDenoiser(dataset.facts, dtype=dtype, broken=broken_at([t], dtype))
    with caplog.at_level(logging.WARNING):
        store = written(tmp_path / "store", dataset, denoiser, precision=precision, **LARGE)
    assert f"{key[0]!r} variation {key[1]} slot {slot}" in caplog.text
    for other in store:
        status = store[other].arrays["row.status"]
        assert status.tolist() == [int(other == key and s == slot) for s in range(4)]
    # The repeated row is as exact as float32, and the others have the noise of the short type.
    exact, found = (s[key].arrays["dense.cond"][slot] for s in (sound, store))
    gain = denoiser.module.gain.item() / 0.5
    np.testing.assert_allclose(found, exact, rtol=abs(gain - 1) + 2e-2, atol=2e-2)
    assert {p.dtype for p in denoiser.module.parameters()} == {dtype}
    assert denoiser.module.steady.dtype == dtype


def test_lifted_weights_come_back_bit_by_bit_and_can_be_trained_still(tmp_path, faulty):
    dataset, _, _, _, t = faulty
    denoiser = FakeDenoiser(dataset.facts, dtype=torch.float16)
    before = {name: x.clone() for name, x in denoiser.module.state_dict().items()}
    denoiser.broken = broken_at([t], torch.float16)
    written(tmp_path / "store", dataset, denoiser, precision="fp16", **LARGE)
    for name, x in denoiser.module.state_dict().items():
        assert torch.equal(x, before[name])
    denoiser.module.gain.square().backward()
    assert denoiser.module.gain.grad is not None


class Roomless(FakeDenoiser):
    """A denoiser that a device has no room for in float32."""

    def predict(self, x, t, conditions, scale=None):
        if self.dtype == torch.float32:
            self.batches.append(0)
            raise torch.OutOfMemoryError("no room to compute")
        return super().predict(x, t, conditions, scale)


@pytest.mark.parametrize("where", ["weights", "arithmetic"])
def test_without_room_for_fp32_a_row_is_failed_and_nothing_else_is_lost(
    tmp_path, faulty, caplog, monkeypatch, where
):
    dataset, sound, key, slot, t = faulty
    again = next(u for k, _, u in times_of(sound) if k != key)
    denoiser = Roomless(dataset.facts, dtype=torch.float16)
    denoiser.broken = broken_at([t, again], torch.float16)
    before = {name: x.clone() for name, x in denoiser.module.state_dict().items()}
    if where == "weights":
        cast = full_precision._cast

        def scarce(wanted):
            cast(wanted[:2])
            if wanted[0][1] == torch.float32:
                denoiser.batches.append(0)
                raise torch.OutOfMemoryError("no room to hold them")
            cast(wanted[2:])

        monkeypatch.setattr(full_precision, "_cast", scarce)
    with caplog.at_level(logging.WARNING):
        store = written(tmp_path / "store", dataset, denoiser, precision="fp16", **LARGE)
    failed = [(k, s) for k in store for s in range(4) if store[k].arrays["row.status"][s]]
    assert (key, slot) in failed
    assert failed == [(k, s) for k, s, u in times_of(sound) if u in (t, again)]
    assert {store[k].arrays["row.status"][s] for k, s in failed} == {2}
    assert "no room for the model in fp32" in caplog.text
    assert denoiser.batches.count(0) == 1, "it is not tried again"
    assert denoiser.dtype == torch.float16
    for name, x in denoiser.module.state_dict().items():
        assert x.dtype == torch.float16
        assert torch.equal(x, before[name])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_row_that_stays_not_finite_is_stored_as_failed_and_nothing_else_is_lost(
    tmp_path, faulty, caplog, precision
):
    dataset, _, key, slot, t = faulty
    dtype = torch.float32 if precision == "fp32" else torch.float16
    broken = broken_at([t], torch.float16, torch.float32)
    with caplog.at_level(logging.WARNING):
        store = written(
            tmp_path / "store", dataset, FakeDenoiser(dataset.facts, dtype=dtype, broken=broken),
            precision=precision, **LARGE,
        )  # fmt: skip
    assert f"{key[0]!r} variation {key[1]} slot {slot}; stored as failed" in caplog.text
    sound = written(
        tmp_path / "alike", dataset, FakeDenoiser(dataset.facts, dtype=dtype),
        precision=precision, **LARGE,
    )  # fmt: skip
    for other in store:
        for name, values in store[other].arrays.items():
            expected = sound[other].arrays[name].copy()
            if other == key and name in BOTH:
                expected[slot] = 0
            if other == key and name == "row.status":
                expected[slot] = 2
            if other == key and name == "row.target_crc":
                zeros = 2 * 2 * int(np.prod(SHAPES[0])) * b"\0"
                expected[slot] = google_crc32c.value(zeros)
            np.testing.assert_array_equal(values, expected)


def test_what_float16_cannot_hold_is_failed_too(tmp_path, faulty):
    dataset, sound, *_ = faulty
    denoiser = FakeDenoiser(dataset.facts)
    peak = {}
    for _, _, slot, row, _, x in rows_of(sound, dataset):
        peak[slot, float(row["row.t"])] = np.abs(x).max()
    largest = max(peak.values())
    with torch.no_grad():
        denoiser.module.gain.fill_(65504 / largest * 1.001)
    store = written(tmp_path / "store", dataset, denoiser, **LARGE)
    status = np.concatenate([store[key].arrays["row.status"] for key in store])
    assert Counter(status.tolist())[2] >= 1
    assert Counter(status.tolist())[0] > 80
    wide = written(tmp_path / "wide", dataset, denoiser, **LARGE, target=WIDE)
    assert all((wide[key].arrays["row.status"] == 0).all() for key in wide)


def test_the_rows_of_a_quantized_teacher_are_failed_at_once(tmp_path, faulty, caplog):
    dataset, _, key, slot, t = faulty
    broken = broken_at([t], torch.bfloat16)
    denoiser = FakeDenoiser(dataset.facts, dtype=torch.bfloat16, broken=broken)
    config = config_of(precision="bf16", **LARGE)
    quantized = Quantized(
        Quantization(method="int8", dtype="bfloat16", layers=("a",)), "before",
        denoiser.architecture(),
    )  # fmt: skip
    store = create_record_store(
        tmp_path / "store",
        dataset,
        lay_out_records(config, denoiser, dataset, seed=7, quantized=quantized),
    )
    assert store.manifest.fingerprints.teacher == "before"
    assert store.manifest.quantization == quantized.record
    with caplog.at_level(logging.WARNING):
        assert record(denoiser, store, dataset, store.missing(), config, stop=StopRequest())
    assert "quantized weights cannot be held in fp32" in caplog.text
    assert PredictionStore.open(tmp_path / "store")[key].arrays["row.status"][slot] == 2


def test_too_many_failed_rows_stop_the_recording_and_earlier_shards_stay(tmp_path):
    dataset = images(tmp_path / "images", ["teacher"] * 6, **ONE_SHAPE)
    store, config = planned(tmp_path / "store", dataset, FakeDenoiser(dataset.facts))
    sound = written(tmp_path / "sound", dataset, FakeDenoiser(dataset.facts))
    last = {key for shard in (4, 5) for key in store.plan[shard]}
    times = {t for key, _, t in times_of(sound) if key in last}
    times -= {t for key, _, t in times_of(sound) if key not in last}
    broken = broken_at(times, torch.float32)
    denoiser = FakeDenoiser(dataset.facts, broken=broken)
    with pytest.raises(NotFinite, match=r"of the 12 rows of a shard"):
        record(denoiser, store, dataset, store.missing(), config, stop=StopRequest())
    assert list(PredictionStore.open(tmp_path / "store").committed) == [0, 1, 2, 3]


def test_failed_rows_are_counted_over_all_batches_of_a_shard(tmp_path, faulty):
    dataset, sound, *_ = faulty
    rows = [t for key in sound.plan[0] for t in sound[key].arrays["row.t"]]
    scattered = [float(t) for t in rows[::5]]  # about one in a batch of 5
    denoiser = FakeDenoiser(dataset.facts, broken=broken_at(scattered, torch.float32))
    with pytest.raises(NotFinite, match=r"5 of the 48 rows of a shard"):
        written(tmp_path / "store", dataset, denoiser, **LARGE)


@pytest.mark.parametrize(("failed", "planned_rows"), [(3, 20), (2, 10), (1, 1), (2, 2), (11, 100)])
def test_failed_rows_beyond_a_share_are_refused(failed, planned_rows):
    with pytest.raises(NotFinite, match=f"{failed} of the {planned_rows} rows"):
        refuse_failed(failed, planned_rows)
    refuse_failed(min(failed - 1, 1), planned_rows)


def test_two_models_of_which_one_fails(tmp_path, faulty):
    dataset, _, key, slot, t = faulty
    for broken_one in (0, 1):
        models = [FakeDenoiser(dataset.facts), FakeDenoiser(dataset.facts, seed=1)]
        models[broken_one].broken = broken_at([t], torch.float32)
        store = written(
            tmp_path / f"store{broken_one}", dataset, models[0], other=models[1], contrast=MODEL,
            **LARGE,
        )  # fmt: skip
        for other in store:
            status = store[other].arrays["row.status"]
            assert status.tolist() == [2 * int(other == key and s == slot) for s in range(4)]
        assert not store[key].arrays["dense.cond"][slot].any()


def test_what_two_models_make_and_float16_cannot_hold_is_failed(tmp_path, faulty):
    dataset, sound, *_ = faulty
    largest = max(np.abs(x).max() for *_, x in rows_of(sound, dataset))
    models = [FakeDenoiser(dataset.facts), FakeDenoiser(dataset.facts, seed=1)]
    with torch.no_grad():  # each below 65504, and their difference above
        models[0].module.gain.fill_(40000 / largest)
        models[1].module.gain.fill_(-40000 / largest)
    store = written(
        tmp_path / "store", dataset, models[0], other=models[1], contrast=MODEL, **LARGE
    )
    statuses = Counter()
    for key in store:
        arrays = store[key].arrays
        failed = arrays["row.status"] == 2
        assert not any(arrays[name][failed].any() for name in BOTH)
        statuses.update(arrays["row.status"].tolist())
    assert statuses.keys() == {0, 2}


def test_what_a_store_refuses_to_be_planned_of(tmp_path):
    dataset = images(tmp_path / "images")
    denoiser = FakeDenoiser(dataset.facts)

    def refused(text, *, model=denoiser, of=dataset, other=None, **changes):
        with pytest.raises(UserError, match=text):
            planned(tmp_path / "store", of, model, other=other, **changes)

    bare = facts_of_images(unconditional="none")
    unconditional = images(tmp_path / "bare", facts=bare)
    for changes in ({}, {"target": {"kind": "dense", "branches": "guided"}}):
        refused("no row that stands for no condition", model=FakeDenoiser(bare), of=unconditional,
                **changes)  # fmt: skip
        told = FakeDenoiser(dataset.facts, takes_scale=True)
        refused("told its guidance as a number", model=told, **changes)
    for field, value in (
        ("latent_channels", 4),
        ("scaling", 0.18215),
        ("classes", ("zero", "one")),
        ("conditions", {"class_labels": {"dtype": "int64", "shape": (1,)}}),
        ("encoder", "ab12"),
    ):
        differing = type(bare).model_validate(bare.model_dump() | {
            "unconditional": "label", field: value
        })  # fmt: skip
        refused(f"{field}: .* of the teacher, .* of the dataset", model=FakeDenoiser(differing))
    refused("no adapter to switch off", contrast={"kind": "adapter"})
    trajectory = {"kind": "trajectory", "steps": 5}
    adapted = FakeDenoiser(dataset.facts, adapted=True)
    refused("solved under classifier-free guidance", model=adapted, rows=trajectory,
            contrast={"kind": "adapter"})  # fmt: skip
    refused("4 variations, first of sample 'image/4', have the target 'data'", rows=trajectory)
    other = FakeDenoiser(dataset.facts, prediction="epsilon")
    refused("predicts 'v_prediction' .* 'epsilon'", contrast=MODEL, other=other)
    strange = FakeDenoiser(facts_of_images(scaling=0.5))
    refused("scaling: 0.5 of the other model of rollout.contrast, 1.0 of the dataset",
            contrast=MODEL, other=strange)  # fmt: skip
    refused("rollout.quantization is 'fp8' .* only the teacher is quantized", contrast=MODEL,
            other=FakeDenoiser(dataset.facts, seed=1), quantization="fp8")  # fmt: skip
    refused("split 'test' of the dataset", split="test")
    only = images(tmp_path / "only", ["teacher"])
    refused("1001 solver steps", of=only, rows={"kind": "trajectory", "steps": 1001})
    assert not (tmp_path / "store").exists()


def test_a_teacher_that_never_saw_no_condition_is_warned_of(tmp_path, caplog):
    dataset = images(tmp_path / "images")
    denoiser = FakeDenoiser(dataset.facts, condition_dropout=0.0)
    with caplog.at_level(logging.WARNING):
        planned(tmp_path / "store", dataset, denoiser)
    assert "without condition dropout" in caplog.text


def test_another_teacher_or_noise_is_refused_by_the_store_that_is_there(tmp_path):
    dataset = images(tmp_path / "images")
    planned(tmp_path / "store", dataset, FakeDenoiser(dataset.facts))
    planned(tmp_path / "store", dataset, FakeDenoiser(dataset.facts))
    with pytest.raises(StoreError, match=r"fingerprints\.teacher"):
        planned(tmp_path / "store", dataset, FakeDenoiser(dataset.facts, seed=2))
    with pytest.raises(StoreError, match=r"recording\.rows\.slots"):
        planned(
            tmp_path / "store",
            dataset,
            FakeDenoiser(dataset.facts),
            rows=PLAIN["rows"] | {"slots": 4},
        )
    with pytest.raises(StoreError, match=r"recording\.schedule"):
        planned(tmp_path / "store", dataset, FakeDenoiser(dataset.facts, prediction="epsilon"))


@pytest.mark.parametrize(
    ("field", "kind", "change", "named"),
    [
        ("recording", Recording, {}, r"recording\.schedule: Field required"),
        ("recording", Recording, {"kind": "video"}, r"recording\.kind: .*'diffusion'"),
        ("recording", Recording, {"later": 1}, r"recording\.later: Extra inputs"),
        ("conditioning", ImageFacts, {"buckets": [[1, 2]]}, r"conditioning\.buckets\.0\.2: "),
        ("conditioning", ImageFacts, {"sample_rate": 1}, r"conditioning\.sample_rate: Extra"),
    ],
)
def test_a_manifest_that_says_something_else_is_refused_by_the_field(
    tmp_path, field, kind, change, named
):
    dataset = images(tmp_path / "images", ["teacher"])
    store, _ = planned(tmp_path / "store", dataset, FakeDenoiser(dataset.facts))
    content = getattr(store.manifest, field) | change if change else {}
    manifest = store.manifest.model_copy(update={field: content})
    with pytest.raises(UserError, match=f"release recorded.*{named}"):
        kind.of(manifest)


def test_where_another_model_lies_is_no_part_of_a_store(tmp_path):
    dataset = images(tmp_path / "images", ["teacher"])
    models = {"other": FakeDenoiser(dataset.facts, seed=1), "denoiser": FakeDenoiser(dataset.facts)}
    named = {"path": "here", "config": "beside", "adapter": "lora.safetensors"}
    for given in ({"path": "there"}, named, named | {"path": "elsewhere", "adapter": "moved"}):
        contrast = {"kind": "model", "other": given}
        store, _ = planned(tmp_path / "store", dataset, contrast=contrast, **models)
        assert store.manifest.recording["contrast_fingerprint"] == "denoiser 1"


def test_newer_packages_go_on_with_a_recording(tmp_path, monkeypatch):
    dataset = images(tmp_path / "images")
    store, _ = planned(tmp_path / "store", dataset, FakeDenoiser(dataset.facts))
    monkeypatch.setattr("stages.diffusion.record_plan.version", lambda _: "99")
    again, _ = planned(tmp_path / "store", dataset, FakeDenoiser(dataset.facts))
    assert again.fingerprint == store.fingerprint


def test_the_second_model_comes_exactly_with_its_contrast(tmp_path):
    dataset = images(tmp_path / "images")
    denoiser, other = FakeDenoiser(dataset.facts), FakeDenoiser(dataset.facts, seed=1)
    store, config = planned(tmp_path / "store", dataset, denoiser)
    with pytest.raises(UserError, match="2 models were given"):
        record(denoiser, store, dataset, [0], config, stop=StopRequest(), other=other)
