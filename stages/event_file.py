"""What TensorBoard reads of a training run: scalars by step, in files of its own format."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from stages.errors import UserError
from stages.silence import silenced

PREFIX = "events.out.tfevents."
"""By these letters TensorBoard knows its files; it reads them in the order of their names."""
INSTALL = "pip install 'foretell[tensorboard]'"


class EventFile:
    """Writes the scalars of one attempt at a run.

    TensorBoard's own writer leaves that to a thread and names files by the clock. Here what was
    written outlives a kill, as a line of the log does, and attempts are numbered, for the clocks of
    machines differ.
    """

    def __init__(self, folder: Path, step: int, earlier: Iterable[dict[str, float]]) -> None:
        """Begin after `step` a file in `folder`.

        What an earlier attempt wrote after `step` is declared void. Where there was none, the
        records `earlier` are written first, so that the curve is whole. Raises `UserError` with the
        pip command where TensorBoard is missing.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._package = _import()
        attempts = sum(1 for _ in folder.glob(f"{PREFIX}*"))
        free = (folder / f"{PREFIX}{number:010d}" for number in count(attempts))
        self._path = next(path for path in free if not path.exists())
        self._add(file_version="brain.Event:2")
        if attempts:
            session = self._package.event.SessionLog
            self._add(step=step + 1, session_log=session(status=session.START))
        else:
            for record in earlier:
                self.write(**record)

    def write(self, step: float, **values: float) -> None:
        """Add what was measured at an optimizer step, as float32."""
        summary = self._package.summary.Summary
        scalars = [summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step=int(step), summary=summary(value=scalars))

    def _add(self, **content: Any) -> None:
        event = self._package.event.Event(wall_time=time.time(), **content)
        with self._path.open("ab") as file:
            self._package.records(file).write(event.SerializeToString())


def missing_reason() -> str | None:
    """Say why no event files can be written here; None where they can."""
    try:
        _import()
    except UserError as error:
        return str(error)
    return None


class _Package(NamedTuple):
    """The parts of TensorBoard that are used: its messages, and what frames them in a file."""

    event: Any
    summary: Any
    records: Any


def _import() -> _Package:
    try:
        with silenced():  # protobuf tells of versions that its own messages were made with
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError as error:
        raise UserError(
            f"event files need the package tensorboard, which cannot be imported ({error}): "
            f"{INSTALL}"
        ) from None
    return _Package(event_pb2, summary_pb2, RecordWriter)
