"""Work shared out to threads that end with the call, so that a fork never finds one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

MOST_THREADS = 4

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_threads(work: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
    """Results of `work` in the order of the jobs; what fails in a thread is raised here.

    After a failure, or when the caller stops asking, jobs that have not begun are left undone.
    """
    threads = _threads(jobs)
    if threads < 2:
        yield from map(work, jobs)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(work, jobs)


def share_out(work: Callable[[Job], None], jobs: Sequence[Job]) -> None:
    """Do all jobs, each thread every n-th of them; what fails in a thread is raised here.

    For jobs that take less time than to hand them out one by one.
    """
    threads = _threads(jobs)

    def do_every_nth(first: int) -> None:
        for job in jobs[first::threads]:
            work(job)

    for _ in in_threads(do_every_nth, range(threads)):
        pass


def _threads(jobs: Sequence[Job]) -> int:
    return min(MOST_THREADS, os.cpu_count() or 1, len(jobs))
