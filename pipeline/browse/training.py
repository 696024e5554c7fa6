"""What the training logs of a run say by now: which models are trained, and their loss curves."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.metric_tables import system_label
from stages.errors import UserError
from stages.report_schema import read_losses
from stages.training_log import read_log

Document = dict[str, Any]

LOG_FILE = "log.jsonl"
CURVE_POINTS = 200


@dataclass(frozen=True)
class TrainingLogs:
    """The logs below the folder of a run; each is read again only when it has changed."""

    run: Path
    _known: dict[Path, tuple[tuple[int, int, int], Document]] = field(default_factory=dict)

    def paths(self) -> list[Path]:
        """The log of the teacher, and of every student by name, as far as they are there."""
        models = [self.run / "teacher", *sorted(self.run.glob("student*"))]
        return [model / LOG_FILE for model in models if (model / LOG_FILE).is_file()]

    def describe(self) -> list[Document]:
        """What every log says; raises `UserError` where one cannot be read."""
        return [self._description(path) for path in self.paths()]

    def _description(self, path: Path) -> Document:
        try:
            found = path.stat()
            stamp = (found.st_ino, found.st_size, found.st_mtime_ns)
            known = self._known.get(path)
            if known is None or known[0] != stamp:
                known = self._known[path] = stamp, _described(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no training log that can be read: {error!r}") from error
        return known[1]


def _described(path: Path) -> Document:
    name = path.parent.name
    steps = [int(record["step"]) for record in read_log(path)]
    losses = read_losses(path, CURVE_POINTS)
    return {
        "name": name,
        "label": name if name == "teacher" else system_label(name),
        "step": steps[-1] if steps else None,
        "written_s": path.stat().st_mtime,
        "losses": [
            {"name": term, "steps": curve.steps, "values": curve.values}
            for term, curve in losses.items()
            if curve.steps
        ],
    }
