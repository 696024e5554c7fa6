"""Listening sheets on disk: pages that listeners open, the key that they must not, the answers."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from pipeline.folders import RunFolders
from pipeline.listening_page import render_sheet
from pipeline.report import read_report, write_report
from pipeline.run_config import RunConfig
from stages.answers import read_answers
from stages.errors import UserError
from stages.listening import COLUMNS, Key, Kind, Sentence, Sheet, plan_sheets
from stages.publish import publish_folder, replace_file
from stages.report_schema import RECORDING, AudioSample, Metric, Report
from stages.tally import Preference, Tally, tally

KEY, TALLY = "key.json", "tally.json"
CLIPS = "clips"
"""Folder of the clips, beside the page that plays them."""


@dataclass(frozen=True)
class SheetOptions:
    """What is asked of listeners."""

    sheets: int = 1
    """Sheets, for as many listeners."""
    items: int | None = None
    """Samples of the report that are heard, from its start; None takes all."""
    systems: tuple[str, ...] = ()
    """Systems that are heard, the recording among them where named; empty takes the report's."""
    kinds: tuple[Kind, ...] = ("mos", "ab")
    """Whether clips are rated, compared, or both."""
    seed: int = 0
    """Seed of orders and names."""


def export_sheets(config: RunConfig, options: SheetOptions) -> Key:
    """Write the sheets of a finished evaluation and their key; return the key.

    What is there already is left alone: `UserError` refuses a folder of other sheets, for answers
    to them can be read with their own key only.
    """
    folders = RunFolders(config)
    report = read_report(folders.report)
    samples = _chosen_samples(report, options)
    systems = _chosen_systems(report, options)
    sources = _sources(folders.report, samples, systems)
    key = plan_sheets(
        config.name,
        [Sentence(sample_id=sample.sample_id, text=sample.text) for sample in samples],
        systems,
        kinds=options.kinds,
        sheets=options.sheets,
        seed=options.seed,
        audio=_fingerprint(sources.values()),
    )
    if not any(sheet.questions for sheet in key.sheets):
        raise UserError(
            f"there is nothing to ask of {', '.join(systems)}: comparing takes two systems beside "
            "the recording and its codec copy; name more with --system"
        )
    if folders.listening.exists():
        if read_key(folders.listening) != key:
            raise UserError(
                f"{folders.listening} holds sheets of other settings or audio: move it away, key "
                "and answers together, then export again"
            )
        return key
    with publish_folder(folders.listening) as draft:
        for sheet in key.sheets:
            _write_sheet(sheet_folder(draft, sheet), sheet, sources)
        replace_file(draft / KEY, key.model_dump_json(indent=1).encode())
    return key


def sheet_folder(listening: Path, sheet: Sheet) -> Path:
    """Folder of a sheet, all that a listener needs."""
    return listening / f"sheet_{sheet.number:02d}"


def _chosen_samples(report: Report, options: SheetOptions) -> Sequence[AudioSample]:
    there = len(report.audio)
    wanted = there if options.items is None else options.items
    if not there or wanted > there:
        raise UserError(
            f"{wanted or 'no'} items were asked for, but the report has the audio of {there} "
            "samples: evaluate a run of another name with a larger evaluate.audio_samples"
        )
    return report.audio[:wanted]


def _chosen_systems(report: Report, options: SheetOptions) -> list[str]:
    there = [RECORDING, *report.systems]
    unknown = [system for system in options.systems if system not in there]
    if unknown or len(set(options.systems)) < len(options.systems):
        raise UserError(
            f"--system {' --system '.join(options.systems)}: name each once, out of "
            f"{', '.join(there)}"
        )
    return [s for s in there if s in options.systems] if options.systems else there[1:]


def _sources(
    folder: Path, samples: Sequence[AudioSample], systems: Sequence[str]
) -> dict[tuple[str, str], Path]:
    """Return the wav file of every (sample_id, system)."""
    sources: dict[tuple[str, str], Path] = {}
    for sample in samples:
        named = {system: PurePosixPath(clip.file) for system, clip in sample.clips.items()}
        first = next(iter(named.values()))
        named[RECORDING] = first.parent.parent / RECORDING / first.name
        sources |= {(sample.sample_id, system): folder / named[system] for system in systems}
    missing = [path for path in sources.values() if not path.is_file()]
    if missing:
        raise UserError(f"{missing[0]} is missing, which report.json names: evaluate again")
    return sources


