"""The page of a listening sheet: it plays clips by neutral names and keeps what is answered."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template

from stages.listening import Kind, Question, Sheet

TITLES: Mapping[Kind, str] = {
    "mos": "How natural does this sound?",
    "ab": "Which of the two sounds more natural?",
}
LABELS: Mapping[Kind, Mapping[str, str]] = {
    "mos": {"1": "bad", "2": "poor", "3": "fair", "4": "good", "5": "excellent"},
    "ab": {"a": "A", "equal": "no difference", "b": "B"},
}
"""What the answers are called, in the order in which they are shown."""


def render_sheet(sheet: Sheet, clips: str) -> str:
    """Return the page of a sheet, which plays the wav files of the folder `clips` beside it.

    Style and script are part of it; it loads nothing but the clips, and sends nothing.
    """
    count = len(sheet.questions)
    return Template(_part("listening.html")).substitute(
        style=_part("report.css") + _part("listening.css"),
        script=_part("listening.js"),
        sheet=escape(sheet.sheet),
        number=sheet.number,
        count=count,
        questions="\n".join(
            _question(question, place, count, clips)
            for place, question in enumerate(sheet.questions, 1)
        ),
    )


def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _question(question: Question, place: int, count: int, clips: str) -> str:
    names = [clip.name for clip in question.clips]
    letters = ["A", "B"] if len(names) == 2 else [""]
    players = "".join(
        _player(f"{clips}/{name}", letter) for name, letter in zip(names, letters, strict=True)
    )
    recorded = dict(zip(("a", "b"), [*names, ""], strict=False))
    data = {"item": question.item, "kind": question.kind, **recorded}
    attributes = " ".join(f'data-{name}="{escape(value)}"' for name, value in data.items())
    return (
        f'<section class="card question" {attributes} aria-labelledby="{question.item}" '
        f'tabindex="-1"><h2 id="{question.item}">{place} of {count}: {TITLES[question.kind]}</h2>'
        f"<blockquote>{escape(question.sentence.text)}</blockquote>"
        f'<div class="players">{players}</div>{_answers(question)}</section>'
    )


def _player(file: str, letter: str) -> str:
    return (
        f'<div class="player"><span class="letter">{letter}</span><audio controls preload="auto" '
        f'src="{escape(file)}" aria-label="{f"clip {letter}".strip()}"></audio></div>'
    )


def _answers(question: Question) -> str:
    choices = "".join(
        f'<label><input type="radio" name="{question.item}" value="{value}" autocomplete="off">'
        f'<span class="key">{key}</span> {label}</label>'
        for key, (value, label) in enumerate(LABELS[question.kind].items(), 1)
    )
    return (
        f'<fieldset class="{question.kind}"><legend>{TITLES[question.kind]}</legend>'
        f"{choices}</fieldset>"
    )
