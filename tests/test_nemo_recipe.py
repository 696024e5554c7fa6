"""NeMo's recipe by its own names: what it stands for, and how its mistakes are told."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from pipeline.config import RunConfig, load_config
from stages.config import TrainConfig
from stages.errors import UserError
from stages.loss_config import LossConfig, NemoLossConfig
from stages.losses import stream_weights
from stages.support import require_supported
from stages.train import ramp
from store.schema import Full, Sampled, TopK
from store.synthetic import synthetic_manifest
from tests.test_train import LOCAL, family_of, learned, store_of


def recipe(**changes) -> LossConfig:
    return NemoLossConfig.model_validate({"recipe": "nemo"} | changes).terms_config


def test_its_defaults_are_those_of_nemo():
    assert recipe() == LossConfig(
        kl=0.7, ce=0.3, nrmse=2.0, temperature=1.0, mean="rollouts", local_share=0.1,
        local_start_step=3000, local_ramp_steps=2000, auxiliary=1.0,
    )  # fmt: skip


def test_the_weight_of_the_local_transformer_is_nemos_at_every_step():
    family = family_of(0, LOCAL)
    loss = recipe()
    for step, weight in {2999: 0.0, 3000: 0.0, 3500: 0.025, 5000: 0.1, 10**6: 0.1}.items():
        share = loss.local_share * ramp(step, loss.local_start_step, loss.local_ramp_steps)
        weights = stream_weights((), family, share).tolist()
        assert weights == pytest.approx([2 * (1 - weight)] * 2 + [2 * weight] * 2)


@pytest.mark.parametrize(
    ("changes", "terms"),
    [
        ({"alpha": 1.0}, {"ce": 1.0, "nrmse": 2.0}),
        ({"alpha": 0.0}, {"kl": 1.0, "nrmse": 2.0}),
        ({"beta": 0.0}, {"kl": 0.7, "ce": 0.3}),
        ({"alpha": 1.0, "beta": 0.0}, {"ce": 1.0}),
    ],
)
def test_what_weighs_nothing_is_left_out(changes, terms):
    assert recipe(**changes).terms == terms


def test_the_other_settings_are_passed_on():
    changes = {
        "temperature": 2.0, "guidance_scale": (1.0, 3.0), "codebook_weights": (2.0, 1.0),
        "auxiliary": 0.5, "local_share": 0.3, "local_start_step": 7, "local_ramp_steps": 9,
    }  # fmt: skip
    found = recipe(**changes)
    assert {name: getattr(found, name) for name in changes} == changes
    assert recipe(kl="joint").joint
    assert not recipe(kl="per_codebook").joint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.2}, r"alpha\n.*less than or equal to 1"),
        ({"beta": -0.1}, r"beta\n.*greater than or equal to 0"),
        ({"temperature": 0.0}, r"temperature\n.*greater than 0"),
        ({"local_share": 1.01}, r"local_share\n.*less than or equal to 1"),
        ({"local_start_step": -1}, r"local_start_step\n.*greater than or equal to 0"),
        ({"local_ramp_steps": -1}, r"local_ramp_steps\n.*greater than or equal to 0"),
        ({"kl": "both"}, r"kl\n.*'per_codebook' or 'joint'"),
        ({"guidance_scale": -1.0}, r"guidance_scale=-1\.0 must be a number of at least 0"),
    ],
)
def test_what_nemo_refuses_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        recipe(**changes)


# Within a configuration.


def loaded(tmp_path: Path, loss: object, *overrides: str) -> RunConfig:
    student = {"model": {"family": "codec_lm"}, "optimizer": {"steps": 5}, "loss": loss}
    document = {"name": "run", "store": "elsewhere", "students": {"small": student}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return load_config(path, overrides)


def test_a_recipe_and_its_parts_may_be_set_on_the_command_line(tmp_path):
    plain = loaded(tmp_path, {"kl": 1.0, "ce": 0.5})
    assert plain.students["small"].loss == LossConfig(kl=1.0, ce=0.5)
    section = "students.small.loss"
    chosen = loaded(tmp_path, {}, f"{section}.recipe=nemo", f"{section}.alpha=0.5")
    assert chosen.students["small"].loss.terms_config.terms == {"kl": 0.5, "ce": 0.5, "nrmse": 2.0}


def test_a_configuration_goes_through_json_and_back(tmp_path):
    for loss in ({"recipe": "nemo", "alpha": 0.2}, {"kl": 0.4}):
        config = loaded(tmp_path, loss).students["small"]
        again = TrainConfig.model_validate_json(config.model_dump_json())
        assert again == config
        assert again.loss.terms_config == config.loss.terms_config


REFUSED = {
    "unknown key": (
        {"recipe": "nemo", "alhpa": 0.1}, r"loss\.alhpa: unknown key; did you mean 'alpha'\?",
    ),
    "key of the other form": (
        {"recipe": "nemo", "reverse_kl": 1}, r"loss\.reverse_kl: unknown key; known here: alpha, ",
    ),
    "key of the recipe": (
        {"alpha": 0.3}, r"loss\.alpha: unknown key; did you mean 'skew_alpha'\?",
    ),
    "mistyped": ({"revers_kl": 0.1}, r"loss\.revers_kl: unknown key; did you mean 'reverse_kl'\?"),
    "value": ({"recipe": "nemo", "alpha": 3}, r"loss\.alpha: .*equal to 1 \(given: 3\)"),
    "other recipe": (
        {"recipe": "megatron"}, r"small\.loss: recipe='megatron' is none of 'nemo' and 'guide'",
    ),
    "value of terms": ({"kl": -1}, r"loss\.kl: .*equal to 0 \(given: -1\)"),
    "nothing to learn": ({"kl": 0}, r"students\.small\.loss: all terms of the loss weigh 0"),
    "no mapping": ("nemo", r"students\.small\.loss: must be a section"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_told_where_they_stand_and_by_the_keys_of_their_form(tmp_path, name):
    loss, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as error:
        loaded(tmp_path, loss)
    assert "plain loss" not in str(error.value)
    assert "nemo loss" not in str(error.value)
    assert "guide loss" not in str(error.value)


def test_training_by_the_recipe_is_training_by_its_terms(tmp_path):
    store = store_of(tmp_path / "store", "hidden", LOCAL)
    changes = {"local_start_step": 0, "local_ramp_steps": 4}
    by_name, gradient, batch = learned(store, {"recipe": "nemo"} | changes, LOCAL, step=2)
    terms = recipe(**changes).model_dump()
    by_terms, expected, _ = learned(store, terms, LOCAL, step=2)
    assert batch.weight == len(batch.keys)
    assert by_name.total == by_terms.total
    assert all((gradient[name] == expected[name]).all() for name in expected)


@pytest.mark.parametrize(
    ("target", "changes", "message"),
    [
        (Full(), {"kl": "joint"}, r"loss\.kl=joint: .*absolute height.*; set it to per_codebook"),
        (TopK(k=5), {}, r"loss\.beta=2\.0: .*moments.*; set it to 0"),
        (Sampled(), {"alpha": 0.4}, r"loss\.alpha=0\.4: .*draws.*; leave recipe: nemo out"),
    ],
)
def test_what_a_store_cannot_teach_is_refused_by_the_names_of_the_recipe(target, changes, message):
    form = NemoLossConfig.model_validate({"recipe": "nemo"} | changes)
    with pytest.raises(UserError, match=message):
        require_supported(form, synthetic_manifest(target))


def test_streams_of_unequal_size_are_refused_by_the_name_of_the_recipe():
    manifest = synthetic_manifest(Full(levels=True))
    first, *others = manifest.streams
    streams = (first.model_copy(update={"vocabulary": 20}), *others)
    form = NemoLossConfig(recipe="nemo", kl="joint")
    with pytest.raises(UserError, match=r"loss\.kl=joint: .*; set it to per_codebook"):
        require_supported(form, manifest.model_copy(update={"streams": streams}))
