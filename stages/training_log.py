"""The log of a training run: JSON lines, one per report, and the same for TensorBoard."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from stages.errors import UserError
from stages.event_file import INSTALL, EventFile

logger = logging.getLogger(__name__)


def read_log(path: Path) -> Iterator[dict[str, float]]:
    """Yield the records of a log; a line cut short by a crash ends it."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


class TrainingLog:
    """Appends one JSON line per report to a file, so that a resumed run continues its curve.

    The same goes into an event file of TensorBoard's beside it, where there is one.
    """

    def __init__(self, path: Path, step: int, tensorboard: bool | None = None) -> None:
        """Open the log, without what a lost attempt wrote after `step`.

        With `tensorboard` null an event file is written where the package is at hand; with true
        its absence raises `UserError`.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_log(path) if record["step"] <= step]
        path.write_text("".join(map(_line, kept)), encoding="utf-8")
        self._path = path
        self._events = _event_file(path.parent, step, kept, tensorboard)
        logger.info("training log: %s%s", path, _told(self._events, path.parent, tensorboard))

    def write(self, step: int, **values: float) -> None:
        """Append one record: the optimizer step and what was measured there."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line({"step": step, **values}))
        if self._events is not None:
            self._events.write(step, **values)


def _event_file(
    folder: Path, step: int, kept: Sequence[dict[str, float]], wanted: bool | None
) -> EventFile | None:
    if wanted is False:
        return None
    try:
        return EventFile(folder, step, kept)
    except UserError:
        if wanted:
            raise
        return None


def _told(events: EventFile | None, folder: Path, wanted: bool | None) -> str:
    """Say how its curves are looked at, or what that needs."""
    if events is not None:
        return f"; its curves: tensorboard --logdir {folder.parent}"
    return "" if wanted is False else f"; for curves in TensorBoard: {INSTALL}"


def _line(record: dict[str, float]) -> str:
    return json.dumps(record) + "\n"
