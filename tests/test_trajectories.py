"""Stage one along trajectories: states, predictions and ends are those of the guided solver."""

from __future__ import annotations

import logging

import google_crc32c
import numpy as np
import pytest
import torch

from stages.diffusion.facts import Recording
from stages.diffusion.noise import row_noise
from stages.diffusion.record import record
from stages.diffusion.schedule import Schedule
from stages.diffusion.solver import step
from stages.guidance import guide
from stages.interruption import StopRequest
from store import PredictionStore, verify
from tests.recorded import SHAPES, FakeDenoiser, by_hand, bytes_of, images, planned, written
from tests.stopping import StopAfter

pytestmark = pytest.mark.slow

STEPS = 6
ALONG = {"rows": {"kind": "trajectory", "steps": STEPS}}
WIDE = {"kind": "dense", "branches": "both", "dtype": "float32"}
TARGETS = ["teacher", "prior", "teacher"]
DDPM, FLOW = "v_prediction", "flow"


def label_of(store, rollout) -> int:
    return int(store.table("conditions")[rollout.drawn["condition"]]["class_labels"])


def half_a_unit(values: np.ndarray) -> np.ndarray:
    """Largest error of rounding to float16, and as much again for the arithmetic before it."""
    return 2.0**-10 * np.abs(values.astype(np.float64)) + 2.0**-20


def next_state(kind: str, x, prediction, here, there) -> np.ndarray:
    """One step by the formulas of the papers, in float64."""
    (alpha, sigma), (alpha2, sigma2) = here, there
    if kind == "flow":  # dx/dsigma = noise − x0
        return x + (sigma2 - sigma) * prediction
    x0 = alpha * x - sigma * prediction
    noise = sigma * x + alpha * prediction
    return alpha2 * x0 + sigma2 * noise


def scale_of(dataset, key) -> float:
    target = next(r["target"] for r in dataset.rows if r["sample_id"] == key[0])
    return 1.0 if target == "prior" else 3.0


@pytest.mark.parametrize("branches", ["both", "guided"])
@pytest.mark.parametrize("kind", [DDPM, FLOW])
def test_every_state_is_where_the_stored_predictions_before_it_lead(tmp_path, kind, branches):
    dataset = images(tmp_path / "images", TARGETS)
    denoiser = FakeDenoiser(dataset.facts, prediction=kind)
    target = {"kind": "dense", "branches": branches}
    store = written(tmp_path / "store", dataset, denoiser, **ALONG, target=target)
    assert verify(tmp_path / "store").ok
    assert len(store) == 12
    for key in store:
        rollout = store[key]
        label, arrays, scale = label_of(store, rollout), rollout.arrays, scale_of(dataset, key)
        states = arrays["row.x_t"][:, 0]
        noise = row_noise(7, key[0], *divmod(key[1], 2), 0, states[0].shape)
        np.testing.assert_array_equal(states[0], noise.astype(np.float16))
        for n in range(STEPS):
            t, x = float(arrays["row.t"][n]), states[n].astype(np.float64)
            cond, uncond = (by_hand(denoiser, x, t, each) for each in (label, 3))
            guided = uncond + scale * (cond - uncond)
            if branches == "guided":
                found = arrays["dense.guided"][n, 0].astype(np.float64)
                assert (np.abs(found - guided) < half_a_unit(guided) + 1e-5).all()
            else:
                parts = [arrays[f"dense.{p}"][n, 0].astype(np.float64) for p in ("cond", "delta")]
                for part, exact in zip(parts, (cond, cond - uncond), strict=True):
                    assert (np.abs(part - exact) < half_a_unit(exact) + 1e-6).all()
                found = parts[0] - parts[1] + scale * parts[1]
            levels = [(arrays["row.alpha"][m], arrays["row.sigma"][m]) for m in (n, n + 1)]
            after = next_state(kind, x, found, *levels)
            assert (np.abs(states[n + 1] - after) < half_a_unit(after) + 1e-6).all()


