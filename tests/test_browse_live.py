"""The local page of what is still written: new shards, reports and log lines, without a restart."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.browse.application import Browse
from pipeline.browse.live_index import LiveIndex
from pipeline.browse.rollout_index import Query, RolloutIndex
from pipeline.browse.serving import browse_of
from pipeline.browse.training import TrainingLogs
from stages.errors import UserError
from store import PredictionStore
from store.errors import StoreError
from store.layout import Layout
from store.remote import RemoteLayout, layout_of
from store.schema import Full, TopK
from store.shard import RolloutTable
from store.synthetic import synthetic_arrays, synthetic_manifest, synthetic_store
from tests.served_pages import Served, served
from tests.test_browse import entropy_of, evaluated_run, keys_of, store_of

pytestmark = pytest.mark.slow

AT_ONCE = 0.0


def begun(place: Path | str, shards: list[int], planned: int = 4) -> PredictionStore:
    """A store of shards with one rollout each, of which some are committed."""
    manifest = synthetic_manifest(Full(), streams=2, vocabulary=34)
    synthetic_store(place, manifest, planned, 1, 1)
    for shard in shards:
        commit(place, shard)
    return PredictionStore.open(place)


def commit(
    place: Path | str, shard: int, timesteps: int | None = None, stop_reason: str = "end"
) -> None:
    """Commit a shard whose one rollout has 3 timesteps and its number's, unless told otherwise."""
    store = PredictionStore.open(place)
    with store.writer(shard) as writer:
        for key in store.plan[shard]:
            arrays = synthetic_arrays(store.manifest, key, timesteps or 3 + shard)
            writer.append(*key, arrays, stop_reason=stop_reason, weight=1.0, seed=shard)
        writer.commit()


def listed(page: Served, **query: Any) -> list[str]:
    return [sample_id for sample_id, _ in keys_of(page.get("/api/rollouts", **query)["rows"])]


def test_a_shard_that_is_committed_meanwhile_is_listed_counted_and_found(tmp_path: Path) -> None:
    store = begun(tmp_path / "store", [0, 3])
    with served(Browse(store, [], look_s=AT_ONCE)) as page:
        first = page.get("/api/overview")["store"]
        assert listed(page) == ["sample-0", "sample-3"]
        assert page.ask("/api/rollout?sample=sample-1&variation=0").status == 404
        commit(tmp_path / "store", 1)
        second = page.get("/api/overview")["store"]
        assert listed(page) == ["sample-0", "sample-1", "sample-3"]
        assert listed(page, text="SAMPLE-1") == ["sample-1"]
        assert listed(page, shortest=4, longest=4) == ["sample-1"]
        found = page.get("/api/rollout", sample="sample-1", variation=0)
        timestep = page.get("/api/timestep", sample="sample-1", variation=0, timestep=3)
    assert (first["shards"], first["rollouts"], first["timesteps"]) == (2, 2, 3 + 6)
    assert (second["shards"], second["rollouts"], second["timesteps"]) == (3, 3, 3 + 4 + 6)
    assert second["samples"] == 3
    assert sum(second["stop_reasons"].values()) == 3
    assert (found["timesteps"], timestep["timestep"]) == (4, 3)


def test_entropies_stay_those_of_their_rollouts_when_one_is_committed_before_them(
    tmp_path: Path,
) -> None:
    store = begun(tmp_path / "store", [0, 3])
    with served(Browse(store, [], look_s=AT_ONCE)) as page:
        places = [row["place"] for row in page.get("/api/rollouts")["rows"]]
        assert places == [0, 3]
        commit(tmp_path / "store", 2)
        page.get("/api/overview")
        found = page.get("/api/entropies", places="0,3")
        assert found.keys() == {"0", "3"}
        rows = page.get("/api/rollouts", order="most_entropy")["rows"]
    for row in rows:
        expected = entropy_of(store, (row["sample_id"], 0)).mean()
        assert row["entropy"] == pytest.approx(expected, rel=1e-4)
        assert found.get(str(row["place"]), row["entropy"]) == row["entropy"]
    assert len(rows) == 3


