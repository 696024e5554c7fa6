"""Small programs in place of Slurm's commands, which note what was asked of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.slurm import FIELDS

PROGRAM = """#!/bin/bash
cd "$(dirname "$0")"
printf '%s\\n' "${0##*/} $*" >> calls
case "${0##*/}" in
  sbatch) expr $(cat next 2>/dev/null || echo 10) + 1 > new; mv new next; cat next;;
  squeue) cat queue 2>/dev/null;;
esac
exit 0
"""


@dataclass(frozen=True)
class StandIn:
    """The folder of the programs, which give ids from 11 on."""

    folder: Path

    def program(self, name: str) -> Path:
        return self.folder / name

    def calls(self) -> list[str]:
        """What was asked so far."""
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def forget(self) -> None:
        (self.folder / "calls").unlink()

    def show(self, *entries: tuple[int, int | str, str, str, int, str]) -> None:
        """Let squeue show (job, task, state, reason, requeues, name)."""
        lines = []
        for job, task, state, reason, requeues, name in entries:
            values = [job, task, state, "1:00", requeues, reason, name]
            cells = dict(zip(FIELDS, values, strict=True))
            lines.append("".join(str(value).ljust(FIELDS[f]) for f, value in cells.items()))
        (self.folder / "queue").write_text("\n".join(lines) + "\n")


def stand_in(folder: Path, patch: pytest.MonkeyPatch) -> StandIn:
    """Put the programs into `folder` and onto the PATH."""
    folder.mkdir()
    for name in ("sbatch", "squeue", "scontrol"):
        (folder / name).write_text(PROGRAM)
        (folder / name).chmod(0o755)
    patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return StandIn(folder)
