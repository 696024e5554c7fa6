"""The commands of listening tests: each parses, calls one function, and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.arguments import Config, Set
from pipeline.completion import systems
from pipeline.config import speech_run
from pipeline.launch import FAILED, FINISHED
from pipeline.listening import (
    SheetOptions,
    export_document,
    export_sheets,
    export_text,
    tally_answers,
    tally_text,
)
from pipeline.printing import Json, print_document
from stages.listening import Kind


def listen(
    config: Config,
    sheets: Annotated[
        int, typer.Option(metavar="N", help="Sheets, for as many listeners.", min=1)
    ] = 1,
    items: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Samples of the report that are heard; without it, all.", min=1
        ),
    ] = None,
    system: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="System that is heard, such as recording or student; may be given again; "
            "without it, all of the report.",
            autocompletion=systems,
        ),
    ] = None,
    only: Annotated[
        Literal["mos", "ab"] | None,
        typer.Option(help="Rate clips (mos) or compare pairs (ab); without it, both."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of orders and names.", min=0)] = 0,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Write blind listening sheets of a finished evaluation.

    Each sheet is a page for one listener; the key that says who spoke stays with you.
    """
    settings = speech_run(config, set_ or [], "listen")
    kinds: tuple[Kind, ...] = ("mos", "ab") if only is None else (only,)
    options = SheetOptions(sheets, items, tuple(system or ()), kinds, seed)
    key = export_sheets(settings, options)
    print_document(export_document(settings, key), as_json, lambda: export_text(settings, key))


def tally(
    config: Config,
    answers: Annotated[
        list[Path],
        typer.Argument(
            metavar="ANSWERS", help="The answers files of all listeners.", show_default=False
        ),
    ],
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Sum up what listeners answered, with intervals.

    Exit code 1 where something in the files does not count.
    """
    result = tally_answers(speech_run(config, set_ or [], "tally"), answers)
    print_document(result.model_dump(mode="json"), as_json, lambda: tally_text(result))
    raise typer.Exit(FAILED if result.faults or not result.answers else FINISHED)