@pytest.mark.parametrize("kind", [DDPM, FLOW])
def test_a_trajectory_ends_where_an_unrounded_one_does(tmp_path, kind):
    dataset = images(tmp_path / "images", TARGETS)
    denoiser = FakeDenoiser(dataset.facts, prediction=kind)
    store = written(tmp_path / "store", dataset, denoiser, **ALONG)
    schedule = Schedule(denoiser.schedule)
    times = schedule.solver_times(STEPS)
    levels = list(zip(*schedule.at(times), strict=True))
    for key in store:
        rollout, label = store[key], label_of(store, store[key])
        shape = rollout.arrays["row.x_t"].shape[2:]
        x = row_noise(7, key[0], *divmod(key[1], 2), 0, shape).astype(np.float64)
        for n in range(STEPS):
            cond, uncond = (by_hand(denoiser, x, times[n], each) for each in (label, 3))
            guided = uncond + scale_of(dataset, key) * (cond - uncond)
            x = next_state(kind, x, guided, levels[n], levels[n + 1])
        np.testing.assert_allclose(rollout.arrays["row.x_t"][-1, 0], x, atol=2e-2)


def test_the_end_predicts_nothing_and_is_said_to_be_one(tmp_path):
    dataset = images(tmp_path / "images", TARGETS)
    store = written(tmp_path / "store", dataset, FakeDenoiser(dataset.facts), **ALONG)
    for key in store:
        arrays = store[key].arrays
        assert arrays["row.status"].tolist() == [0] * STEPS + [3]
        assert (arrays["row.alpha"][-1], arrays["row.sigma"][-1]) == (1.0, 0.0)
        assert not arrays["dense.cond"][-1].any()
        assert not arrays["dense.delta"][-1].any()
        for x, crc in zip(arrays["row.x_t"], arrays["row.x_t_crc"], strict=True):
            assert crc == google_crc32c.value(x.tobytes())
        for n, crc in enumerate(arrays["row.target_crc"]):
            parts = b"".join(arrays[f"dense.{part}"][n].tobytes() for part in ("cond", "delta"))
            assert crc == google_crc32c.value(parts)


def test_a_store_is_replayed_bit_by_bit_without_the_model(tmp_path):
    dataset = images(tmp_path / "images", TARGETS)
    store = written(tmp_path / "store", dataset, FakeDenoiser(dataset.facts), **ALONG)
    kind = Recording.of(store.manifest).schedule.prediction
    for key in store:
        arrays = {n: torch.from_numpy(x.copy()) for n, x in store[key].arrays.items()
                  if x.dtype != np.uint32}  # fmt: skip
        x = arrays["row.x_t"][0].float()
        for n in range(STEPS):
            assert torch.equal(x.half(), arrays["row.x_t"][n])
            cond, delta = arrays["dense.cond"][n].float(), arrays["dense.delta"][n].float()
            guided = guide(cond, cond - delta, scale_of(dataset, key))
            levels = [arrays[f"row.{name}"][m].item() for m in (n, n + 1)
                      for name in ("alpha", "sigma")]  # fmt: skip
            x = step(x, guided, kind, *levels).half().float()
        assert torch.equal(x.half(), arrays["row.x_t"][-1])


def test_kept_states_are_those_of_the_whole_trajectory(tmp_path):
    dataset = images(tmp_path / "images", TARGETS)
    whole = written(tmp_path / "whole", dataset, FakeDenoiser(dataset.facts), **ALONG)
    rows = {"kind": "trajectory", "steps": STEPS, "keep": [0, 2, 5]}
    kept = written(tmp_path / "kept", dataset, FakeDenoiser(dataset.facts), rows=rows)
    for key in whole:
        for name, values in whole[key].arrays.items():
            np.testing.assert_array_equal(kept[key].arrays[name], values[[0, 2, 5, STEPS]])


