"""Reading the answers of listeners: what is wrong is named with file and row, the rest counts."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from stages.listening import ANSWERS, COLUMNS, Key, Question
from store.schema import Record

DELIMITERS = (",", ";", "\t")
"""What spreadsheets put between cells, depending on the language that they speak."""


class Answer(Record):
    """One answer of a listener."""

    file: str
    """Answers file."""
    row: int
    """Line of the file, the header being 1."""
    sheet: str
    """Name of the sheet."""
    listener: str
    """Who answered."""
    question: Question
    """What was asked."""
    answer: str
    """What was answered, one of `ANSWERS`."""


class Fault(Record):
    """Something in an answers file that cannot be counted."""

    file: str
    """Answers file."""
    row: int | None
    """Line of the file, the header being 1; null where the whole file is meant."""
    reason: str
    """What is wrong, and what would be right."""


class Answers(Record):
    """What several answers files hold."""

    given: tuple[Answer, ...]
    """Answers that count."""
    unanswered: int
    """Items that were left empty."""
    faults: tuple[Fault, ...]
    """What does not count, and why."""


class _Refused(Exception):
    """A file or row that cannot be counted; the message is the reason."""


def read_answers(files: Sequence[Path], key: Key) -> Answers:
    """Read answers files against the key of their sheets.

    They are CSV in UTF-8, with or without a byte order mark, cells apart by commas, semicolons or
    tabs. Two equal answers of a listener to an item count once, of two different ones neither.
    """
    questions = {(s.sheet, q.item): q for s in key.sheets for q in s.questions}
    given: list[Answer] = []
    faults: list[Fault] = []
    unanswered = 0
    for path in files:
        try:
            rows = list(_rows(path))
        except _Refused as error:
            faults.append(Fault(file=str(path), row=None, reason=str(error)))
            continue
        for number, cells in rows:
            try:
                answer = _answer(path, number, cells, questions)
            except _Refused as error:
                faults.append(Fault(file=str(path), row=number, reason=str(error)))
                continue
            unanswered += answer is None
            given += [] if answer is None else [answer]
    counted, repeated = _once(given)
    return Answers(given=counted, unanswered=unanswered, faults=(*faults, *repeated))


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str] | None]]:
    """Yield (line, cells by column) of every row that is not blank; None where cells are amiss."""
    text = _text(path)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text))
    try:
        header = [name.strip().lower() for name in next(reader)]
        for cells in reader:
            if any(cell.strip() for cell in cells):
                whole = len(cells) == len(header)
                row = dict(zip(header, (cell.strip() for cell in cells), strict=False))
                yield reader.line_num, row if whole else None
    except csv.Error as error:
        raise _Refused(f"line {reader.line_num} is not CSV: {error}") from None


def _text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise _Refused(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise _Refused("is not UTF-8: save it as CSV UTF-8") from None
    if not text.strip():
        raise _Refused("is empty")
    return text


def _delimiter(text: str) -> str:
    """Find what stands between the cells of the header; refuse one that lacks a column."""
    header = text.splitlines()[0]
    delimiter = max(DELIMITERS, key=header.count)
    cells = next(csv.reader([header], delimiter=delimiter))
    names = [cell.strip().lower() for cell in cells]
    missing = [column for column in COLUMNS if names.count(column) != 1]
    if missing:
        raise _Refused(
            f"its first line must name {', '.join(COLUMNS)} once each, but it is wrong in "
            f"{', '.join(missing)}: {header[:80]!r}"
        )
    return delimiter


def _answer(
    path: Path,
    row: int,
    cells: dict[str, str] | None,
    questions: dict[tuple[str, str], Question],
) -> Answer | None:
    """Check one row; None where it is left empty."""
    if cells is None:
        raise _Refused("has another number of cells than the first line")
    sheet, item, answer = cells["sheet"], cells["item"], cells["answer"].lower()
    question = questions.get((sheet, item))
    if question is None:
        sheets = {name for name, _ in questions}
        if sheet in sheets:
            raise _Refused(f"the sheet {sheet!r} has no item {item!r}")
        raise _Refused(
            f"the sheet {sheet!r} is of another export; this one has {', '.join(sorted(sheets))}"
        )
    names = [*(clip.name for clip in question.clips), ""][:2]
    if [cells["kind"].lower(), cells["a"], cells["b"]] != [question.kind, *names]:
        raise _Refused(
            f"item {item!r} of the sheet is {question.kind!r} of "
            f"{' and '.join(filter(None, names))}: the cells before the answer must stay as they "
            "were"
        )
    if not answer:
        return None
    if answer not in ANSWERS[question.kind]:
        raise _Refused(
            f"the answer {answer!r} to item {item!r} is none of {', '.join(ANSWERS[question.kind])}"
        )
    if not cells["listener"]:
        raise _Refused(f"the answer to item {item!r} names no listener")
    return Answer(
        file=str(path), row=row, sheet=sheet, listener=cells["listener"], question=question,
        answer=answer,
    )  # fmt: skip


def _once(given: Sequence[Answer]) -> tuple[tuple[Answer, ...], list[Fault]]:
    """Keep one of equal answers of a listener to an item, and none of different ones."""
    counted: list[Answer] = []
    faults: list[Fault] = []
    for (_, item, listener), group in groupby(sorted(given, key=_asked), key=_asked):
        answers = list(group)
        agree = len({answer.answer for answer in answers}) == 1
        counted += answers[:1] if agree else []
        places = " and ".join(f"{answer.file} row {answer.row}" for answer in answers)
        told = "alike, and counts once" if agree else "in different ways, and none counts"
        faults += [
            Fault(
                file=answer.file,
                row=answer.row,
                reason=f"{listener!r} answered item {item!r} more than once {told}: {places}",
            )
            for answer in answers[int(agree) :]
        ]
    return tuple(counted), faults


def _asked(answer: Answer) -> tuple[str, str, str]:
    return answer.sheet, answer.question.item, answer.listener
