"""Where a run keeps what: every path below `runs/<name>/`, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Run
from store.object_url import ObjectUrl


@dataclass(frozen=True)
class RunFolders:
    """Paths of one run."""

    config: Run

    @property
    def root(self) -> Path:
        """The run's own folder."""
        return self.config.runs / self.config.name

    @property
    def corpus(self) -> Path:
        """Recordings that `prepare` makes when the dataset is spoken by voices."""
        return self.root / "corpus"

    @property
    def dataset(self) -> Path:
        """The prepared dataset."""
        return self.config.dataset or self.root / "dataset"

    @property
    def teacher(self) -> Path:
        """The teacher's weights, log and checkpoints."""
        given = self.config.teacher.checkpoint if self.config.teacher else None
        return given or self.root / "teacher"

    @property
    def store(self) -> Path | ObjectUrl:
        """The prediction store."""
        return self.config.store or self.root / "store"

    @property
    def draws(self) -> Path:
        """Codes that a student drew for the teacher to score."""
        return self.root / "draws"

    def store_of(self, round_name: str | None) -> Path | ObjectUrl:
        """The prediction store of a round; None stands for the run's own."""
        return self.store if round_name is None else self.root / f"store_{round_name}"

    def lock_of(self, store: Path | ObjectUrl) -> Path:
        """What processes of this machine lock that must not begin a store at the same time."""
        path = store if isinstance(store, Path) else self.root / "store"
        return path.with_name(f"{path.name}.lock")

    def draws_of(self, round_name: str | None) -> Path:
        """The codes that a student drew for a round; None stands for the run's own."""
        return self.draws if round_name is None else self.root / f"draws_{round_name}"

    @property
    def previews(self) -> Path:
        """Images that the teacher of a diffusion run rendered once."""
        return self.root / "previews"

    @property
    def report(self) -> Path:
        """Report, audio and the reference store of the evaluation."""
        return self.root / "report"

    @property
    def listening(self) -> Path:
        """Listening sheets, their key, and what listeners answered."""
        return self.root / "listening"

    @property
    def stages(self) -> Path:
        """One record of cost and completion per stage."""
        return self.root / "stages"

    @property
    def jobs(self) -> Path:
        """Scripts of the jobs on a cluster, and which were submitted."""
        return self.root / "jobs"

    @property
    def logs(self) -> Path:
        """What these jobs say."""
        return self.root / "logs"

    def student(self, name: str) -> Path:
        """A student's weights, log and checkpoints."""
        return self.root / system_name(name)


def system_name(student: str) -> str:
    """Return what a student is called in the report: `student`, or `student_<name>`."""
    return student if student == "student" else f"student_{student}"
