"""Reading ahead: what is needed next is prepared by a thread or by processes, in order."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar, cast

import torch

from stages.config import LoaderConfig
from stages.errors import UserError
from stages.interruption import STOP_SIGNALS, held_back

Item = TypeVar("Item")
Read = Callable[[int], Item]


class Loader(Generic[Item]):
    """Items by position, of which the next ones are being read while one is in use.

    Whoever reads them, and however many, the item of a position is what `read` makes of it, and
    what `read` raises is raised when that position is asked for. With processes `read` and its
    items travel between them, and items go through `pin`, if given, on arrival.
    """

    def __init__(
        self,
        read: Read[Item],
        config: LoaderConfig,
        step: int,
        pin: Callable[[Item], Item] | None = None,
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
        if not self._config.workers:
            return read_in_a_thread(self._read, positions, self._config.prefetch)
        items = read_in_processes(self._read, positions, self._config)
        return items if self._pin is None else pinned_in_a_thread(items, self._pin)

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


def pinned_in_a_thread(items: Generator[Item], pin: Callable[[Item], Item]) -> Generator[Item]:
    """Yield what `pin` makes of endless items; one beyond the yielded one is held."""
    thread = ThreadPoolExecutor(1, "loader-pin")

    def arrive() -> Item:
        return pin(next(items))

    try:
        waiting = thread.submit(arrive)
        while True:
            item = waiting.result()
            waiting = thread.submit(arrive)
            yield item
    finally:
        thread.shutdown()
        items.close()


def read_in_processes(
    read: Read[Item], positions: Iterator[int], config: LoaderConfig
) -> Generator[Item]:
    """Yield the items of endless `positions`; each process holds `prefetch` beyond the yielded one.

    Position n is read by process n modulo their number. Raises `UserError` when a process ended.
    """
    # A fork server that has imported what reads begins each process at once.
    multiprocessing.set_forkserver_preload(["__main__", type(read).__module__])
    processes: list[_Reader[Item]] = []
    try:
        resource_tracker.ensure_running()  # starting it would let the signals through
        with held_back():
            for _ in range(config.workers):
                processes.append(_Reader.begin(read, config.start_method))
        for _ in range(config.prefetch):
            for process in processes:
                process.ask(next(positions))
        for process in itertools.cycle(processes):
            item = process.answer()
            process.ask(next(positions))
            yield item
    finally:
        for process in processes:
            process.end()


@dataclass(frozen=True)
class _Reader(Generic[Item]):
    """A process that reads, and the pipe to it.

    Nothing but the pipe is shared. So the end of the process, however sudden, is the end of the
    pipe, and not a lock that it held or half an item that the others wait for (DataLoader's fate).
    """

    process: BaseProcess
    pipe: Connection

    @classmethod
    def begin(cls, read: Read[Item], start_method: str) -> _Reader[Item]:
        context = cast(Any, multiprocessing.get_context(start_method))
        ours, theirs = context.Pipe()
        # A forked process has both ends, and must close ours to see when nobody else holds it.
        inherited = ours if start_method == "fork" else None
        process = context.Process(target=_serve, args=(theirs, read, inherited), daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)

    def ask(self, position: int) -> None:
        with suppress(OSError):  # it has ended; what it had answered before is still to be read
            self.pipe.send(position)

    def answer(self) -> Item:
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if isinstance(answer, _Failure):
            raise answer.error
        return cast(Item, answer)

    def end(self) -> None:
        """A reader has nothing to tidy up, so it need not be asked."""
        self.pipe.close()
        self.process.kill()
        self.process.join()
        self.process.close()

    def _ended(self) -> UserError:
        self.process.join(1)
        return UserError(
            f"a process that reads ahead (pid {self.process.pid}) has ended with exit code "
            f"{self.process.exitcode} (-9 is a kill, as for want of memory). If memory ran out, "
            "lower loader.workers, loader.prefetch or buffer_shards; then run the same command "
            "again"
        )


@dataclass(frozen=True)
class _Failure:
    """What a process could not read."""

    error: BaseException


_serving = False


def serves_another_process() -> bool:
    """Return whether this process reads for another one."""
    return _serving


def _serve(pipe: Connection, read: Read[Item], inherited: Connection | None) -> None:
    """Answer positions with their items, or with what went wrong, until the pipe is closed."""
    global _serving  # noqa: PLW0603 - it is a fact about the whole process
    _serving = True
    # It is for the process that trains to stop between two steps, and then to end this one.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    torch.set_num_threads(1)
    if inherited is not None:
        inherited.close()
    # A future carries whatever went wrong; a closed pipe says that nobody waits any more.
    with suppress(EOFError, OSError), ThreadPoolExecutor(1) as thread:
        while True:
            reading = thread.submit(read, pipe.recv())
            error = reading.exception()
            pipe.send(reading.result() if error is None else _Failure(error))
