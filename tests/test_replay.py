"""Codes of a store are scored again for other targets, and nothing is generated."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.progress import stage_identity
from stages.errors import UserError
from stages.families.codec_lm import CodecLM
from stages.interruption import StopRequest
from stages.replay import Replay, open_replay
from stages.rollout import rollout
from stages.rollout_plan import create_store, lay_out
from stages.sampling import keyed_seed
from store import PredictionStore, StoreError, verify
from store.schema import Dense
from store.synthetic import synthetic_manifest, synthetic_store
from tests.stopping import StopAfter
from tests.test_cli import foretell
from tests.test_rollout import (
    VARIANTS,
    config_of,
    logprobs_again,
    samples_of,
    shard_bytes,
    stored_logprobs,
    teacher_of,
    written,
)

pytestmark = pytest.mark.slow

SAMPLER = {
    "temperature": 0.9, "min_timesteps": 2, "max_timesteps": 10, "top_k": 12,
    "reference_multiple": 1.5, "too_short_multiple": 0.6, "too_short_weight": 0.01,
}  # fmt: skip


def begun(
    path: Path, family: CodecLM, samples: list[dict], replayed: Path, **changes: Any
) -> tuple[PredictionStore, Replay, int]:
    config = config_of(source="replay", replay=replayed, **changes)
    replay = open_replay(replayed, family, "d", path)
    store = create_store(
        path,
        family,
        lay_out(
            config,
            family,
            samples,
            facts=family.facts,
            dataset_fingerprint="d",
            seed=9,
            replay=replay,
        ),
    )
    return store, replay, config.batch_size


def replayed(
    path: Path, family: CodecLM, samples: list[dict], codes: Path, stop=None, **changes: Any
) -> PredictionStore:
    """A store of the codes of `codes`, scored by `family` while it cannot generate."""
    store, replay, size = begun(path, family, samples, codes, **changes)
    by_id = {sample["sample_id"]: sample for sample in samples}
    family.rollout = lambda *_, **__: pytest.fail("the teacher generated")
    finished = rollout(
        family, store, by_id, store.missing(), batch_size=size, stop=stop or StopRequest(),
        draws=replay,
    )  # fmt: skip
    del family.rollout
    assert finished == (stop is None)
    return PredictionStore.open(path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_replay_with_the_same_settings_is_the_same_store(tmp_path, variant):
    family, samples = teacher_of(**VARIANTS[variant]), samples_of()
    first = written(tmp_path / "first", family, samples, sampler=SAMPLER)
    # What else the configuration says of samples and sampler is not asked: the codes are given.
    again = replayed(
        tmp_path / "again", family, samples, first.path, variations=1, first_variation=7,
        sampler={"max_timesteps": 3}, split="nowhere",
    )  # fmt: skip
    assert again.plan == first.plan
    assert verify(again.path).ok
    for key in first:
        one, two = first[key], again[key]
        assert two.codes.tolist() == one.codes.tolist()
        assert (two.stop_reason, two.weight, two.seed) == (one.stop_reason, one.weight, one.seed)
        torch.testing.assert_close(
            stored_logprobs(again, key).exp(), stored_logprobs(first, key).exp(),
            atol=2e-5, rtol=1e-4,
        )  # fmt: skip
    assert len({again[key].weight for key in again}) > 1
    kept = ("sampler", "seed", "split", "streams", "conditioning", "architecture")
    ours, theirs = (store.manifest.model_dump() for store in (again, first))
    assert {name: ours[name] for name in kept} == {name: theirs[name] for name in kept}
    assert again.manifest.source == "replay"
    assert again.manifest.fingerprints == first.manifest.fingerprints.model_copy(
        update={"codes": first.fingerprint}
    )


def test_a_replay_draws_its_targets_with_the_numbers_of_the_rollouts_own_seeds(tmp_path):
    family, samples = teacher_of(), samples_of(4)
    target = {"kind": "sampled", "draws": 30}
    first = written(tmp_path / "first", family, samples, target=target)
    again = replayed(tmp_path / "again", family, samples, first.path, target=target)
    same = [
        (again[key].arrays["sampled.ids"] == first[key].arrays["sampled.ids"]).mean()
        for key in first
    ]
    assert np.mean(same) > 0.999
    assert all(again[key].seed == keyed_seed(4, *key) for key in again)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("k", [3, 9])
def test_a_replay_keeps_another_k_at_another_scale_as_scoring_gives_it(tmp_path, k, scale):
    family, samples = teacher_of(**VARIANTS["all"]), samples_of(4)
    first = written(tmp_path / "first", family, samples)
    target = {"kind": "top_k", "k": k, "dtype": "float32"}
    again = replayed(
        tmp_path / "again", family, samples, first.path, target=target, guidance={"scale": scale}
    )
    assert again.manifest.guidance.scale == scale
    for key in first:
        exact = logprobs_again(family, first, key, samples, scale)
        arrays = again[key].arrays
        ids = torch.from_numpy(arrays["top_k.ids"].astype(np.int64))
        assert ids.shape[-1] == k
        kept = exact.gather(-1, ids)
        found = torch.from_numpy(arrays["top_k.logits"].copy()).double()
        torch.testing.assert_close(
            found.log_softmax(-1), kept.log_softmax(-1), atol=1e-4, rtol=1e-4
        )
        tail = torch.from_numpy(arrays["top_k.tail_logmass"][..., 0].copy()).double().exp()
        torch.testing.assert_close(tail, 1 - kept.exp().sum(-1), atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize(("before", "after"), [("plain", "local"), ("local", "plain")])
def test_streams_of_a_local_transformer_may_come_or_go(tmp_path, before, after):
    samples = samples_of(4)
    drawn_by, family = teacher_of(**VARIANTS[before]), teacher_of(**VARIANTS[after])
    first = written(tmp_path / "first", drawn_by, samples)
    again = replayed(tmp_path / "again", family, samples, first.path)
    assert again.manifest.fingerprints.teacher == family.fingerprint()
    assert [s.name for s in again.manifest.streams] == [s.name for s in family.streams]
    for key in first:
        codes, streams = again[key].codes, len(family.streams)
        assert codes.tolist() == np.tile(first[key].codes[:, :2], streams // 2).tolist()
        exact = logprobs_again(family, again, key, samples, 2.5)
        torch.testing.assert_close(
            stored_logprobs(again, key).exp(), exact.exp(), atol=2e-5, rtol=1e-4
        )


def test_shards_of_another_size_hold_the_same_rollouts(tmp_path):
    family, samples = teacher_of(), samples_of()
    first = written(tmp_path / "first", family, samples)
    again = replayed(tmp_path / "again", family, samples, first.path, rollouts_per_shard=3)
    assert (again.planned_shards, first.planned_shards) == (5, 3)
    assert {key: again[key].codes.tobytes() for key in again} == {
        key: first[key].codes.tobytes() for key in first
    }


def test_an_interrupted_replay_goes_on_to_the_same_bytes(tmp_path):
    family, samples = teacher_of(), samples_of()
    target = {"kind": "top_k", "k": 5, "tail_samples": 4}
    first = written(tmp_path / "first", family, samples)
    whole = replayed(tmp_path / "whole", family, samples, first.path, target=target)
    part = replayed(
        tmp_path / "part", family, samples, first.path, stop=StopAfter(3), target=target
    )
    assert part.committed == [0]
    resumed = replayed(tmp_path / "part", family, samples, first.path, target=target)
    assert shard_bytes(resumed.path) == shard_bytes(whole.path)
    assert (resumed.path / "manifest.json").read_bytes() == (
        whole.path / "manifest.json"
    ).read_bytes()


def test_codes_of_a_student_and_of_the_dataset_stay_known_by_their_store(tmp_path):
    family, samples = teacher_of(), samples_of(4)
    first = written(tmp_path / "first", family, samples, source="dataset", variations=1)
    again = replayed(tmp_path / "again", family, samples, first.path)
    third = replayed(tmp_path / "third", family, samples, again.path)
    for sample in samples:
        codes = third[sample["sample_id"], 0].codes
        assert codes.tolist() == family.reference_codes(sample).tolist()
    assert third.manifest.fingerprints.codes == again.fingerprint


OTHERS = {
    "dataset": ({"dataset": "e"}, r"dataset: 'd', not 'e'"),
    "tokenizer": ({"tokenizer": "x"}, r"tokenizer: '\w{64}', not 'x'"),
    "frame stacking": ({"model": {"frames_per_step": 2}}, r"streams: .*, not .*backbone\.3:16"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_codes_of_something_else_are_refused_saying_what_differs(tmp_path, monkeypatch, other):
    changes, words = OTHERS[other]
    written(tmp_path / "first", teacher_of(), samples_of(2))
    family = teacher_of(**changes.get("model", {}))
    if "tokenizer" in changes:
        monkeypatch.setattr(family, "tokenizer_fingerprint", lambda: changes["tokenizer"])
    with pytest.raises(UserError, match=rf"first are not those of this teacher .*{words}") as told:
        open_replay(tmp_path / "first", family, changes.get("dataset", "d"), tmp_path / "again")
    assert str(told.value).count(", not ") == 1
    assert "replay a store of the same dataset, codebooks and tokenizer" in str(told.value)


def test_codes_of_other_vocabularies_are_refused_naming_every_difference(tmp_path):
    written(tmp_path / "first", teacher_of(), samples_of(2))
    family = teacher_of()
    family.forbidden, family.end_id = (15,), 16
    family.streams = tuple(s.model_copy(update={"vocabulary": 17}) for s in family.streams)
    words = (
        r"forbidden ids: \(14,\), not \(15,\); end id: 15, not 16; streams: backbone\.0:16, "
        r"backbone\.1:16, not backbone\.0:17, backbone\.1:17: replay"
    )
    with pytest.raises(UserError, match=words):
        open_replay(tmp_path / "first", family, "d", tmp_path / "again")


def test_a_store_of_another_family_or_without_codes_is_refused(tmp_path):
    synthetic_store(tmp_path / "other", synthetic_manifest(config_of().target), 2, 1, 2)
    with pytest.raises(UserError, match="family: 'synthetic', not 'codec_lm'"):
        open_replay(tmp_path / "other", teacher_of(), "d", tmp_path / "again")
    synthetic_store(tmp_path / "dense", synthetic_manifest(Dense()), 2, 1, 2)
    with pytest.raises(UserError, match="continuous predictions and no codes"):
        open_replay(tmp_path / "dense", teacher_of(), "d", tmp_path / "again")


def test_an_incomplete_store_and_no_store_are_refused(tmp_path):
    written(tmp_path / "first", teacher_of(), samples_of())
    shutil.rmtree(tmp_path / "first" / "shards" / "00001")
    words = r"lacks 1 of 3 shards \(first: 00001\): finish its rollout"
    with pytest.raises(UserError, match=words):
        open_replay(tmp_path / "first", teacher_of(), "d", tmp_path / "again")
    with pytest.raises(StoreError, match="is no store"):
        open_replay(tmp_path / "nothing", teacher_of(), "d", tmp_path / "again")


def test_a_store_is_not_replayed_into_itself(tmp_path):
    written(tmp_path / "first", teacher_of(), samples_of())
    (tmp_path / "link").symlink_to(tmp_path / "first", target_is_directory=True)
    with pytest.raises(UserError, match="is the store that would be written: give the run another"):
        open_replay(tmp_path / "first", teacher_of(), "d", tmp_path / "link")


# ---- by the command line


@pytest.fixture
def replaying(tiny_run, run_of):
    """A run that keeps another k of the codes of `tiny_run`."""
    section = tiny_run.document["rollout"] | {"target": {"kind": "top_k", "k": 4}}
    return run_of("again", fitted=True, rollout=section, students=None)


def test_the_option_replays_in_two_processes_and_status_knows_it(tiny_run, replaying):
    first = PredictionStore.open(tiny_run.root / "store")
    done = foretell("rollout", replaying.path, "--replay", first.path,
                    "--set", "rollout.processes=2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    again = PredictionStore.open(replaying.root / "store")
    assert again.manifest.source == "replay"
    assert {key: again[key].codes.tobytes() for key in again} == {
        key: first[key].codes.tobytes() for key in first
    }
    same = ["--set", "rollout.source=replay", "--set", f"rollout.replay={first.path}"]
    assert foretell("status", replaying.path, *same, "--json").returncode == 0
    assert foretell("status", replaying.path).returncode == 1
    repeated = foretell("rollout", replaying.path, "--replay", first.path)
    assert (repeated.returncode, "rollout: done" in repeated.stderr) == (0, True)


def test_a_run_into_the_replayed_store_is_refused(tiny_run, replaying, start_worker):
    store = str(tiny_run.root / "store")
    options = (f"--set=rollout.replay={store}", "--set=rollout.source=replay")
    worker = start_worker("rollout", replaying, *options, f"--set=store={store}")
    assert worker.wait() == 2
    assert "is the store that would be written" in worker.stderr.read_text()


def test_what_a_replay_depends_on_is_the_store_and_not_where_it_lies(tiny_run, run_of, tmp_path):
    moved = shutil.copytree(tiny_run.root / "store", tmp_path / "moved")
    other = written(tmp_path / "other", teacher_of(), samples_of(2)).path

    def identity(path: Path) -> str:
        section = tiny_run.document["rollout"] | {"source": "replay", "replay": str(path)}
        return stage_identity(run_of("own", fitted=True, rollout=section).load(), "rollout")

    assert identity(tiny_run.root / "store") == identity(moved)
    assert identity(other) != identity(moved)
