"""Samples that a model cannot take leave the plan by name, the same ones for everyone."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.inspection import describe_store
from pipeline.inspection_text import store_text
from pipeline.progress import progress
from stages.dataset import SAMPLES, Dataset, fingerprint
from stages.errors import Refused, UserError
from stages.family import load_family
from stages.interruption import StopRequest
from stages.rejections import kind_of
from stages.replay import open_replay
from stages.rollout import rollout
from stages.rollout_plan import create_store, lay_out
from store import PredictionStore, StoreError, verify
from tests.conftest import Run
from tests.test_rollout import (
    config_of,
    samples_of,
    shard_bytes,
    store_of,
    teacher_of,
    written,
)

FAULTS: dict[str, dict[str, Any]] = {
    "empty text": {"text": ""},
    "text too long": {"text": "a" * 21},
    "text outside the alphabet": {"text": "bad xyz"},
    "unknown speaker": {"speaker": "nobody"},
    "truncated frame": {"codes": np.zeros(5, np.uint16)},
    "code outside its codebook": {"codes": np.full(6, 14, np.uint16)},
}
"""A change of a sample for every kind of fault."""


def kinds(store: PredictionStore) -> dict[str, str]:
    return {sample_id: kind_of(reason) for sample_id, reason in store.rejected}


def faulty(count: int = 9) -> tuple[list[dict], dict[str, str]]:
    """Samples of which every kind of fault has one, and the kind of each by sample_id."""
    samples = samples_of(count)
    for place, change in enumerate(FAULTS.values(), 1):
        samples[place] = samples[place] | change
    expected = {samples[place]["sample_id"]: kind for place, kind in enumerate(FAULTS, 1)}
    return samples, expected


@pytest.mark.parametrize("source", ["teacher", "dataset"])
def test_every_kind_of_fault_is_named_and_the_rest_goes_on(tmp_path, caplog, source):
    family, (samples, expected) = teacher_of(), faulty()
    store = written(tmp_path / "store", family, samples, source=source)
    assert kinds(store) == expected
    good = [sample["sample_id"] for sample in samples if sample["sample_id"] not in expected]
    assert {sample_id for sample_id, _ in store} == set(good)
    assert store.samples["sample_id"].to_pylist() == good
    assert store.missing() == []
    assert verify(store.path).ok
    assert "6 of 9 samples are left out, each with its reason in rejected.parquet" in caplog.text
    for sample_id, kind in expected.items():
        assert any(
            line.split()[-1] == repr(sample_id) and line.startswith(f"{kind} ")
            for line in caplog.text.splitlines()
        )


def test_the_others_are_rolled_out_as_if_the_refused_had_never_been_there(tmp_path):
    samples, expected = faulty()
    store = written(tmp_path / "some", teacher_of(), samples)
    good = [sample for sample in samples if sample["sample_id"] not in expected]
    without = written(tmp_path / "good", teacher_of(), good)
    assert store.plan == without.plan
    for key in without:
        assert store[key].codes.tolist() == without[key].codes.tolist()
    assert without.rejected == ()


def test_a_recording_is_refused_for_its_length_only_where_it_is_what_is_scored(tmp_path):
    """The model takes 40 timesteps."""
    samples = samples_of(3)
    samples[1]["codes"] = np.zeros(2 * 40, np.uint16)
    drawn = written(tmp_path / "drawn", teacher_of(), samples)
    assert drawn.rejected == ()
    given = written(tmp_path / "given", teacher_of(), samples, source="dataset")
    assert kinds(given) == {"clip/1": "too long for the model"}


def test_what_teaches_nothing_is_left_out_where_the_recording_teaches(tmp_path):
    family, samples = teacher_of(), samples_of(3)
    silent = family.reference_codes(samples[2])
    family.predicted = lambda codes: torch.full_like(
        codes, not torch.equal(codes, silent), dtype=torch.bool
    )
    store, _ = store_of(tmp_path / "given", family, samples, source="dataset")
    assert kinds(store) == {"clip/2": "nothing to learn from"}
    drawn, _ = store_of(tmp_path / "drawn", family, samples)
    assert drawn.rejected == ()


def test_settings_that_fit_no_sample_are_one_error_whatever_the_samples_are(tmp_path, monkeypatch):
    family, (samples, _) = teacher_of(), faulty()
    monkeypatch.setattr(family, "check_sample", lambda *_: pytest.fail("a sample was asked for"))
    with pytest.raises(UserError, match=r"sampler\.max_timesteps: a rollout has 41") as caught:
        store_of(tmp_path / "store", family, samples, sampler={"max_timesteps": 41})
    assert not isinstance(caught.value, Refused)
    assert not (tmp_path / "store").exists()


def test_an_error_that_is_no_samples_fault_leaves_no_sample_out(tmp_path, monkeypatch):
    family, asked = teacher_of(), []

    def check(sample, timesteps):
        asked.append(sample)
        raise UserError("the layout is wrong")

    monkeypatch.setattr(family, "check_sample", check)
    with pytest.raises(UserError, match="the layout is wrong"):
        store_of(tmp_path / "store", family, samples_of())
    assert len(asked) == 1


def test_where_nothing_is_left_the_error_has_the_count_and_the_first_reason(tmp_path):
    samples = [sample | {"speaker": "nobody"} for sample in samples_of()]
    words = r"none of the 7 samples .* 'clip/0': unknown speaker: 'nobody'"
    with pytest.raises(UserError, match=words):
        store_of(tmp_path / "store", teacher_of(), samples)
    assert not (tmp_path / "store").exists()


def test_a_replay_refuses_by_the_lengths_of_the_codes_that_it_is_given(tmp_path):
    """Another teacher, of the same tokenizer and codes, takes fewer timesteps."""
    samples = samples_of()
    first = written(tmp_path / "first", teacher_of(), samples, sampler={"max_timesteps": 30})
    longest: dict[str, int] = {}
    for key in first:
        longest[key[0]] = max(len(first[key]), longest.get(key[0], 0))
    limit = sorted(longest.values())[3]
    assert limit < max(longest.values()), "all rollouts are of one length"
    small = teacher_of(max_timesteps=limit)
    replay = open_replay(first.path, small, "d", tmp_path / "again")
    store = create_store(
        tmp_path / "again",
        small,
        lay_out(
            config_of(source="replay", replay=first.path),
            small,
            samples,
            facts=small.facts,
            dataset_fingerprint="d",
            seed=4,
            replay=replay,
        ),
    )
    too_long = {sample_id for sample_id, length in longest.items() if length > limit}
    assert kinds(store) == dict.fromkeys(too_long, "too long for the model")
    by_id = {sample["sample_id"]: sample for sample in samples}
    assert rollout(
        small, store, by_id, store.missing(), batch_size=3, stop=StopRequest(), draws=replay
    )
    again = PredictionStore.open(store.path)
    assert set(again) == {key for key in first if key[0] not in too_long}
    assert all(again[key].codes.tolist() == first[key].codes.tolist() for key in again)


def test_a_store_that_leaves_out_others_is_another_store(tmp_path):
    samples = samples_of()
    cut = [*samples, samples[0] | {"sample_id": "cut", "codes": np.zeros(3, np.uint16)}]
    store_of(tmp_path / "store", teacher_of(), cut)
    store_of(tmp_path / "store", teacher_of(), cut)
    with pytest.raises(StoreError, match="'cut' is left out only in the store"):
        store_of(tmp_path / "store", teacher_of(), samples)
    store_of(tmp_path / "whole", teacher_of(), samples)
    with pytest.raises(StoreError, match="'cut' is left out only given"):
        store_of(tmp_path / "whole", teacher_of(), cut)


def test_the_reasons_name_nothing_of_the_machine(tmp_path):
    """Else two workers, which see the model in other folders, would make two stores."""
    samples, _ = faulty()
    for name in ("here", "elsewhere"):
        teacher_of().save(tmp_path / name)
    stores = [
        store_of(tmp_path / f"store {name}", load_family("codec_lm").load(
            tmp_path / name, device="cpu", dtype=torch.float32
        ), samples)[0]
        for name in ("here", "elsewhere")
    ]  # fmt: skip
    assert stores[0].rejected == stores[1].rejected
    assert stores[0].fingerprint == stores[1].fingerprint


# Whole stages


def spoiled(source: Path, target: Path, changes: dict[int, dict[str, Any]], split: str) -> Path:
    """A copy of a dataset in which some rows of a split, by number, are faulty."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.name not in ("samples.parquet", "dataset.json"):
            (target / path.name).symlink_to(path)
    rows = pq.read_table(source / "samples.parquet").to_pylist()
    chosen = [row for row in rows if row["split"] == split]
    for number, change in changes.items():
        chosen[number].update(change)
    table = pa.Table.from_pylist(rows, SAMPLES)
    pq.write_table(table, target / "samples.parquet")
    header = json.loads((source / "dataset.json").read_text())
    header["fingerprint"] = fingerprint(table, header["facts"]["audio_codec"])
    (target / "dataset.json").write_text(json.dumps(header))
    return target


