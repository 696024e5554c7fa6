"""`foretell init`: five answers make a whole configuration, and nothing is ever overwritten."""

from __future__ import annotations

import sys
import tarfile
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, StringIO
from itertools import product
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import pytest
import yaml

from pipeline.commented_yaml import commented_yaml
from pipeline.config import load_config
from pipeline.entry import main
from pipeline.first_answers import (
    DEMO,
    FIT,
    TEACHER_OF,
    Answers,
    FirstFamily,
    Machine,
    offered_guidance,
)
from pipeline.first_config import first_config, missing_files
from pipeline.progress import stages_of
from pipeline.run_config import RunConfig
from pipeline.teacher_files import PipelineFiles, pipeline_files, stacked_frames
from stages.config import OptimizerConfig
from stages.errors import UserError
from tests.test_garbage import Terminal

COMBINATIONS = [
    (family, data, teacher, machine)
    for family, data, machine in product(get_args(FirstFamily), (DEMO, "mine"), get_args(Machine))
    for teacher in (FIT, TEACHER_OF[family], "runs/old/teacher")
    if (family == "codec_lm")
    or (family == "diffusion" and (data == DEMO) == (teacher == FIT))
    or (family == "magpie" and teacher.endswith(".nemo"))
    or (family == "orpheus" and teacher != FIT)
]


