"""Downloading what is needed next while something else is in use."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable

from store.errors import StoreError

logger = logging.getLogger(__name__)


class DownloadAhead:
    """One thread that fetches the shards it was told of last, in order, and ends when done.

    It only makes things faster: what it cannot fetch is fetched, and explained, by who needs it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted: list[int] = []
        self._done: set[int] = set()
        self._thread: threading.Thread | None = None

    def expect(self, shards: Iterable[int], fetch: Callable[[int], None]) -> None:
        """Fetch these shards in the background; what was expected before no longer is."""
        with self._lock:
            wanted = list(shards)
            self._done &= set(wanted)
            self._wanted = [shard for shard in wanted if shard not in self._done]
            if not self._wanted or self._thread is not None:
                return
            self._thread = threading.Thread(
                target=self._work, args=(fetch,), name="download-ahead", daemon=True
            )
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is expected any more."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def _work(self, fetch: Callable[[int], None]) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._thread = None
                    return
                shard = self._wanted.pop(0)
                self._done.add(shard)
            try:
                fetch(shard)
            except StoreError as error:
                logger.info("shard %d could not be downloaded ahead: %s", shard, error)
