"""How `--help` is laid out: commands by what they are for, then options, then examples.

It must read without colour, in 80 columns and aloud, so there are no boxes.
"""

from __future__ import annotations

from collections.abc import Iterator
from inspect import cleandoc
from typing import Any

from typer.core import TyperCommand, TyperGroup

START, STAGES, CLUSTER = "Start here", "Stages, one at a time", "On a cluster (Slurm)"
STORES, LISTENING = "Stores", "Judged by ears"
GROUPS = (START, STAGES, CLUSTER, STORES, LISTENING)
"""What commands are for, in the order of the help; a command names its group as its panel."""


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


class GroupedHelp(TyperGroup):
    """A group of commands whose help lists them below a heading for each `rich_help_panel`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands first: who asks for help here looks for one."""
        self.format_commands(ctx, formatter)
        _write_options(self, ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each group, with the first sentence on every command."""
        width = max(map(len, self.commands))
        limit = formatter.width - width - 4
        for group in GROUPS:
            rows = [
                (name.ljust(width), command.get_short_help_str(limit))
                for name, command in self.commands.items()
                if getattr(command, "rich_help_panel", None) == group
            ]
            with formatter.section(group):
                formatter.write_dl(rows)

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