def init(*arguments: str | Path, typed: str | None = None) -> tuple[int, str, str]:
    """Exit code, output and errors of `foretell init`; what is typed comes from a terminal."""
    with (
        patch.object(sys, "argv", ["foretell", "init", *map(str, arguments)]),
        patch.object(sys, "stdin", StringIO() if typed is None else Terminal(typed)),
        redirect_stdout(StringIO()) as out,
        redirect_stderr(StringIO()) as err,
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return ended.value.code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("answers", COMBINATIONS, ids="-".join)
def test_every_combination_of_answers_is_a_configuration_that_does_what_was_answered(
    answers, tmp_path
):
    family, data, teacher, machine = answers
    path = tmp_path / "mine.yaml"
    text, meant = first_config(path, Answers(family, data, teacher, 3.5, machine))
    path.write_text(text)
    config = load_config(path)
    assert config == meant
    assert config.name == "mine"
    assert config.rollout.guidance.scale == 3.5
    assert stages_of(config) == [
        *(["prepare"]), *(["fit"] if config.fit else []), "rollout", "train:student", "evaluate",
    ]  # fmt: skip
    assert (config.cluster is not None) == (machine == "slurm")
    trained = config.students["student"].optimizer
    if not (family == "diffusion" and data == DEMO):
        assert {trained.precision, config.rollout.precision} == {
            "fp32" if machine == "cpu" else "bf16"
        }
    source = config.prepare.source
    assert (source is None) == (data == DEMO)
    assert source is None or str(source) == data
    if teacher != FIT:
        assert teacher in text


@pytest.mark.parametrize("family", get_args(FirstFamily))
def test_every_explained_key_has_its_docstring_above_it_once(family, tmp_path):
    teacher = TEACHER_OF[family]
    text, config = first_config(tmp_path / "m.yaml", Answers(family, "mine", teacher, 2.0, "slurm"))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 140
    assert "# Optimizer steps." in text
    assert text.count("# Optimizer steps.\n") == 1
    explained = OptimizerConfig.model_fields["batch_size"].description
    (place,) = [i for i, line in enumerate(lines) if line.endswith(f"# {explained}")]
    assert lines[place + 1].strip().startswith("batch_size:")
    assert yaml.safe_load(text)["rollout"]["batch_size"] == config.rollout.batch_size


def test_values_survive_yaml_whatever_they_look_like():
    document = {
        "name": "on", "runs": "a: b # c", "seed": 3,
        "prepare": {"source": "null", "min_snr_db": 1e-7, "alphabet": "é\n'\"x"},
    }  # fmt: skip
    assert yaml.safe_load(commented_yaml(document, RunConfig.model_validate(document))) == document


def test_a_fitted_teacher_decides_how_its_student_is_built(tiny_run, tmp_path):
    teacher = tiny_run.root / "teacher"
    answers = Answers("codec_lm", "mine", str(teacher), 2.0, "cpu")
    _, config = first_config(tmp_path / "m.yaml", answers)
    model = tiny_run.load().teacher.model
    assert config.students["student"].model == model.model_copy(
        update={"dropout": 0.0, "code_noise": 0.0, "timestep_noise": 0.0}
    )


SIZES = {
    512: ((512, 512), (576, 448), (448, 576), (640, 448), (448, 640), (704, 384), (384, 704)),
    1024: (
        (1024, 1024), (1152, 896), (896, 1152), (1216, 832), (832, 1216), (1344, 768), (768, 1344),
    ),
}  # fmt: skip


def test_images_are_brought_to_sizes_that_a_pipeline_draws(tmp_path):
    blocks = '"block_out_channels": [1, 2, 3, 4]'
    configs = {"unet": f'{{"sample_size": 64, {blocks}}}', "vae": f"{{{blocks}}}"}
    for part, text in configs.items():
        (tmp_path / "sd" / part).mkdir(parents=True)
        (tmp_path / "sd" / part / "config.json").write_text(text)
    for folder, size in {"sd": 512, "nothing": 1024}.items():
        answers = Answers("diffusion", "mine", str(tmp_path / folder), 7.0, "gpu")
        _, config = first_config(tmp_path / "m.yaml", answers)
        assert config.prepare.buckets.sizes == SIZES[size]


def written(family: str, teacher: Path, folder: Path) -> Any:
    return first_config(folder / "m.yaml", Answers(family, "mine", str(teacher), 7.0, "gpu"))[1]


def test_what_stands_for_no_text_is_what_the_pipeline_takes(tmp_path):
    for name, text in {"sdxl": '{"force_zeros_for_empty_prompt": true}', "sd": "{}"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(text)
    kinds = {n: written("diffusion", tmp_path / n, tmp_path).prepare.unconditional.kind
             for n in ("sdxl", "sd", "nothing")}  # fmt: skip
    assert kinds == {"sdxl": "zeros", "sd": "empty", "nothing": "empty"}


def test_files_that_are_damaged_count_as_silent(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text("[")
    (tmp_path / "vae" / "config.json").write_bytes(b"\xff")
    (tmp_path / "unet" / "config.json").write_text("[1]")
    assert pipeline_files(tmp_path) == pipeline_files(tmp_path / "gone") == PipelineFiles()
    (tmp_path / "unet" / "config.json").write_text('{"sample_size": [8, 8], "in_channels": 4}')
    (tmp_path / "vae" / "config.json").write_text('{"block_out_channels": [8, 8]}')
    assert pipeline_files(tmp_path).size == 1024
    (tmp_path / "t.nemo").write_text("no archive")
    assert stacked_frames(tmp_path / "t.nemo") == stacked_frames(tmp_path / "gone.nemo") == 1


def archive(path: Path, text: str) -> Path:
    with tarfile.open(path, "w:gz") as file:
        info = tarfile.TarInfo("./model_config.yaml")
        info.size = len(text)
        file.addfile(info, BytesIO(text.encode()))
    return path


@pytest.mark.parametrize(("frames", "steps"), [(1, (4, 430)), (2, (2, 215)), (4, (1, 107))])
def test_steps_of_a_magpie_hold_as_many_frames_as_it_stacks(frames, steps, tmp_path):
    nemo = archive(tmp_path / "t.nemo", f"frame_stacking_factor: {frames}\n")
    sampler = written("magpie", nemo, tmp_path).rollout.sampler
    assert (sampler.min_timesteps, sampler.max_timesteps) == steps


@pytest.mark.parametrize("text", ["a: [", "- 1", "frame_stacking_factor: many", "b: 1"])
def test_a_magpie_that_says_no_number_of_frames_stacks_none(text, tmp_path):
    assert stacked_frames(archive(tmp_path / "t.nemo", text)) == 1


def test_a_pipeline_that_is_told_its_guidance_is_offered_another_number(tmp_path):
    (tmp_path / "flux" / "transformer").mkdir(parents=True)
    text = '{"guidance_embeds": true, "patch_size": 1}'
    (tmp_path / "flux" / "transformer" / "config.json").write_text(text)
    assert offered_guidance("diffusion", str(tmp_path / "flux")) == 3.5
    assert offered_guidance("diffusion", str(tmp_path / "other")) == 7.0
    config = written("diffusion", tmp_path / "flux", tmp_path)
    assert config.teacher.pretrained.embedded_guidance == 7.0
    assert config.rollout.guidance.scale == 1.0
    answers = Answers("diffusion", "mine", str(tmp_path / "flux"), 7.0, "gpu")
    assert "its student learns fewer steps" in first_config(tmp_path / "m.yaml", answers)[0]


def test_flags_alone_write_a_file_and_say_what_is_missing_and_what_comes_next(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("clips").mkdir()
    flags = ["--family", "magpie", "--data", "clips", "--machine", "slurm"]
    code, told, _ = init("small.yaml", *flags)
    assert code == 0
    config = load_config(Path("small.yaml"))
    assert config.rollout.guidance.scale == 2.5
    missing = missing_files(config)
    assert [line.split(" (")[1] for line in missing] == [
        "prepare.audio_codec.path)", "teacher.pretrained.path)",
    ]  # fmt: skip
    assert all(f"  {line}\n" in told for line in missing)
    for command in ("doctor small.yaml", "submit small.yaml", "rollout small.yaml --estimate"):
        assert f"  foretell {command}\n" in told
    before = Path("small.yaml").read_bytes()
    code, told, error = init("small.yaml", "--family", "codec_lm")
    assert (code, told) == (2, "")
    assert "small.yaml exists and is never overwritten" in error
    assert Path("small.yaml").read_bytes() == before
    code, _, error = init("none/x.yaml", "--family", "codec_lm")
    assert (code, "the folder none, which does not exist" in error) == (2, True)


def test_without_a_terminal_the_family_must_be_given(tmp_path):
    code, _, error = init(tmp_path / "a.yaml", "--data", "x")
    assert (code, error) == (
        2, "foretell: there is no terminal to ask for it: give --family\n",
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--family", "diffusion", "--teacher", "fit", "--data", "x"], "fitted on the demo data"),
        (["--family", "magpie", "--teacher", "fit"], "trained elsewhere"),
        (["--family", "magpie", "--teacher", "model.ckpt"], "is no .nemo"),
        (["--family", "codec_lm", "--guidance", "1"], "guidance 1 is no guidance"),
        (["--family", "codec_lm", "--guidance", "-2"], "not a number of at least 0"),
        (["--family", "codec_lm", "--guidance", "nan"], "not a number of at least 0"),
        (["--family", "codec_lm", "--data", " "], "must be a path, or demo"),
        (["--family", "codec_lm", "--teacher", ""], "must be a path, or fit"),
        (["--family", "codec_lm", "--speakers", "a,b"], "a codec_lm takes those of the data"),
        (["--family", "magpie", "--speakers", "a,a"], "no different names"),
    ],
)
def test_answers_that_will_not_do_are_refused_with_what_would(flags, message, tmp_path):
    code, _, error = init(tmp_path / "a.yaml", *flags)
    assert (code, message in error) == (2, True), error
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_no_run_can_have_is_refused(tmp_path):
    code, _, error = init(tmp_path / "my run.yaml", "--family", "codec_lm")
    assert (code, "would name the run 'my run'" in error) == (2, True)


def test_at_a_terminal_a_wrong_answer_is_asked_again(tmp_path):
    typed = "orphan\norpheus\nmy/clips\nfit\nmy/model\n1\nmuch\n1.8\n\n"
    code, told, _ = init(tmp_path / "a.yaml", typed=typed)
    assert code == 0
    assert "'orphan' is none of codec_lm, magpie, orpheus, diffusion" in told
    assert told.count("an image model of diffusers") == 1, "the choices are told once"
    config = load_config(tmp_path / "a.yaml")
    assert str(config.prepare.source) == "my/clips"
    assert str(config.teacher.model.path) == "my/model"
    assert config.rollout.guidance.scale == 1.8
    assert config.rollout.precision == "bf16", "a gpu is what return alone answers"


def test_what_was_given_is_not_asked_and_what_is_offered_is_taken(tmp_path):
    code, told, _ = init(tmp_path / "a.yaml", "--family", "diffusion", typed="demo\n\n\n")
    assert code == 0
    assert "Family" not in told
    assert "Teacher" not in told, "with the demo there is but one answer"
    assert load_config(tmp_path / "a.yaml").fit is not None


def test_speakers_are_asked_for_where_the_model_knows_them(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.questions.has_baked_contexts", lambda path: True)
    flags = ("--family", "magpie", "--data", "clips")
    code, _, error = init(tmp_path / "a.yaml", *flags)
    assert (code, "give --speakers" in error) == (2, True)
    code, told, _ = init(tmp_path / "a.yaml", *flags, typed="t.nemo\nann, ,bob\nann, bob\n\n\n")
    assert (code, "no different names" in told) == (0, True)
    config = load_config(tmp_path / "a.yaml")
    assert config.teacher.pretrained.speakers == ("ann", "bob")
    assert config.students["student"].model.speakers == ("ann", "bob")
    assert config.prepare.context_s == 0, "nobody reads a context"


def test_who_leaves_the_questions_leaves_nothing(tmp_path):
    code, _, error = init(tmp_path / "a.yaml", typed="codec_lm\n")
    assert (code, error) == (1, "\nforetell: no more answers, so nothing was written\n")
    assert list(tmp_path.iterdir()) == []


def test_answers_from_python_are_checked_too(tmp_path):
    with pytest.raises(UserError, match="fitted on the demo"):
        first_config(tmp_path / "m.yaml", Answers("diffusion", DEMO, "models/sdxl", 7.0, "gpu"))
