"""Rows as batches: each is what was recorded, or refused, and whoever reads them gets the same."""

from __future__ import annotations

import pickle
from collections import Counter
from contextlib import closing

import numpy as np
import pytest
import torch

from stages.diffusion.conversion import Conversion
from stages.diffusion.facts import Recording
from stages.diffusion.model_config import TimestepsConfig
from stages.diffusion.record_config import ForwardRows, TrajectoryRows
from stages.diffusion.rows import Reading, RowBatch, RowReader, StoreRows, row_order
from stages.diffusion.schedule import Schedule
from stages.diffusion.stored_row import SOURCES
from stages.distributed import Place
from stages.errors import UserError
from stages.host_memory import HostMemory
from store import PredictionStore
from store.side_tables import SideTable
from tests.diffusion_stores import (
    IMAGES,
    SAMPLES,
    SLOTS,
    TEACHERS,
    TEXTS,
    Written,
    config_of,
    rollout_weight,
    schedule_of,
    write_store,
)

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
ROWS = len(SAMPLES) * IMAGES * TEXTS * SLOTS
TRAJECTORIES = Written(rows=TrajectoryRows(kind="trajectory", steps=5), samples=TEACHERS)
NOISE_STORED = Written(rows=ForwardRows(slots=SLOTS, store_noise=True))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> PredictionStore:
    return write_store(tmp_path_factory.mktemp("rows") / "store")


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory) -> PredictionStore:
    return write_store(tmp_path_factory.mktemp("rows") / "trajectories", TRAJECTORIES)


def reading_of(store, config, own=None) -> Reading:
    recording = Recording.of(store.manifest)
    return Reading.of(recording, Conversion(recording.schedule, own or schedule_of()), config, 5)


def walked(store, config, positions, rank=0, world_size=1, own=None) -> list[RowBatch]:
    place = Place(rank, world_size, CPU)
    with closing(StoreRows(store, config, reading_of(store, config, own), 5, place)) as rows:
        return [batch for position in positions for batch in rows.batches(position)]


def content(batch: RowBatch) -> dict[str, np.ndarray]:
    return {name: values.copy() for name, values in batch.arrays.as_numpy().items()}


def seen(batches) -> list[tuple]:
    return [(*k, e) for batch in batches for k, e in zip(batch.keys, batch.epochs, strict=True)]


def by_row(batches) -> dict[tuple, dict[str, bytes]]:
    """Bytes of every row that all batches have, whatever else its batch holds."""
    return {
        (*key, epoch): {
            name: values[place].tobytes()
            for name, values in content(batch).items()
            if name not in ("x0", "noise")  # of a data row's whole micro-batch
        }
        for batch in batches
        for place, (key, epoch) in enumerate(zip(batch.keys, batch.epochs, strict=True))
    }


# What a batch holds.


@pytest.mark.parametrize("written", [Written(), NOISE_STORED], ids=["drawn", "stored"])
def test_a_row_holds_what_was_recorded_of_it(tmp_path, written):
    store = write_store(tmp_path / "s", written)
    latents, conditions = store.table("latents"), store.table("conditions")
    config = config_of({"guidance_scale": 2.0, "mask": {}, "data_share": 0.5})
    for batch in walked(store, config, range(0, ROWS, 8)):
        arrays = content(batch)
        for place, (sample_id, variation, slot) in enumerate(batch.keys):
            rollout, sample = store[sample_id, variation], store.sample(sample_id)
            image = latents[rollout.drawn["latent"]]
            np.testing.assert_array_equal(arrays["x0"][place], image["latent"])
            np.testing.assert_array_equal(
                arrays["condition.embeds"][place], conditions[rollout.drawn["condition"]]["embeds"]
            )
            np.testing.assert_array_equal(arrays["condition.time_ids"][place], image["time_ids"])
            mask = image.get("mask", np.ones_like(arrays["mask"][place]))
            np.testing.assert_array_equal(arrays["mask"][place], mask)
            alpha, sigma = (rollout.arrays[f"row.{n}"][slot] for n in ("alpha", "sigma"))
            exact = alpha * image["latent"].astype(np.float64)
            exact += sigma * arrays["noise"][place].astype(np.float64)
            np.testing.assert_allclose(arrays["x_t"][place], exact, rtol=0, atol=2e-6)
            if "row.noise" in rollout.arrays:
                np.testing.assert_array_equal(
                    arrays["noise"][place], rollout.arrays["row.noise"][slot, 0]
                )
            for name, ours in {"t": "t", "alpha": "own_alpha", "sigma": "own_sigma"}.items():
                assert arrays[ours][place] == rollout.arrays[f"row.{name}"][slot]
            weight = sample["weight"] * rollout_weight(variation)
            assert arrays["weight"][place] == np.float32(weight)
            assert SOURCES[arrays["source"][place]] == sample["target"]
            for name in ("dense.cond", "dense.delta"):
                assert (name in arrays) == (name in rollout.arrays) == (sample["target"] != "data")
                if name in arrays:
                    stored = rollout.arrays[name][slot]
                    assert arrays[name][place].tobytes() == stored.tobytes()


