"""Stage two of diffusion: every row is taught what its one source says, by a formula of its own."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from stages.diffusion.distil import RowLearner, distil
from stages.diffusion.facts import ConditionFacts, Recording
from stages.diffusion.losses import weighting
from stages.diffusion.record_config import AdapterContrast, TrajectoryRows
from stages.diffusion.stored_row import SOURCES
from stages.distributed import Place
from stages.errors import UserError
from stages.interruption import StopRequest
from stages.targets import read_scales
from store import PredictionStore
from tests.conftest import START
from tests.diffusion_stores import (
    IMAGES,
    SAMPLES,
    SCALE,
    SLOTS,
    TEACHERS,
    TEXTS,
    FakeDenoiser,
    Written,
    config_of,
    facts_of,
    schedule_of,
    write_store,
)
from tests.stopping import StopAfter

pytestmark = pytest.mark.slow

HERE = Place(0, 1, torch.device("cpu"))
ROWS = len(SAMPLES) * IMAGES * TEXTS * SLOTS
TRAJECTORY = TrajectoryRows(kind="trajectory", steps=5)
FLOW, V = schedule_of("flow", "flow"), schedule_of("v_prediction")
CONTRAST = AdapterContrast(kind="adapter")
STORES = {
    "forward": Written(),
    "v": Written(schedule=V),
    "flow": Written(schedule=FLOW),
    "asked": Written(asked=("d", "e")),
    "guided": Written(branches="guided"),
    "told": Written(branches="guided", embedded_guidance=3.5),
    "trajectory": Written(rows=TRAJECTORY, samples=TEACHERS),
    "adapter": Written(contrast=CONTRAST),
    "told adapter": Written(contrast=CONTRAST, embedded_guidance=3.5),
    "teachers": Written(samples=TEACHERS),
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("stores"), {}

    def get(kind: str) -> PredictionStore:
        if kind not in made:
            made[kind] = write_store(folder / kind, STORES[kind])
        return made[kind]

    return get


# What a row is taught, from the store's numbers alone, in float64.


def expected(store, batch, denoiser, loss, place: int):
    """Question x, alpha, sigma, scale that is told, and target of a row of a batch."""
    recording = Recording.of(store.manifest)
    sample_id, variation, slot = batch.keys[place]
    rollout, source = store[sample_id, variation], store.sample(sample_id)["target"]
    kind, own = recording.schedule.prediction, denoiser.schedule.prediction
    x_t, alpha, sigma, x0, noise = state_of(store, batch, recording, loss, place)
    # The student's frame: the same ratio, and alpha + sigma or alpha² + sigma² equal to 1.
    norm = alpha + sigma if own == "flow" else np.hypot(alpha, sigma)
    levels = alpha / norm, sigma / norm
    scale = scale_of(recording, batch, loss, source, place)
    row = x_t, alpha, sigma
    arrays = {
        name: values[slot, 0].astype(np.float64)
        for name, values in rollout.arrays.items()
        if name.startswith("dense.")
    }

    if source == "data" or loss.get("teaches") == "pairs":
        target = as_type(own, x0, noise, *levels)
    elif loss.get("teaches") == "end":
        end = rollout.arrays["row.x_t"][-1, 0].astype(np.float64)
        target = as_type(own, end, (x_t - alpha * end) / sigma, *levels)
    elif "dense.guided" in arrays:
        target = as_type(own, *implied(kind, arrays["dense.guided"], *row), *levels)
    elif recording.contrast.kind == "adapter":
        with torch.no_grad(), denoiser.adapter_off():
            told = told_of(recording, scale, source)
            base = asked(denoiser, batch, place, x_t / norm, told)
        delta = arrays["dense.delta"]
        one, two = (as_type(own, *implied(kind, d, *row), *levels) for d in (delta, 0 * delta))
        target = base + scale * (one - two)
    else:
        guided = arrays["dense.cond"] + (scale - 1) * arrays["dense.delta"]
        target = as_type(own, *implied(kind, guided, *row), *levels)
    if source == "teacher" and loss.get("data_share"):
        share = loss["data_share"]
        target = (1 - share) * target + share * as_type(own, x0, noise, *levels)
    return x_t / norm, *levels, told_of(recording, scale, source), target


def state_of(store, batch, recording, loss, place: int):
    """x_t, alpha, sigma, and where they are known x0 and noise, of a row."""
    sample_id, variation, slot = batch.keys[place]
    rollout = store[sample_id, variation]
    alpha, sigma = (float(rollout.arrays[f"row.{name}"][slot]) for name in ("alpha", "sigma"))
    if recording.rows.kind == "forward":
        x0 = store.table("latents")[rollout.drawn["latent"]]["latent"].astype(np.float64)
        noise = None
        if "noise" in batch.arrays.fields:  # where somebody is taught it
            noise = batch.arrays["noise"][place].double().numpy()
        return batch.arrays["x_t"][place].double().numpy(), alpha, sigma, x0, noise
    states = rollout.arrays["row.x_t"][:, 0].astype(np.float64)
    if loss.get("teaches") != "pairs":
        return states[slot], alpha, sigma, None, None
    alpha, sigma = (float(batch.arrays[name][place]) for name in ("own_alpha", "own_sigma"))
    return alpha * states[-1] + sigma * states[0], alpha, sigma, states[-1], states[0]


def scale_of(recording, batch, loss, source: str, place: int) -> float:
    scale = loss.get("guidance_scale", SCALE)
    if isinstance(scale, tuple):
        scale = float(read_scales(scale, 5, [batch.keys[place]], [batch.epochs[place]])[0])
    off = 1.0 if recording.contrast.kind == "unconditional" else 0.0
    return {"teacher": scale, "prior": off, "data": 1.0}[source]


def told_of(recording, scale: float, source: str) -> float:
    """What a student is told: that at which its target was predicted, and of data no guidance."""
    embedded = recording.embedded_guidance
    return scale if embedded is None else {"data": 1.0}.get(source, embedded)


def as_type(own: str, x0, noise, alpha: float, sigma: float) -> np.ndarray:
    return {
        "epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0,
        "flow": noise - x0,
    }[own]  # fmt: skip


def implied(kind: str, value, x_t, alpha: float, sigma: float):
    """x0 and noise of a prediction at x_t."""
    if kind == "epsilon":
        return (x_t - sigma * value) / alpha, value
    if kind == "v_prediction":
        return alpha * x_t - sigma * value, sigma * x_t + alpha * value
    return x_t - sigma * value, x_t + alpha * value  # of flow, where alpha + sigma = 1


def asked(denoiser, batch, place: int, x: np.ndarray, scale: float) -> np.ndarray:
    told = torch.tensor([scale], dtype=torch.float32) if denoiser.takes_scale else None
    conditions = {
        name: batch.arrays[f"condition.{name}"][place][None] for name in ("embeds", "time_ids")
    }
    inputs = torch.from_numpy(x).float()[None], batch.arrays["t"][place][None]
    return denoiser.predict(*inputs, conditions, told)[0].detach().double().numpy()


CASES = {
    "one scale": ("forward", {"guidance_scale": 2.5}, {}),
    "a range, told": ("forward", {"guidance_scale": (1.0, 6.0)}, {"takes_scale": True}),
    "one scale, told": ("forward", {"guidance_scale": 4.0}, {"takes_scale": True}),
    "guided already": ("guided", {}, {"takes_scale": True}),
    "guided by a number": ("told", {}, {"takes_scale": True}),
    "shared with data": ("forward", {"guidance_scale": 2.5, "data_share": 0.3}, {}),
    "data that was asked for": ("asked", {"guidance_scale": 2.5}, {}),
    "data that was asked for, shared": (
        "asked", {"guidance_scale": 2.5, "data_share": 0.3}, {"schedule": V},
    ),
    "noise to v": ("forward", {"guidance_scale": 2.5}, {"schedule": V}),
    "noise to x0": ("forward", {"guidance_scale": 2.5}, {"schedule": schedule_of("sample")}),
    "noise to flow": ("forward", {"guidance_scale": 2.5}, {"schedule": FLOW}),
    "v to noise": ("v", {"guidance_scale": 2.5}, {}),
    "v to flow": ("v", {"guidance_scale": 2.5}, {"schedule": FLOW}),
    "flow to v": ("flow", {"guidance_scale": 2.5}, {"schedule": V}),
    "v to v of flow": ("flow", {"guidance_scale": 2.5, "data_share": 0.5}, {
        "schedule": schedule_of("v_prediction", betas="linear"),
    }),
    "states": ("trajectory", {"guidance_scale": 2.5}, {}),
    "ends": ("trajectory", {"teaches": "end"}, {"takes_scale": True}),
    "ends as flow": ("trajectory", {"teaches": "end"}, {"schedule": FLOW}),
    "pairs": ("trajectory", {"teaches": "pairs"}, {"schedule": FLOW}),
    "transfer": ("adapter", {"guidance_scale": 0.7}, {"adapter": True}),
    "transfer to what is told": ("told adapter", {"guidance_scale": 0.7}, {
        "adapter": True, "takes_scale": True,
    }),
    "transfer to v": ("adapter", {"guidance_scale": 1.0}, {
        "adapter": True, "schedule": V,
    }),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weighting_name", ["constant", "min_snr"])
def test_the_loss_is_that_of_the_formulas(stores, case, weighting_name):
    kind, loss, student = CASES[case]
    store, denoiser = stores(kind), FakeDenoiser(**student)
    config = config_of(loss | {"weighting": weighting_name})
    learner = learner_of(denoiser, store, config)
    with closing(learner):
        seen: set[str] = set()
        for position in range(0, 64, 8):
            for batch in learner.batches(position):
                objective = learner.objective(0, batch)
                told = learner._targets.of(batch, learner._base).question.scale
                total, error = 0.0, 0.0
                for place in range(len(batch.keys)):
                    weight = float(batch.arrays["weight"][place])
                    if not weight:
                        continue
                    x, alpha, sigma, scale, target = expected(store, batch, denoiser, loss, place)
                    assert told is None or float(told[place]) == pytest.approx(scale)
                    square = np.square(asked(denoiser, batch, place, x, scale) - target).mean()
                    levels = (torch.tensor([float(each)]) for each in (alpha, sigma))
                    of_level = weighting(*levels, denoiser.schedule.prediction, weighting_name, 5.0)
                    total += weight * float(of_level) * square
                    error += square
                    seen.add(SOURCES[batch.arrays["source"][place]])
                assert (told is not None) == denoiser.takes_scale
                assert float(objective.total.detach()) == pytest.approx(total, rel=1e-4, abs=1e-6)
                assert float(objective.terms["mse"].detach()) == pytest.approx(
                    error, rel=1e-4, abs=1e-6
                )
        assert seen == ({"teacher"} if kind == "trajectory" else set(SOURCES))


def learner_of(denoiser, store, config, place=HERE) -> RowLearner:
    recording = Recording.of(store.manifest)
    return RowLearner(denoiser, store, recording, config, 5, place)


@pytest.mark.parametrize("kind", ["forward", "asked"])
def test_each_row_of_a_mixed_batch_has_one_source(stores, kind):
    store, config = stores(kind), config_of({"guidance_scale": 2.5, "data_share": 0.4})
    learner = learner_of(FakeDenoiser(), store, config)
    found = {}
    with closing(learner):
        for position in range(0, ROWS, 8):
            for batch in learner.batches(position):
                rows = learner._targets.of(batch, learner._base)
                for place, key in enumerate(batch.keys):
                    found[key] = (batch, place, rows.target[place])
    for (sample_id, variation, slot), (batch, place, target) in found.items():
        rollout, source = store[sample_id, variation], store.sample(sample_id)["target"]
        noise = batch.arrays["noise"][place] if "noise" in batch.arrays.fields else None
        if source == "data":
            assert torch.equal(target, noise)
        elif source == "prior":
            stored = torch.from_numpy(rollout.arrays["dense.cond"][slot, 0].copy()).float()
            assert torch.equal(target, stored)
        else:
            cond, delta = (
                torch.from_numpy(rollout.arrays[f"dense.{n}"][slot, 0].copy()).double()
                for n in ("cond", "delta")
            )
            mixed = 0.6 * (cond + 1.5 * delta) + 0.4 * noise.double()
            torch.testing.assert_close(target.double(), mixed, rtol=1e-5, atol=1e-5)


def test_targets_of_guided_stores_are_the_stored_bytes(stores):
    store = stores("guided")
    learner = learner_of(FakeDenoiser(), store, config_of({}))
    with closing(learner):
        for position in range(0, ROWS, 8):
            for batch in learner.batches(position):
                rows = learner._targets.of(batch, learner._base)
                for place, (sample_id, variation, slot) in enumerate(batch.keys):
                    rollout = store[sample_id, variation]
                    if "dense.guided" in rollout.arrays:
                        ours = rows.target[place].half().numpy().tobytes()
                        assert ours == rollout.arrays["dense.guided"][slot].tobytes()


def test_masks_weigh_the_error_of_images_that_have_one(stores):
    store = stores("teachers")
    settings = {"unmasked_weight": 0.25, "normalize_area": True}
    losses = []
    for mask in (None, settings):
        learner = learner_of(
            FakeDenoiser(), store, config_of({"guidance_scale": 2.5, "mask": mask}, optimizer={
                "batch_size": 1,
            }),
        )  # fmt: skip
        with closing(learner):
            rows = {}
            for position in range(ROWS):
                (batch,) = learner.batches(position)
                rows[batch.keys[0]] = float(learner.objective(0, batch).total.detach())
            losses.append(rows)
    for key, plain in losses[0].items():
        masked = losses[1][key]
        assert (masked != pytest.approx(plain, rel=1e-4)) == (key[0] == "a"), key


@pytest.mark.parametrize("most", [None, 1, 2, 3])
@pytest.mark.parametrize("adapter", [False, True])
def test_micro_batches_add_up_to_the_batch(stores, most, adapter):
    store, gradients = stores("adapter" if adapter else "forward"), []
    for size in (None, most):
        denoiser = FakeDenoiser(adapter=adapter)
        config = config_of(
            {"guidance_scale": 0.5}, optimizer={"batch_size": 24, "micro_batch_size": size}
        )
        learner = learner_of(denoiser, store, config)
        with closing(learner):
            batches = learner.batches(24)
            assert sum(batch.weight for batch in batches) == 24
            for batch in batches:
                torch.autograd.backward(learner.objective(0, batch).total / 24)
        parameters = denoiser.module.named_parameters()
        gradients.append({n: p.grad for n, p in parameters if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)
    assert ("adapter" in gradients[0]) == adapter == (len(gradients[0]) == 1)


def test_rows_without_a_weight_move_nothing_whatever_they_hold(tmp_path):
    failed = frozenset({("a", v, s) for v in range(4) for s in range(SLOTS)})
    store = write_store(tmp_path / "s", Written(samples=TEACHERS, failed=failed))
    denoiser = FakeDenoiser()
    learner = learner_of(denoiser, store, config_of(optimizer={"batch_size": ROWS}))
    with closing(learner):
        batches = learner.batches(0)
        total = sum(learner.objective(0, batch).total for batch in batches)
        total.backward()
        assert all(p.grad.isfinite().all() for p in denoiser.module.parameters() if p.requires_grad)
        shares = [learner.objective(0, batch).terms["failed_share"] for batch in batches]
        assert sum(map(int, shares)) == 12
    alone = write_store(tmp_path / "t", Written(samples=TEACHERS[1:]))
    learner = learner_of(FakeDenoiser(), alone, config_of(optimizer={"batch_size": ROWS - 12}))
    with closing(learner):
        others = sum(learner.objective(0, batch).total for batch in learner.batches(0))
    assert float(total.detach()) == pytest.approx(float(others.detach()), rel=1e-5)


def test_a_target_beyond_all_numbers_moves_nothing(tmp_path):
    plain = schedule_of()
    steep = plain.model_copy(update={"alphas_cumprod": (*plain.alphas_cumprod[:-1], 1e-44)})
    store = write_store(tmp_path / "s", Written(schedule=steep, samples=TEACHERS))
    denoiser = FakeDenoiser(steep.model_copy(update={"prediction": "sample"}))
    learner = learner_of(denoiser, store, config_of(optimizer={"batch_size": ROWS}))
    with closing(learner):
        batches = learner.batches(0)
        assert any((batch.arrays["t"] == 39).any() for batch in batches)
        assert sum(batch.counts["left_out"] for batch in batches) > 0
        total = sum(learner.objective(0, batch).total for batch in batches)
        total.backward()
    assert total.isfinite()
    assert all(p.grad.isfinite().all() for p in denoiser.module.parameters())


# Training.


def trained(folder: Path, store, stop=None, previews=None, config=None, **student):
    denoiser = FakeDenoiser(dropout=0.1, **student)
    finished = distil(
        denoiser, store, config or training(), folder,
        seed=5, identity="i", place=HERE, stop=stop or StopRequest(), previews=previews,
    )  # fmt: skip
    return finished, denoiser


def training(workers: int = 0, **optimizer):
    plain = {"batch_size": 8, "micro_batch_size": 3, "checkpoint_every": 2, "ema_decay": 0.5}
    return config_of(workers=workers, optimizer=plain | optimizer)


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("questions", [1, 3, 4])
def test_a_stopped_run_goes_on_to_the_same_weights(stores, tmp_path, questions):
    store = stores("forward")
    assert trained(tmp_path / "whole", store)[0]
    assert not trained(tmp_path / "own", store, StopAfter(questions))[0]
    assert not (tmp_path / "own" / "model.safetensors").exists()
    assert trained(tmp_path / "own", store, config=training(workers=2))[0]
    whole, own = (FakeDenoiser.saved(tmp_path / name) for name in ("whole", "own"))
    assert all(torch.equal(own[name], whole[name]) for name in whole)
    start = FakeDenoiser().module.state_dict()
    assert not any(torch.equal(whole[name], start[name]) for name in ("of_x", "of_t", "of_embeds"))


def test_the_log_has_the_error_and_shares_of_rows(stores, tmp_path):
    trained(tmp_path, stores("forward"))
    for line in log_of(tmp_path):
        shares = [line[f"{source}_share"] for source in SOURCES]
        assert sum(shares) == pytest.approx(1)
        assert line["failed_share"] == line["left_out_share"] == 0
        assert line["mse"] > 0
    assert {"teacher_share", "data_share", "prior_share", "total"} <= line.keys()


@pytest.mark.slow
def test_a_student_comes_to_predict_what_its_teacher_did(stores, tmp_path):
    store = stores("teachers")
    loss = {"guidance_scale": 3.0}
    config = config_of(loss, optimizer={"steps": 60, "learning_rate": 0.05, "batch_size": 36})
    trained_error = []
    for steps in (1, 60):
        changed = config.optimizer.model_copy(update={"steps": steps})
        folder = tmp_path / str(steps)
        denoiser = FakeDenoiser()
        distil(
            denoiser, store, config.model_copy(update={"optimizer": changed}), folder,
            seed=5, identity="i", place=HERE, stop=StopRequest(),
        )  # fmt: skip
        trained_error.append(log_of(folder)[-1]["mse"])
    assert trained_error[1] < trained_error[0] / 20
    # cond + 2·(cond − uncond) of the formula in `teacher` and `rollout_arrays`: x is in both.
    assert float(denoiser.module.of_x.detach()) == pytest.approx(0.7 + 2 * 0.2, abs=0.1)


class Recorder:
    """Previews that use up random numbers and look at the model."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.networks: list[nn.Module] = []

    def draw(self, denoiser, step: int) -> None:
        assert not denoiser.module.training
        assert not torch.is_grad_enabled()
        assert denoiser.network is denoiser.module
        torch.rand(step + 3)
        if step % 2 == 0:
            self.steps.append(step)