BAD_ROWS: dict[int, dict[str, Any]] = {
    0: {"text": "bad " * 9},
    2: {"text": "bäd"},
    3: {"speaker": "nobody"},
    5: {"codes": [1, 2, 3]},
    7: {"codes": [1, 2, 3, 16]},
    9: {"text": ""},
}
KINDS = [
    "text too long", "text outside the alphabet", "unknown speaker", "truncated frame",
    "code outside its codebook", "empty text",
]  # fmt: skip


@pytest.fixture
def bad_run(tiny_run, run_of, tmp_path) -> Callable[..., Run]:
    """A run of the fitted teacher on a dataset with bad rows; keywords replace sections."""
    path = spoiled(tiny_run.root / "dataset", tmp_path / "bad", BAD_ROWS, "train")

    def make(name: str = "own", **sections: Any) -> Run:
        own = {"dataset": str(path), "students": None} | sections
        return run_of(name, fitted=True, **own)

    return make


def refused_ids(run: Run) -> dict[str, str]:
    samples = Dataset.open(Path(run.document["dataset"])).samples("train")
    ids = [samples[number]["sample_id"] for number in BAD_ROWS]
    return dict(zip(ids, KINDS, strict=True))


@pytest.mark.slow
def test_a_rollout_of_a_dataset_with_bad_rows_is_done_and_says_so(bad_run, foretell):
    run = bad_run()
    done = foretell("run", run.path)
    samples = len(Dataset.open(Path(run.document["dataset"])).samples("train"))
    assert f"6 of {samples} samples are left out, each with its reason" in done.stderr
    for sample_id, kind in refused_ids(run).items():
        assert f"{kind} " in done.stderr
        assert repr(sample_id) in done.stderr
    store = run.root / "store"
    table = pq.read_table(store / "rejected.parquet")
    assert table.column_names == ["sample_id", "reason"]
    assert kinds(PredictionStore.open(store)) == refused_ids(run)
    shown = json.loads(foretell("inspect", store, "--json").stdout)
    assert (shown["rejected"], shown["rollouts"]) == (6, 2 * (samples - 6))
    assert shown["rejected_for"] == dict.fromkeys(KINDS, 1)
    text = foretell("inspect", store).stdout
    assert [line.split() for line in text.splitlines() if line.startswith("rejected ")] == [
        ["rejected", "6"]
    ]
    assert "unknown speaker 1" in text
    foretell("verify", store)
    status = foretell("status", run.path, "--json")
    planned = -(-2 * (samples - 6) // 8)
    assert json.loads(status.stdout)["stages"]["rollout"] == {
        "planned": planned, "done": planned, "missing": 0, "state": "done",
    }  # fmt: skip
    (store / "rejected.parquet").unlink()
    foretell("verify", store, code=1)


@pytest.mark.slow
def test_a_dataset_of_nothing_but_bad_rows_is_refused_with_the_count(
    bad_run, tiny_run, tmp_path, foretell
):
    dataset = tiny_run.root / "dataset"
    samples = Dataset.open(dataset).samples("train")
    path = spoiled(
        dataset, tmp_path / "worse",
        {number: {"speaker": "nobody"} for number in range(len(samples))}, "train",
    )  # fmt: skip
    worse = bad_run("worse", dataset=str(path))
    done = foretell("rollout", worse.path, code=2)
    assert f"none of the {len(samples)} samples can be rolled out" in done.stderr
    first = f"the first, {samples[0]['sample_id']!r}: unknown speaker: 'nobody'"
    assert done.stderr.count(first) == done.stderr.count("unknown speaker") == 1
    assert not (worse.root / "store").exists()


@pytest.mark.slow
def test_killed_or_shared_rollouts_with_refusals_end_with_the_bytes_of_one(
    bad_run, tiny_run, start_worker
):
    section = tiny_run.document["rollout"] | {"rollouts_per_shard": 3, "batch_size": 1}
    whole, killed, shared = (bad_run(n, rollout=section) for n in ("whole", "killed", "shared"))
    whole.do("rollout")
    shards = killed.root / "store" / "shards"
    for count in (1, 4):
        worker = start_worker("rollout", killed)
        worker.kill_when(
            lambda count=count: shards.exists() and len(list(shards.iterdir())) >= count,
            signal.SIGKILL,
        )
    assert progress(killed.load(), "rollout").state == "partial"
    killed.do("rollout")
    workers = [start_worker("rollout", shared, "--task", f"{task}/2") for task in range(2)]
    assert [worker.wait() for worker in workers] == [0, 0]
    files = ("manifest.json", "plan.parquet", "samples.parquet", "rejected.parquet")
    for run in (killed, shared):
        store = run.root / "store"
        for name in files:
            assert (store / name).read_bytes() == (whole.root / "store" / name).read_bytes()
        assert shard_bytes(store) == shard_bytes(whole.root / "store")
        assert verify(store).ok
        assert kinds(PredictionStore.open(store)) == refused_ids(run)


def without_letter(model: Path, letter: str, target: Path) -> str:
    """A copy of a model that has another letter in the place of one."""
    shutil.copytree(model, target)
    described = json.loads((target / "config.json").read_text())
    described["facts"]["alphabet"] = described["facts"]["alphabet"].replace(letter, "z")
    (target / "config.json").write_text(json.dumps(described))
    return str(target)


@pytest.mark.slow
def test_a_student_and_a_teacher_each_refuse_their_own(bad_run, tiny_run, tmp_path):
    """The student, which has no g, has drawn when the teacher is asked, which has no f."""
    teacher = without_letter(tiny_run.root / "teacher", "f", tmp_path / "teacher")
    student = without_letter(tiny_run.root / "student", "g", tmp_path / "student")
    section = tiny_run.document["rollout"] | {"source": "student", "student": student}
    run = bad_run("two", teacher={"checkpoint": teacher}, rollout=section)
    run.do("draw", "rollout")
    samples = Dataset.open(Path(run.document["dataset"])).samples("train")
    by_both, by_student, by_teacher = refused_ids(run), set(), set()
    for sample in samples:
        if sample["sample_id"] not in by_both and "g" in sample["text"]:
            by_student.add(sample["sample_id"])
        elif sample["sample_id"] not in by_both and "f" in sample["text"]:
            by_teacher.add(sample["sample_id"])
    assert by_student
    assert by_teacher
    store = PredictionStore.open(run.root / "store")
    assert kinds(store).keys() == by_both.keys() | by_student | by_teacher
    assert {kinds(store)[name] for name in by_student | by_teacher} == {"text outside the alphabet"}
    order = [sample["sample_id"] for sample in samples]
    assert [name for name, _ in store.rejected] == sorted(kinds(store), key=order.index)
    left = {name for name in order if name not in kinds(store)}
    assert set(store) == {(name, variation) for name in left for variation in range(2)}
    table = pq.read_table(run.root / "draws" / "rejected.parquet")
    assert set(table["sample_id"].to_pylist()) == by_both.keys() | by_student
    draws = draws_of(run.root / "draws")
    assert {name for name, _ in draws} == left | by_teacher
    for key in store:
        assert store[key].codes.ravel().tolist() == draws[key]


def draws_of(folder: Path) -> dict[tuple[str, int], list[int]]:
    rows = [
        row for path in sorted(folder.glob("0*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    return {(row["sample_id"], row["variation"]): row["codes"] for row in rows}


@pytest.mark.slow
def test_the_reference_of_an_evaluation_leaves_them_out_too(tiny_run, run_of, tmp_path):
    """Of four samples of the test split one is cut within a frame, and one says nothing."""
    bad = {0: {"codes": [1, 2, 3]}, 2: {"text": ""}}
    path = spoiled(tiny_run.root / "dataset", tmp_path / "bad", bad, "test")
    run = run_of(
        "own", fitted=True, dataset=str(path), students=None,
        evaluate=tiny_run.document["evaluate"] | {"samples": 4},
    )  # fmt: skip
    run.do("rollout", "evaluate")
    samples = Dataset.open(path).samples("test")
    reference = PredictionStore.open(run.root / "report" / "reference")
    assert kinds(reference) == {
        samples[0]["sample_id"]: "truncated frame", samples[2]["sample_id"]: "empty text",
    }  # fmt: skip
    report = json.loads((run.root / "report" / "report.json").read_text())
    assert report["samples"] == 2


@pytest.mark.slow
def test_an_audit_is_made_of_what_the_teacher_takes(tiny_run, run_of, tmp_path):
    path = spoiled(tiny_run.root / "dataset", tmp_path / "bad", BAD_ROWS, "train")
    run = run_of(
        "own", fitted=True, dataset=str(path), students=None,
        rollout=tiny_run.document["rollout"] | {"precision": "bf16", "audit_samples": 20},
    )  # fmt: skip
    run.do("rollout")
    store = PredictionStore.open(run.root / "store")
    quantization = store.manifest.quantization
    assert quantization is not None
    assert quantization.audit is not None
    given = len(Dataset.open(path).samples("train"))
    assert quantization.audit.samples == min(20, given) - len(BAD_ROWS)


def test_a_store_without_refusals_says_that_there_are_none(tmp_path):
    store = written(tmp_path / "store", teacher_of(), samples_of(2))
    document = describe_store(store.path)
    assert (document["rejected"], document["rejected_for"]) == (0, {})
    assert "rejected_for none" in " ".join(store_text(document).split())
