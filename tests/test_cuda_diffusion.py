"""Diffusion on CUDA: rows and trajectories, types, two models in turn, and the shipped run."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from stages.diffusion.distil import distil
from stages.diffusion.facts import OK, REPEATED
from stages.diffusion.record import record
from stages.diffusion.rows import StoreRows
from stages.distributed import Place, choose_device
from stages.interruption import StopRequest
from store import PredictionStore, verify
from tests import diffusion_stores, recorded, test_diffusion_run, test_distil, test_rows
from tests.conftest import ROOT, Run, write_run
from tests.stopping import StopAfter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda", 0)
HERE = Place(0, 1, CUDA)
ROWS = {
    "forward": {"kind": "forward", "slots": 3},
    "trajectory": {"kind": "trajectory", "steps": 5},
}
PARTS = ("dense.cond", "dense.delta")


def denoiser_of(dataset, device: torch.device, **changes: Any) -> recorded.FakeDenoiser:
    denoiser = recorded.FakeDenoiser(dataset.facts, **changes)
    denoiser.module.to(device)
    return denoiser


# Stage one, of a formula


def images_of(folder: Path, kind: str) -> recorded.Images:
    """Images that are their own target have no trajectory."""
    return recorded.images(folder, recorded.TARGETS if kind == "forward" else ["teacher"] * 4)


@pytest.mark.parametrize("kind", ROWS)
def test_rows_are_those_of_the_cpu(tmp_path, kind):
    dataset = images_of(tmp_path / "images", kind)
    stores = [
        recorded.written(
            tmp_path / device, dataset, denoiser_of(dataset, torch.device(device)), rows=ROWS[kind]
        )
        for device in ("cpu", "cuda")
    ]
    assert verify(stores[1].path).ok
    for key in stores[0]:
        ours, theirs = (store[key].arrays for store in stores)
        assert ours.keys() == theirs.keys()
        assert (ours["row.t"] == theirs["row.t"]).all()
        if kind == "forward":
            assert (ours["row.x_t_crc"] == theirs["row.x_t_crc"]).all()
        for part in set(PARTS) & set(ours):
            np.testing.assert_allclose(theirs[part], ours[part], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ROWS)
def test_a_stopped_recording_goes_on_to_the_same_bytes(tmp_path, kind):
    dataset = images_of(tmp_path / "images", kind)
    denoiser = denoiser_of(dataset, CUDA)
    whole = recorded.written(tmp_path / "whole", dataset, denoiser, rows=ROWS[kind])
    store, config = recorded.planned(tmp_path / "parted", dataset, denoiser, rows=ROWS[kind])
    assert not record(denoiser, store, dataset, store.missing(), config, stop=StopAfter(3))
    parted = recorded.written(tmp_path / "parted", dataset, denoiser, rows=ROWS[kind])
    assert recorded.bytes_of(parted) == recorded.bytes_of(whole)


def test_two_models_take_turns_on_the_device(tmp_path):
    dataset = recorded.images(tmp_path / "images", ["teacher"] * 3)
    places: list[tuple[str, str]] = []
    pair: list[recorded.FakeDenoiser] = []

    def watched(denoiser: recorded.FakeDenoiser) -> recorded.FakeDenoiser:
        plain = denoiser.predict

        def predict(*given: Any) -> Tensor:
            places.append(tuple(each.module.gain.device.type for each in pair))
            return plain(*given)

        denoiser.predict = predict
        return denoiser

    contrast = {"kind": "model", "other": {"path": "elsewhere"}}
    stores = []
    for device in (torch.device("cpu"), CUDA):
        places.clear()
        pair[:] = [
            watched(denoiser_of(dataset, device)),
            watched(denoiser_of(dataset, torch.device("cpu"), seed=1)),
        ]
        stores.append(
            recorded.written(
                tmp_path / device.type, dataset, pair[0], other=pair[1], contrast=contrast
            )
        )
    assert set(places) == {("cuda", "cpu"), ("cpu", "cuda")}, "never both, and each in its turn"
    for key in stores[0]:
        for part in PARTS:
            ours, theirs = (store[key].arrays[part] for store in stores)
            np.testing.assert_allclose(theirs, ours, rtol=2e-3, atol=2e-3)


# Stage two, of a formula


def trained(folder: Path, store: PredictionStore, device: torch.device, stop=None, **optimizer):
    denoiser = diffusion_stores.FakeDenoiser(dropout=0.0)
    denoiser.module.to(device)
    finished = distil(
        denoiser, store, test_distil.training(**optimizer), folder, seed=5, identity="i",
        place=Place(0, 1, device), stop=stop or StopRequest(), previews=None,
    )  # fmt: skip
    return finished


@pytest.mark.parametrize("kind", ["forward", "trajectory"])
def test_training_takes_the_steps_of_the_cpu(tmp_path, kind):
    store = diffusion_stores.write_store(tmp_path / "store", test_distil.STORES[kind])
    logs = []
    for device in (torch.device("cpu"), CUDA):
        assert trained(tmp_path / device.type, store, device)
        logs.append([line["total"] for line in test_distil.log_of(tmp_path / device.type)])
    assert logs[1] == pytest.approx(logs[0], rel=1e-3)


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path):
    store = diffusion_stores.write_store(tmp_path / "store")
    assert trained(tmp_path / "whole", store, CUDA)
    assert not trained(tmp_path / "parted", store, CUDA, StopAfter(3))
    assert trained(tmp_path / "parted", store, CUDA, workers=2)
    whole, parted = (diffusion_stores.FakeDenoiser.saved(tmp_path / n) for n in ("whole", "parted"))
    assert all(torch.equal(parted[name], whole[name]) for name in whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_through_page_locked_memory_are_equal(tmp_path, workers):
    store = diffusion_stores.write_store(tmp_path / "store")
    config = diffusion_stores.config_of(workers=workers)
    assert config.loader.pin_memory
    expected = test_rows.walked(store, config, range(0, 32, 8))
    reading = test_rows.reading_of(store, config)
    with closing(StoreRows(store, config, reading, 5, HERE)) as rows:
        found = [batch for position in range(0, 32, 8) for batch in rows.batches(position)]
        assert all(batch.arrays.memory.is_pinned() for batch in found)
    for one, other in zip(found, expected, strict=True):
        ours, theirs = test_rows.content(one), test_rows.content(other)
        assert ours.keys() == theirs.keys()
        assert all((ours[name] == theirs[name]).all() for name in ours)


# Diffusers' networks


@pytest.fixture(scope="module")
def models(require, tmp_path_factory) -> Callable[..., Path]:
    require("diffusers", test_diffusion_run.HINT)
    require("peft", test_diffusion_run.HINT)
    return test_diffusion_run.tiny_pipelines(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return test_diffusion_run.write_images(tmp_path_factory.mktemp("source") / "images")


@pytest.fixture
def do(start_worker) -> Callable[..., str]:
    """Do stages of a run one after the other, each in a process of its own."""

    def stages(run: Run, *names: str) -> str:
        said = ""
        for name in names:
            worker = start_worker(name, run, imports=test_diffusion_run.IMPORTS)
            ended, text = worker.wait(), worker.stderr.read_text()
            assert ended == 0, text
            said += text
        return said

    return stages


def on_the_device(section: dict[str, Any]) -> dict[str, Any]:
    return section | {"device": "cuda"}


def document(name: str, folder: Path, pipeline: Path, images: Path, **sections: Any) -> Any:
    whole = test_diffusion_run.document(name, folder, pipeline, images)
    whole["prepare"]["encoder"]["device"] = "cuda"
    for part in ("rollout", "evaluate"):
        whole[part] = on_the_device(whole[part])
    student = whole["students"]["student"]
    student["optimizer"] = on_the_device(student["optimizer"])
    return {key: value for key, value in (whole | sections).items() if value is not None}


@pytest.mark.slow
def test_float32_convolutions_on_the_device_are_not_rounded_to_less(models):
    """Left to itself cudnn keeps 10 bits of what it multiplies."""
    choose_device("cuda")
    torch.manual_seed(0)
    layer, x = torch.nn.Conv2d(64, 64, 3, padding=1), torch.randn(2, 64, 32, 32)
    with torch.no_grad():
        expected = layer.double()(x.double())
        found = layer.float().cuda()(x.cuda()).double().cpu()
    assert float((found - expected).norm() / expected.norm()) < 1e-6


ERRORS = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}
"""Of stored predictions, which are in float16, to those in float32 of the CPU."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", "sdxl", "flux"])
def test_networks_predict_what_they_predict_on_the_cpu(models, images, do, tmp_path, kind):
    """Of images that the CPU encoded."""
    whole = document("cpu", tmp_path, models(kind), images, students={}, evaluate=None)
    whole["prepare"]["encoder"]["device"] = whole["rollout"]["device"] = "cpu"
    if kind == "flux":
        whole["teacher"]["pretrained"]["embedded_guidance"] = 3.5
        whole["rollout"]["guidance"] = {"scale": 1.0}
        whole["rollout"]["target"] = {"kind": "dense", "branches": "guided"}
    run = write_run(whole, tmp_path)
    do(run, "prepare", "rollout")
    exact = PredictionStore.open(run.root / "store")
    given = {"prepare": None, "dataset": str(run.root / "dataset")}
    for precision, most in ERRORS.items():
        rollout = whole["rollout"] | {"precision": precision, "device": "cuda"}
        other = {k: v for k, v in whole.items() if k != "prepare"} | given
        other |= {"name": precision, "rollout": rollout}
        again = write_run({k: v for k, v in other.items() if v is not None}, tmp_path)
        do(again, "rollout")
        store = PredictionStore.open(again.root / "store")
        assert verify(store.path).ok
        errors, sizes = [], []
        for key in exact:
            ours, theirs = exact[key].arrays, store[key].arrays
            assert (ours["row.x_t_crc"] == theirs["row.x_t_crc"]).all(), "of the same noised images"
            assert set(theirs["row.status"].tolist()) == {OK}
            for part in (name for name in ours if name.startswith("dense.")):
                errors.append(np.square(theirs[part].astype(float) - ours[part]).mean())
                sizes.append(np.square(ours[part].astype(float)).mean())
        error = (np.mean(errors) / np.mean(sizes)) ** 0.5
        assert error < most, (precision, error)