def test_looking_reads_the_tables_of_new_shards_alone_and_lists_only_when_it_is_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = begun(tmp_path / "store", [0, 1])
    read: list[int] = []
    looks: list[str] = []
    table, stamps = PredictionStore.rollout_table, Layout.stamps

    def counted(self: PredictionStore, shard: int) -> RolloutTable:
        read.append(shard)
        return table(self, shard)

    def noted(self: Layout) -> dict[int, float]:
        looks.append("look")
        return stamps(self)

    index = LiveIndex(store, AT_ONCE)
    index.current()
    monkeypatch.setattr(PredictionStore, "rollout_table", counted)
    same = index.current()
    assert index.current() is same
    commit(tmp_path / "store", 2)
    assert len(index.current()) == 3
    assert read == [2]
    rarely = LiveIndex(store, 3600)
    rarely.current()
    monkeypatch.setattr(Layout, "stamps", noted)
    assert rarely.current() is rarely.current()
    assert looks == []


def test_a_shard_that_comes_in_pieces_is_told_and_then_shown(tmp_path: Path) -> None:
    whole = begun(tmp_path / "whole", [0, 1, 2])
    store = begun(tmp_path / "store", [0])
    shards = Path(str(store.path)) / "shards"
    with served(Browse(store, [], look_s=AT_ONCE)) as page:
        assert listed(page) == ["sample-0"]
        (shards / "00002").mkdir()  # as who copies a store makes it, file by file
        commit(tmp_path / "store", 1)
        told = page.get("/api/overview")["store"]
        assert listed(page) == ["sample-0", "sample-1"]
        assert (told["shards"], told["rollouts"]) == (3, 2)
        (damaged,) = told["damaged"]
        assert "00002" in damaged
        assert page.ask("/api/rollout?sample=sample-2&variation=0").status == 500
        copied = Path(str(whole.path)) / "shards" / "00002"
        shutil.copytree(copied, shards / "00002", dirs_exist_ok=True)
        assert listed(page) == ["sample-0", "sample-1", "sample-2"]
        assert page.get("/api/overview")["store"]["damaged"] == []


def test_a_search_by_entropy_leaves_out_a_shard_whose_arrays_are_damaged_and_says_so(
    tmp_path: Path,
) -> None:
    store = begun(tmp_path / "store", [0, 1, 2])
    (array,) = (Path(str(store.path)) / "shards" / "00001" / "full.logits").rglob("c/*/*/*")
    array.write_bytes(b"\0" * array.stat().st_size)
    with served(Browse(store, [], look_s=AT_ONCE)) as page:
        assert listed(page) == ["sample-0", "sample-1", "sample-2"]
        found = page.get("/api/rollouts", order="least_entropy")
        (damaged,) = page.get("/api/overview")["store"]["damaged"]
    assert sorted(sample_id for sample_id, _ in keys_of(found["rows"])) == ["sample-0", "sample-2"]
    assert (found["entropy_known"], found["entropy_of"]) == (2, 2), "there is no more to compute"
    assert "00001" in damaged


def test_a_shard_that_was_taken_out_and_written_anew_is_read_anew(tmp_path: Path) -> None:
    place = tmp_path / "store"
    store = begun(place, [0, 1])
    index = LiveIndex(store, AT_ONCE)
    before = index.current()
    before.learn([0, 1])
    kept, gone = before.entropies[0], before.entropies[1]
    (place / "shards" / "00001").rename(place / "tmp" / "out")
    assert len(index.current()) == 1
    commit(place, 1, 9)
    after = index.current()
    assert after.lengths.tolist() == [3, 9]
    assert after.entropies[0] == kept
    after.learn([1])
    expected = entropy_of(store, ("sample-1", 0))
    assert len(expected) == 9
    assert after.entropies[1] == pytest.approx(expected.mean(), rel=1e-4) != pytest.approx(gone)


