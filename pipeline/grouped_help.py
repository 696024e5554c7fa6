"""How `--help` is laid out: commands by what they are for, then options, then examples.

It must read without colour, in 80 columns and aloud, so there are no boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import cleandoc
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

START, STAGES, CLUSTER = "Start here", "Stages, one at a time", "On a cluster (Slurm)"
STORES, LISTENING = "Stores", "Judged by ears"
GROUPS = (START, STAGES, CLUSTER, STORES, LISTENING)
"""What commands are for, in the order of the help; a command names its group as its panel."""
OTHERS = "Commands"
LONGEST_SENTENCE = 1000
"""Letters; the first sentence on a command is shown whole, and wrapped where it is long."""


Handler = TypeVar("Handler", bound=Callable[..., Any])


class PlainCommand(TyperCommand):
    """A command whose help names its arguments as a person types them: CONFIG, not {CONFIG}."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return what stands behind the name of the command."""
        return ["[OPTIONS]", *(_in_usage(argument) for argument in _of_kind(self, ctx, "argument"))]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, without the types of Python, and options."""
        rows = [(_name(argument), argument.help) for argument in _of_kind(self, ctx, "argument")]
        if rows:
            with formatter.section("Arguments"):
                formatter.write_dl(rows)
        _write_options(self, ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples."""
        _write_epilog(self, formatter)


class PlainTyper(typer.Typer):
    """A group of commands whose help is plain."""

    def command(self, *args: Any, **settings: Any) -> Callable[[Handler], Handler]:
        """Return the decorator of a command, of `PlainCommand` unless told otherwise."""
        return super().command(*args, **{"cls": PlainCommand} | settings)


class GroupedHelp(TyperGroup):
    """A group of commands whose help lists them below a heading for each `rich_help_panel`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands first: who asks for help here looks for one."""
        self.format_commands(ctx, formatter)
        _write_options(self, ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each group, with the first sentence on every command."""
        width = max(map(len, self.commands))
        rows: dict[str, list[tuple[str, str]]] = {group: [] for group in (*GROUPS, OTHERS)}
        for name, command in self.commands.items():
            group = getattr(command, "rich_help_panel", None)
            whole = command.get_short_help_str(LONGEST_SENTENCE)
            rows[group if group in GROUPS else OTHERS].append((name.ljust(width), whole))
        for group in filter(rows.get, rows):
            with formatter.section(group):
                formatter.write_dl(rows[group])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples."""
        _write_epilog(self, formatter)


def _of_kind(command: Any, ctx: Any, kind: str) -> Iterator[Any]:
    return (param for param in command.get_params(ctx) if param.param_type_name == kind)


def _name(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return f"{name}..." if argument.nargs != 1 else name


def _in_usage(argument: Any) -> str:
    return _name(argument) if argument.required else f"[{_name(argument)}]"


def _write_options(command: Any, ctx: Any, formatter: Any) -> None:
    records = (option.get_help_record(ctx) for option in _of_kind(command, ctx, "option"))
    with formatter.section("Options"):
        formatter.write_dl([record for record in records if record is not None])


def _write_epilog(command: Any, formatter: Any) -> None:
    if command.epilog:
        formatter.write_paragraph()
        formatter.write_text(cleandoc(command.epilog))


def examples(*commands: str) -> str:
    """Return an epilog that shows how a command is typed; no line of it is wrapped."""
    return "\n".join(["\b", "Examples:", *(f"  {command}" for command in commands)])
