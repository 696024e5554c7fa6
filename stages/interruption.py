"""Stopping between two steps when a person or a scheduler asks for it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """A flag that the first signal sets; a stage looks at it wherever stopping loses nothing.

    With `at_once` the first signal raises KeyboardInterrupt instead: for stages whose result
    appears whole or not at all.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.requested = False
        self.signals: set[int] = set()
        """What asked for it."""
        self._at_once = at_once

    def request(self, signum: int) -> None:
        """Ask for a stop, as a signal does."""
        self.requested = True
        self.signals.add(signum)

    def note(self, signum: int, _frame: FrameType | None) -> None:
        """Remember the signal; a second Ctrl-C stops at once, for a person in a hurry."""
        impatient = self.requested and signum == signal.SIGINT
        self.request(signum)
        if impatient or self._at_once:
            raise KeyboardInterrupt


@contextmanager
def held_back() -> Iterator[None]:
    """Let signals that ask for a stop wait until the block ends.

    A process that is begun in the block lets them wait too, until its own `stop_request`, however
    long its imports take.
    """
    hold_back()
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def hold_back() -> None:
    """Let signals that ask for a stop wait until the next `stop_request`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


@contextmanager
def stop_request(at_once: bool = False, *, last: bool = False) -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM and SIGUSR1 into a `StopRequest` inside the block (main thread).

    Signals that were held back when this process began arrive now. With `last` they are ignored
    after the block: what they would stop is done, and its end would look like a failure.
    """
    request = StopRequest(at_once)
    previous = {number: signal.signal(number, request.note) for number in STOP_SIGNALS}
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_IGN if last else handler)
