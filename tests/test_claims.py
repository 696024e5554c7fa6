"""Claims: two workers never spend their time on one shard, and nobody's end holds up the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from stages.interruption import StopRequest
from stages.sharing import in_turns, own_first
from store.claims import UNCHANGED_LOOKS, Claims
from tests.stopping import StopAfter

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
BEAT_S = 0.02
FOREIGN = json.dumps({"owner": ["another-host"], "beat": "0"}).encode()

WORKER = """
import sys
from pathlib import Path
from store.claims import Claims
folder, shard = Path(sys.argv[1]), int(sys.argv[2])
with Claims(folder, lambda shard: False, heartbeat_s=0.02) as claims:
    print(claims.take(shard), flush=True)
    sys.stdin.readline()
"""


@dataclass
class Committed:
    """The shards of a make-believe store."""

    shards: set[int] = field(default_factory=set)

    def __call__(self, shard: int) -> bool:
        return shard in self.shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "tmp" / "claims"


@pytest.fixture
def start(folder) -> Iterator[Callable[[int], subprocess.Popen[str]]]:
    """Start a process that claims a shard and lives on."""
    started = []

    def run(shard: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WORKER, str(folder), str(shard)]
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "True\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def claims_of(folder: Path, committed: Callable[[int], bool] = lambda _: False) -> Claims:
    return Claims(folder, committed, heartbeat_s=BEAT_S)


def take_in_the_end(claims: Claims, shard: int, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not claims.take(shard):
        assert time.monotonic() < deadline, "it was never taken over"
        time.sleep(BEAT_S / 4)


def test_one_of_two_gets_a_shard_and_leaving_frees_it(folder):
    with claims_of(folder) as first, claims_of(folder) as second:
        assert first.take(3)
        assert not second.take(3)
        assert second.take(4)
        first.release()
        assert second.take(3)
    assert not folder.exists(), "the last one removes the folder"


def test_of_many_threads_that_claim_at_once_one_wins_every_shard(folder):
    workers = [claims_of(folder) for _ in range(8)]
    taken: list[tuple[int, int]] = []
    barrier = threading.Barrier(len(workers))

    def work(number: int) -> None:
        barrier.wait()
        taken.extend((shard, number) for shard in range(25) if workers[number].take(shard))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(workers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(shard for shard, _ in taken) == list(range(25))


def test_an_owner_that_lives_keeps_its_shard_however_long_it_takes(folder, start):
    start(0)
    patience_s = 5 * BEAT_S  # between looks: a machine that is busy may miss some beats
    with Claims(folder, lambda _: False, patience_s) as observer:
        until = time.monotonic() + 2 * UNCHANGED_LOOKS * patience_s
        while time.monotonic() < until:
            assert not observer.take(0)
            time.sleep(BEAT_S)


def test_the_shard_of_a_killed_process_is_free_at_once_on_its_own_machine(folder, start):
    owner = start(0)
    with claims_of(folder) as observer:
        assert not observer.take(0)
        owner.kill()
        os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
        assert observer.take(0), "a zombie has ended"
        owner.wait()


def test_a_claim_from_another_machine_is_taken_over_after_looks_that_find_it_unchanged(folder):
    folder.mkdir(parents=True)
    (folder / "00000.4").write_bytes(FOREIGN)
    with claims_of(folder) as observer:
        began = time.monotonic()
        take_in_the_end(observer, 0)
        assert time.monotonic() - began >= UNCHANGED_LOOKS * BEAT_S
        assert [path.name for path in folder.iterdir()] == ["00000.5"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"owner": 5}', b"\xff", b"[" * 9000])
def test_a_claim_that_says_nothing_is_outwaited_too(folder, content):
    folder.mkdir(parents=True)
    (folder / "00000.1").write_bytes(content)
    with claims_of(folder) as observer:
        assert not observer.take(0)
        take_in_the_end(observer, 0)


def test_an_observer_that_was_stopped_itself_takes_nothing_from_the_living(folder, monkeypatch):
    folder.mkdir(parents=True)
    (folder / "00000.1").write_bytes(FOREIGN)
    now = [100.0]
    monkeypatch.setattr("store.claims.time.monotonic", lambda: now[0])
    observer = Claims(folder, lambda _: False, heartbeat_s=10)
    for _ in range(5):
        assert not observer.take(0)
        now[0] += 1e6  # asleep for days, then awake for one look
    (folder / "00000.1").write_bytes(FOREIGN.replace(b'"0"', b'"1"'))
    for _ in range(UNCHANGED_LOOKS):
        assert not observer.take(0), "from the sign of life on it is watched anew"
        now[0] += 10
    assert observer.take(0)


def test_looks_faster_than_the_heartbeat_do_not_count(folder, monkeypatch):
    folder.mkdir(parents=True)
    (folder / "00000.1").write_bytes(FOREIGN)
    now = [0.0]
    monkeypatch.setattr("store.claims.time.monotonic", lambda: now[0])
    observer = Claims(folder, lambda _: False, heartbeat_s=10)
    taken = []
    while not taken or not taken[-1]:
        taken.append(observer.take(0))
        now[0] += 1.0
    assert now[0] == 10.0 * UNCHANGED_LOOKS + 1


def test_of_several_observers_one_takes_over(folder):
    folder.mkdir(parents=True)
    (folder / "00000.1").write_bytes(FOREIGN)
    taken: list[int] = []
    all_tried = threading.Barrier(4)

    def observe(number: int) -> None:
        with Claims(folder, lambda _: False, 5 * BEAT_S) as claims:
            until = time.monotonic() + 2 * UNCHANGED_LOOKS * 5 * BEAT_S
            while time.monotonic() < until:
                if claims.take(0):
                    taken.append(number)
                time.sleep(BEAT_S)
            all_tried.wait(60)

    threads = [threading.Thread(target=observe, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1


def test_a_stopped_owner_that_wakes_up_after_it_was_taken_over_lets_go(folder, start):
    owner = start(0)
    owner.send_signal(signal.SIGSTOP)
    with claims_of(folder) as observer:
        take_in_the_end(observer, 0)
        owner.send_signal(signal.SIGCONT)
        time.sleep(10 * BEAT_S)
        owner.communicate("\n")
        assert owner.returncode == 0
        assert [path.name for path in folder.iterdir()] == ["00000.2"], "ours, untouched"


def test_the_claim_on_a_committed_shard_goes_while_its_worker_works_on(folder):
    committed = Committed()
    with claims_of(folder, committed) as claims:
        assert claims.take(0)
        assert claims.take(1)
        committed.shards.add(0)
        deadline = time.monotonic() + 20
        while (folder / "00000.1").exists():
            assert time.monotonic() < deadline
            time.sleep(BEAT_S)
        assert (folder / "00001.1").exists()
        assert not claims.take(0), "nobody claims what is committed"
        assert not (folder / "00000.1").exists()


def test_claims_that_are_deleted_with_tmp_cost_nothing_but_work(folder):
    import shutil

    with claims_of(folder) as first, claims_of(folder) as second:
        assert first.take(0)
        shutil.rmtree(folder.parent)
        time.sleep(5 * BEAT_S)
        assert second.take(0)
        time.sleep(5 * BEAT_S)
        assert [path.name for path in folder.iterdir()] == ["00000.1"]


def test_a_worker_that_leaves_sweeps_up_behind_those_that_were_killed_after_their_commit(folder):
    folder.mkdir(parents=True)
    for name in ("00000.1", "00001.7", "00002.1", "stranger"):
        (folder / name).write_bytes(FOREIGN)
    with claims_of(folder, Committed({0, 1})):
        pass
    assert sorted(path.name for path in folder.iterdir()) == ["00002.1", "stranger"]


def test_a_worker_begins_with_its_own_share_and_then_helps_from_the_back():
    assert own_first(range(9), 1, 3) == [1, 4, 7, 8, 6, 5, 3, 2, 0]
    assert own_first([2, 5], 0, 3) == [5, 2]
    for tasks in range(1, 6):
        orders = [own_first(range(11), task, tasks) for task in range(tasks)]
        assert all(sorted(order) == list(range(11)) for order in orders)
        assert len({order[0] for order in orders}) == tasks, "nobody begins where another does"


@dataclass
class Store:
    """Counts who commits what; the first one wins, as in a store."""

    committed: dict[int, str] = field(default_factory=dict)
    made: Counter[int] = field(default_factory=Counter)

    def is_committed(self, shard: int) -> bool:
        return shard in self.committed

    def worker(self, name: str, pause_s: float = 0.0) -> Callable[[Iterator[int]], bool]:
        def work(shards: Iterator[int]) -> bool:
            for shard in shards:
                self.made[shard] += 1
                time.sleep(pause_s)
                self.committed.setdefault(shard, name)
            return True

        return work


def in_threads(folder: Path, store: Store, shards: Sequence[int], workers: dict[str, float]):
    """Let workers of different speed share shards; their answers by name."""
    finished = {}

    def run(number: int, name: str, pause_s: float) -> None:
        with claims_of(folder, store.is_committed) as claims:
            order = own_first(shards, number, len(workers))
            finished[name] = in_turns(
                claims, order, store.is_committed, store.worker(name, pause_s), StopRequest()
            )

    threads = [
        threading.Thread(target=run, args=(number, name, pause_s))
        for number, (name, pause_s) in enumerate(workers.items())
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return finished


def test_workers_make_every_shard_once_and_all_see_the_end(folder):
    store = Store()
    finished = in_threads(folder, store, range(40), dict.fromkeys("abcd", 0.001))
    assert finished == dict.fromkeys("abcd", True)
    assert sorted(store.committed) == list(range(40))
    assert set(store.made.values()) == {1}
    assert not folder.exists()


def test_a_slow_worker_does_not_hold_up_the_run(folder):
    store = Store()
    finished = in_threads(folder, store, range(20), {"slow": 1.0, "fast": 0.001})
    assert finished == {"slow": True, "fast": True}
    counts = Counter(store.committed.values())
    assert counts["slow"] <= 3, "its own share would have been ten"
    assert set(store.made.values()) == {1}


def test_who_waits_for_others_heeds_a_stop(folder):
    with claims_of(folder) as theirs, claims_of(folder) as ours:
        assert theirs.take(0)
        assert not in_turns(ours, [0], lambda _: False, Store().worker("ours"), StopAfter(3))


def test_work_that_was_stopped_is_not_begun_again(folder):
    calls = []

    def stopped(shards: Iterator[int]) -> bool:
        calls.append(next(shards))
        return False

    with claims_of(folder) as claims:
        assert not in_turns(claims, [0, 1], lambda _: False, stopped, StopRequest())
        assert calls == [0]
        assert list(folder.iterdir()) == []


def test_a_failure_leaves_the_shard_to_others(folder):
    def failing(shards: Iterator[int]) -> bool:
        raise FloatingPointError(f"in {next(shards)}")

    with (
        pytest.raises(FloatingPointError, match="in 0"),
        claims_of(folder) as claims,
    ):
        in_turns(claims, [0, 1], lambda _: False, failing, StopRequest())
    assert not folder.exists()