def test_every_row_comes_once_in_an_epoch_and_ends_of_trajectories_never(store, trajectories):
    rows = Counter(seen(walked(store, config_of(), range(0, ROWS, 8))))
    assert len(rows) == ROWS
    assert set(rows.values()) == {1}
    count = len(SAMPLES) * IMAGES * TEXTS * 5
    config = config_of({"guidance_scale": 2.0}, optimizer={"batch_size": 10})
    rows = Counter(seen(walked(trajectories, config, range(0, count, 10))))
    assert len(rows) == count
    assert {slot for _, _, slot, _ in rows} == set(range(5))


def test_one_row_of_every_sample_is_an_epoch_where_one_is_asked_for(store):
    config = config_of(variations="one", optimizer={"batch_size": 6})
    epochs = [seen(walked(store, config, [position])) for position in range(0, 60, 6)]
    for epoch in epochs:
        assert sorted(sample for sample, *_ in epoch) == [s["sample_id"] for s in SAMPLES]
    assert len({row[:3] for epoch in epochs for row in epoch}) > 30


@pytest.mark.parametrize("most", [None, 1, 3])
def test_a_micro_batch_is_of_one_shape_and_kind_and_no_larger_than_allowed(store, most):
    config = config_of(optimizer={"batch_size": 16, "micro_batch_size": most})
    cut = 0
    for position in range(0, ROWS, 16):
        batches = walked(store, config, [position])
        assert sum(batch.weight for batch in batches) == 16
        for batch in batches:
            assert len(batch.keys) <= (most or 16)
            predicted = {store.sample(k[0])["target"] != "data" for k in batch.keys}
            assert len(predicted) == 1
        cut += len({batch.arrays["x_t"].shape[1:] for batch in batches}) < len(batches)
    assert cut, "some batch holds rows of one shape with predictions and without"


def test_batches_are_mostly_of_one_shape(store):
    config = config_of(optimizer={"batch_size": 6}, buffer_shards=9)
    shapes = [
        len({batch.arrays["x_t"].shape[1:] for batch in walked(store, config, [position])})
        for position in range(0, ROWS, 6)
    ]
    assert shapes.count(1) >= len(shapes) - 2


@pytest.mark.parametrize("sizes", [(8, 1, None), (5, 2, 2), (4, 3, 1), (3, 3, None)])
def test_the_same_rows_come_in_the_same_order_however_they_are_shared_out(store, sizes):
    size, world_size, most = sizes
    whole = seen(walked(store, config_of(optimizer={"batch_size": 1}), range(120)))
    config = config_of(optimizer={"batch_size": size, "micro_batch_size": most})
    for position in range(40, 80, size):
        shares = [walked(store, config, [position], rank, world_size) for rank in range(world_size)]
        assert all(shares), "no process is left without a batch"
        for rank, share in enumerate(shares):
            assert sorted(seen(share)) == sorted(
                whole[position : position + size][rank::world_size]
            )


@pytest.mark.parametrize(
    ("workers", "start"),
    [
        (1, "fork"),
        (2, "fork"),
        pytest.param(2, "forkserver", marks=pytest.mark.slow),
        pytest.param(1, "spawn", marks=pytest.mark.slow),
    ],
)
def test_threads_and_processes_read_the_same_bytes(store, trajectories, workers, start):
    for each, loss in ((store, {"guidance_scale": 2.0}), (trajectories, {"teaches": "pairs"})):
        positions = range(16, 48, 8)
        plain = walked(each, config_of(loss), positions)
        others = walked(each, config_of(loss, workers=workers, start=start), positions)
        assert seen(others) == seen(plain)
        for ours, theirs in zip(others, plain, strict=True):
            assert ours.counts == theirs.counts
            mine, other = content(ours), content(theirs)
            assert mine.keys() == other.keys()
            for name in mine:
                assert mine[name].tobytes() == other[name].tobytes(), name


def test_a_row_does_not_depend_on_the_rows_beside_it(store):
    one = by_row(walked(store, config_of(optimizer={"batch_size": 1}), range(24)))
    several = by_row(walked(store, config_of(optimizer={"batch_size": 1}), range(12, 24)))
    assert several.items() <= one.items()
    travelled = pickle.loads(pickle.dumps(reader_of(store)))
    assert by_row(travelled(0)) == by_row(reader_of(store)(0))


def reader_of(store) -> RowReader:
    config = config_of()
    order = row_order(store, config, False, 5)
    return RowReader(store, order, reading_of(store, config), 8, None, 0, 1, HostMemory())


