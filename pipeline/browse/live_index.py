"""The index of a store that may still be written: looked over again when it is asked for."""

from __future__ import annotations

from threading import Lock
from time import monotonic

from pipeline.browse.rollout_index import RolloutIndex
from store import PredictionStore, StoreError

LOOK_S = 1.0
"""Least time between two listings of the shards of a store on this machine."""
REMOTE_LOOK_S = 20.0
"""The same in object storage, where a listing takes a request that is paid for."""


class LiveIndex:
    """The rollouts of a store by now, as far as `look_s` allows; threads may share it."""

    def __init__(self, store: PredictionStore, look_s: float | None = None) -> None:
        """Read nothing yet; `look_s` None stands for what suits the place of the store."""
        usual_s = REMOTE_LOOK_S if store.is_remote else LOOK_S
        self.store = store
        self.trouble: str | None = None
        """Why the last look failed; None where it did not."""
        self._look_s = usual_s if look_s is None else look_s
        self._index: RolloutIndex | None = None
        self._due_s = 0.0
        self._looking = Lock()

    def current(self) -> RolloutIndex:
        """The index; one thread renews it where that is due, and others take the one from before.

        A look that fails is told by `trouble`, and what was known stays. Raises `StoreError` where
        nothing was known yet.
        """
        index = self._index
        if index is None:
            with self._looking:
                return self._index or self._first()
        if monotonic() >= self._due_s and self._looking.acquire(blocking=False):
            try:
                return self._renew(index)
            finally:
                self._looking.release()
        return index

    def _first(self) -> RolloutIndex:
        self.store.refresh()  # it may have been opened long ago
        self._index = RolloutIndex(self.store)
        self._due_s = monotonic() + self._look_s
        return self._index

    def _renew(self, index: RolloutIndex) -> RolloutIndex:
        try:
            index, self.trouble = index.renewed(), None
        except StoreError as error:
            self.trouble = str(error)
        self._index, self._due_s = index, monotonic() + self._look_s
        return index
