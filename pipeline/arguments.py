"""Arguments and options that commands share, and how those end that are interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from pipeline.completion import configurations, settings, stores
from pipeline.launch import MORE_TO_DO
from stages.interruption import stop_request

Config = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="YAML configuration of a run; `foretell init` writes one.",
        show_default=False,
        autocompletion=configurations,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one key, e.g. rollout.batch_size=8; may be given again.",
        autocompletion=settings,
    ),
]
StorePlace = Annotated[
    str,
    typer.Argument(
        metavar="STORE",
        help="Folder of a store, or s3://BUCKET/PREFIX.",
        show_default=False,
        autocompletion=stores,
    ),
]
StorePath = Annotated[
    str,
    typer.Argument(
        metavar="STORE", help="Folder of a store.", show_default=False, autocompletion=stores
    ),
]


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """Do what leaves nothing half done; a stop interrupts it, with the code for more to do."""
    try:
        with stop_request(at_once=True):
            yield
    except KeyboardInterrupt:
        raise typer.Exit(MORE_TO_DO) from None