def test_a_shard_replaced_between_two_looks_is_noticed(tmp_path: Path) -> None:
    place = tmp_path / "store"
    index = LiveIndex(begun(place, [0, 1]), AT_ONCE)
    index.current().learn([0, 1])
    assert index.store["sample-1", 0].codes.shape[0] == 4
    (place / "shards" / "00001").rename(place / "tmp" / "out")
    commit(place, 1, 9)
    after = index.current()
    assert after.lengths.tolist() == [3, 9]
    assert np.isnan(after.entropies).tolist() == [False, True, True, True]
    assert index.store["sample-1", 0].codes.shape[0] == 9


def test_a_look_that_fails_keeps_what_is_known_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = begun(tmp_path / "store", [0])
    with served(Browse(store, [], look_s=AT_ONCE)) as page:
        assert listed(page) == ["sample-0"]
        commit(tmp_path / "store", 1)
        with monkeypatch.context() as patched:

            def fail(_: Layout) -> dict[int, float]:
                raise StoreError("the server has gone")

            patched.setattr(Layout, "stamps", fail)
            assert listed(page) == ["sample-0"]
            assert page.get("/api/overview")["store"]["trouble"] == "the server has gone"
        assert listed(page) == ["sample-0", "sample-1"], "a shard found in vain is found again"
        assert page.get("/api/overview")["store"]["trouble"] is None


def test_a_new_table_that_fails_for_a_while_is_read_at_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = begun(tmp_path / "store", [0])
    index = LiveIndex(store, AT_ONCE)
    index.current()
    commit(tmp_path / "store", 1)
    with monkeypatch.context() as patched:

        def fail(*_: object) -> RolloutTable:
            raise StoreError("no answer")

        patched.setattr(PredictionStore, "rollout_table", fail)
        assert len(index.current()) == 1
        assert index.trouble == "no answer"
    assert len(index.current()) == 2


def test_many_who_ask_while_shards_are_committed_each_see_a_whole_list(tmp_path: Path) -> None:
    planned = 24
    store = begun(tmp_path / "store", [0], planned)
    wrong: list[str] = []
    ended = threading.Event()

    def ask(page: Served) -> None:
        seen = 0
        while not ended.is_set():
            found = page.get("/api/rollouts", order="most_entropy")
            rows = found["rows"]
            if not seen <= len(rows) == found["rollouts"]:
                wrong.append(f"{seen} rollouts, then {len(rows)} of {found['rollouts']}")
            wrong.extend(
                f"{row['sample_id']} at {row['place']} with {row['timesteps']}"
                for row in rows
                if (row["sample_id"], row["timesteps"])
                != (f"sample-{row['place']}", 3 + row["place"])
            )
            seen = len(rows)

    with served(Browse(store, [], look_s=AT_ONCE)) as page:
        readers = [threading.Thread(target=ask, args=(page,)) for _ in range(4)]
        for reader in readers:
            reader.start()
        for shard in range(planned - 1, 0, -1):
            commit(tmp_path / "store", shard)
        ended.set()
        for reader in readers:
            reader.join()
        assert len(page.get("/api/rollouts")["rows"]) == planned
    assert wrong == []


def test_one_thread_looks_and_the_others_do_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = LiveIndex(begun(tmp_path / "store", [0]), AT_ONCE)
    before = index.current()
    looking, go_on = threading.Event(), threading.Event()
    renewed = RolloutIndex.renewed

    def slow(self: RolloutIndex) -> RolloutIndex:
        looking.set()
        assert go_on.wait(20)
        return renewed(self)

    monkeypatch.setattr(RolloutIndex, "renewed", slow)
    commit(tmp_path / "store", 1)
    found: list[RolloutIndex] = []
    thread = threading.Thread(target=lambda: found.append(index.current()))
    thread.start()
    assert looking.wait(20)
    assert index.current() is before
    go_on.set()
    thread.join()
    assert len(found[0]) == 2
    assert len(index.current().find(Query())["rows"]) == 2