def test_previews_leave_training_as_it_is(stores, tmp_path):
    recorder = Recorder()
    trained(tmp_path / "without", stores("forward"))
    trained(tmp_path / "with", stores("forward"), previews=recorder)
    one, two = (FakeDenoiser.saved(tmp_path / name) for name in ("without", "with"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert recorder.steps == [0, 2, 4, 6]


SHARED = {"batch_size": 5, "micro_batch_size": 2}


def work(rank: int, folder: Path, parallel: str, student: dict) -> None:
    """One of two data-parallel processes."""
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    store = PredictionStore.open(folder / "store")
    denoiser = FakeDenoiser(**student)
    config = config_of({"guidance_scale": 0.5}, optimizer=SHARED | {"parallel": parallel})
    finished = distil(
        denoiser, store, config, folder / "two",
        seed=5, identity="i", place=Place(rank, 2, torch.device("cpu")), stop=StopRequest(),
    )  # fmt: skip
    dist.destroy_process_group()
    assert finished


@pytest.mark.parametrize(
    ("kind", "student", "parallel"),
    [("forward", {}, "ddp"), ("adapter", {"adapter": True}, "ddp"), ("forward", {}, "fsdp")],
    ids=["all", "adapter", "sharing weights"],
)
def test_two_processes_take_the_steps_of_one(tmp_path, kind, student, parallel):
    store = write_store(tmp_path / "store", STORES[kind])
    start = multiprocessing.get_context(START)
    workers = [start.Process(target=work, args=(r, tmp_path, parallel, student)) for r in range(2)]
    for worker in workers:
        worker.start()
    config = config_of({"guidance_scale": 0.5}, optimizer=SHARED)
    denoiser = FakeDenoiser(**student)
    distil(
        denoiser, store, config, tmp_path / "one",
        seed=5, identity="i", place=HERE, stop=StopRequest(),
    )  # fmt: skip
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    for ours, theirs in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys()
        for name in set(ours) - {"steps_per_s", "data_wait_share"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    alone, shared = (FakeDenoiser.saved(tmp_path / name) for name in ("one", "two"))
    for name in alone:
        torch.testing.assert_close(alone[name], shared[name], rtol=1e-4, atol=1e-5)


# What is refused, before anything is trained.


REFUSED = {
    "no scale": ("forward", {}, {}, "at which scale to mix"),
    "a scale of guided targets": ("guided", {"guidance_scale": 2.0}, {}, "are mixed at scale"),
    "a scale of ends": (
        "trajectory", {"teaches": "end", "guidance_scale": 2.0}, {}, "solved at scale 3.0",
    ),
    "a range that is not told": (
        "forward", {"guidance_scale": (1.0, 5.0)}, {}, "set model.scale_input: true",
    ),
    "a range that is told as one number": (
        "told adapter", {"guidance_scale": (0.5, 1.0)}, {"adapter": True, "takes_scale": True},
        "told the guidance 3.5 that the teacher",
    ),
    "ends of noised images": ("guided", {"teaches": "end"}, {}, "no trajectories"),
    "data of trajectories": (
        "trajectory", {"guidance_scale": 2.0, "data_share": 0.5}, {}, "loss.data_share is set",
    ),
    "masks of trajectories": (
        "trajectory", {"guidance_scale": 2.0, "mask": {}}, {}, "loss.mask is set",
    ),
    "a transfer without adapter": (
        "adapter", {"guidance_scale": 1.0}, {}, "set model.adapter",
    ),
    "another autoencoder": (
        "guided", {}, {"facts": facts_of(encoder="other")}, r"text encoders \(other\) differ",
    ),
    "another scaling": (
        "guided", {}, {"facts": facts_of(scaling=0.18215)}, r"scaling of latents \(0.18215\)",
    ),
    "other channels": ("guided", {}, {"facts": facts_of(latent_channels=4)}, "latent channels"),
    "other conditions": (
        "guided", {},
        {"facts": facts_of(conditions={"label": ConditionFacts(dtype="int64", shape=())})},
        "encoded conditions",
    ),
    "a type that amplifies too much": (
        "forward", {"guidance_scale": 2.0, "largest_factor": 1.01},
        {"schedule": schedule_of("sample")}, "no more than loss.largest_factor=1.01;",
    ),
    "a schedule it cannot learn from": (
        "flow", {"guidance_scale": 2.0}, {"schedule": schedule_of(betas="linear")},
        r"has \d+% of the recorded noise levels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_match_is_refused_by_name(stores, tmp_path, case):
    kind, loss, student, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        trained(tmp_path / "own", stores(kind), config=config_of(loss), **student)
    assert not (tmp_path / "own").exists()


def test_a_store_that_is_not_finished_is_refused(tmp_path):
    store = write_store(tmp_path / "s", shards=3)
    with pytest.raises(UserError, match="lacks 7 of 10 shards"):
        trained(tmp_path / "own", store)


def test_a_sample_that_was_to_be_taught_and_was_never_asked_for_is_refused(tmp_path):
    # Planned as data, and then given another target.
    samples = [s | {"target": "teacher"} if s["sample_id"] == "d" else s for s in SAMPLES]
    store = write_store(tmp_path / "s", Written())
    altered = write_store(tmp_path / "t", Written(samples=samples, unasked=("d",)))
    assert len(store.plan) == len(altered.plan)
    with pytest.raises(UserError, match=r"sample 'd' is to learn from 'teacher', .* no prediction"):
        trained(tmp_path / "own", altered)


def test_a_store_whose_samples_weigh_nothing_is_refused(tmp_path):
    samples = [sample | {"weight": 0.0} for sample in SAMPLES]
    store = write_store(tmp_path / "s", Written(samples=samples))
    with pytest.raises(UserError, match="all of its samples weigh 0"):
        trained(tmp_path / "own", store)
    samples[0] = SAMPLES[0]
    assert trained(tmp_path / "two", write_store(tmp_path / "t", Written(samples=samples)))[0]


def test_an_image_as_the_target_of_a_trajectory_is_refused(tmp_path):
    written = Written(rows=TRAJECTORY, samples=SAMPLES, asked=("d", "e"))
    store = write_store(tmp_path / "s", written)
    with pytest.raises(UserError, match=r"sample 'd' is its own target, .* trajectories"):
        trained(tmp_path / "own", store)


def test_pairs_need_the_start_of_a_trajectory(tmp_path):
    rows = TrajectoryRows(kind="trajectory", steps=4, keep=(1, 3))
    store = write_store(tmp_path / "s", Written(rows=rows, samples=TEACHERS))
    with pytest.raises(UserError, match=r"keeps the steps \[1, 3\].* beginning at 0"):
        trained(tmp_path / "own", store, config=config_of({"teaches": "pairs"}))
    assert trained(tmp_path / "own", store, config=config_of({"teaches": "end"}))[0]


ALONE = """
import sys
from pathlib import Path
import torch
from stages.diffusion.distil import distil
from stages.distributed import Place
from stages.interruption import StopRequest
from store import PredictionStore
from tests.diffusion_stores import FakeDenoiser, config_of

store = PredictionStore.open(sys.argv[1])
distil(
    FakeDenoiser(), store, config_of(), Path(sys.argv[2]), seed=5, identity="i",
    place=Place(0, 1, torch.device("cpu")), stop=StopRequest(),
)
print(*sorted(name for name in sys.modules if name.startswith("stages.")))
"""


@pytest.mark.slow
def test_stage_two_imports_nothing_that_could_ask_a_teacher(stores, tmp_path):
    command = [sys.executable, "-W", "error", "-c", ALONE]
    command += [str(stores("forward").path), str(tmp_path / "own")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, done.stderr
    modules = set(done.stdout.split())
    assert "stages.diffusion.distil" in modules
    assert not {name for name in modules if name.startswith("stages.families")}
    asking = {"stages.diffusion." + name for name in ("record", "answers", "asked_rows", "parts")}
    assert not modules & (asking | {"stages.rollout", "stages.capture"})