def _fingerprint(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _write_sheet(folder: Path, sheet: Sheet, sources: Mapping[tuple[str, str], Path]) -> None:
    (folder / CLIPS).mkdir(parents=True)
    for question in sheet.questions:
        for clip in question.clips:
            source = sources[question.sentence.sample_id, clip.system]
            (folder / CLIPS / clip.name).write_bytes(source.read_bytes())
    (folder / "listen.html").write_text(render_sheet(sheet, CLIPS), encoding="utf-8")
    (folder / "answers.csv").write_text(answers_template(sheet), encoding="utf-8", newline="")


def answers_template(sheet: Sheet) -> str:
    """Return the CSV file of a sheet in which nothing is answered."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for question in sheet.questions:
        first, second = [*(clip.name for clip in question.clips), ""][:2]
        writer.writerow([sheet.sheet, question.item, question.kind, first, second, "", ""])
    return text.getvalue()


def read_key(listening: Path) -> Key:
    """Read the key of a run's sheets; raises UserError where there is none or it is damaged."""
    path = listening / KEY
    try:
        return Key.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: export sheets with `foretell listen`") from None
    except ValidationError as error:
        raise UserError(f"{path} is not the key of listening sheets: {error}") from None


def tally_answers(config: RunConfig, files: Sequence[Path]) -> Tally:
    """Read filled answers files, write what they add up to as tally.json and into the page.

    `files` are all answers of the run: what an earlier call read does not count any more.
    """
    folders = RunFolders(config)
    key = read_key(folders.listening)
    evaluation = config.evaluate
    if evaluation is None:
        raise UserError("the configuration has no section 'evaluate', whose bootstrap is taken")
    result = tally(
        key, read_answers(files, key), files=len(files),
        draws=evaluation.bootstrap_draws, seed=evaluation.seed,
    )  # fmt: skip
    replace_file(folders.listening / TALLY, result.model_dump_json(indent=1).encode())
    write_report(folders.report, result)
    return result


def export_document(config: RunConfig, key: Key) -> dict[str, Any]:
    """Return where the sheets of a key are; it tells nothing of who speaks."""
    folder = RunFolders(config).listening
    return {
        "key": str(folder / KEY),
        "systems": list(key.systems),
        "sheets": [
            {
                "sheet": sheet.sheet,
                "folder": str(sheet_folder(folder, sheet)),
                "questions": len(sheet.questions),
            }
            for sheet in key.sheets
        ],
    }


def export_text(config: RunConfig, key: Key) -> str:
    """Return where the sheets of a key are, and what to do with them."""
    folder = RunFolders(config).listening
    kinds = [question.kind for question in key.sheets[0].questions]
    return "\n".join(
        [
            f"{kinds.count('mos')} clips to rate and {kinds.count('ab')} pairs to compare on each "
            f"of {len(key.sheets)} sheets, spoken by {', '.join(key.systems)}",
            *(f"{sheet_folder(folder, sheet)}  {sheet.sheet}" for sheet in key.sheets),
            f"Give each listener a whole folder, never {folder / KEY}. Read the answers back with "
            "`foretell tally`.",
        ]
    )


def tally_text(result: Tally) -> str:
    """Return what listeners answered as lines, faults first."""
    faults = [
        f"{fault.file}{'' if fault.row is None else f' row {fault.row}'}: {fault.reason}"
        for fault in result.faults
    ]
    ratings = [
        f"{name:<24}MOS {rating.mos.value:.2f}{_ends(rating.mos)}  {rating.answers} answers of "
        f"{rating.listeners} listeners"
        for name, rating in result.ratings.items()
    ]
    return "\n".join(
        [
            *faults,
            f"{result.answers} answers of {len(result.listeners)} listeners in {result.files} files"
            f", {result.unanswered} items left empty, {len(result.faults)} faults",
            *ratings,
            *map(_preference_text, result.preferences),
        ]
    )


def _preference_text(pair: Preference) -> str:
    share = "no answer found a difference"
    if pair.share is not None:
        share = f"share {pair.share.value:.3f}{_ends(pair.share)}, sign test p = {pair.p_value:.3g}"
    return (
        f"{pair.system} {pair.preferred}, {pair.against} {pair.rejected}, no difference "
        f"{pair.equal}: {share}"
    )


def _ends(metric: Metric) -> str:
    if metric.low is None or metric.high is None:
        return ""
    return f" [{metric.low:.2f}, {metric.high:.2f}]"
