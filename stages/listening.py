"""Blind listening sheets: which clips a listener hears, in which order, and under which names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Literal

import numpy as np

from stages.report_schema import RECORDING
from store.schema import Record

Kind = Literal["mos", "ab"]

ANCHORS = (RECORDING, "codec_copy")
"""Systems that are rated beside the models but not compared with them in pairs."""

COLUMNS = ("sheet", "item", "kind", "a", "b", "answer", "listener")
"""Columns of an answers file; the clip of a `mos` item stands under `a`."""

ANSWERS: dict[Kind, tuple[str, ...]] = {
    "mos": ("1", "2", "3", "4", "5"),
    "ab": ("a", "equal", "b"),
}
"""What may stand under `answer`: naturalness from bad to excellent (ITU-T P.800), or which of two
is more natural."""


class Sentence(Record):
    """A sample that several systems speak."""

    sample_id: str
    """Name of the sample."""
    text: str
    """What is said."""


class Clip(Record):
    """A clip as a listener meets it, and who speaks."""

    name: str
    """Name of its file on the sheet, which tells nothing."""
    system: str
    """System that speaks."""


class Question(Record):
    """One thing that a listener is asked: to rate a clip, or to compare two of the same text."""

    item: str
    """Its name on the sheet."""
    kind: Kind
    """What is asked."""
    sentence: Sentence
    """What is said."""
    clips: tuple[Clip, ...]
    """The clip to rate, or clip A and clip B."""


class Sheet(Record):
    """What one listener is asked, in order."""

    sheet: str
    """Name of the sheet; no sheet of other audio or settings has the same."""
    number: int
    """Place among the sheets of its export, from 1."""
    questions: tuple[Question, ...]
    """The ratings first, then the comparisons, each in an order of their own."""


class Key(Record):
    """What nobody who listens may see: the systems behind the clips of all sheets."""

    format_version: Literal[1] = 1
    """Version of this layout."""
    run: str
    """Name of the run."""
    seed: int
    """Seed of orders and names."""
    audio: str
    """Hexadecimal sha256 of all clips."""
    systems: tuple[str, ...]
    """Systems that are heard."""
    sheets: tuple[Sheet, ...]
    """The sheets."""


def plan_sheets(
    run: str,
    sentences: Sequence[Sentence],
    systems: Sequence[str],
    *,
    kinds: Sequence[Kind],
    sheets: int,
    seed: int,
    audio: str,
) -> Key:
    """Plan sheets on which every system speaks every sentence; a function of its arguments alone.

    Asking for `mos`, every clip is rated once per sheet; asking for `ab`, every pair of systems but
    the anchors is compared on every sentence. Which of a pair comes first is balanced within a
    sheet, to within one, and reversed on the next.
    """
    settings = [run, [s.model_dump() for s in sentences], list(systems), list(kinds), seed, audio]
    return Key(
        run=run,
        seed=seed,
        audio=audio,
        systems=tuple(systems),
        sheets=tuple(
            Sheet(
                sheet=_sheet_name([*settings, number]),
                number=number,
                questions=tuple(_questions(sentences, systems, kinds, seed, number)),
            )
            for number in range(1, sheets + 1)
        ),
    )


def _sheet_name(settings: list[object]) -> str:
    """Name a sheet after all that it depends on; a spreadsheet must not take it for a number."""
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    return f"sheet-{digest[:12]}"


def _questions(
    sentences: Sequence[Sentence],
    systems: Sequence[str],
    kinds: Sequence[Kind],
    seed: int,
    number: int,
) -> Iterator[Question]:
    random = np.random.default_rng([seed, 0, number])
    names = _clip_names(len(sentences) * len(systems), random)
    clips = {
        (sentence, system): Clip(name=name, system=system)
        for (sentence, system), name in zip(
            ((s, system) for s in range(len(sentences)) for system in systems), names, strict=True
        )
    }
    asked: dict[Kind, list[tuple[int, tuple[str, ...]]]] = {
        "mos": [(s, (system,)) for s in range(len(sentences)) for system in systems],
        "ab": list(_pairs(len(sentences), systems, seed, number)),
    }
    for kind in kinds:
        for place, index in enumerate(random.permutation(len(asked[kind])), 1):
            sentence, spoken_by = asked[kind][index]
            yield Question(
                item=f"{kind}-{place:03d}",
                kind=kind,
                sentence=sentences[sentence],
                clips=tuple(clips[sentence, system] for system in spoken_by),
            )


def _clip_names(count: int, random: np.random.Generator) -> list[str]:
    return [f"clip-{place:03d}.wav" for place in random.permutation(count) + 1]


def _pairs(
    sentences: int, systems: Sequence[str], seed: int, number: int
) -> Iterator[tuple[int, tuple[str, str]]]:
    """Yield (sentence, (first, second)); half of a pair's sentences have either order."""
    compared = [system for system in systems if system not in ANCHORS]
    for index, (one, other) in enumerate(combinations(compared, 2)):
        # Not of the sheet's number, which alternates: sheets in twos hold both orders of each.
        order = np.random.default_rng([seed, 1, index]).permutation(sentences)
        for place, sentence in enumerate(order.tolist()):
            yield sentence, ((one, other) if (place + number) % 2 else (other, one))