def test_an_interrupted_recording_of_trajectories_ends_with_the_same_bytes(tmp_path):
    dataset = images(tmp_path / "images", ["teacher"] * 4)
    changes = ALONG | {"batch_size": 3}
    whole = written(tmp_path / "whole", dataset, FakeDenoiser(dataset.facts), **changes)
    store, config = planned(tmp_path / "parts", dataset, FakeDenoiser(dataset.facts), **changes)
    for questions in (3, 2):
        denoiser, missing = FakeDenoiser(dataset.facts), store.missing()
        stop = StopAfter(questions)
        assert not record(denoiser, store, dataset, missing, config, stop=stop)
        store = PredictionStore.open(tmp_path / "parts")
    assert 0 < len(store.committed) < len(store.plan)
    denoiser = FakeDenoiser(dataset.facts)
    assert record(denoiser, store, dataset, store.missing(), config, stop=StopRequest())
    assert bytes_of(PredictionStore.open(tmp_path / "parts")) == bytes_of(whole)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_neighbours_in_a_batch_do_not_move_a_trajectory(tmp_path, batch_size):
    dataset = images(tmp_path / "images", TARGETS)
    one = written(tmp_path / "one", dataset, FakeDenoiser(dataset.facts), **ALONG)
    two = written(
        tmp_path / "two", dataset, FakeDenoiser(dataset.facts), **ALONG, batch_size=batch_size
    )
    for key in one:
        for name in ("row.x_t", "dense.cond", "dense.delta"):
            np.testing.assert_allclose(
                two[key].arrays[name], one[key].arrays[name], rtol=2e-3, atol=1e-3
            )


def broken_for(label: int, t: float, *dtypes: torch.dtype):
    """A denoiser that is not finite at a time for a label, in these types only."""

    class Broken(FakeDenoiser):
        def predict(self, x, t_, conditions, scale=None):
            y = super().predict(x, t_, conditions, scale)
            hit = (conditions["class_labels"] == label) & (t_ == t) & (self.dtype in dtypes)
            return torch.where(hit[:, None, None, None], torch.nan, y)

    return Broken


@pytest.fixture
def one_label(tmp_path):
    """Twelve samples of one shape, of which trajectories of the label 0 are few, and times."""
    dataset = images(tmp_path / "images", ["teacher"] * 10, shapes=SHAPES[:1])
    for sample in dataset.rows:
        sample["conditions"] = [2, 3]
    dataset.rows[4]["conditions"] = [1, 3]
    times = Schedule(FakeDenoiser(dataset.facts).schedule).solver_times(STEPS)
    hit = {("image/4", 0), ("image/4", 2)}
    return dataset, times, hit


MANY = ALONG | {"rollouts_per_shard": 40}


def test_a_trajectory_that_is_not_finite_is_solved_again_in_fp32(tmp_path, one_label, caplog):
    dataset, times, hit = one_label
    broken = broken_for(0, times[3], torch.float16)
    with caplog.at_level(logging.WARNING):
        store = written(
            tmp_path / "store", dataset, broken(dataset.facts, dtype=torch.float16),
            precision="fp16", **MANY,
        )  # fmt: skip
    assert "not finite in fp16, and so predicted in fp32" in caplog.text
    lifted = FakeDenoiser(dataset.facts, dtype=torch.float16)
    lifted.module.float()
    lifted.dtype = torch.float32
    exact = written(tmp_path / "exact", dataset, lifted, **MANY)
    plain = FakeDenoiser(dataset.facts, dtype=torch.float16)
    short = written(tmp_path / "short", dataset, plain, precision="fp16", **MANY)
    for key in store:
        arrays = dict(store[key].arrays)
        status = arrays.pop("row.status").tolist()
        assert status == [int(key in hit)] * STEPS + [3]
        for name, values in arrays.items():
            expected = (exact if key in hit else short)[key].arrays[name]
            np.testing.assert_array_equal(values, expected)


def test_a_trajectory_that_stays_not_finite_is_failed_from_there_on(tmp_path, one_label, caplog):
    dataset, times, hit = one_label
    with caplog.at_level(logging.WARNING):
        store = written(
            tmp_path / "store", dataset,
            broken_for(0, times[4], torch.float32)(dataset.facts), **MANY,
        )  # fmt: skip
    assert "'image/4' variation 0 slot 4" in caplog.text
    sound = written(tmp_path / "sound", dataset, FakeDenoiser(dataset.facts), **MANY)
    for key in store:
        arrays, expected = store[key].arrays, sound[key].arrays
        if key not in hit:
            for name, values in arrays.items():
                np.testing.assert_array_equal(values, expected[name])
            continue
        assert arrays["row.status"].tolist() == [0] * 4 + [2] * 3
        for name in ("dense.cond", "dense.delta", "row.x_t"):
            np.testing.assert_array_equal(arrays[name][:4], expected[name][:4])
            assert not arrays[name][4:].any()
    assert verify(tmp_path / "store").ok
