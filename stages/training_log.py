"""The log of a training run: JSON lines, one per report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path


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
    """Appends one JSON line per report to a file, so that a resumed run continues its curve."""

    def __init__(self, path: Path, step: int) -> None:
        """Open the log, without what a lost attempt wrote after `step`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_log(path) if record["step"] <= step]
        path.write_text("".join(map(_line, kept)), encoding="utf-8")
        self._path = path

    def write(self, step: int, **values: float) -> None:
        """Append one record: the optimizer step and what was measured there."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line({"step": step, **values}))


def _line(record: dict[str, float]) -> str:
    return json.dumps(record) + "\n"
