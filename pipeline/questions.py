"""The questions of `foretell init`, and what is said when the file is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import typer

from pipeline.first_answers import (
    DEMO,
    FAMILY_OF,
    MACHINE_OF,
    Answers,
    FirstFamily,
    Machine,
    check_data,
    check_guidance,
    check_speakers,
    check_teacher,
    data_question,
    offered_guidance,
    offered_machine,
    offered_teacher,
    teacher_question,
)
from pipeline.first_config import first_config, missing_files
from pipeline.teacher_files import has_baked_contexts
from stages.errors import UserError

Value = TypeVar("Value")

SPEAKERS = "Speakers: the data's names of those that the model knows, in its order, with commas"
"""Asked for a magpie with baked contexts alone."""


def asked(given: Mapping[str, str | None], audio_codec: str | None, terminal: bool) -> Answers:
    """Return the answers: those given, and of a person at the terminal those that are left.

    An answer that will not do is asked for again. Without a terminal every question but the first
    has a default. Raises `UserError` for a given answer that will not do, and typer.Abort where a
    person leaves.
    """

    def answer(
        name: str, question: str | None, default: str | None, check: Callable[[str], Value]
    ) -> Value:
        if given.get(name) is not None:
            return check(str(given[name]))
        if terminal and question is not None:
            return _ask(question, default, check)
        if default is None:
            raise UserError(f"there is no terminal to ask for it: give --{name}")
        return check(default)

    family = answer("family", _choices("Family", FAMILY_OF), None, _one_of(FirstFamily))
    data = answer("data", data_question(family), DEMO, check_data)
    teacher = answer(
        "teacher",
        teacher_question(family, data),
        offered_teacher(family, data),
        lambda text: check_teacher(family, data, text),
    )
    speakers: tuple[str, ...] = ()
    if given.get("speakers") or (family == "magpie" and has_baked_contexts(Path(teacher))):
        speakers = answer("speakers", SPEAKERS, None, lambda text: check_speakers(family, text))
    guidance = answer(
        "guidance",
        "Guidance scale that the student is to learn (1 is none)",
        str(offered_guidance(family, teacher)),
        check_guidance,
    )
    machine = answer(
        "machine", _choices("Machine", MACHINE_OF), offered_machine(teacher), _one_of(Machine)
    )
    return Answers(family, data, teacher, guidance, machine, audio_codec, speakers)


def _ask(question: str, default: str | None, check: Callable[[str], Value]) -> Value:
    def checked(text: str) -> Value:
        try:
            return check(text.strip())
        except UserError as error:
            raise typer.BadParameter(str(error)) from None

    *explanation, question = question.splitlines()  # told once, however often it is asked
    if explanation:
        typer.echo("\n".join(explanation))
    value: Value = typer.prompt(question, default=default, value_proc=checked)
    return value


def _choices(name: str, explained: Mapping[str, str]) -> str:
    lines = (f"  {choice:<10} {what}" for choice, what in explained.items())
    return "\n".join([f"{name}, one of", *lines, name])


def _one_of(literal: Any) -> Callable[[str], Any]:
    choices: Sequence[str] = get_args(literal)

    def check(text: str) -> str:
        if text not in choices:
            raise UserError(f"{text!r} is none of {', '.join(choices)}")
        return text

    return check


def refuse_to_overwrite(path: Path) -> None:
    """Raise `UserError` for a file that exists, or in a folder that does not."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists and is never overwritten: give another name, or move it")
    if not path.parent.is_dir():
        raise UserError(f"{path} lies in the folder {path.parent}, which does not exist: make it")


def write_first_config(path: Path, answers: Answers) -> str:
    """Write a configuration that did not exist, and return what to tell: what comes next."""
    text, config = first_config(path, answers)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        refuse_to_overwrite(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    missing = missing_files(config)
    lines = [f"Wrote {path}. Read it, and change what you like."]
    if missing:
        lines += [f"Not there yet, looked for from {os.getcwd()}:"]
        lines += [f"  {each}" for each in missing]
    begin = "submit" if answers.machine == "slurm" else "run"
    return "\n".join(
        [
            *lines,
            "Next:",
            f"  foretell doctor {path}",
            "    says whether all is here that it needs",
            f"  foretell {begin} {path}",
            "    does all stages; the same command goes on after a stop",
            f"  foretell rollout {path} --estimate",
            "    says what stage one will take, once its data and teacher are there",
        ]
    )
