"""Downloading what is needed next while something else is in use."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from store.errors import StoreError

logger = logging.getLogger(__name__)


class DownloadAhead:
    """One thread that fetches the shards it was told of last, in order.

    It only makes things faster: what it cannot fetch is fetched, and explained, by who needs it.
    A process that ends waits for the shard in hand and for no other.
    """

    def __init__(self, fetch: Callable[[int], None]) -> None:
        self._fetch = fetch
        self._idle = threading.Condition()
        self._wanted: list[int] = []
        self._begun: set[int] = set()
        self._working = False
        self._thread = ThreadPoolExecutor(1, "download-ahead")

    def expect(self, shards: Iterable[int]) -> None:
        """Fetch these shards in the background; what was expected before no longer is."""
        with self._idle:
            listed = list(shards)
            self._begun &= set(listed)
            self._wanted = [shard for shard in listed if shard not in self._begun]
            if self._wanted and not self._working:
                self._working = True
                self._thread.submit(self._fetch_next)

    def wait(self) -> None:
        """Wait until nothing is expected any more."""
        with self._idle:
            self._idle.wait_for(lambda: not self._working)

    def _fetch_next(self) -> None:
        with self._idle:
            if not self._wanted:
                self._working = False
                self._idle.notify_all()
                return
            shard = self._wanted.pop(0)
            self._begun.add(shard)
        try:
            self._fetch(shard)
        except StoreError as error:
            logger.info("shard %d could not be downloaded ahead: %s", shard, error)
        with suppress(RuntimeError):  # the interpreter is about to end
            self._thread.submit(self._fetch_next)