@pytest.mark.slow
def test_what_overflows_in_half_precision_is_predicted_again(models, images, do, tmp_path):
    layer = "mid_block.resnets.0.conv1"
    factors = {f"{layer}.weight": 1e6, f"{layer}.bias": 1e6}  # below 65504 all the same
    pipeline = test_diffusion_run.rescaled(models, tmp_path / "model", factors)
    run = write_run(
        document("half", tmp_path, pipeline, images, students={}, evaluate=None), tmp_path
    )
    run.document["rollout"] |= {"precision": "fp16", "samples": 3}
    run = write_run(run.document, tmp_path)
    said = do(run, "prepare", "rollout")
    assert "not finite in fp16, and so predicted in fp32" in said
    store = PredictionStore.open(run.root / "store")
    statuses = {s for key in store for s in store[key].arrays["row.status"].tolist()}
    assert statuses == {REPEATED}


@pytest.mark.slow
def test_two_runs_have_the_same_bytes(models, images, do, tmp_path):
    """On one device, in the same batches; a stopped run is the test above, of a formula."""
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        whole = document("sdxl", tmp_path / name, models("sdxl"), images, evaluate=None)
        run = write_run(whole, tmp_path / name)
        do(run, "prepare", "rollout", "train:student")
        found.append(run.root)
    for part in ("dataset", "store"):
        ours, theirs = (test_diffusion_run.bytes_of(root / part) for root in found)
        assert ours == theirs
    losses = [
        [json.loads(line)["total"] for line in (root / "student" / "log.jsonl").open()]
        for root in found
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("held", ["fp8", "int8", "int4", None])
def test_the_shipped_configuration_runs_where_its_paths_and_sizes_are_small(
    models, images, do, tmp_path, held
):
    whole = yaml.safe_load((ROOT / "configs" / "sdxl_cfg.yaml").read_text(encoding="utf-8"))
    pipeline, student = str(models("sdxl")), whole["students"]["student"]
    whole["runs"] = str(tmp_path / "runs")
    whole["prepare"] |= {"source": str(images), "buckets": test_diffusion_run.BUCKETS}
    whole["prepare"]["encoder"]["path"] = student["model"]["pipeline"] = pipeline
    whole["teacher"]["pretrained"]["path"] = pipeline
    whole["rollout"] |= {"quantization": held}
    whole["rollout"]["rows"]["slots"] = 2
    whole["rollout"]["previews"] |= {"samples": 1, "steps": 2}
    student["optimizer"] |= {"steps": 2, "warmup_steps": 1}
    student["previews"] = {"every": 2}
    whole["evaluate"] |= {"samples": 2, "steps": [2], "bootstrap_draws": 100}
    run = write_run(whole, tmp_path)
    do(run, "prepare", "rollout", "train:student", "evaluate")
    quantization = PredictionStore.open(run.root / "store").manifest.quantization
    assert (quantization and quantization.method) == held
    assert (run.root / "previews").is_dir()
    assert (run.root / "student" / test_diffusion_run.LORA).exists()
    assert (run.root / "student" / "previews" / "00000002.png").exists()
    assert (run.root / "report" / "report.html").exists()
