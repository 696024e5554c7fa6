"""Reading ahead: what is needed next is prepared by a thread or by processes, in order."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from stages.config import LoaderConfig
from stages.errors import UserError
from stages.interruption import STOP_SIGNALS, held_back
from store import StoreError

Item = TypeVar("Item")
Read = Callable[[int], Item]


class Loader(Generic[Item]):
    """Items by position, of which the next ones are being read while one is in use.

    Whoever reads them, and however many, the item of a position is what `read` makes of it, and
    what `read` raises is raised when that position is asked for. With processes `read` and its
    items travel between them; items that have a method `pin_memory` are pinned on arrival.
    """

    def __init__(
        self, read: Read[Item], config: LoaderConfig, step: int, pin: bool = False
    ) -> None:
        """Expect positions that rise by `step`; any other one begins anew."""
        self._read, self._config, self._step, self._pin = read, config, step, pin
        self._ahead: Generator[Item] | None = None
        self._next = 0

    def __getitem__(self, position: int) -> Item:
        if self._ahead is None or position != self._next:
            self.close()
            self._ahead = self._begin(itertools.count(position, self._step))
        try:
            item = next(self._ahead)
        except BaseException:
            self.close()
            raise
        self._next = position + self._step
        return item

    def _begin(self, positions: Iterator[int]) -> Generator[Item]:
        if self._config.workers:
            return read_in_processes(self._read, positions, self._config, self._pin)
        return read_in_a_thread(self._read, positions, self._config.prefetch)

    def close(self) -> None:
        """End the thread or the processes; a later position begins new ones."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


def read_in_a_thread(read: Read[Item], positions: Iterator[int], prefetch: int) -> Generator[Item]:
    """Yield the items of endless `positions`; `prefetch` beyond the yielded one are held."""
    thread = ThreadPoolExecutor(1, "loader")
    try:
        waiting = deque(thread.submit(read, next(positions)) for _ in range(prefetch))
        while True:
            waiting.append(thread.submit(read, next(positions)))
            yield waiting.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)


def read_in_processes(
    read: Read[Item], positions: Iterator[int], config: LoaderConfig, pin: bool
) -> Generator[Item]:
    """Yield the items of endless `positions`; each process holds `prefetch` beyond the yielded one.

    Raises `UserError` when a process was killed.
    """
    loader: DataLoader[Item | _Failure] = DataLoader(
        _Positions(read),
        batch_size=None,
        sampler=positions,
        num_workers=config.workers,
        collate_fn=_unchanged,
        pin_memory=pin,
        worker_init_fn=_ignore_stop_signals,
        multiprocessing_context=config.start_method,
        generator=torch.Generator(),  # else it draws from the random state of the step
        prefetch_factor=config.prefetch,
    )
    # A fork server that has imported what reads begins each process at once.
    multiprocessing.set_forkserver_preload(["__main__", type(read).__module__])
    try:
        resource_tracker.ensure_running()  # starting it would let the signals through
        with held_back():
            items = iter(loader)
        try:
            for item in items:
                if isinstance(item, _Failure):
                    raise item.error
                yield item
        finally:  # not when the last traceback that knows of it is forgotten
            items._shutdown_workers()  # type: ignore[attr-defined]
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            f"a process that reads ahead has ended: {error}. If memory ran out, lower "
            "loader.workers, loader.prefetch or buffer_shards; then run the same command again"
        ) from error


@dataclass(frozen=True)
class _Failure:
    """What a process could not read: the error itself, where torch would raise one of its own."""

    error: StoreError


class _Positions(Dataset[Item | _Failure]):
    def __init__(self, read: Read[Item]) -> None:
        self._read = read

    def __getitem__(self, position: int) -> Item | _Failure:
        try:
            return self._read(position)
        except StoreError as error:
            return _Failure(error)


def _unchanged(item: Item) -> Item:
    return item


def _ignore_stop_signals(_worker: int) -> None:
    """Leave it to the process that trains to stop between two steps, and then to end this one."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
