"""Configurations of diffusion runs: mistakes are named, and stages depend on what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import speech_run
from pipeline.diffusion_config import DiffusionRunConfig
from pipeline.progress import stage_identity, stages_of
from stages.errors import UserError
from tests.config_documents import load_changed

DOCUMENT: dict[str, Any] = {
    "kind": "diffusion",
    "name": "small",
    "prepare": {"digits": {}, "buckets": {"sizes": [[8, 8]]}},
    "teacher": {"model": {"network": "UNet2DModel"}},
    "fit": {"optimizer": {"steps": 5}},
    "rollout": {"guidance": {"scale": 3.0}, "rows": {"kind": "forward"}},
    "students": {
        "student": {
            "model": {"network": "UNet2DModel"},
            "loss": {"guidance_scale": 3.0},
            "optimizer": {"steps": 5},
        }
    },
    "evaluate": {"samples": 3},
}


@pytest.fixture
def load(tmp_path):
    """Load DOCUMENT with changes `{"a.b": value}`; a value of ... removes the key."""

    def loaded(changes: dict[str, Any] | None = None) -> DiffusionRunConfig:
        return load_changed(tmp_path, DOCUMENT, changes)

    return loaded


def test_stages_come_in_the_order_of_their_work(load):
    assert stages_of(load()) == ["prepare", "fit", "rollout", "train:student", "evaluate"]


BAD = {
    "kind": ("difusion", "kind is 'difusion', but must be one of speech, diffusion"),
    "rolout": ({}, "rolout: unknown key; did you mean 'rollout'?"),
    "students.student.loss.kl": (1.0, "students.student.loss.kl: unknown key; known here: data_sh"),
    "students.student.loss.guidance_scale": ([4, 2], "(low, high) with 0 <= low <= high"),
    "students.student.loss.data_share": (1.5, "less than or equal to 1"),
    "students.student.loss.error": ("kl", "'mse', 'l1', 'huber' or 'log_cosh'"),
    "students.student.model.network": (..., "give pipeline (a local folder) or network"),
    "students.student.model.base_precision": ("bf16", "without an adapter all weights are trained"),
    "students.student.init": ({"kind": "checkpoint"}, "give a path exactly for 'checkpoint'"),
    "students.a/b": (DOCUMENT["students"]["student"], "'a/b' is not a student name"),
    "rollout.target": ({"kind": "top_k", "k": 4}, "rollout.target"),
    "rollout.rows": ({"kind": "trajectory", "steps": 4, "keep": [3, 1]}, "must be rising steps"),
    "rollout.contrast": ({"kind": "both"}, "'both' is none of 'unconditional', 'adapter', 'model'"),
    "rollout.rows.timesteps": ({"low": 0.6, "high": 0.5}, "low=0.6 must lie below high=0.5"),
    "teacher.model.schedule": (
        {"kind": "flow", "prediction": "epsilon"}, "flow predicts 'flow', and nothing else does",
    ),
    "teacher.checkpoint": ("t", "give exactly one of"),
    "prepare.source": ("images", "give exactly one of source (a folder of images) and digits"),
    "prepare.unconditional": ({"kind": "negative"}, "give a text exactly for 'negative'"),
    "prepare.buckets.sizes": ([], "prepare.buckets.sizes"),
    "prepare.encoder": ({"kind": "vae"}, "'vae' is none of 'pixels', 'pipeline'"),
    "evaluate.steps": ([], "evaluate.steps"),
    "teacher": (..., "fit needs the section teacher"),
}  # fmt: skip


@pytest.mark.parametrize("key", BAD)
def test_a_mistake_is_named_with_its_place_and_what_is_possible(load, key):
    value, words = BAD[key]
    with pytest.raises(UserError) as caught:
        load({key: value})
    assert words in str(caught.value)


def test_parts_are_given_a_scale_and_what_is_mixed_already_is_not(load):
    guided = {"rollout.target": {"kind": "dense", "branches": "guided"}}
    with pytest.raises(UserError, match=r"students\.student\.loss\.guidance_scale was given, but"):
        load(guided)
    with pytest.raises(UserError, match=r"guidance_scale was not given, .*, for example 3\.0"):
        load({"students.student.loss.guidance_scale": ...})
    assert load(guided | {"students.student.loss.guidance_scale": ...})


UNTAUGHT = {
    "ends of noised images": ({"loss": {"teaches": "end"}}, {}, "no trajectories: use"),
    "data of trajectories": (
        {"loss": {"guidance_scale": 3.0, "data_share": 0.5}}, {"kind": "trajectory"},
        "loss.data_share is set, but",
    ),
    "pairs without their start": (
        {"loss": {"teaches": "pairs"}}, {"kind": "trajectory", "keep": [1, 2]},
        "needs the start of every trajectory, but the store keeps the steps [1, 2]",
    ),
    "a scale of ends": (
        {"loss": {"teaches": "end", "guidance_scale": 2.0}}, {"kind": "trajectory"},
        "the store are solved at scale 3.0: leave it out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNTAUGHT)
def test_a_loss_that_the_rows_will_not_teach_is_refused_when_it_is_read(load, case):
    student, rows, words = UNTAUGHT[case]
    changes = {f"students.student.{key}": value for key, value in student.items()}
    with pytest.raises(UserError) as caught:
        load(changes | ({"rollout.rows": rows} if rows else {}))
    assert words in str(caught.value)
    assert "students.student.loss" in str(caught.value)
    load(changes | {"rollout": ..., "teacher": ..., "fit": ..., "evaluate": ..., "store": "s"})


DEPENDS = {
    "prepare.seed": "prepare fit rollout train:student evaluate",
    "fit.condition_dropout": "fit rollout train:student evaluate",
    "rollout.rows.slots": "rollout train:student evaluate",
    "students.student.loss.gamma": "train:student evaluate",
    "evaluate.seed": "evaluate",
    "fit.optimizer.log_every": "",
    "rollout.device": "",
}
VALUES = {"fit.condition_dropout": 0.2, "rollout.rows.slots": 4, "rollout.device": "cpu"}


HALF = {
    "rollout": {"guidance": {"scale": 3.0}, "precision": "fp16", "quantization": "fp8"},
    "students.student.model": {
        "network": "UNet2DModel", "adapter": {"rank": 2}, "base_precision": "fp16",
        "base_quantization": "int8",
    },
    "prepare.encoder": {
        "kind": "pipeline", "path": "p", "precision": "fp16",
        "quantization": {"text_encoder": "fp8"},
    },
}  # fmt: skip


@pytest.mark.parametrize("section", HALF)
def test_what_is_quantized_does_not_compute_in_fp16(load, section):
    """It would be found when the model is quantized: for a teacher, after the dataset is ready."""
    settings = HALF[section]
    (name,) = (key for key in settings if key.endswith("precision"))
    quantized = name.replace("precision", "quantization")
    with pytest.raises(UserError, match=f"{name} is fp16, but with {quantized}.*set {name}: bf16"):
        load({section: settings})
    for rest in (settings | {name: "bf16"}, {k: v for k, v in settings.items() if k != quantized}):
        assert load({section: rest})


@pytest.mark.parametrize("key", DEPENDS)
def test_a_stage_is_stale_exactly_when_something_it_depends_on_has_changed(load, key):
    before, after = load(), load({key: VALUES.get(key, 3)})
    changed = [
        s for s in stages_of(before) if stage_identity(before, s) != stage_identity(after, s)
    ]
    assert changed == DEPENDS[key].split()


def test_commands_about_listening_are_for_speech(load, tmp_path):
    load()
    with pytest.raises(UserError, match="is of kind 'diffusion', but listen is for speech alone"):
        speech_run(Path(tmp_path / "config.yaml"), [], "listen")