# Trajectories.


def test_rows_of_trajectories_teach_their_prediction_their_end_or_the_line(trajectories):
    for teaches in ("prediction", "end", "pairs"):
        loss = {"teaches": teaches} | ({"guidance_scale": 2.0} if teaches == "prediction" else {})
        for batch in walked(trajectories, config_of(loss), range(0, 64, 8)):
            arrays = content(batch)
            for place, (sample_id, variation, slot) in enumerate(batch.keys):
                states = trajectories[sample_id, variation].arrays["row.x_t"][:, 0]
                assert ("x0" in arrays) == (teaches != "prediction")
                assert ("noise" in arrays) == (teaches == "pairs")
                assert ("dense.cond" in arrays) == (teaches == "prediction")
                if "x0" in arrays:
                    np.testing.assert_array_equal(arrays["x0"][place], states[-1])
                if teaches != "pairs":
                    np.testing.assert_array_equal(arrays["x_t"][place], states[slot])
                    continue
                np.testing.assert_array_equal(arrays["noise"][place], states[0])
                alpha, sigma = arrays["alpha"][place], arrays["sigma"][place]
                line = alpha * states[-1].astype(np.float64) + sigma * states[0]
                np.testing.assert_allclose(arrays["x_t"][place], line, rtol=0, atol=2e-6)


def test_pairs_are_mixed_at_another_level_in_every_epoch_and_at_each_stratum(trajectories):
    count = len(SAMPLES) * IMAGES * TEXTS * 5
    config = config_of({"teaches": "pairs"}, optimizer={"batch_size": 30})
    own = schedule_of("flow", "flow")
    levels: dict[tuple, list[float]] = {}
    for batch in walked(trajectories, config, range(0, 2 * count, 30), own=own):
        for key, t in zip(batch.keys, batch.arrays["t"].tolist(), strict=True):
            assert key[2] == int(t / 40 * 5), "of the student's schedule, one row a stratum"
            levels.setdefault(key, []).append(t)
            assert Schedule(own).at(np.array(t))[1] == pytest.approx(t / 40)
    assert all(one != two for one, two in levels.values())


# What weighs nothing.


def test_a_row_without_a_prediction_weighs_nothing_and_is_counted(tmp_path):
    failed = frozenset({("a", 0, 1), ("d", 1, 2), ("b", 2, 0)})
    repeated = frozenset({("a", 0, 2), ("f", 1, 0)})  # which have one after all
    store = write_store(tmp_path / "s", Written(failed=failed, repeated=repeated))
    batches = walked(store, config_of(), range(0, ROWS, 8))
    weights = {
        k: w for b in batches for k, w in zip(b.keys, b.arrays["weight"].tolist(), strict=True)
    }
    assert {key for key, weight in weights.items() if weight == 0} == {("a", 0, 1), ("b", 2, 0)}
    assert sum(batch.counts["failed"] for batch in batches) == 2
    assert sum(batch.weight for batch in batches) == ROWS, "the mean is over all rows"
    assert {n: sum(b.counts[n] for b in batches) for n in SOURCES} == {
        "teacher": 36, "data": 24, "prior": 12,
    }  # fmt: skip


def test_a_trajectory_that_failed_teaches_no_end(tmp_path):
    failed = frozenset({("a", 0, 5)})  # its end
    written = Written(rows=TRAJECTORIES.rows, samples=TEACHERS, failed=failed)
    store = write_store(tmp_path / "s", written)
    for teaches in ("end", "pairs"):
        batches = walked(store, config_of({"teaches": teaches}), range(0, 120, 8))
        dead = {
            k for b in batches for k, w in zip(b.keys, b.arrays["weight"], strict=True) if not w
        }
        assert dead == {("a", 0, slot) for slot in range(5)}


def test_rows_that_conversion_would_amplify_are_left_out_and_data_are_not(store):
    loss = {"guidance_scale": 2.0, "largest_factor": 3.0}
    own = schedule_of("sample")
    batches = walked(store, config_of(loss), range(0, ROWS, 8), own=own)
    left_out = 0
    for batch in batches:
        arrays = content(batch)
        for place in range(len(batch.keys)):
            data = SOURCES[arrays["source"][place]] == "data"
            # An error of the noise is divided by alpha and multiplied by sigma on its way to x0.
            factor = arrays["sigma"][place] / arrays["alpha"][place]
            assert (arrays["weight"][place] > 0) == (data or factor <= 3.0)
        left_out += batch.counts["left_out"]
    assert left_out == sum(int((b.arrays["weight"] == 0).sum()) for b in batches) > 0


