"""What is said of whole shards at once is what a loop over their rows finds."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipeline import stored_rows
from pipeline.row_statistics import RowStatistics, statistics_of
from store import PredictionStore
from store.schema import Dense, Full, Hidden, Sampled, Target, TopK
from store.synthetic import (
    synthetic_arrays,
    synthetic_heads,
    synthetic_manifest,
    synthetic_store,
    write_synthetic_shard,
)
from tests.row_stores import rows_store

SCALE = 2.5
FORBIDDEN = 32


def found(path: Path, target: Target) -> tuple[PredictionStore, RowStatistics]:
    store = synthetic_store(path, synthetic_manifest(target), 3, 1, 3)
    write_synthetic_shard(store, 0, 5)
    store = PredictionStore.open(path)
    return store, statistics_of(store, store.shard(0).arrays)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits.astype(np.float64))
    return exponentials / exponentials.sum()


def entropy(probabilities: np.ndarray) -> float:
    return -math.fsum(p * math.log(p) for p in probabilities.tolist() if p > 0)


@pytest.mark.parametrize("block", [1, 2**21])
def test_top_k_has_the_entropy_of_the_kept_ids_and_one_category_for_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(stored_rows, "BLOCK_NUMBERS", block)
    store, statistics = found(tmp_path / "s", TopK(k=5, temperatures=(0.5, 1.0, 2.0)))
    arrays = store.shard(0).arrays
    rows, streams = arrays["codes"].shape
    assert statistics.entropy.shape == (rows, streams)
    for row, stream in np.ndindex(rows, streams):
        tail = math.exp(arrays["top_k.tail_logmass"][row, stream, 1])
        kept = softmax(arrays["top_k.logits"][row, stream]) * (1 - tail)
        drawn = arrays["top_k.ids"][row, stream].tolist().index(arrays["codes"][row, stream])
        expected = {
            "entropy": entropy(np.append(kept, tail)),
            "code_probability": kept[drawn],
            "kept_mass": 1 - tail,
            "tail_mass": tail,
        }
        shown = {name: float(getattr(statistics, name)[row, stream]) for name in expected}
        assert shown == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert (statistics.entropy_is, statistics.temperature) == ("lower bound", 1.0)


def test_no_probability_is_above_1_where_rounding_adds_up(tmp_path: Path) -> None:
    store, _ = found(tmp_path / "s", TopK(k=30))
    arrays = synthetic_arrays(store.manifest, ("sample-0", 0), 400)
    arrays["top_k.tail_logmass"] = np.full_like(arrays["top_k.tail_logmass"], -20)
    statistics = statistics_of(store, arrays)
    assert 0.999 < statistics.kept_mass.min() <= statistics.kept_mass.max() <= 1


def test_a_store_that_knows_no_tail_at_temperature_1_says_which_one_it_shows(
    tmp_path: Path,
) -> None:
    store, statistics = found(tmp_path / "s", TopK(k=5, temperatures=(2.0,)))
    arrays = store.shard(0).arrays
    tail = math.exp(arrays["top_k.tail_logmass"][0, 0, 0])
    kept = softmax(arrays["top_k.logits"][0, 0].astype(np.float64) / 2) * (1 - tail)
    assert statistics.temperature == 2.0
    assert statistics.entropy[0, 0] == pytest.approx(entropy(np.append(kept, tail)), rel=1e-5)


@pytest.mark.parametrize(
    "target", [Full(), Full(branches="both"), Hidden(), Hidden(branches="both")]
)
def test_whole_distributions_are_guided_and_have_their_own_entropy(
    tmp_path: Path, target: Target
) -> None:
    store, statistics = found(tmp_path / "s", target)
    arrays, heads = store.shard(0).arrays, synthetic_heads(store.manifest)
    for row, stream in np.ndindex(arrays["codes"].shape):
        logits = {}
        for part in ("logits", "cond", "uncond"):
            state = "hidden.backbone" if part == "logits" else f"hidden.{part}.backbone"
            if f"full.{part}" in arrays:
                logits[part] = arrays[f"full.{part}"][row, stream].astype(np.float64)
            elif state in arrays:
                logits[part] = heads["backbone.bias"][stream] + heads["backbone.weight"][
                    stream
                ] @ arrays[state][row, 0].astype(np.float64)
        allowed = {part: np.delete(values, FORBIDDEN) for part, values in logits.items()}
        if "cond" in allowed:
            allowed["logits"] = (1 - SCALE) * allowed["uncond"] + SCALE * allowed["cond"]
        expected = softmax(allowed["logits"])
        code = int(arrays["codes"][row, stream])
        place = code - (code > FORBIDDEN)
        assert statistics.entropy[row, stream] == pytest.approx(entropy(expected), abs=1e-4)
        assert statistics.code_probability[row, stream] == pytest.approx(expected[place], abs=1e-5)
    assert (statistics.entropy_is, statistics.kept_mass) == ("exact", None)


def test_draws_have_the_entropy_of_how_often_each_id_was_drawn(tmp_path: Path) -> None:
    store, statistics = found(tmp_path / "s", Sampled(draws=20))
    arrays = store.shard(0).arrays
    for row, stream in np.ndindex(arrays["codes"].shape):
        counts = Counter(arrays["sampled.ids"][row, stream].tolist())
        shares = np.array(list(counts.values())) / 20
        assert statistics.entropy[row, stream] == pytest.approx(entropy(shares), rel=1e-5)
        share = counts[int(arrays["codes"][row, stream])] / 20
        assert statistics.code_probability[row, stream] == pytest.approx(share)
    assert statistics.entropy_is == "estimate"


def test_continuous_predictions_have_the_size_of_every_latent(tmp_path: Path) -> None:
    store, statistics = found(tmp_path / "s", Dense())
    arrays = store.shard(0).arrays
    assert statistics.entropy is None
    assert statistics.rms.keys() == {"dense.cond", "dense.delta"}
    for name, values in arrays.items():
        exact = np.square(values.astype(np.float64))
        assert statistics.rms[name] == pytest.approx(np.sqrt(exact.mean((2, 3))), rel=1e-5)
        assert statistics.norm[name] == pytest.approx(np.sqrt(exact.sum((2, 3))), rel=1e-5)


def test_columns_that_are_numbers_have_no_size(tmp_path: Path) -> None:
    store = rows_store(tmp_path / "s", tmp_path / "table")
    store = PredictionStore.open(store.path)
    shapes = [statistics_of(store, store.shard(shard).arrays).rms for shard in store.committed]
    assert [set(rms) for rms in shapes] == [
        {"dense.cond", "dense.delta", "row.noise"},
        {"dense.cond", "dense.delta", "row.noise"},
        {"row.noise"},
    ]


def test_streams_of_unequal_vocabularies_have_no_mass_beyond_their_own(tmp_path: Path) -> None:
    manifest = synthetic_manifest(Hidden())
    small = manifest.streams[1].model_copy(update={"vocabulary": 20})
    changes = {"streams": (manifest.streams[0], small), "forbidden": (3,), "end_id": None}
    manifest = manifest.model_copy(update=changes)
    allowed = stored_rows.allowed_ids(manifest)
    assert allowed.sum(-1).tolist() == [33, 19]
    assert not allowed[:, 3].any()
