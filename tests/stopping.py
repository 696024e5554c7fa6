"""A stop that comes at a moment which a test chooses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StopAfter:
    """A stop request that comes true after so many questions."""

    questions: int

    @property
    def requested(self) -> bool:
        self.questions -= 1
        return self.questions < 0
