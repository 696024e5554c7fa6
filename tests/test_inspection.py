"""`foretell inspect` shows one timestep of every kind of target as the target defines it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.inspection import describe_store
from pipeline.inspection_text import store_text
from pipeline.rollout_inspection import describe_key
from stages.architecture import Architecture
from store import PredictionStore
from store.convert import convert
from store.schema import Compact, Dense, Fast, Full, Hidden, Sampled, Target, TopK
from store.shard import ShardRecord
from store.shard_folder import ShardFolder
from store.synthetic import (
    synthetic_arrays,
    synthetic_heads,
    synthetic_manifest,
    synthetic_store,
    write_synthetic_shard,
)
from tests.golden_stores import GOLDEN
from tests.row_stores import COLUMNS, rows_store

SCALE = 2.5
FORBIDDEN = 32


def inspected(path: Path, target: Target) -> tuple[PredictionStore, dict[str, Any], str]:
    store = synthetic_store(path, synthetic_manifest(target), 2, 1, 2)
    write_synthetic_shard(store, 0, 5)
    document = describe_key(path, "sample-1/0/3")
    json.dumps(document, allow_nan=False)
    return PredictionStore.open(path), document, store_text(document)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits.astype(np.float64))
    return exponentials / exponentials.sum()


def probabilities(stream: dict[str, Any], name: str = "probability") -> dict[int, float]:
    return {candidate["id"]: candidate[name] for candidate in stream["candidates"]}


def test_top_k_shows_the_kept_ids_by_falling_probability_and_the_tail(tmp_path: Path) -> None:
    store, document, text = inspected(tmp_path / "s", TopK(k=8))
    arrays = store["sample-1", 0, 3].arrays
    for stream, shown in enumerate(document["streams"]):
        tail = np.exp(arrays["top_k.tail_logmass"][stream, 0].astype(np.float64))
        kept = softmax(arrays["top_k.logits"][stream]) * (1 - tail)
        expected = dict(zip(arrays["top_k.ids"][stream].tolist(), kept.tolist(), strict=True))
        assert probabilities(shown) == pytest.approx(expected)
        assert sorted(probabilities(shown).values(), reverse=True) == list(
            probabilities(shown).values()
        )
        assert shown["tail_mass"] == pytest.approx(tail)
        assert shown["code"] == arrays["codes"][stream]
    assert "backbone.1" in text


def test_sampled_shows_each_id_with_its_share_of_the_draws(tmp_path: Path) -> None:
    store, document, text = inspected(tmp_path / "s", Sampled(draws=20))
    drawn = store["sample-1", 0, 3].arrays["sampled.ids"]
    for stream, shown in enumerate(document["streams"]):
        expected = {i: n / 20 for i, n in Counter(drawn[stream].tolist()).items()}
        assert probabilities(shown) == pytest.approx(expected)
        assert shown["tail_mass"] is None
    assert "not stored" in text


@pytest.mark.parametrize("target", [Full(branches="both"), Hidden(branches="both")])
def test_both_branches_are_shown_apart_and_guided_at_the_scale_of_the_codes(
    tmp_path: Path, target: Target
) -> None:
    store, document, text = inspected(tmp_path / "s", target)
    arrays = store["sample-1", 0, 3].arrays
    heads = synthetic_heads(store.manifest)
    for stream, shown in enumerate(document["streams"]):
        logits = {}
        for part in ("cond", "uncond"):
            if isinstance(target, Full):
                logits[part] = arrays[f"full.{part}"][stream].astype(np.float64)
            else:
                state = arrays[f"hidden.{part}.backbone"][0].astype(np.float64)
                logits[part] = heads["backbone.weight"][stream] @ state
                logits[part] = logits[part] + heads["backbone.bias"][stream]
        logits = {part: np.delete(values, FORBIDDEN) for part, values in logits.items()}
        ids = np.delete(np.arange(34), FORBIDDEN).tolist()
        guided = softmax((1 - SCALE) * logits["uncond"] + SCALE * logits["cond"])
        expected = dict(zip(ids, guided, strict=True))
        assert probabilities(shown) == pytest.approx(expected, rel=1e-4)
        assert probabilities(shown, "cond") == pytest.approx(
            dict(zip(ids, softmax(logits["cond"]), strict=True)), rel=1e-4
        )
    assert text.splitlines()[1].split() == ["stream", "id", "probability", "cond", "uncond"]


def test_the_level_of_a_row_is_shown_beside_its_candidates(tmp_path: Path) -> None:
    store, document, _ = inspected(tmp_path / "s", Full(levels=True))
    levels = store["sample-1", 0, 3].arrays["full.levels"]
    assert [shown["level"] for shown in document["streams"]] == levels.tolist()


@pytest.mark.parametrize("target", [Full(), Full(levels=True), Hidden()])
def test_whole_distributions_leave_out_only_the_forbidden_id(
    tmp_path: Path, target: Target
) -> None:
    _, document, _ = inspected(tmp_path / "s", target)
    for shown in document["streams"]:
        assert set(probabilities(shown)) == set(range(34)) - {FORBIDDEN}
        assert sum(probabilities(shown).values()) == pytest.approx(1)


def test_continuous_predictions_are_summed_up(tmp_path: Path) -> None:
    store, document, text = inspected(tmp_path / "s", Dense())
    values = store["sample-1", 0, 3].arrays["dense.delta"].astype(np.float64)
    for stream, shown in enumerate(document["streams"]):
        assert shown["dense.delta"]["rms"] == pytest.approx(np.sqrt((values[stream] ** 2).mean()))
        assert shown["dense.delta"]["most"] == values[stream].max()
    assert "dense.cond" in text


def test_a_store_of_rows_that_are_no_audio_is_summed_up(tmp_path: Path) -> None:
    store = rows_store(tmp_path / "s", tmp_path / "table")
    document = describe_store(store.path)
    json.dumps(document, allow_nan=False)
    assert "audio_s" not in document
    names = {"dense.cond", "dense.delta", "tables", *(f"row.{c.name}" for c in COLUMNS)}
    assert document["bytes"].keys() == names
    assert [(b["predicted"], b["shards"]) for b in document["buckets"]] == [
        (True, 1), (True, 1), (False, 1)
    ]  # fmt: skip
    files = (store.path / "tables/latents").iterdir()
    size = sum(file.stat().st_size for file in files)
    assert document["tables"] == {"latents": {"rows": 5, "bytes": size}}
    text = " ".join(store_text(document).split())
    assert "columns t (float64), scale (float32)" in text
    assert "drawn latent, condition" in text
    assert "4 × 3 × 2 (1 shards), 4 × 2 × 3 without predictions (1 shards)" in text
    assert f"tables latents 5 rows ({size:,} bytes)" in text
    assert "kind: diffusion schedule.alphas: 20 values" in text


def names_shown(document: dict[str, Any]) -> set[str]:
    """What stands in the left column, before the first table."""
    values = store_text(document).split("\n\n")[0]
    return {line.split()[0] for line in values.splitlines() if line[0] != " "}


def test_what_is_said_of_codes_is_left_out_of_the_text_where_there_are_none(
    tmp_path: Path,
) -> None:
    images = describe_store(rows_store(tmp_path / "s", tmp_path / "table").path)
    speech = synthetic_store(tmp_path / "t", synthetic_manifest(TopK(k=3)), 2, 1, 2)
    write_synthetic_shard(speech, 0, 5)
    heard = describe_store(speech.path)
    in_tables = {"arrays", "bytes", "lengths", "longest", "outliers", "unreadable"}
    of_codes = {"longest", "stop_reasons", "weights", "source", "sampler"}
    for document in (images, heard):
        assert of_codes | in_tables < document.keys(), "machines find them in any store"
        assert document["fingerprints"].keys() == images["fingerprints"].keys()
    assert names_shown(images) == images.keys() - of_codes - in_tables
    assert names_shown(heard) == heard.keys() - in_tables
    given = [part for part, found in images["fingerprints"].items() if found]
    lines = store_text(images).splitlines()
    first = next(at for at, line in enumerate(lines) if line.startswith("fingerprints"))
    assert "teacher" in given
    assert [line.split()[-2] for line in lines[first : first + len(given)]] == given

    rollout = describe_key(tmp_path / "s", "a/0")
    assert {"codes", "stop_reason"} < rollout.keys()
    assert {"codes", "stop_reason"}.isdisjoint(names_shown(rollout))
    text = store_text(describe_key(speech.path, "sample-0/0"))
    assert "stop_reason" in text
    assert "codes" in text


def test_rows_are_shown_with_their_columns_and_what_was_drawn(tmp_path: Path) -> None:
    store = rows_store(tmp_path / "s", tmp_path / "table")
    for key in [("a", 0), ("d", 1)]:
        rollout, name = store[key], f"{key[0]}/{key[1]}"
        document = describe_key(store.path, name)
        json.dumps(document, allow_nan=False)
        assert document["drawn"] == rollout.drawn
        assert "audio_s" not in document
        numbers = [column.name for column in COLUMNS if not column.latent]
        for timestep, row in enumerate(document["rows"]):
            assert [row[n] for n in numbers] == [
                rollout.arrays[f"row.{n}"][timestep] for n in numbers
            ]
            for part in ("dense.cond", "dense.delta"):
                assert (part in row) == (key == ("a", 0))
                if part in row:
                    values = rollout.arrays[part][timestep].astype(np.float64)
                    assert row[part] == pytest.approx({"mean": values.mean(), "std": values.std()})
        lines = store_text(document).splitlines()
        first = next(at for at, line in enumerate(lines) if line.startswith("timestep  "))
        assert len(lines[first:]) == 1 + len(rollout), "a line for every timestep"
        assert "status" in lines[first]
        assert "x_t_crc" not in lines[first]

        at = describe_key(store.path, f"{name}/1")
        json.dumps(at, allow_nan=False)
        assert at["columns"] == {n: document["rows"][1][n] for n in numbers}
        assert at["drawn"] == rollout.drawn
        noise = rollout.arrays["row.noise"][1].astype(np.float64)
        assert at["streams"][0]["row.noise"]["std"] == pytest.approx(noise.std())
        assert ("dense.delta" in at["streams"][0]) == (key == ("a", 0))
        text = store_text(at)
        assert f"x_t_crc {at['columns']['x_t_crc']}, " in " ".join(text.split())
        assert f"latent {rollout.drawn['latent']}, condition" in text


def test_a_store_is_summed_up_with_progress_and_every_record_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = synthetic_store(tmp_path / "s", synthetic_manifest(TopK(k=3)), 4, 1, 2)
    for shard in (0, 1):
        write_synthetic_shard(store, shard, 5)
    seen: list[int] = []
    read: list[int] = []
    record = ShardFolder.record

    def counted(folder: ShardFolder) -> ShardRecord:
        read.append(folder.number)
        return record(folder)

    monkeypatch.setattr(ShardFolder, "record", counted)
    document = describe_store(store.path, lambda shards: seen.extend(shards) or shards)
    assert seen == read == [0, 1]
    lengths = np.concatenate(PredictionStore.open(store.path).lengths())
    assert document["timesteps"] == lengths.sum()
    assert document["longest"] == lengths.max()
    assert document["stop_reasons"] == {"end": 4}
    assert document["bytes"]["tables"] > 0


def test_how_many_rollouts_ended_why_and_what_they_weigh(tmp_path: Path) -> None:
    store = synthetic_store(tmp_path / "s", synthetic_manifest(TopK(k=3)), 6, 1, 3)
    found = [("end", 1.0), ("end", 0.5), ("truncated", 0.125), ("end", 1.0), ("truncated", 0.25),
             ("max_timesteps", 0.0)]  # fmt: skip
    for shard, facts in enumerate((found[:3], found[3:])):
        with store.writer(shard) as writer:
            for key, (reason, weight) in zip(store.plan[shard], facts, strict=True):
                arrays = synthetic_arrays(store.manifest, key, 4)
                writer.append(*key, arrays, stop_reason=reason, weight=weight, seed=1)
            writer.commit()
    document = describe_store(store.path)
    assert document["stop_reasons"] == {"end": 3, "truncated": 2, "max_timesteps": 1}
    assert document["weights"] == {"end": 2.5, "truncated": 0.375, "max_timesteps": 0.0}
    assert document["weight"] == 2.875
    text = " ".join(store_text(document).split())
    assert "stop_reasons end 3, truncated 2, max_timesteps 1" in text
    assert "weights end 2.5, truncated 0.375, max_timesteps 0 weight 2.875" in text


COUNTED = Architecture(
    parameters=1000, parts={"decoder": 900, "head": 100}, active_parameters=400,
    flops_per_timestep=1500, dense_flops_per_timestep=2500, experts=8, active_experts=2,
)  # fmt: skip


def test_a_store_says_how_large_its_teacher_is(tmp_path: Path) -> None:
    known = COUNTED.model_dump(mode="json")
    manifest = synthetic_manifest(TopK(k=3)).model_copy(update={"architecture": known})
    document = describe_store(synthetic_store(tmp_path / "s", manifest, 2, 1, 2).path)
    assert document["architecture"] == known
    text = " ".join(store_text(document).split())
    assert "1,000 parameters, 400 of them active at a position (decoder 900, head 100)" in text
    assert "1,500 FLOPs per timestep and pass" in text
    assert (
        "2 of 8 experts per layer; with a dense feed-forward as wide as all of them 2,500" in text
    )


@pytest.mark.parametrize("profile", ["fast", "compact"])
def test_a_store_of_an_earlier_release_does_not_know_its_teacher_s_size(profile: str) -> None:
    document = describe_store(GOLDEN / profile / "top_k")
    assert document["architecture"] == {}
    assert document["sampler"]["too_short_weight"] == 0.0
    assert "not recorded: it was written by an earlier foretell" in store_text(document)


def test_a_converted_store_shows_what_its_values_went_through(tmp_path: Path) -> None:
    inspected(tmp_path / "a", TopK(k=3))
    assert describe_store(tmp_path / "a")["lineage"] == []
    assert "as the teacher gave them" in store_text(describe_store(tmp_path / "a"))
    convert(tmp_path / "a", tmp_path / "b", Compact(loss_nats=0.01))
    convert(tmp_path / "b", tmp_path / "c", Fast())
    document = describe_store(tmp_path / "c")
    first, second = (PredictionStore.open(tmp_path / name).fingerprint for name in "ab")
    assert [step["fingerprint"] for step in document["lineage"]] == [first, second]
    text = " ".join(store_text(document).split())
    assert f"{first[:12]} (kind fast) → {second[:12]} (kind compact, loss_nats 0.01," in text


def test_an_empty_store_is_summed_up(tmp_path: Path) -> None:
    store = synthetic_store(tmp_path / "s", synthetic_manifest(TopK(k=3)), 4, 1, 2)
    document = describe_store(store.path)
    assert (document["shards"], document["longest"], document["bytes"]) == (0, 0, {})