def test_an_end_is_left_out_where_the_noise_that_it_implies_would_be_amplified(trajectories):
    """The end is x0, whatever the teacher predicts; an error of it is in the noise alpha/sigma."""
    loss = {"teaches": "end", "largest_factor": 1.5}
    counted = 0
    for batch in walked(trajectories, config_of(loss), range(0, 120, 8)):
        arrays = content(batch)
        np.testing.assert_array_equal(
            arrays["weight"] > 0, arrays["alpha"] / arrays["sigma"] <= 1.5
        )
        counted += batch.counts["left_out"]
    assert 0 < counted < 120


def test_rows_of_less_noise_than_the_first_step_of_the_student_are_left_out(tmp_path):
    """Between the clean image and its first step a table can tell a time, but no network that."""
    timesteps = TimestepsConfig(low=0.0, high=0.1)
    rows = ForwardRows(slots=3, timesteps=timesteps)
    store = write_store(tmp_path / "s", Written(schedule=schedule_of("flow", "flow"), rows=rows))
    own = schedule_of()
    alpha, sigma = Schedule(own).at(np.array(0.0))
    found = set()
    for batch in walked(store, config_of({"guidance_scale": 2.0}), range(0, ROWS, 8), own=own):
        arrays = content(batch)
        known = arrays["sigma"] / arrays["alpha"] >= sigma / alpha
        data = np.array([SOURCES[source] == "data" for source in arrays["source"]])
        np.testing.assert_array_equal(arrays["weight"] > 0, known)
        found |= set(zip(known.tolist(), data.tolist(), strict=True))
    assert found == {(False, False), (False, True), (True, False), (True, True)}


def test_rows_of_more_noise_than_the_student_knows_are_left_out(tmp_path):
    written = Written(schedule=schedule_of("flow", "flow"))
    store = write_store(tmp_path / "s", written)
    own = schedule_of(betas="linear")  # whose last step has a signal of 0.82, and its first noise
    last = Schedule(own).at(np.array(39.0))
    first = Schedule(own).at(np.array(0.0))
    batches = walked(store, config_of({"guidance_scale": 2.0}), range(0, ROWS, 8), own=own)
    for batch in batches:
        arrays = content(batch)
        ratio = arrays["sigma"] / arrays["alpha"]
        known = (ratio <= last[1] / last[0] * 1.01) & (ratio >= first[1] / first[0] * 0.99)
        np.testing.assert_array_equal(arrays["weight"] > 0, known)
    assert sum(batch.counts["left_out"] for batch in batches) > 0


# What is refused.


def test_a_latent_that_is_not_the_one_that_was_noised_is_refused(tmp_path, monkeypatch):
    store = write_store(tmp_path / "s")
    plain = SideTable.__getitem__

    def nudged(self, row):
        arrays = plain(self, row)
        if "latent" in arrays and row == 2:
            arrays["latent"][0, 0, 0] += np.float16(0.01)
        return arrays

    monkeypatch.setattr(SideTable, "__getitem__", nudged)
    with pytest.raises(
        UserError, match=r"row \d of sample 'b', variation [01] .*store_noise: true"
    ):
        walked(store, config_of(), range(0, ROWS, 8))


def test_noise_of_another_key_is_refused_and_stored_noise_needs_no_key(tmp_path, monkeypatch):
    plain, with_noise = write_store(tmp_path / "s"), write_store(tmp_path / "n", NOISE_STORED)

    def other(*key):
        return np.random.default_rng(0).standard_normal(key[-1], np.float32)

    monkeypatch.setattr("stages.diffusion.stored_row.row_noise", other)
    with pytest.raises(UserError, match="drawn again from its key"):
        walked(plain, config_of(), range(8))
    assert walked(with_noise, config_of(), range(0, ROWS, 8))


@pytest.mark.parametrize("array", ["dense.cond", "dense.delta", "row.x_t"])
def test_a_stored_value_that_is_not_the_recorded_one_is_refused(
    tmp_path, trajectories, array, monkeypatch
):
    """The shard's own sums are right: it was written so, or read wrongly."""
    plain = PredictionStore.shard

    def altered(self, number):
        shard = plain(self, number)
        arrays = {name: values.copy() for name, values in shard.arrays.items()}
        if array in arrays:
            arrays[array].reshape(-1)[-1] += np.float16(0.25)
        return type(shard)(shard.number, shard.plan, arrays, shard.rollouts)

    monkeypatch.setattr(PredictionStore, "shard", altered)
    teaches = "end" if array == "row.x_t" else "prediction"
    store, loss = trajectories, {"teaches": teaches}
    if array != "row.x_t":
        store, loss = write_store(tmp_path / "s"), {"guidance_scale": 2.0}
    with pytest.raises(UserError, match=r"row \d of sample .* was altered; .* `foretell rollout`"):
        walked(store, config_of(loss), range(0, ROWS, 8))
