"""`foretell inspect` and its sub-commands: each parses, calls one function, and prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial, reduce
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from pipeline.arguments import Config, Set, StorePlace, stopped_at_once
from pipeline.audio_export import clip_text, export_clip
from pipeline.comparison import describe_difference
from pipeline.comparison_text import difference_text
from pipeline.completion import stores
from pipeline.entry import ending_at_once
from pipeline.grouped_help import GroupedHelp, PlainTyper, examples
from pipeline.inspection import (
    describe_model,
    describe_shard,
    is_model,
    store_parts,
)
from pipeline.inspection_csv import csv_text
from pipeline.inspection_text import store_text
from pipeline.launch import FAILED, FINISHED
from pipeline.printing import Json, print_document, tell
from pipeline.rollout_inspection import Document, describe_key, describe_rollout
from stages.errors import UserError
from store import PredictionStore
from store.object_url import ObjectUrl, place_of

DEFAULT = "show"
"""The command that `foretell inspect STORE` stands for."""
BAR = partial(tqdm, unit="shard", leave=False, disable=None)
"""Shows progress on a terminal."""


class DefaultGroup(GroupedHelp):
    """A group of commands in which the default one needs no name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default command's name before what begins with no name of a command."""
        named = args and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if named or not args else [DEFAULT, *args])


inspect_app = PlainTyper(
    cls=DefaultGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    options_metavar="",
    subcommand_metavar="STORE | COMMAND [ARGS]...",
    help="Show what is in a store, down to one timestep, or how large a model is.\n\n"
    f"`foretell inspect STORE` is short for `foretell inspect {DEFAULT} STORE`, whose options "
    f"`foretell inspect {DEFAULT} --help` lists. A folder that is called like a command is "
    "reached as ./diff.",
    epilog=examples(
        "foretell inspect runs/my/store",
        "foretell inspect runs/my/store --key SAMPLE/0/12",
        "foretell inspect runs/my/student",
    ),
)


Csv = Annotated[bool, typer.Option("--csv", help="Print one table of comma-separated values.")]


@inspect_app.command(DEFAULT)
def show(
    store: Annotated[
        str,
        typer.Argument(
            metavar="STORE",
            help="Folder of a store or a model, or s3://….",
            show_default=False,
            autocompletion=stores,
        ),
    ],
    key: Annotated[
        str | None, typer.Option(help="SAMPLE/VARIATION or SAMPLE/VARIATION/TIMESTEP.")
    ] = None,
    shard: Annotated[int | None, typer.Option(help="Number of a shard.", min=0)] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Read the arrays of every shard, not of a few.")
    ] = False,
    as_json: Json = False,
    as_csv: Csv = False,
) -> None:
    """Show what is in a store, or how large a model is.

    Of a store also one shard, one rollout, or one timestep with its candidates.
    """
    asked = {"--key": key is not None, "--shard": shard is not None, "--all": everything}
    refuse_together({"--json": as_json, "--csv": as_csv})
    refuse_together(asked)
    path = place_of(store)
    with ending_at_once():  # pyarrow imports pandas at its first use, where it is installed
        parts = parts_of(path, key, shard, asked)
    print_parts(parts, as_json, as_csv)


def parts_of(
    path: Path | ObjectUrl, key: str | None, shard: int | None, asked: dict[str, bool]
) -> Iterator[Document]:
    """Return what `show` shows; of a whole store what is read lazily, part by part."""
    if is_model(path):
        for option in (name for name, given in asked.items() if given):
            raise UserError(f"{option} is for a store, but {path} is the folder of a model")
        return iter([describe_model(path)])
    if key is not None:
        return iter([describe_key(path, key)])
    if shard is not None:
        return iter([describe_shard(path, shard)])
    return store_parts(PredictionStore.open(path), asked["--all"], BAR)


@inspect_app.command()
def diff(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="Store (folder or s3://…), run folder, model folder, or configuration.",
            show_default=False,
        ),
    ],
    b: Annotated[
        str, typer.Argument(metavar="B", help="Another one of its kind.", show_default=False)
    ],
    everything: Annotated[
        bool, typer.Option("--all", help="Compare every common rollout, not 256 of them.")
    ] = False,
    as_json: Json = False,
    as_csv: Csv = False,
) -> None:
    """Show what differs between two stores or two runs.

    Settings, keys and codes, and the KL between their targets where both follow on equal codes.
    """
    refuse_together({"--json": as_json, "--csv": as_csv})
    bar = partial(tqdm, unit="rollout", leave=False, disable=None)
    found = describe_difference(place_of(a), place_of(b), everything, bar)
    print_document(found, as_json, lambda: csv_text(found) if as_csv else difference_text(found))


