"""Writing beside the teacher: in order, bounded, and no failure or thread is left behind."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest

from stages.background_writer import WAITING_VALUES, BackgroundWriter, Drawn
from store import PredictionStore, StoreError, verify
from store.commit import ShardWriter
from store.schema import TopK
from store.synthetic import synthetic_arrays, synthetic_manifest, synthetic_store
from tests.row_stores import rows_store

TIMEOUT_S = 20
DRAWN = [{"latent": 3, "condition": 1}, {"latent": 0, "condition": -1}]


@pytest.fixture
def store(tmp_path: Path) -> PredictionStore:
    """A store of three shards of four rollouts."""
    manifest = synthetic_manifest(TopK(k=4))
    return synthetic_store(tmp_path / "store", manifest, 6, 2, rollouts_per_shard=4)


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    assert not [t for t in threading.enumerate() if t.name.startswith("shard-writer")]


def batch(store: PredictionStore, shard: int, part: slice = slice(None)) -> list[Drawn]:
    return [
        Drawn(key, synthetic_arrays(store.manifest, key, 3), "end", 1.0, seed=7)
        for key in store.plan[shard][part]
    ]


def fill(writer: BackgroundWriter, store: PredictionStore, shard: int) -> None:
    """Append a shard in two batches and commit it."""
    for part in (slice(0, 2), slice(2, None)):
        writer.append(shard, lambda part=part: batch(store, shard, part))
    writer.commit(shard)


def test_what_a_variation_drew_is_stored(tmp_path):
    store = rows_store(tmp_path / "store", tmp_path / "table")
    shutil.rmtree(store.path / "shards/00000")
    with BackgroundWriter(PredictionStore.open(store.path)) as writer:
        drawn = [
            Drawn(key, synthetic_arrays(store.manifest, key, 3, 0), "end", 1.0, 7, numbers)
            for key, numbers in zip(store.plan[0], DRAWN, strict=True)
        ]
        writer.append(0, lambda: drawn)
        writer.commit(0)
    found = PredictionStore.open(store.path)
    assert [found[key].drawn for key in store.plan[0]] == DRAWN


def committed(store: PredictionStore) -> list[int]:
    assert verify(store.path).ok
    assert list((store.path / "tmp").iterdir()) == []
    return PredictionStore.open(store.path).committed


def test_what_was_given_is_appended_and_committed_in_order(store, monkeypatch):
    calls = []

    def spy(name):
        done = getattr(ShardWriter, name)

        def call(writer, *arguments, **named):
            assert threading.current_thread().name.startswith("shard-writer")
            calls.append((name, *arguments[:2]))
            return done(writer, *arguments, **named)

        monkeypatch.setattr(ShardWriter, name, call)

    spy("append")
    spy("commit")
    with BackgroundWriter(store) as writer:
        for shard in range(3):
            fill(writer, store, shard)
    expected = [
        call for s in range(3) for call in [*(("append", *k) for k in store.plan[s]), ("commit",)]
    ]
    assert calls == expected
    assert committed(store) == [0, 1, 2]
    again = PredictionStore.open(store.path)
    for key in again:
        assert again[key].seed == 7


def test_a_shard_is_generated_while_the_one_before_is_committed_and_never_a_third(
    store, monkeypatch
):
    free, begun = threading.Event(), threading.Event()
    commit = ShardWriter.commit

    def slow(writer: ShardWriter) -> bool:
        begun.set()
        assert free.wait(TIMEOUT_S)
        return commit(writer)

    monkeypatch.setattr(ShardWriter, "commit", slow)
    third_began = threading.Event()

    def generate() -> None:
        with BackgroundWriter(store) as writer:
            for shard in range(3):
                if shard == 2:
                    third_began.set()
                fill(writer, store, shard)

    teacher = threading.Thread(target=generate)
    teacher.start()
    assert begun.wait(TIMEOUT_S)
    assert not third_began.wait(0.2), "two shards were in memory and a third was begun"
    free.set()
    assert third_began.wait(TIMEOUT_S)
    teacher.join(TIMEOUT_S)
    assert committed(store) == [0, 1, 2]


class Broken(Exception):
    """What a test lets fail."""


def fail(*_):
    raise Broken


@pytest.mark.parametrize("name", ["append", "commit"])
def test_a_failure_is_raised_by_the_next_call_and_nothing_later_is_done(
    store, monkeypatch, caplog, name
):
    monkeypatch.setattr(ShardWriter, name, fail if name == "commit" else lambda *_, **__: fail())
    later = []

    def generate():
        with BackgroundWriter(store) as writer:
            writer.append(0, lambda: batch(store, 0))
            writer.commit(0)
            for _ in range(1000 * TIMEOUT_S):  # the next call after the failure raises it
                writer.append(1, lambda: later.append("appended") or [])
                time.sleep(0.001)
            later.append("went on for good")

    with pytest.raises(Broken):
        generate()
    assert later == []
    assert not caplog.records, "one failure is told once"
    assert committed(store) == []


def test_who_catches_a_failure_and_goes_on_meets_it_again_at_every_call_and_on_leaving(store):
    done = []

    def generate():
        with BackgroundWriter(store) as writer:
            failed = writer.compute(fail, 1)
            with pytest.raises(Broken):
                failed.result(TIMEOUT_S)
            for call in (
                lambda: writer.append(0, lambda: done.append("append") or batch(store, 0)),
                lambda: writer.compute(lambda: done.append("compute"), 1),
                lambda: writer.commit(0),
            ):
                with pytest.raises(Broken):
                    call()
            done.append("left")

    with pytest.raises(Broken):
        generate()
    assert done == ["left"]
    assert committed(store) == []


def test_what_was_given_before_a_failure_was_known_says_why_it_was_left_undone(store):
    free = threading.Event()

    def generate():
        with BackgroundWriter(store) as writer:
            writer.compute(lambda: free.wait(TIMEOUT_S) and fail(), 1)
            later = writer.compute(lambda: None, 1)
            free.set()
            with pytest.raises(Broken):
                later.result(TIMEOUT_S)

    with pytest.raises(Broken):
        generate()


def test_a_failure_after_the_last_call_is_raised_on_leaving(store, monkeypatch):
    commits = iter([ShardWriter.commit, ShardWriter.commit, fail])

    def commit(writer: ShardWriter) -> bool:
        return next(commits)(writer)

    monkeypatch.setattr(ShardWriter, "commit", commit)

    def generate():
        with BackgroundWriter(store) as writer:
            for shard in range(3):
                fill(writer, store, shard)

    with pytest.raises(Broken):
        generate()
    assert committed(store) == [0, 1]


def test_predictions_that_the_store_refuses_say_so_to_who_generates(store):
    wrong = batch(store, 1)
    wrong[0].arrays["top_k.logits"][0, 0] += 1

    def generate():
        with BackgroundWriter(store) as writer:
            fill(writer, store, 0)
            writer.append(1, lambda: wrong)
            writer.commit(1)
            fill(writer, store, 2)

    with pytest.raises(StoreError, match="largest logit that is not 0"):
        generate()
    assert committed(store) == [0]


def test_leaving_early_drops_the_shard_in_hand_and_finishes_the_one_before(store, monkeypatch):
    free, commit = threading.Event(), ShardWriter.commit

    def slow(writer: ShardWriter) -> bool:
        assert free.wait(TIMEOUT_S)
        return commit(writer)

    monkeypatch.setattr(ShardWriter, "commit", slow)
    done = []
    with BackgroundWriter(store) as writer:
        fill(writer, store, 0)
        writer.append(1, lambda: done.append("append") or batch(store, 1))
        writer.compute(lambda: done.append("compute"), 1)
        threading.Timer(0.2, free.set).start()
    assert committed(store) == [0]
    assert done == []
    with BackgroundWriter(store) as writer:
        fill(writer, store, 1)
    assert committed(store) == [0, 1]


def test_an_error_of_the_teacher_is_the_one_that_is_raised(store, monkeypatch, caplog):
    def generate(shard: int) -> None:
        with BackgroundWriter(store) as writer:
            fill(writer, store, shard)
            raise KeyError("teacher")

    with pytest.raises(KeyError, match="teacher"):
        generate(0)
    assert committed(store) == [0]
    assert not caplog.records
    monkeypatch.setattr(ShardWriter, "commit", fail)
    with pytest.raises(KeyError, match="teacher"):
        generate(1)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "failed too" in caplog.text
    assert committed(store) == [0]


def test_a_shard_that_another_worker_has_committed_is_left_to_it(store, caplog):
    for _ in range(2):
        with BackgroundWriter(store) as writer:
            fill(writer, store, 0)
    assert committed(store) == [0]


def test_what_waits_to_be_computed_is_bounded(store):
    free, given = threading.Event(), []

    def generate() -> None:
        with BackgroundWriter(store) as writer:
            for number in range(20):
                given.append(number)
                writer.compute(lambda: free.wait(TIMEOUT_S), WAITING_VALUES // 8)

    teacher = threading.Thread(target=generate)
    teacher.start()
    teacher.join(0.3)
    assert len(given) == 8 + 1, "the next one waits before it is queued"
    free.set()
    teacher.join(TIMEOUT_S)
    assert len(given) == 20


def test_what_was_computed_is_handed_back_even_where_it_failed(store):
    with BackgroundWriter(store) as writer:
        assert writer.compute(lambda: 6 * 7, 1).result(TIMEOUT_S) == 42
        writer.append(0, lambda: batch(store, 0))
        writer.commit(0)
    assert committed(store) == [0]
    with pytest.raises(Broken), BackgroundWriter(store) as writer:
        writer.compute(fail, 1)
