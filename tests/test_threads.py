"""Work in threads is all done, in order where results count, and what fails in one is raised."""

from __future__ import annotations

import threading

import pytest

from store.threads import in_threads, share_out


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_every_job_is_done_once(count: int) -> None:
    assert list(in_threads(lambda job: job * job, range(count))) == [n * n for n in range(count)]
    done: list[int] = []
    share_out(done.append, range(count))
    assert sorted(done) == list(range(count))


def test_what_fails_in_a_thread_is_raised_and_no_thread_is_left() -> None:
    def fail(job: int) -> None:
        if job == 5:
            raise ValueError("job 5")

    before = threading.active_count()
    with pytest.raises(ValueError, match="job 5"):
        share_out(fail, range(9))
    with pytest.raises(ValueError, match="job 5"):
        list(in_threads(fail, range(9)))
    assert threading.active_count() == before
