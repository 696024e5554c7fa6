"""Images, a network of diffusers, its store and its students: the stages fit each other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.diffusion.dataset import ImageDataset
from stages.diffusion.distil import distil
from stages.diffusion.facts import ImageFacts, Recording
from stages.diffusion.fit import fit_denoiser
from stages.diffusion.image_config import ImagesConfig
from stages.diffusion.model_config import DenoiserConfig, ScheduleConfig
from stages.diffusion.noise import noised, row_noise
from stages.diffusion.prepare import prepare_images
from stages.diffusion.previews import Previews, StudentGallery, render
from stages.diffusion.record import record
from stages.diffusion.record_config import PreviewConfig, RecordConfig
from stages.diffusion.record_plan import create_record_store, lay_out_records
from stages.diffusion.train_config import DenoisingFitConfig, DistilConfig, StudentPreviews
from stages.distributed import Place
from stages.family import load_denoiser
from stages.interruption import StopRequest
from store import PredictionStore

HERE = Place(0, 1, torch.device("cpu"))
NETWORK = {
    "network": "UNet2DModel",
    "settings": {
        "block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    },
}  # fmt: skip
OPTIMIZER = {"batch_size": 16, "learning_rate": 2e-3, "warmup_steps": 2, "log_every": 10}
RUN = {"seed": 5, "identity": "i", "place": HERE}
SCALE = 3.0


@pytest.fixture(scope="module")
def recorded(require, tmp_path_factory) -> tuple[ImageDataset, Path]:
    """Digits, and a folder with their teacher, its store and its previews."""
    require("sklearn", "pip install 'foretell[diffusion]'")
    require("diffusers", "pip install 'foretell[diffusion]'")
    folder = tmp_path_factory.mktemp("stages")
    images = ImagesConfig.model_validate({
        "digits": {"seed": 0}, "encoder": {"kind": "pixels", "channels": 1},
        "buckets": {"sizes": [[8, 8]]}, "dev_images": 4, "test_images": 1760,
    })  # fmt: skip
    dataset = prepare_images(images, folder / "dataset")
    config = DenoiserConfig.model_validate(
        NETWORK | {"schedule": ScheduleConfig(train_timesteps=100)}
    )
    teacher = load_denoiser().build(config, dataset.facts, seed=1)
    fit = DenoisingFitConfig.model_validate(
        {"optimizer": OPTIMIZER | {"steps": 60}, "condition_dropout": 0.2}
    )
    assert fit_denoiser(teacher, dataset, fit, folder / "teacher", stop=StopRequest(), **RUN)
    stage_one = RecordConfig.model_validate(
        {"rows": {"kind": "forward", "slots": 4}, "rollouts_per_shard": 8, "batch_size": 32}
    )
    store = create_record_store(
        folder / "store", dataset, lay_out_records(stage_one, teacher, dataset, seed=3)
    )
    assert record(teacher, store, dataset, store.missing(), stage_one, stop=StopRequest())
    render(teacher, dataset, PreviewConfig(samples=2, steps=4), SCALE, folder / "previews")
    return dataset, folder


def distilled(store: PredictionStore, folder: Path):
    """Train a student that begins as its teacher, and return it."""
    config = DistilConfig.model_validate(
        {
            "model": NETWORK, "loss": {"guidance_scale": SCALE},
            "optimizer": OPTIMIZER | {"steps": 40, "micro_batch_size": 8},
        }
    )  # fmt: skip
    recording = Recording.of(store.manifest)
    student = load_denoiser().build(
        config.model,
        ImageFacts.of(store.manifest),
        seed=2,
        schedule=recording.schedule,
        weights=folder / "teacher",
    )
    gallery = StudentGallery(
        Previews.read(folder / "previews"), StudentPreviews(every=20), folder / "student-previews"
    )
    assert distil(
        student, store, config, folder / "student", stop=StopRequest(), previews=gallery, **RUN
    )
    return student


@pytest.mark.slow
def test_a_student_of_the_store_comes_nearer_to_the_guided_teacher(recorded):
    dataset, folder = recorded
    log = [json.loads(line) for line in (folder / "teacher" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["dev_mse"] < 0.8
    store = PredictionStore.open(folder / "store")
    student = distilled(store, folder)
    log = [json.loads(line) for line in (folder / "student" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["mse"] < log[0]["mse"]
    assert log[-1]["failed_share"] == log[-1]["left_out_share"] == 0
    with torch.no_grad():
        ours, unguided = errors(dataset, store, student)
    assert ours < 0.9 * unguided
    drawn = sorted(path.name for path in (folder / "student-previews").glob("*.safetensors"))
    assert drawn == ["00000000.safetensors", "00000020.safetensors", "00000040.safetensors"]
    again = load_denoiser().load(folder / "student", device="cpu", dtype=torch.float32)
    with torch.no_grad():
        assert errors(dataset, store, again) == pytest.approx((ours, unguided), rel=1e-4)


def errors(dataset: ImageDataset, store: PredictionStore, student) -> tuple[float, float]:
    """Squared error to the guided prediction, of the student and of the unguided teacher."""
    ours, unguided = [], []
    for key in store:
        rollout = store[key]
        latent = dataset.table("latents")[rollout.drawn["latent"]]["latent"]
        label = dataset.table("conditions")[rollout.drawn["condition"]]["class_labels"]
        for slot in range(len(rollout)):
            row = {n: values[slot] for n, values in rollout.arrays.items()}
            variations = rollout.drawn["image_variation"], rollout.drawn["text_variation"]
            noise = row_noise(store.manifest.seed, key[0], *variations, slot, latent.shape)
            x = noised(latent, noise, float(row["row.alpha"]), float(row["row.sigma"]))
            cond, delta = (row[f"dense.{n}"][0].astype(np.float64) for n in ("cond", "delta"))
            found = student.predict(
                torch.from_numpy(x)[None],
                torch.tensor([float(row["row.t"])], dtype=torch.float64),
                {"class_labels": torch.from_numpy(np.array(label))[None]},
            )
            guided = cond + (SCALE - 1) * delta
            ours.append(np.square(found[0].numpy() - guided).mean())
            unguided.append(np.square(cond - guided).mean())
    return float(np.mean(ours)), float(np.mean(unguided))
