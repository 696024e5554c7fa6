"""A teacher that is trained on images: keyed noise and dropout, resumed exactly, tried fairly."""

from __future__ import annotations

import json
import multiprocessing
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from stages.diffusion.fit import ImageLearner, fit_denoiser
from stages.diffusion.losses import weighting
from stages.diffusion.train_config import DenoisingFitConfig
from stages.distributed import Place
from stages.errors import UserError
from stages.interruption import StopRequest
from tests.conftest import START
from tests.diffusion_stores import (
    IMAGES,
    SAMPLES,
    TEXTS,
    FakeDenoiser,
    FakeImages,
    facts_of,
    schedule_of,
)
from tests.stopping import StopAfter

HERE = Place(0, 1, torch.device("cpu"))
TRAIN = len(SAMPLES) - 2


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> FakeImages:
    return FakeImages.write(tmp_path_factory.mktemp("images"))


def config_of(**changes) -> DenoisingFitConfig:
    optimizer = {
        "steps": 6, "batch_size": 4, "learning_rate": 0.02, "warmup_steps": 1, "log_every": 1,
        "checkpoint_every": 2, "ema_decay": 0.5,
    }  # fmt: skip
    optimizer |= changes.pop("optimizer", {})
    return DenoisingFitConfig.model_validate({"optimizer": optimizer} | changes)


def batches_of(images, config, positions, place=HERE, seed=5, **student):
    denoiser = FakeDenoiser(**student)
    with closing(ImageLearner(denoiser, images, config, seed, place)) as learner:
        return [(b, learner.objective(0, b)) for p in positions for b in learner.batches(p)]


def rows_of(images, config, positions, **place) -> list[dict[str, np.ndarray]]:
    found = []
    for batch, _ in batches_of(images, config, positions, **place):
        arrays = {name: values.copy() for name, values in batch.arrays.as_numpy().items()}
        found += [{n: v[i] for n, v in arrays.items()} for i in range(len(arrays["t"]))]
    return found