@inspect_app.command()
def plot(
    store: StorePlace,
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write: .png or .svg.")],
    key: Annotated[
        str | None, typer.Option(help="SAMPLE/VARIATION: a picture of this rollout.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Read the arrays of every shard, not of a few.")
    ] = False,
) -> None:
    """Draw the distributions of a store, or one rollout.

    Of a rollout: how sure the teacher was over timesteps and streams, as a heat map.
    """
    from pipeline.plots import check_format, plot_rollout, plot_store  # noqa: PLC0415, matplotlib

    refuse_together({"--key": key is not None, "--all": everything})
    check_format(output)
    path = place_of(store)
    with ending_at_once():
        opened = PredictionStore.open(path)
    if key is None:
        found = reduce(dict.__or__, store_parts(opened, everything, BAR))
        for damaged in (*found["unreadable"], *found["statistics"]["unreadable"]):
            tell(f"shard {damaged['shard']} is left out: {damaged['reason']}")
        plot_store(found, str(path), output)
    else:
        streams = [stream.name for stream in opened.manifest.streams]
        plot_rollout(describe_rollout(path, key), streams, output)
    typer.echo(f"wrote {output}")


@inspect_app.command()
def serve(
    place: Annotated[
        str,
        typer.Argument(
            metavar="STORE",
            help="Folder of a store or of a run, or s3://BUCKET/PREFIX.",
            show_default=False,
            autocompletion=stores,
        ),
    ],
    run: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="A further run, whose systems are heard."),
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(help="Folder of the dataset, whose audio codec decodes; the run's own."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Where to listen; elsewhere than here readers need a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port; 0 for a free one.", min=0, max=65535)] = 8765,
    token: Annotated[
        str | None, typer.Option(help="What readers must know; drawn where one is needed.")
    ] = None,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open a browser.")] = False,
) -> None:
    """Show a store and its runs on a local web page, until interrupted."""
    # A web server, which nobody else waits for.
    from pipeline.browse.serving import Listening, browse_of, serve_page  # noqa: PLC0415

    def say(address: str) -> None:
        typer.echo(address)
        tell("Ctrl-C ends it.")

    browse, listening = browse_of(place, run or [], dataset), Listening(host, port, token)
    serve_page(browse, listening, say, open_browser=open_)


def refuse_together(options: dict[str, bool]) -> None:
    """Refuse options of which one alone can be given; raises UserError."""
    given = [name for name, is_given in options.items() if is_given]
    if len(given) > 1:
        raise UserError(f"{given[0]} and {given[1]} exclude each other: give one of them")


def print_parts(parts: Iterator[Document], as_json: bool, as_csv: bool) -> None:
    """Print every part as soon as it is known; as JSON or CSV all of them together."""
    if as_json or as_csv:
        whole = reduce(dict.__or__, parts)
        typer.echo(csv_text(whole) if as_csv else json.dumps(whole, ensure_ascii=False))
        return
    for part in parts:
        typer.echo(store_text(part))
        sys.stdout.flush()


@inspect_app.command()
def audio(
    store: StorePlace,
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="SAMPLE/VARIATION.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="WAV file to write.", show_default=False)
    ],
    dataset: Annotated[
        Path | None,
        typer.Option(help="Folder of the dataset with the audio codec. [default: the run's]"),
    ] = None,
    recording: Annotated[
        bool, typer.Option("--recording", help="The recording behind the rollout instead.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write a rollout as it sounds to a WAV file.

    Its stored codes are decoded; no model is loaded but the audio codec.
    """
    clip = export_clip(
        place_of(store), key, output, dataset=dataset, recording=recording, overwrite=force
    )
    print_document(clip.model_dump() | {"audio_s": clip.audio_s}, as_json, lambda: clip_text(clip))


@inspect_app.command()
def audit(
    config: Config,
    fraction: Annotated[
        float, typer.Option(help="Share of the rollouts that is asked for again; one at least.")
    ] = 0.001,
    limit: Annotated[
        float | None,
        typer.Option(
            help="Largest mean drift of the predictions of a stream or rollout, in nats (a share "
            "for draws and images). [default: what arithmetic and storage explain]"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses the rollouts.", min=0)] = 0,
    round_: Annotated[
        str | None,
        typer.Option("--round", help="Audit the store of this round. [default: the run's own]"),
    ] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Ask the teacher again and compare.

    Exit code 1 where the store holds something else than the teacher predicts.
    """
    # Settings, and torch, which nobody else waits for.
    from pipeline.config import load_config  # noqa: PLC0415
    from pipeline.drift_audit import audit_document, audit_of, audit_text  # noqa: PLC0415
    from stages.drift import AuditChoice  # noqa: PLC0415

    with stopped_at_once():  # nothing is written
        found = audit_of(
            load_config(config, set_ or []), round_, AuditChoice(fraction, seed, limit)
        )
    print_document(audit_document(found), as_json, lambda: audit_text(found))
    raise typer.Exit(FINISHED if found.ok else FAILED)
