"""The two stages share no memory: each, in a process of its own, has one model and no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from store import PredictionStore
from tests.conftest import write_run
from tests.test_diffusion_run import HINT, IMPORTS, SCHEDULE, document, student_of, write_images


@pytest.fixture
def observe(start_worker, tmp_path):
    """Run a stage in a real process; return the networks built and tensors read, by file."""

    def run(stage: str, run_, **more) -> dict:
        seen = tmp_path / "seen.json"
        worker = start_worker(stage, run_, observe=str(seen), **more)
        assert worker.wait() == 0, worker.stderr.read_text()
        return json.loads(seen.read_text())

    return run


def tensors_of(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


@pytest.mark.slow
def test_the_observer_sees_a_model_that_is_built_and_loaded(tiny_run, run_of, observe):
    # Control: evaluation builds the teacher twice and the student, so the other tests can see.
    run = run_of("both", fitted=True, evaluate=tiny_run.document["evaluate"])
    run.root.mkdir(parents=True)
    shutil.copytree(tiny_run.root / "student", run.root / "student")
    shutil.copytree(tiny_run.root / "store", run.root / "store")
    seen = observe("evaluate", run)
    assert {network["decoder_layers"] for network in seen["networks"]} == {1, 2}
    assert {Path(file).parent.name for file in seen["files"]} == {"teacher", "student"}


def test_stage_one_builds_the_teacher_once_and_no_student(tiny_run, run_of, observe):
    run = run_of("one", fitted=True)
    assert run.load().students["student"].model.decoder_layers == 1
    seen = observe("rollout", run)
    assert [network["decoder_layers"] for network in seen["networks"]] == [2]
    teacher = tiny_run.root / "teacher"
    assert list(seen["files"]) == [str(teacher / "model.safetensors")]
    assert set(seen["files"][str(teacher / "model.safetensors")]) == tensors_of(teacher)


def test_stage_two_builds_the_student_once_where_no_teacher_exists(
    tiny_run, run_of, observe, tmp_path
):
    # Weeks later, elsewhere: nothing but the store was brought along.
    elsewhere = tmp_path / "brought along"
    shutil.copytree(tiny_run.root / "store", elsewhere)
    run = run_of("two", store=str(elsewhere), dataset=None, teacher=None, fit=None, rollout=None)
    seen = observe("train:student", run)
    assert [network["decoder_layers"] for network in seen["networks"]] == [1]
    assert seen["files"] == {}
    assert (run.root / "student" / "model.safetensors").exists()
    assert not (run.root / "teacher").exists()


def test_a_student_that_inherits_reads_only_the_tensors_it_keeps(tiny_run, run_of, observe):
    student = tiny_run.document["students"]["student"] | {
        "init": {"kind": "teacher", "layers": [1]}
    }
    store = str(tiny_run.root / "store")
    run = run_of("two", fitted=True, store=store, students={"student": student}, rollout=None)
    seen = observe("train:student", run)
    assert [network["decoder_layers"] for network in seen["networks"]] == [1]
    teacher = tiny_run.root / "teacher"
    (read,) = seen["files"].values()
    kept = {name for name in tensors_of(teacher) if not name.startswith("decoder.0.")}
    assert set(read) == kept
    assert len(read) == len(kept), "each tensor is read once"
    assert any(name.startswith("decoder.0.") for name in tensors_of(teacher))


def test_a_store_alone_says_all_that_a_student_is_built_from(tiny_run):
    manifest = PredictionStore.open(tiny_run.root / "store").manifest
    facts = json.loads((tiny_run.root / "dataset" / "dataset.json").read_text())["facts"]
    assert manifest.conditioning == facts


@pytest.mark.slow
def test_stages_of_diffusion_have_one_model_each_and_no_other(require, observe, tmp_path):
    require("diffusers", HINT)
    require("peft", HINT)
    from stages.families.diffusion_tiny import save_tiny

    teacher, other = tmp_path / "teacher", tmp_path / "other"
    for seed, folder in enumerate((teacher, other)):
        save_tiny("sd15", folder, seed=seed)
    source = write_images(tmp_path / "images")
    run = write_run(document("one", tmp_path / "runs", teacher, source), tmp_path)

    def models(stage: str, of=run) -> list[tuple[str, str | None]]:
        return [tuple(model) for model in observe(stage, of, imports=IMPORTS)["models"]]

    # Text encoders and then the autoencoder, without the denoiser; and the denoiser alone.
    assert [name for name, _ in models("prepare")] == ["CLIPTextModel", "AutoencoderKL"]
    assert models("rollout") == [("UNet2DConditionModel", str(teacher / "unet"))]

    # Elsewhere there is nothing but the store, and for one student what it begins as.
    elsewhere = tmp_path / "brought along"
    shutil.copytree(run.root / "store", elsewhere)
    settings = json.loads((teacher / "unet" / "config.json").read_text())
    settings = {name: value for name, value in settings.items() if not name.startswith("_")}
    for gone in (teacher, source, run.root):
        shutil.rmtree(gone)
    network = {"network": "UNet2DConditionModel", "settings": settings}
    short = SCHEDULE | {"steps": 2}
    fresh = {"model": network, "init": {"kind": "fresh"}, "optimizer": short}
    path = tmp_path / "runs" / "two" / "student_fresh"
    begun = fresh | {"init": {"kind": "checkpoint", "path": str(path)}}
    students = {
        "fresh": student_of(other, **fresh),
        "begun": student_of(other, **begun),
        "own": student_of(other, optimizer=short),
    }
    sections = dict.fromkeys(("prepare", "teacher", "rollout", "evaluate"))
    two = document(
        "two", tmp_path / "runs", other, source, **sections, store=str(elsewhere), students=students
    )
    two = write_run(two, tmp_path)
    wanted = {"fresh": None, "begun": str(path), "own": str(other / "unet")}
    for name, origin in wanted.items():
        assert models(f"train:{name}", two) == [("UNet2DConditionModel", origin)]
    assert (two.root / "student_begun" / "diffusion_pytorch_model.safetensors").exists()
    assert (two.root / "student_own" / "pytorch_lora_weights.safetensors").exists()
