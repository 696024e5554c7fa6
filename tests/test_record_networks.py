"""Stage one with a network of diffusers on a prepared dataset: everything as it is in a run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.diffusion.dataset import ImageDataset
from stages.diffusion.image_config import ImagesConfig
from stages.diffusion.model_config import DenoiserConfig, ScheduleConfig
from stages.diffusion.noise import matches, noised, row_noise
from stages.diffusion.prepare import prepare_images
from stages.diffusion.previews import Previews, render
from stages.diffusion.record import record
from stages.diffusion.record_config import PreviewConfig, RecordConfig
from stages.diffusion.record_plan import create_record_store, lay_out_records
from stages.family import load_denoiser
from stages.interruption import StopRequest
from store import PredictionStore, verify

pytestmark = pytest.mark.slow

SETTINGS = {
    "block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip


@pytest.fixture(scope="module")
def digits(require, tmp_path_factory) -> ImageDataset:
    require("sklearn", "pip install 'foretell[diffusion]'")
    config = ImagesConfig.model_validate({
        "digits": {"seed": 0}, "encoder": {"kind": "pixels", "channels": 1},
        "buckets": {"sizes": [[8, 8]]}, "dev_images": 8, "test_images": 1700,
        "image_variations": 2, "crop": "random", "flip": 0.5,
    })  # fmt: skip
    return prepare_images(config, tmp_path_factory.mktemp("digits") / "dataset")


@pytest.fixture
def teacher(require: Callable[[str, str], None], digits: ImageDataset):
    require("diffusers", "pip install 'foretell[diffusion]'")

    def make(dtype: torch.dtype = torch.float32):
        config = DenoiserConfig(network="UNet2DModel", settings=SETTINGS, schedule=ScheduleConfig())
        denoiser = load_denoiser().build(config, digits.facts, seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in denoiser.module.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        denoiser.module.to(dtype)
        denoiser.dtype = dtype
        return denoiser

    return make


def written(path: Path, dataset, denoiser, **changes) -> PredictionStore:
    config = RecordConfig.model_validate({"samples": 6, "rollouts_per_shard": 4} | changes)
    store = create_record_store(path, dataset, lay_out_records(config, denoiser, dataset, seed=3))
    assert record(denoiser, store, dataset, store.missing(), config, stop=StopRequest())
    return PredictionStore.open(path)


def predictions(denoiser, x: np.ndarray, t: float, label: int) -> torch.Tensor:
    with torch.inference_mode():
        told = {"class_labels": torch.tensor([label])}
        time = torch.tensor([t], dtype=torch.float64)
        return denoiser.predict(torch.from_numpy(x[None]), time, told)[0].float()


@pytest.mark.slow
def test_a_network_asked_again_of_every_row_says_what_is_stored(tmp_path, digits, teacher):
    denoiser = teacher()
    store = written(tmp_path / "store", digits, denoiser, samples=3)
    assert verify(tmp_path / "store").ok
    assert len(store) == 6
    none = len(digits.facts.classes)
    for key in store:
        rollout = store[key]
        label = int(store.table("conditions")[rollout.drawn["condition"]]["class_labels"])
        x0 = digits.table("latents")[rollout.drawn["latent"]]["latent"]
        for slot in range(8):
            row = {name: values[slot] for name, values in rollout.arrays.items()}
            noise = row_noise(3, key[0], rollout.drawn["image_variation"], 0, slot, x0.shape)
            x = noised(x0, noise, row["row.alpha"], row["row.sigma"])
            assert matches(x, int(row["row.x_t_crc"]), float(row["row.x_t_sum"]))
            cond, uncond = (predictions(denoiser, x, row["row.t"], n) for n in (label, none))
            assert (cond - uncond).abs().max() > 1e-3
            for name, exact in (("cond", cond), ("delta", cond - uncond)):
                found = torch.from_numpy(row[f"dense.{name}"][0].astype(np.float32))
                torch.testing.assert_close(found, exact, rtol=1e-3, atol=2e-5)


def test_a_network_in_float16_repeats_in_fp32_what_overflowed_and_is_float16_again(
    tmp_path, digits, teacher, caplog
):
    denoiser = teacher(torch.float16)
    exact = teacher()
    with torch.no_grad():  # weights that float16 holds, in both
        for ours, theirs in zip(
            denoiser.module.parameters(), exact.module.parameters(), strict=True
        ):
            theirs.copy_(ours)
    weights = {name: x.clone() for name, x in denoiser.module.state_dict().items()}
    first = denoiser.module.conv_in

    def overflow(_module, _inputs, output):
        hit = (output.flatten(1).abs().amax(1) > limit) & (output.dtype == torch.float16)
        return output.masked_fill(hit[:, None, None, None], torch.inf)

    peaks: list[float] = []
    spy = exact.module.conv_in.register_forward_hook(
        lambda _m, _i, y: peaks.extend(y.flatten(1).abs().amax(1).tolist())
    )
    plain = written(tmp_path / "exact", digits, exact)
    spy.remove()
    limit = sorted(set(peaks))[-3]
    first.register_forward_hook(overflow)
    with caplog.at_level(logging.WARNING):
        store = written(tmp_path / "store", digits, denoiser, precision="fp16")
    assert "not finite in fp16, and so predicted in fp32" in caplog.text
    status = {key: store[key].arrays["row.status"] for key in store}
    repeated = [(key, slot) for key in store for slot in np.flatnonzero(status[key] == 1)]
    assert 1 <= len(repeated) <= 4
    assert all(set(values.tolist()) <= {0, 1} for values in status.values())
    for key, slot in repeated:
        for name in ("dense.cond", "dense.delta"):
            found, wanted = (s[key].arrays[name][slot] for s in (store, plain))
            np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-4)
    for name, x in denoiser.module.state_dict().items():
        assert torch.equal(x, weights[name])
    assert denoiser.dtype == torch.float16


def test_trajectories_and_previews_of_a_network_begin_and_end_finite(tmp_path, digits, teacher):
    denoiser = teacher()
    rows = {"kind": "trajectory", "steps": 4}
    store = written(
        tmp_path / "store", digits, denoiser, rows=rows, samples=3, guidance={"scale": 3}
    )
    assert verify(tmp_path / "store").ok
    for key in store:
        assert store[key].arrays["row.status"].tolist() == [0, 0, 0, 0, 3]
    render(denoiser, digits, PreviewConfig(samples=3, steps=4), 3.0, tmp_path / "previews")
    previews = Previews.read(tmp_path / "previews")
    assert list(previews.latents) == ["guided", "unguided"]
    assert (tmp_path / "previews" / "grid.png").exists()
