"""Writing shards beside the teacher: one thread appends and commits while the next is generated."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from stages.free_space import require_floor
from store import PredictionStore
from store.commit import ShardWriter

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

WAITING_VALUES = 32 * 2**20
"""Numbers that may wait for `compute` before who gives them waits as well (128 MiB of fp32)."""


@dataclass(frozen=True)
class Drawn:
    """One finished rollout, ready to be stored."""

    key: tuple[str, int]
    arrays: dict[str, np.ndarray]
    """`codes` [T, C] but for continuous streams, and the target's arrays [T, ...]."""
    stop_reason: str
    weight: float
    seed: int
    drawn: Mapping[str, int] = field(default_factory=dict)
    """What the variation drew, by the names of the manifest."""


class BackgroundWriter:
    """Appends rollouts to the shards of a store and commits them, in one thread, in order.

    Leave it through `with`: then the thread has ended. Shards that `commit` was called for are
    finished first, and one that was not is dropped. What fails in the thread is raised by every
    call after it and on leaving; nothing that was given later is done.
    """

    def __init__(self, store: PredictionStore, free_floor: int = 0) -> None:
        """With less than `free_floor` bytes free no shard is begun: FloorReached is raised."""
        self._store, self._free_floor = store, free_floor
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shard-writer")
        self._in_hand: list[Future[Any]] = []
        """What was given since the last commit."""
        self._computing: deque[tuple[Future[Any], int]] = deque()
        self._computing_values = 0
        self._publishing: Future[None] | None = None
        # From here on for the thread to write.
        self._failure: BaseException | None = None
        """What failed first."""
        self._writer: ShardWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._in_hand:
            task.cancel()
        self._executor.shutdown(wait=True)
        if self._writer is not None:
            self._writer.__exit__(kind, error, trace)
        if self._failure is None or self._failure is error:
            return
        if error is None:
            raise self._failure
        logger.error("writing a shard in the background failed too: %r", self._failure)

    def append(self, shard: int, collect: Callable[[], Iterable[Drawn]]) -> None:
        """Append to a shard what `collect`, called in the thread, returns."""
        self._in_hand.append(self._give(self._append, shard, collect))

    def commit(self, shard: int) -> None:
        """Commit a shard after what was appended to it.

        Waits for the commit before it: one shard is published and one generated, never three.
        """
        if self._publishing is not None:
            wait([self._publishing])
        self._publishing = self._give(self._commit, shard)
        self._in_hand.clear()

    def compute(self, work: Callable[[], Result], values: int) -> Future[Result]:
        """Do work on so many `values` for the shard in hand; waits while too much is waiting."""
        while self._computing and (
            self._computing[0][0].done() or self._computing_values >= WAITING_VALUES
        ):
            oldest, count = self._computing.popleft()
            wait([oldest])
            self._computing_values -= count
        task = self._give(work)
        self._computing.append((task, values))
        self._computing_values += values
        self._in_hand.append(task)
        return task

    def _give(self, work: Callable[..., Result], *arguments: Any) -> Future[Result]:
        if self._failure is not None:
            raise self._failure
        return self._executor.submit(self._do, work, *arguments)

    def _do(self, work: Callable[..., Result], *arguments: Any) -> Result:
        if self._failure is not None:
            raise self._failure
        try:
            return work(*arguments)
        except BaseException as failure:
            self._failure = failure
            raise

    def _append(self, shard: int, collect: Callable[[], Iterable[Drawn]]) -> None:
        if self._writer is None:
            require_floor(self._store.folder_here, self._free_floor)
            self._writer = self._store.writer(shard)
        for drawn in collect():
            self._writer.append(
                *drawn.key,
                drawn.arrays,
                stop_reason=drawn.stop_reason,
                weight=drawn.weight,
                seed=drawn.seed,
                drawn=drawn.drawn,
            )

    def _commit(self, shard: int) -> None:
        writer = self._writer or self._store.writer(shard)
        self._writer = None
        with writer:
            if not writer.commit():
                logger.info("shard %d was committed by another worker first", shard)