def test_in_object_storage_new_shards_are_listed_too(object_url: str) -> None:
    store = begun(object_url, [0])
    assert LiveIndex(store)._look_s == 20, "a listing costs a request"
    with served(Browse(store, [], look_s=AT_ONCE)) as page:
        assert listed(page) == ["sample-0"]
        commit(object_url, 2)
        assert listed(page) == ["sample-0", "sample-2"]
        assert page.get("/api/rollout", sample="sample-2", variation=0)["timesteps"] == 5


def test_in_object_storage_a_shard_that_was_taken_out_is_read_anew(object_url: str) -> None:
    index = LiveIndex(begun(object_url, [0, 1]), AT_ONCE)
    assert index.current().lengths.tolist() == [3, 4]
    assert len(index.store["sample-1", 0]) == 4
    layout = layout_of(object_url).opened()
    assert isinstance(layout, RemoteLayout)
    layout.take_out(1)
    assert index.current().lengths.tolist() == [3]
    commit(object_url, 1, 9)
    assert index.current().lengths.tolist() == [3, 9]
    assert len(index.store["sample-1", 0]) == 9


def test_refreshing_a_store_pins_what_is_committed_by_now(tmp_path: Path) -> None:
    store = begun(tmp_path / "store", [0])
    assert not store.refresh()
    commit(tmp_path / "store", 2)
    assert store.missing() == [1, 2, 3]
    assert store.refresh()
    assert (store.committed, len(store), store.missing()) == ([0, 2], 2, [1, 3])
    assert ("sample-2", 0) in store
    assert len(store["sample-2", 0]) == 5


# Runs


def log_line(folder: Path, step: int, **values: float) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps({"step": step, "learning_rate": 0.1, **values}) + "\n")


def test_new_lines_of_training_logs_appear(tmp_path: Path) -> None:
    run = evaluated_run(tmp_path / "run")
    log_line(run / "student_half", 20, kl=0.5)
    with served(browse_of(str(run), [], None)) as page:
        (log,) = page.get("/api/training", run=0)
        assert (log["name"], log["label"], log["step"]) == ("student_half", "student half", 20)
        log_line(run / "student_half", 40, kl=0.25)
        log_line(run / "teacher", 10, ce=2.0)
        with (run / "student_half" / "log.jsonl").open("a") as half_written:
            half_written.write('{"step": 60, "kl"')
        teacher, student = page.get("/api/training", run=0)
    assert student["losses"] == [{"name": "kl", "steps": [20, 40], "values": [0.5, 0.25]}]
    assert (teacher["label"], teacher["step"]) == ("teacher", 10)


def test_a_log_is_read_again_only_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_line(tmp_path / "student", 20, kl=0.5)
    logs = TrainingLogs(tmp_path)
    first = logs.describe()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", None)
        assert logs.describe() == first
    log_line(tmp_path / "student", 40, kl=0.25)
    assert logs.describe()[0]["step"] == 40


@pytest.mark.parametrize("text", ['{"kl": 1}\n', "[1]\n", '{"step": "x"}\n', "\udcff"])
def test_a_log_that_is_none_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "student").mkdir()
    log = tmp_path / "student" / "log.jsonl"
    log.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="is no training log that can be read"):
        TrainingLogs(tmp_path).describe()


def test_a_report_that_is_written_anew_is_another_one(tmp_path: Path) -> None:
    run = evaluated_run(tmp_path / "run")
    with served(browse_of(str(run), [], None)) as page:
        first = page.get("/api/run", run=0)
        shutil.rmtree(run / "report")
        assert page.get("/api/overview")["runs"][0]["report"] is None
        evaluated_run(run, samples=7, sentences=7)
        second = page.get("/api/run", run=0)
        (told,) = page.get("/api/overview")["runs"]
    assert (first["samples"], second["samples"]) == (1, 7)
    assert first["report"] != second["report"] == told["report"]


def test_the_run_of_a_store_appears_with_its_first_log_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    store_of(run / "store", ["a"], TopK(k=4))
    with served(browse_of(str(run / "store"), [], None)) as page:
        assert page.get("/api/overview")["runs"] == []
        log_line(run / "student", 20, kl=0.5)
        (told,) = page.get("/api/overview")["runs"]
    assert told == {"run": 0, "name": "run", "report": None}
