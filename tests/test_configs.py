"""Configurations: every shipped one loads, every key is explained, every mistake is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from pipeline.config import KINDS, load_config
from pipeline.diffusion_config import DiffusionRunConfig
from pipeline.folders import RunFolders, system_name
from pipeline.identity import VOLATILE
from pipeline.progress import stage_identity, stages_of
from pipeline.run_config import RunConfig
from stages.errors import UserError
from tests.config_documents import load_changed

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))

STUDENT = {
    "model": {"family": "codec_lm", "d_model": 16, "heads": 2},
    "optimizer": {"steps": 5},
}
PRETRAINED = {"family": "magpie", "path": "t.nemo"}
DOCUMENT: dict[str, Any] = {
    "name": "small",
    "prepare": {"source": "somewhere"},
    "teacher": {"model": {"family": "codec_lm", "d_model": 16, "heads": 2}},
    "fit": {"optimizer": {"steps": 5}},
    "rollout": {"sampler": {"max_timesteps": 20}, "target": {"kind": "top_k", "k": 4}},
    "students": {"student": STUDENT},
    "evaluate": {"samples": 3},
}


@pytest.fixture
def load(tmp_path):
    """Load DOCUMENT with changes `{"a.b": value}`; a value of ... removes the key."""

    def loaded(changes: dict[str, Any] | None = None, *overrides: str) -> RunConfig:
        return load_changed(tmp_path, DOCUMENT, changes, overrides)

    return loaded


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_loads_and_survives_json(path):
    config = load_config(path)
    assert stages_of(config)
    assert KINDS[config.kind].model_validate(json.loads(config.model_dump_json())) == config


def test_a_configuration_is_shipped():
    assert "mini.yaml" in [path.name for path in CONFIGS]


def records_of(record: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    """Every record that a configuration may hold."""
    if record in seen:
        return
    seen.add(record)
    yield record
    for field in record.model_fields.values():
        waiting = [field.annotation]
        while waiting:
            annotation: Any = waiting.pop()
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                yield from records_of(annotation, seen)
            waiting += getattr(annotation, "__args__", ())


RECORDS = list(records_of(RunConfig, seen := set())) + list(records_of(DiffusionRunConfig, seen))


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_every_key_is_explained_where_it_is_declared(record):
    silent = [
        name
        for name, field in record.model_fields.items()
        if not field.description and name not in ("kind", "family")
    ]
    assert not silent, f"{record.__name__} has no docstring under {silent}"
    assert record.__doc__


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_records_are_frozen_and_refuse_unknown_keys(record):
    assert record.model_config["frozen"]
    assert record.model_config["extra"] == "forbid"


def test_the_walk_over_records_reaches_the_deepest():
    names = {record.__name__ for record in RECORDS}
    assert {"Sampler", "TopK", "Full", "ExpertsConfig", "OptimizerConfig", "VoiceConfig"} <= names
    assert {"LoraConfig", "ModelContrast", "TimestepsConfig", "MaskConfig"} <= names


UNKNOWN = {
    "sead": "sead: unknown key; did you mean 'seed'?",
    "fit.optimiser": "fit.optimiser: unknown key; did you mean 'optimizer'?",
    "fit.optimizer.lerning_rate": "fit.optimizer.lerning_rate: unknown key; did you mean "
    "'learning_rate'?",
    "rollout.sampler.temprature": "unknown key; did you mean 'temperature'?",
    "rollout.target.kk": "rollout.target.kk: unknown key; did you mean 'k'?",
    "rollout.target.branchs": "known here: dtype, k, kind, moments, tail_samples, temperatures",
    "rollout.profile.loss_nats": "rollout.profile.loss_nats: unknown key; known here: kind",
    "prepare.audio_codec.path": "prepare.audio_codec.path: unknown key; known here: codebooks",
    "students.student.model.dmodel": "students.student.model.dmodel: unknown key; did you mean "
    "'d_model'?",
    "students.student.loss.klx": "klx: unknown key; did you mean 'kl'?",
    "teacher.model.experts.expert": "expert: unknown key; did you mean 'experts'?",
    "evaluate.zzzz": "evaluate.zzzz: unknown key; known here: audio_samples, batch_size",
}


@pytest.mark.parametrize("key", UNKNOWN)
def test_an_unknown_key_is_named_with_the_one_that_was_meant(load, key):
    tags = {"rollout.profile.kind": "fast", "prepare.audio_codec.kind": "fit"}
    with pytest.raises(UserError) as caught:
        load(tags | {key: 1})
    assert UNKNOWN[key] in str(caught.value)


BAD = {
    "name missing": ({"name": ...}, "name: missing; this key has no default"),
    "steps missing": ({"fit.optimizer.steps": ...}, "fit.optimizer.steps: missing"),
    "sampler missing": ({"rollout.sampler": ...}, "rollout.sampler: missing"),
    "k missing": ({"rollout.target": {"kind": "top_k"}}, "  rollout.target.k: missing"),
    "family missing": (
        {"students.student.model.family": ...},
        "  students.student.model.family: missing; give one of 'codec_lm', 'magpie'",
    ),
    "kind missing": (
        {"rollout.target": {"k": 4}},
        "  rollout.target.kind: missing; give one of 'top_k', 'full', 'sampled', 'hidden', 'dense'",
    ),
    "an unknown kind": (
        {"rollout.target.kind": "topk"},
        "  rollout.target.kind: 'topk' is none of 'top_k', 'full', 'sampled', 'hidden', 'dense'; "
        "did you mean 'top_k'?",
    ),
    "a word for one of two numbers": (
        {"students.student.loss": {"guidance_scale": "much"}},
        "  students.student.loss.guidance_scale: Input should be a valid number",
    ),
    "two of three weights": (
        {"students.student.loss": {"codebook_weights": [1.0, "a"]}},
        "  students.student.loss.codebook_weights.1: Input should be a valid number",
    ),
    "a word for a number": ({"seed": "one"}, "seed: Input should be a valid integer"),
    "a fraction for a count": ({"fit.optimizer.steps": 2.5}, "(given: 2.5)"),
    "a list for a section": ({"fit": [1]}, "fit: must be a section, with keys of its own"),
    "a bad choice": ({"fit.optimizer.precision": "fp8"}, "Input should be 'fp32', "),
    "an unknown family": (
        {"teacher.model.family": "gpt"},
        "  teacher.model.family: 'gpt' is none of 'codec_lm', 'magpie'",
    ),
    "temperature 0": ({"rollout.sampler.temperature": 0}, "temperature is 0.0 but must be > 0"),
    "temperature < 0": ({"rollout.sampler.temperature": -1}, "must be > 0"),
    "distillation temperature 0": (
        {"students.student.loss": {"temperature": 0}},
        "students.student.loss.temperature: Input should be greater than 0",
    ),
    "stored temperature 0": ({"rollout.target.temperatures": [0.0, 1.0]}, "rising numbers > 0"),
    "k below 1": ({"rollout.target.k": 0}, "k is 0 but must be >= 1"),
    "negative guidance": ({"rollout.guidance": {"scale": -1}}, "cfg scale is -1.0"),
    "infinite guidance": ({"rollout.guidance": {"scale": float("inf")}}, "finite number"),
    "batch of nothing": ({"rollout.batch_size": 0}, "rollout.batch_size: Input should be greater"),
    "heads that do not divide": ({"teacher.model.heads": 3}, "  teacher.model: heads=3 does not"),
    "a name that is a path": ({"name": "../up"}, "'../up' is not a run name"),
    "a student that is a path": ({"students": {"../up": STUDENT}}, "is not a student name"),
    "no data": ({"prepare.source": ...}, "exactly one of source"),
    "both datasets": ({"dataset": "d"}, "give prepare (to make a dataset) or dataset"),
    "a stage without its teacher": ({"teacher": ..., "fit": ...}, "rollout needs the section"),
    "a teacher that nobody trains": ({"fit": ...}, "give the section fit exactly when"),
    "no teacher at all": ({"teacher": {}}, "  teacher: give exactly one of model"),
    "two teachers": (
        {"teacher.checkpoint": "t"},
        "(trained elsewhere), not model and checkpoint",
    ),
    "a pretrained teacher to be fitted": (
        {"teacher": {"pretrained": PRETRAINED}},
        "give the section fit exactly when teacher.model",
    ),
    "a pretrained teacher of no checkpoint": (
        {"teacher": {"pretrained": PRETRAINED | {"path": "t.safetensors"}}, "fit": ...},
        "  teacher.pretrained: path=t.safetensors is no MagpieTTS checkpoint",
    ),
    "no loss": ({"students.student.loss": {"kl": 0}}, "all terms of the loss weigh 0"),
    "a loss that the store will not teach": (
        {"students.student.loss": {"nrmse": 0.5}},
        "students.student.loss.nrmse=0.5: it needs the moments of the teacher's logits",
    ),
    "a recipe that the store will not teach": (
        {"students.student.loss": {"recipe": "nemo"}},
        "students.student.loss.beta=2.0: it needs the moments of the teacher's logits",
    ),
    "a temperature that the store will not keep": (
        {"students.student.loss": {"temperature": 2}},
        "students.student.loss.temperature=2.0: the store keeps the mass of the tail at the "
        "temperatures [1.0]",
    ),
    "branches that nobody mixes": (
        {"rollout.target": {"kind": "hidden", "branches": "both"}},
        "students.student.loss.guidance_scale was not given",
    ),
    "a source without its student": ({"rollout.source": "student"}, "name the student exactly"),
    "a replay without its store": ({"rollout.source": "replay"}, "name the store exactly"),
    "a store that is not replayed": ({"rollout.replay": "s"}, "replay=s: name the store exactly"),
    "a checkpoint without path": (
        {"students.student.init": {"kind": "checkpoint"}},
        "give a path exactly for 'checkpoint'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_is_named_with_its_place_and_what_is_possible(load, case):
    changes, words = BAD[case]
    with pytest.raises(UserError) as caught:
        load(changes)
    assert words in str(caught.value)
    assert "config.yaml is not a valid configuration" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_a_loss_is_not_held_against_a_store_that_is_written_elsewhere(load):
    sections = dict.fromkeys(("prepare", "teacher", "fit", "rollout", "evaluate"), ...)
    config = load(sections | {"store": "s", "students.student.loss": {"nrmse": 0.5}})
    assert config.students["student"].loss.terms_config.nrmse == 0.5


def test_all_mistakes_are_named_at_once(load):
    with pytest.raises(UserError) as caught:
        load({"sead": 1, "fit.optimizer.steps": "x", "rollout.target.k": 0})
    assert str(caught.value).count("\n") == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("name: [", "is not valid YAML"),
        ("- a list", "must hold a mapping of sections, not list"),
        ("", "must hold a mapping of sections"),
        ("name: !!python/object/apply:os.system ['true']", "is not valid YAML"),
        ("a: \x00", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content, words):
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        load_config(path)


def test_a_file_that_is_missing_or_no_text_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the configuration .*gone\.yaml"):
        load_config(tmp_path / "gone.yaml")
    with pytest.raises(UserError, match="cannot read the configuration"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not valid YAML"):
        load_config(tmp_path / "binary.yaml")


def test_overrides_replace_and_add_keys_at_any_depth_with_yaml_values(load):
    config = load(
        None, "seed=7", "rollout.sampler.top_p=0.5", "students.student.loss.kl=2.0",
        "rollout.sampler.top_k=null", "evaluate.judges=[whisper]",
    )  # fmt: skip
    assert config.seed == 7
    assert config.rollout.sampler.top_p == 0.5
    assert config.rollout.sampler.top_k is None
    assert config.students["student"].loss.kl == 2.0
    assert config.evaluate.judges == ("whisper",)


def test_an_override_changes_one_place_of_a_section_that_stands_in_several(tmp_path):
    path = tmp_path / "shared.yaml"
    path.write_text(yaml.safe_dump(DOCUMENT | {"students": {"student": STUDENT, "half": STUDENT}}))
    assert "&id" in path.read_text(), "the test needs a section that is shared"
    students = load_config(path, ["students.half.optimizer.steps=9"]).students
    assert {name: s.optimizer.steps for name, s in students.items()} == {"student": 5, "half": 9}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "is not of the form section.key=value"),
        ("=3", "is not of the form"),
        ("a..b=3", "is not of the form"),
        ("seed.deeper=3", "'seed' is a value, not a section"),
        ("seed=[", "the value is not valid YAML"),
        ("rollout.sampler.temprature=1", "did you mean 'temperature'?"),
    ],
)
def test_a_bad_override_is_refused(load, override, words):
    with pytest.raises(UserError) as caught:
        load({"seed": 1}, override)
    assert words in str(caught.value)


def test_a_pretrained_teacher_has_nothing_to_fit(load):
    config = load({"teacher": {"pretrained": PRETRAINED}, "fit": ...})
    assert config.teacher.pretrained.path == Path("t.nemo")
    assert "fit" not in stages_of(config)
    other = load({"teacher": {"pretrained": PRETRAINED | {"path": "u.nemo"}}, "fit": ...})
    assert stage_identity(config, "rollout") != stage_identity(other, "rollout")


def test_stages_come_in_the_order_of_their_work(load):
    config = load({"students.half": STUDENT})
    assert stages_of(config) == [
        "prepare", "fit", "rollout", "train:student", "train:half", "evaluate",
    ]  # fmt: skip


def test_students_have_folders_and_report_names_of_their_own():
    assert system_name("student") == "student"
    assert system_name("half") == "student_half"


def test_folders_lie_below_the_run_unless_they_are_given(load):
    folders = RunFolders(load({"store": "elsewhere/store"}))
    assert folders.store == Path("elsewhere/store")
    assert folders.teacher == Path("runs/small/teacher")
    assert folders.student("half") == Path("runs/small/student_half")


DEPENDS = {
    "seed": (1, {"fit", "rollout", "train:student", "evaluate"}),
    "prepare.dev_texts": (7, {"prepare", "fit", "rollout", "train:student", "evaluate"}),
    "fit.condition_dropout": (0.3, {"fit", "rollout", "train:student", "evaluate"}),
    "teacher.model.dropout": (0.3, {"fit", "rollout", "train:student", "evaluate"}),
    "rollout.guidance": ({"scale": 3.0}, {"rollout", "train:student", "evaluate"}),
    "rollout.batch_size": (7, {"rollout", "train:student", "evaluate"}),
    "students.student.loss": ({"ce": 1.0}, {"train:student", "evaluate"}),
    "evaluate.samples": (4, {"evaluate"}),
    "fit.optimizer.log_every": (3, set()),
    "fit.optimizer.device": ("cpu", set()),
    "rollout.processes": (3, set()),
    "rollout.disk_check": (False, set()),
    "rollout.free_floor": (5, set()),
    "students.student.optimizer.micro_batch_size": (1, set()),
    "students.student.loader": ({"workers": 2}, set()),
    "students.student.variations": ("one", {"train:student", "evaluate"}),
    "runs": ("other", set()),
    "name": ("other", set()),
}


@pytest.mark.parametrize("key", DEPENDS)
def test_a_stage_is_stale_exactly_when_something_it_depends_on_has_changed(load, key):
    value, expected = DEPENDS[key]
    plain, changed = load(), load({key: value})
    stale = {s for s in stages_of(plain) if stage_identity(plain, s) != stage_identity(changed, s)}
    assert stale == expected


def test_what_never_makes_a_stage_stale_is_what_changes_only_its_speed_or_its_stop():
    fast = {"processes", "parallel", "device", "log_every", "micro_batch_size", "loader"}
    kept = {"checkpoint_every", "keep_checkpoints", "disk_check", "free_floor", "tensorboard"}
    assert fast | kept == VOLATILE


def test_the_configuration_of_published_models_keeps_the_capitals_that_their_tokenizers_know():
    (path,) = (path for path in CONFIGS if path.stem == "magpie_cfg")
    assert not load_config(path).prepare.lower_case
