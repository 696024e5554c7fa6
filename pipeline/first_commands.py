"""The commands that a person types first: each parses, calls one function, and prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.completion import configurations
from pipeline.config import load_config
from pipeline.doctor import diagnose
from pipeline.doctor_text import diagnosis_text
from pipeline.first_answers import FirstFamily, Machine
from pipeline.launch import FAILED, FINISHED
from pipeline.printing import Json, print_document, tell
from pipeline.questions import asked, refuse_to_overwrite, write_first_config


def init(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="File to write; the run is named after it.")
    ] = Path("my.yaml"),
    family: Annotated[
        FirstFamily | None, typer.Option(help="Kind of model.", show_default=False)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Recordings or images, or the word demo."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Trained teacher, or the word fit to train one."),
    ] = None,
    guidance: Annotated[
        str | None, typer.Option(metavar="SCALE", help="Guidance scale that the student learns.")
    ] = None,
    machine: Annotated[Machine | None, typer.Option(help="Where it is to run.")] = None,
    audio_codec: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Audio codec of a trained teacher; never asked for."),
    ] = None,
    speakers: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="The data's names of the speakers that a magpie knows, if it does, in its order.",
        ),
    ] = None,
) -> None:
    """Write a commented configuration of a run, from five answers.

    What no option answers is asked for; without a terminal, --family is needed and the others have
    defaults. A file that exists is never overwritten.
    """
    refuse_to_overwrite(path)
    given = {"family": family, "data": data, "teacher": teacher, "guidance": guidance}
    given |= {"machine": machine, "speakers": speakers}
    try:
        answers = asked(given, audio_codec, sys.stdin.isatty())
    except typer.Abort:
        tell("\nforetell: no more answers, so nothing was written")
        raise typer.Exit(FAILED) from None
    typer.echo(write_first_config(path, answers))


def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG",
            help="YAML configuration of a run; without one, all that foretell may do.",
            show_default=False,
            autocompletion=configurations,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what can run on this machine, and what to install.

    Imports what is installed, which takes seconds. Exit code 0 when the base works and, of a
    configuration, all that it needs is there; 1 otherwise.
    """
    found = diagnose(load_config(config) if config else None)
    print_document(found.model_dump(mode="json"), as_json, lambda: diagnosis_text(found))
    raise typer.Exit(FINISHED if found.ok else FAILED)
