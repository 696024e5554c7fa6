"""The record that a stage leaves: what it was for, whether it is finished, and what it cost."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from pydantic import ValidationError

from stages.errors import UserError
from stages.publish import replace_file
from store.schema import Record


class Usage(Record):
    """What one process needed."""

    peak_rss_bytes: int
    """Most resident memory."""
    peak_device_bytes: int
    """Most memory held on the accelerator; 0 without one."""


class StageRecord(Record):
    """State and cost of a stage, over all attempts."""

    stage: str
    """Name of the stage."""
    identity: str
    """Hash of what its result depends on."""
    finished: bool = False
    """Whether nothing is left to do."""
    wall_s: float = 0.0
    """Seconds from start to end, summed over attempts."""
    peak_rss_bytes: int = 0
    """Most resident memory, summed over processes that ran together."""
    peak_device_bytes: int = 0
    """Most accelerator memory, summed over processes that ran together."""

    def after(self, wall_s: float, usages: list[Usage], *, finished: bool) -> StageRecord:
        """Return the record with one more attempt added."""
        return self.model_copy(
            update={
                "finished": finished,
                "wall_s": self.wall_s + wall_s,
                "peak_rss_bytes": max(
                    self.peak_rss_bytes, sum(usage.peak_rss_bytes for usage in usages)
                ),
                "peak_device_bytes": max(
                    self.peak_device_bytes, sum(usage.peak_device_bytes for usage in usages)
                ),
            }
        )


def read_record(folder: Path, stage: str, task: str | None = None) -> StageRecord | None:
    """Read a stage's record, or that of one `task` of it ("I/N"); None before its first attempt."""
    return _read(folder / _file_name(stage, task))


def read_records(folder: Path, stage: str) -> list[StageRecord]:
    """Read the records of a stage and of its tasks, none of them before the first attempt.

    Tasks that run at once have one each: none overwrites what another has noted.
    """
    paths = [folder / _file_name(stage, None), *sorted(folder.glob(_file_name(stage, "*/*")))]
    return [record for record in map(_read, paths) if record is not None]


def _file_name(stage: str, task: str | None) -> str:
    return f"{stage}.json" if task is None else f"{stage}@{task.replace('/', 'of')}.json"


def _read(path: Path) -> StageRecord | None:
    try:
        return StageRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise UserError(
            f"{path} is not the record of a stage ({error.error_count()} faults): move it away, "
            "and the stage will look at what is there and finish it"
        ) from None


def write_record(folder: Path, record: StageRecord, task: str | None = None) -> None:
    """Write a stage's record, or that of one `task` of it, in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / _file_name(record.stage, task), record.model_dump_json(indent=1).encode())


def own_usage(peak_device_bytes: int) -> Usage:
    """Return what this process needed so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return Usage(peak_rss_bytes=peak, peak_device_bytes=peak_device_bytes)
