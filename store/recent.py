"""The last few things that were used."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from typing import Generic, TypeVar

Thing = TypeVar("Thing")


class Recent(Generic[Thing]):
    """At most `limit` things by number; those unused for longest go first.

    Threads may share it without a lock, which a fork could leave locked: every step is a single
    operation of an OrderedDict. Two threads may then both make what neither found.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._things: OrderedDict[int, Thing] = OrderedDict()

    def get(self, number: int) -> Thing | None:
        """The thing with this number, now the most recent; None where it is not held."""
        try:
            self._things.move_to_end(number)
            return self._things[number]
        except KeyError:
            return None

    def put(self, number: int, thing: Thing) -> None:
        """Hold a thing as the most recent."""
        self._things.pop(number, None)
        self.make_room()
        self._things[number] = thing

    def make_room(self) -> None:
        """Let go of what was unused for longest, until one more thing may be held."""
        with suppress(KeyError):  # another thread was faster
            while len(self._things) >= self._limit:
                self._things.popitem(last=False)

    def clear(self) -> None:
        """Let go of everything."""
        self._things.clear()
