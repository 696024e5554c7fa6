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
    threads = min(MOST_THREADS, os.cpu_count() or 1, len(jobs))
    if threads < 2:
        yield from map(work, jobs)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(work, jobs)