def name_of(images, row) -> tuple[str, int]:
    """Sample and image variation whose latent a row has."""
    table = images.table("latents")
    (found,) = (
        number for number in range(len(table)) if np.array_equal(table[number]["latent"], row["x0"])
    )
    return SAMPLES[found // IMAGES]["sample_id"], found % IMAGES


@pytest.mark.parametrize("kind", [("epsilon", "ddpm"), ("v_prediction", "ddpm"), ("flow", "flow")])
def test_the_loss_is_the_error_at_the_noised_image(images, kind):
    config = config_of(weighting="min_snr", condition_dropout=0.0)
    schedule = schedule_of(*kind)
    denoiser = FakeDenoiser(schedule)
    for batch, objective in batches_of(images, config, range(0, 16, 4), schedule=schedule):
        total = 0.0
        arrays = {
            name: values.astype(np.float64) for name, values in batch.arrays.as_numpy().items()
        }
        for i, t in enumerate(arrays["t"]):
            alpha, sigma, x0, noise = (arrays[n][i] for n in ("alpha", "sigma", "x0", "noise"))
            if kind[1] == "flow":
                assert (alpha, sigma) == pytest.approx((1 - t / 40, t / 40))
            else:
                assert alpha == pytest.approx(np.sqrt(schedule.alphas_cumprod[int(t)]))
                assert alpha**2 + sigma**2 == pytest.approx(1)
            target = {
                "epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "flow": noise - x0,
            }[kind[0]]  # fmt: skip
            x = torch.from_numpy(alpha * x0 + sigma * noise).float()[None]
            conditions = {
                name: batch.arrays[f"condition.{name}"][i][None] for name in ("embeds", "time_ids")
            }
            found = denoiser.predict(x, torch.tensor([t]), conditions).detach().double().numpy()[0]
            levels = torch.tensor([alpha]), torch.tensor([sigma])
            weight = arrays["weight"][i] * float(weighting(*levels, kind[0], "min_snr", 5.0))
            total += weight * np.square(found - target).mean()
        assert float(objective.total.detach()) == pytest.approx(total, rel=1e-4)


def test_noise_is_normal_and_another_for_every_image_and_epoch(images):
    rows = rows_of(images, config_of(), range(0, 60 * TRAIN, 4))
    noise = np.concatenate([row["noise"].reshape(-1) for row in rows])
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    assert len({row["noise"].tobytes() for row in rows}) == len(rows) == 60 * TRAIN
    steps = np.array([row["t"] for row in rows])
    assert np.histogram(steps, bins=4, range=(0, 40))[0].min() > len(rows) / 8


def test_variations_take_turns_and_conditions_are_dropped_for_their_share(images):
    rows = rows_of(images, config_of(condition_dropout=0.25), range(0, 100 * TRAIN, 4))
    table = images.table("conditions")
    assert not table[0]["embeds"].any()
    drawn: dict[tuple, int] = {}
    dropped = 0
    for row in rows:
        sample_id, image = name_of(images, row)
        number = [s["sample_id"] for s in SAMPLES].index(sample_id)
        if not row["condition.embeds"].any():
            dropped += 1
            continue
        (text,) = (
            each for each in range(TEXTS)
            if np.array_equal(table[1 + number * TEXTS + each]["embeds"], row["condition.embeds"])
        )  # fmt: skip
        drawn[sample_id, image, text] = drawn.get((sample_id, image, text), 0) + 1
    assert dropped / len(rows) == pytest.approx(0.25, abs=0.08)
    assert len(drawn) == TRAIN * IMAGES * TEXTS
    assert min(drawn.values()) > 10


@pytest.mark.parametrize(("size", "world_size", "most"), [(2, 1, None), (4, 2, 1), (3, 3, None)])
def test_an_image_is_noised_alike_however_batches_are_cut_and_shared(
    images, size, world_size, most
):
    def bytes_of(rows) -> set[tuple]:
        return {tuple((n, v.tobytes()) for n, v in sorted(row.items())) for row in rows}

    whole = bytes_of(rows_of(images, config_of(), range(0, 12, 4)))
    config = config_of(optimizer={"batch_size": size, "micro_batch_size": most})
    shares = [
        rows_of(images, config, range(0, 12, size), place=Place(rank, world_size, HERE.device))
        for rank in range(world_size)
    ]
    rows = [row for share in shares for row in share]
    assert all(shares)
    assert len(rows) == 12
    assert bytes_of(rows) == whole
    assert bytes_of(rows_of(images, config_of(), range(0, 12, 4), seed=6)).isdisjoint(whole)


def trained(folder: Path, images, stop=None, place=HERE, config=None):
    denoiser = FakeDenoiser(dropout=0.1)
    finished = fit_denoiser(
        denoiser, images, config or config_of(), folder,
        seed=5, identity="i", place=place, stop=stop or StopRequest(),
    )  # fmt: skip
    return finished, denoiser


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_stopped_run_goes_on_to_the_same_weights_and_the_same_dev_losses(images, tmp_path):
    finished, denoiser = trained(tmp_path / "whole", images)
    assert finished
    assert denoiser.condition_dropout == 0.1
    assert not trained(tmp_path / "own", images, StopAfter(3))[0]
    assert trained(tmp_path / "own", images)[0]
    whole, own = (FakeDenoiser.saved(tmp_path / name) for name in ("whole", "own"))
    assert all(torch.equal(own[name], whole[name]) for name in whole)
    dev = [
        [line["dev_mse"] for line in log_of(tmp_path / name) if "dev_mse" in line]
        for name in ("whole", "own")
    ]
    assert dev[0] == dev[1]
    assert len(dev[0]) == 3


def test_the_dev_loss_is_of_the_same_noise_every_time_and_of_no_dropped_condition(images):
    found = []
    for dropout in (0.0, 1.0):
        denoiser = FakeDenoiser(dropout=0.5)
        learner = ImageLearner(denoiser, images, config_of(condition_dropout=dropout), 5, HERE)
        with closing(learner):
            found += [learner.validate()["dev_mse"], learner.validate()["dev_mse"]]
            assert denoiser.module.training
    assert len(set(found)) == 1, "neither dropout of the network nor of conditions"


def test_a_run_without_dev_images_reports_none(images, tmp_path):
    alone = FakeImages(images.folder, images.tables, dev=0)
    alone.samples = lambda split: images.samples("train") if split == "train" else []
    trained(tmp_path, alone)
    assert not [line for line in log_of(tmp_path) if "dev_mse" in line]


def test_a_denoiser_learns_to_denoise(images, tmp_path):
    optimizer = {"steps": 200, "learning_rate": 0.05, "checkpoint_every": 200}
    _, denoiser = trained(tmp_path, images, config=config_of(optimizer=optimizer))
    learner = ImageLearner(FakeDenoiser(), images, config_of(), 5, HERE)
    with closing(learner):
        before = learner.validate()["dev_mse"]
    assert log_of(tmp_path)[-1]["dev_mse"] < before / 3
    assert float(denoiser.module.of_x.detach()) > 0.4, "most of what is noisy is noise"


def work(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    images = FakeImages.write(folder / f"images-{rank}")
    config = config_of(optimizer={"batch_size": 3, "micro_batch_size": 1})
    finished = fit_denoiser(
        FakeDenoiser(), images, config, folder / "two", seed=5, identity="i",
        place=Place(rank, 2, torch.device("cpu")), stop=StopRequest(),
    )  # fmt: skip
    dist.destroy_process_group()
    assert finished


def test_two_processes_take_the_steps_of_one(images, tmp_path):
    start = multiprocessing.get_context(START)
    workers = [start.Process(target=work, args=(rank, tmp_path)) for rank in range(2)]
    for worker in workers:
        worker.start()
    config = config_of(optimizer={"batch_size": 3})
    fit_denoiser(
        FakeDenoiser(), images, config, tmp_path / "one",
        seed=5, identity="i", place=HERE, stop=StopRequest(),
    )  # fmt: skip
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    for one, two in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        for name in set(one) - {"steps_per_s", "data_wait_share"}:
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-6), name


def test_dropout_without_anything_that_stands_for_no_condition_is_refused(images, tmp_path):
    bare = FakeImages(images.folder, images.tables, facts_of(unconditional="none"))
    with pytest.raises(UserError, match=r"fit.condition_dropout is 0.1, .* set it to 0"):
        trained(tmp_path, bare)
    none = FakeImages(images.folder, images.tables, facts_of(unconditional="none", conditions={}))
    with closing(ImageLearner(FakeDenoiser(), none, config_of(), 5, HERE)) as learner:
        assert "condition.embeds" not in learner.batches(0)[0].arrays.fields


def test_an_empty_train_split_is_refused(images, tmp_path):
    empty = FakeImages(images.folder, images.tables, dev=len(SAMPLES))
    with pytest.raises(UserError, match="train split of the dataset is empty"):
        trained(tmp_path, empty)
