"""What a person meets before anything runs: help that reads in a terminal."""

from __future__ import annotations

import re
import shlex
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import pytest
from typer.main import get_command

from pipeline.cli import app
from pipeline.entry import main
from pipeline.grouped_help import GROUPS
from pipeline.printing import tell

COMMANDS = get_command(app).commands
ROOT = Path(__file__).parent.parent


def said(*arguments: str) -> tuple[int, str]:
    """Exit code and standard output of a command in a terminal of 80 columns without colour."""
    with (
        patch("sys.argv", ["foretell", *arguments]),
        redirect_stdout(StringIO()) as out,
        redirect_stderr(StringIO()) as err,
        pytest.raises(SystemExit) as ended,
    ):
        main()
    assert err.getvalue() == ""
    return ended.value.code, out.getvalue()


@pytest.fixture(autouse=True)
def narrow(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    monkeypatch.setenv("NO_COLOR", "1")


def test_the_help_lists_every_command_once_below_what_it_is_for_in_a_whole_sentence():
    code, text = said("--help")
    assert code == 0
    places = [text.index(f"\n{group}:\n") for group in GROUPS]
    assert places == sorted(places)
    assert places[-1] < text.index("\nOptions:\n") < text.index("\nExamples:\n")
    listed = text[places[0] : text.index("\nOptions:\n")]
    rows = dict(re.findall(r"^  (\S+)  +(\S.*)$", listed, flags=re.MULTILINE))
    assert sorted(rows) == sorted(COMMANDS)
    assert len(re.findall(r"^  \S", listed, flags=re.MULTILINE)) == len(COMMANDS), "one line each"
    assert [row for row in rows.values() if not row.endswith(".") or row.endswith("...")] == []


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_80_columns_and_ends_with_examples(command):
    code, text = said(*command.split(), "--help")
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert text.startswith(f"Usage: foretell {command}".rstrip())
    assert re.search(r"^ *Examples:\n( +\S.*\n)+\Z", text, flags=re.MULTILINE)


def examples() -> list[str]:
    epilogs = [get_command(app).epilog, *(command.epilog for command in COMMANDS.values())]
    lines = [
        line.strip() for epilog in epilogs for line in epilog.replace("\\\n", " ").splitlines()
    ]
    return [line for line in lines if line and line not in ("\b", "Examples:")]


def test_the_example_of_answers_names_files_as_listening_sheets_write_them():
    (tallied,) = (example for example in examples() if example.startswith("foretell tally"))
    script = (ROOT / "pipeline" / "listening.js").read_text(encoding="utf-8")
    (suffix,) = re.findall(r"link\.download = .*(\.\w+)`", script)
    assert tallied.endswith(f"*{suffix}")


@pytest.mark.parametrize("example", sorted(set(examples())))
def test_examples_are_commands_that_exist_with_options_that_they_have(example):
    words = shlex.split(example, comments=True)
    if words[0] == "torchrun":
        words = ["foretell", *words[words.index("pipeline") + 1 :]]
    assert words[0] == "foretell"
    if "COMMAND" in words:
        return
    command = COMMANDS[words[1]]
    context = command.make_context(words[1], words[2:])
    assert not context.args or words[1] == "inspect"


class Screen(StringIO):
    """A terminal on which something is told."""

    def isatty(self) -> bool:
        return True


def test_what_is_told_breaks_no_word_on_a_terminal_and_no_line_elsewhere():
    path = "/a/path/that/is/longer/than/" + "a-terminal/" * 8 + "x.yaml"
    message = f"foretell: cannot read {path}: there is no such file\n  prepare.source: missing"
    with redirect_stderr(StringIO()) as file:
        tell(message)
    assert file.getvalue() == message + "\n"
    with redirect_stderr(Screen()) as screen:
        tell(message)
    lines = screen.getvalue().splitlines()
    assert path in " ".join(lines).replace(":", "").split()
    assert [line for line in lines if len(line) > 80 and path not in line] == []
    assert lines[-1] == "  prepare.source: missing"
    assert screen.getvalue().split() == message.split()
