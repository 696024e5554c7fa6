"""The commands that keep stores: each parses, calls one function, and prints."""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated

import typer
from tqdm import tqdm

from pipeline.arguments import StorePath, StorePlace, stopped_at_once
from pipeline.conversion import ProfileName, conversion_text, profile_of
from pipeline.copying import copy_text
from pipeline.garbage import deletion_text, garbage_text
from pipeline.inspection_text import verification_text
from pipeline.launch import FAILED, FINISHED
from pipeline.printing import Json, print_document
from pipeline.repair import repair_text
from stages.errors import UserError
from store import verify as check
from store.convert import convert as convert_store
from store.copying import copy_store
from store.garbage import delete_garbage, find_garbage
from store.repair import after_repair, repairable
from store.repair import repair as take_out


def verify(
    store: StorePlace,
    repair: Annotated[
        bool, typer.Option("--repair", help="Take damaged shards out, to be made again.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Take them out without asking.")] = False,
    as_json: Json = False,
) -> None:
    """Check every file and array of a store against its checksums.

    Exit code 1 where anything is damaged.
    """
    if yes and not repair:
        raise UserError("--yes answers what --repair asks: give both, or neither")
    result = check(store, partial(tqdm, unit="shard", disable=None))
    damaged = repairable(result) if repair else []
    if not as_json:
        typer.echo(verification_text(result))
    if damaged and not yes and not as_json:
        question = f"Take {len(damaged)} damaged shards out of the store, to be made again?"
        yes = _confirm(question, "nothing was taken out")
    repaired = take_out(store, damaged) if damaged and yes else []
    after = after_repair(result, repaired)
    document = after.model_dump(mode="json") | {"repaired": [r.model_dump() for r in repaired]}
    if as_json or repair:
        print_document(document, as_json, lambda: repair_text(result, damaged, repaired))
    raise typer.Exit(FINISHED if after.ok else FAILED)


def convert(
    store: StorePath,
    destination: Annotated[
        str, typer.Argument(metavar="DESTINATION", help="Folder to make.", show_default=False)
    ],
    profile: Annotated[ProfileName, typer.Option(help="How the arrays are encoded.")],
    loss_nats: Annotated[
        float | None,
        typer.Option(metavar="NATS", help="Bound on the KL that compact may cost, in nats."),
    ] = None,
    hidden_step: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Step of compact hidden states, as a share of their root mean square.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a store in another profile, verify it, say what it cost.

    `fast` is mapped into memory, `compact` takes the fewest bytes.
    """
    chosen = profile_of(profile, loss_nats, hidden_step)
    bar = partial(tqdm, unit="shard", disable=None)
    with stopped_at_once():  # a shard appears whole or not at all
        result = convert_store(store, destination, chosen, bar)
    print_document(result.model_dump(mode="json"), as_json, lambda: conversion_text(result))


def copy(
    source: StorePlace,
    destination: Annotated[
        str,
        typer.Argument(
            metavar="DESTINATION",
            help="Folder or URL to make, or to go on with.",
            show_default=False,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Copy a store between folders and object storage, comparing sums.

    The same command goes on where a copy was interrupted.
    """
    with stopped_at_once():  # a shard appears whole or not at all
        result = copy_store(source, destination, partial(tqdm, unit="shard", disable=None))
    print_document(result.model_dump(mode="json"), as_json, lambda: copy_text(result))
    raise typer.Exit(FAILED if result.differing else FINISHED)


def gc(
    store: StorePlace,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
    as_json: Json = False,
) -> None:
    """List what killed jobs left in a store; delete it if you say so.

    Committed shards are never deleted.
    """
    found = find_garbage(store)
    if not as_json:
        typer.echo(garbage_text(found))
    if found and not yes and not as_json:
        question = "Delete all of it? A job that writes now has its work there too"
        yes = _confirm(question, "nothing was deleted")
    kept = delete_garbage(store, found) if yes else []
    document = {"found": [f.model_dump() for f in found], "kept": [k.model_dump() for k in kept]}
    print_document(document | {"deleted": yes}, as_json, lambda: deletion_text(found, kept, yes))
    raise typer.Exit(FAILED if kept else FINISHED)


def _confirm(question: str, otherwise: str) -> bool:
    """Ask a person; raises UserError that begins with `otherwise` where there is no terminal."""
    if not sys.stdin.isatty():
        raise UserError(f"{otherwise}: there is no terminal to ask; --yes answers the question")
    return typer.confirm(question, default=False)
