"""`foretell inspect` and its sub-commands: each parses, calls one function, and prints."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm
from typer.core import TyperGroup

from pipeline.audio_export import clip_text, export_clip
from pipeline.config import load_config
from pipeline.inspection import describe_key, describe_model, describe_store, is_model
from pipeline.inspection_text import store_text
from pipeline.launch import FAILED, FINISHED, MORE_TO_DO
from pipeline.printing import Json, print_document
from stages.errors import UserError
from stages.interruption import stop_request
from store.object_url import place_of

DEFAULT = "show"
"""The command that `foretell inspect STORE` stands for."""


class DefaultGroup(TyperGroup):
    """A group of commands in which the default one needs no name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default command's name before what begins with no name of a command."""
        named = args and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if named or not args else [DEFAULT, *args])


inspect_app = typer.Typer(
    cls=DefaultGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    options_metavar="",
    subcommand_metavar="STORE [OPTIONS] | COMMAND [ARGS]...",
    help="Show what is in a store, down to one timestep, or how large a model is.\n\n"
    f"`foretell inspect STORE` is short for `foretell inspect {DEFAULT} STORE`, whose options "
    f"`foretell inspect {DEFAULT} --help` lists. A folder that is called like a command is "
    "reached as ./diff.",
)


@inspect_app.command(DEFAULT)
def show(
    store: Annotated[
        str,
        typer.Argument(
            metavar="STORE", help="Folder of a store or a model, or s3://….", show_default=False
        ),
    ],
    key: Annotated[
        str | None, typer.Option(help="SAMPLE/VARIATION or SAMPLE/VARIATION/TIMESTEP.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what is in a store, down to one timestep, or how large a model is."""
    path = place_of(store)
    if is_model(path):
        if key is not None:
            raise UserError(f"--key {key} is for a store, but {path} is the folder of a model")
        document = describe_model(path)
    elif key is None:
        document = describe_store(path, partial(tqdm, unit="shard", disable=None))
    else:
        document = describe_key(path, key)
    print_document(document, as_json, lambda: store_text(document))


@inspect_app.command()
def audio(
    store: Annotated[
        str,
        typer.Argument(
            metavar="STORE", help="Folder of a store, or s3://BUCKET/PREFIX.", show_default=False
        ),
    ],
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="SAMPLE/VARIATION.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="WAV file to write.", show_default=False)
    ],
    dataset: Annotated[
        Path | None,
        typer.Option(help="Folder of the dataset, whose audio codec decodes; the run's own."),
    ] = None,
    recording: Annotated[
        bool, typer.Option("--recording", help="The recording behind the rollout instead.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write what the stored codes of a rollout sound like; needs the audio codec."""
    clip = export_clip(
        place_of(store), key, output, dataset=dataset, recording=recording, overwrite=force
    )
    print_document(clip.model_dump() | {"audio_s": clip.audio_s}, as_json, lambda: clip_text(clip))


@inspect_app.command()
def audit(
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG", help="YAML configuration of a run.", show_default=False),
    ],
    fraction: Annotated[
        float, typer.Option(help="Share of the rollouts that is asked for again; one at least.")
    ] = 0.001,
    limit: Annotated[
        float | None,
        typer.Option(
            help="Largest mean drift of a stream or rollout, in nats (a share, for draws and "
            "images); what arithmetic and storage explain."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses the rollouts.", min=0)] = 0,
    round_: Annotated[
        str | None, typer.Option("--round", help="Audit the store of this round.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one key of the configuration."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask the teacher again for some rollouts; exit code 1 where the store holds something else."""
    from pipeline.drift_audit import audit_document, audit_of, audit_text  # noqa: PLC0415, torch
    from stages.drift import AuditChoice  # noqa: PLC0415, likewise

    try:
        with stop_request(at_once=True):  # nothing is written that could be left half done
            found = audit_of(
                load_config(config, set_ or []), round_, AuditChoice(fraction, seed, limit)
            )
    except KeyboardInterrupt:
        raise typer.Exit(MORE_TO_DO) from None
    print_document(audit_document(found), as_json, lambda: audit_text(found))
    raise typer.Exit(FINISHED if found.ok else FAILED)
