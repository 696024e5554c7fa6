"""Stopping between two steps when a person or a scheduler asks for it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """A flag that the first signal sets; a stage looks at it wherever stopping loses nothing."""

    def __init__(self) -> None:
        self.requested = False

    def note(self, signum: int, _frame: FrameType | None) -> None:
        """Remember the signal; a second Ctrl-C stops at once, for a person in a hurry."""
        if self.requested and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM and SIGUSR1 into a `StopRequest` inside the block (main thread)."""
    request = StopRequest()
    previous = {number: signal.signal(number, request.note) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
