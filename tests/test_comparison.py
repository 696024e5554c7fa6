"""`foretell inspect diff` tells what differs, and KL only of what both stores know exactly."""

from __future__ import annotations

import csv
import json
import math
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline import distribution_divergence
from pipeline.cli import app
from pipeline.comparison import describe_difference, differing, equal_history
from pipeline.comparison_text import difference_text
from pipeline.dotted import dotted
from stages.errors import UserError
from store import PredictionStore
from store.convert import convert
from store.schema import Compact, Dense, Full, Sampled, Target, TopK
from store.synthetic import (
    synthetic_arrays,
    synthetic_manifest,
    synthetic_store,
    write_synthetic_shard,
)

pytestmark = pytest.mark.slow

FORBIDDEN = 32


def stored(path: Path, target: Target, noise: float = 0.0, samples: int = 2) -> PredictionStore:
    """Rollouts of equal codes, whose whole logits are those of `Full` with noise added."""
    manifest = synthetic_manifest(target)
    store = synthetic_store(path, manifest, samples, 1, 2)
    for shard in range(len(store.plan)):
        with store.writer(shard) as writer:
            for key in store.plan[shard]:
                arrays = reduced(logits_of(key, noise), target)
                writer.append(*key, arrays, stop_reason="end", weight=1.0, seed=1)
            writer.commit()
    return PredictionStore.open(path)


def logits_of(key: tuple[str, int], noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Codes [T, C] and logits [T, C, V] float32, -inf at the forbidden id."""
    arrays = synthetic_arrays(synthetic_manifest(Full(dtype="float32")), key, 6)
    random = np.random.default_rng(len(key[0]))
    logits = arrays["full.logits"] + noise * random.standard_normal(arrays["full.logits"].shape)
    return arrays["codes"], logits.astype(np.float32)


def reduced(found: tuple[np.ndarray, np.ndarray], target: Target) -> dict[str, np.ndarray]:
    codes, logits = found
    relative = logits - logits.max(-1, keepdims=True)
    if isinstance(target, Full):
        return {"codes": codes, "full.logits": relative.astype(target.dtype)}
    assert isinstance(target, TopK)
    first = relative.copy()
    np.put_along_axis(first, codes[..., None].astype(int), np.inf, -1)  # the drawn code is kept
    first[..., relative.shape[-1] - 1] = np.where(
        codes == relative.shape[-1] - 1, np.inf, first[..., -1]
    )
    np.put_along_axis(first, relative.argmax(-1)[..., None], np.inf, -1)
    ids = np.sort(np.argsort(-first, -1, kind="stable")[..., : target.k], -1)
    kept = np.take_along_axis(relative, ids, -1)
    tail = relative.astype(np.float64).copy()
    np.put_along_axis(tail, ids, -np.inf, -1)
    masses = [
        np.log(np.exp(tail / t).sum(-1) / np.exp(relative.astype(np.float64) / t).sum(-1))
        for t in target.temperatures
    ]
    return {
        "codes": codes,
        "top_k.ids": ids.astype(np.uint16),
        "top_k.logits": kept.astype(target.dtype),
        "top_k.tail_logmass": np.stack(masses, -1).astype(np.float32),
    }


def by_cells(p: np.ndarray, q: np.ndarray, singles: set[int]) -> float:
    """KL of two probabilities [V] where the ids of `singles` stand alone and all others as one."""
    rest = [i for i in range(len(p)) if i not in singles]
    masses = [(p[i], q[i]) for i in singles] + [(p[rest].sum(), q[rest].sum())]
    return math.fsum(a * math.log(a / b) for a, b in masses if a > 0)


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    exponentials = np.exp(logits.astype(np.float64) / temperature)
    return exponentials / exponentials.sum()


CASES: dict[str, tuple[Target, Target]] = {
    "full and full": (Full(dtype="float32"), Full(dtype="float32")),
    "top_k and full": (TopK(k=9, dtype="float32"), Full(dtype="float32")),
    "full and top_k": (Full(dtype="float32"), TopK(k=9, dtype="float32")),
    "top_k and top_k": (TopK(k=9, dtype="float32"), TopK(k=5, dtype="float32")),
    "at a common temperature": (
        TopK(k=9, dtype="float32", temperatures=(0.5, 2.0)),
        TopK(k=5, dtype="float32", temperatures=(2.0, 3.0)),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("block", [1, 2**23])
def test_kl_is_that_of_the_finest_categories_that_both_stores_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, block: int
) -> None:
    monkeypatch.setattr(distribution_divergence, "BLOCK_NUMBERS", block)
    targets = CASES[case]
    a = stored(tmp_path / "a", targets[0])
    b = stored(tmp_path / "b", targets[1], noise=0.7)
    found = describe_difference(a.path, b.path)["stores"][0]
    heat = 2.0 if "temperature" in case else 1.0
    expected: list[list[float]] = [[], []]
    for key in a:
        kept = [store[key].arrays.get("top_k.ids") for store in (a, b)]
        (_, ours), (_, theirs) = logits_of(key, 0.0), logits_of(key, 0.7)
        for row, stream in np.ndindex(ours.shape[:2]):
            singles = set(range(34))
            for ids in kept:
                singles &= set(range(34)) if ids is None else set(ids[row, stream].tolist())
            p, q = softmax(ours[row, stream], heat), softmax(theirs[row, stream], heat)
            expected[stream].append(by_cells(p, q, singles))
    for stream, line in enumerate(found["kl"]["streams"]):
        assert line["mean"] == pytest.approx(np.mean(expected[stream]), rel=1e-4)
        assert line["most"] == pytest.approx(max(expected[stream]), rel=1e-4)
        assert (line["rows"], line["infinite"]) == (12, 0)
    assert found["kl"]["is"] == ("exact" if case == "full and full" else "lower bound")
    assert found["kl"]["temperature"] == heat
    assert found["kl"]["mean"] == pytest.approx(np.mean(expected), rel=1e-4)


def test_a_store_does_not_differ_from_its_copy(tmp_path: Path) -> None:
    a = stored(tmp_path / "a", TopK(k=5))
    shutil.copytree(a.path, tmp_path / "b")
    found = describe_difference(a.path, tmp_path / "b")
    json.dumps(found, allow_nan=False)
    assert found["settings"] == []
    (store,) = found["stores"]
    assert store["keys"]["only_a"]["count"] == store["keys"]["only_b"]["count"] == 0
    assert store["rollouts"]["equal_codes"] == store["rollouts"]["compared"] == 2
    assert store["kl"]["mean"] == 0
    assert "No setting differs" in difference_text(found)


def test_a_conversion_s_loss_is_within_its_bound(tmp_path: Path) -> None:
    a = stored(tmp_path / "a", TopK(k=5))
    convert(a.path, tmp_path / "b", Compact(loss_nats=0.01))
    found = describe_difference(a.path, tmp_path / "b")
    names = {line["name"] for line in found["settings"]}
    assert {"profile.kind", "profile.loss_nats"} <= names
    assert 0 < found["stores"][0]["kl"]["streams"][0]["most"] <= 0.01


def test_predictions_count_as_far_as_the_codes_before_them_are_equal() -> None:
    ours = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 1, 1]])
    theirs = np.array([[1, 2, 3], [4, 0, 6], [7, 8, 9]])
    expected = [[True, True, True], [True, True, False]]
    assert equal_history(ours, theirs).tolist() == expected
    assert equal_history(ours, ours[:2]).all()
    assert len(equal_history(ours, ours[:2])) == 2
    first = equal_history(ours, ours + 1)
    assert first.tolist() == [[True, False, False]]


def test_where_codes_differ_only_equal_histories_are_compared(tmp_path: Path) -> None:
    target = TopK(k=5)
    a = stored(tmp_path / "a", target)
    b = synthetic_store(tmp_path / "b", synthetic_manifest(target), 3, 1, 3)
    write_synthetic_shard(b, 0, 9)
    found = describe_difference(a.path, b.path)
    (store,) = found["stores"]
    assert store["keys"]["common"] == 2
    assert store["keys"]["only_b"] == {"count": 1, "first": ["sample-2/0"]}
    rollouts = store["rollouts"]
    assert rollouts["equal_lengths"] < rollouts["compared"]
    text = difference_text(found)
    assert "only in B" in text
    assert "sample-2/0" in text
    if rollouts["at_equal_history"] < rollouts["timesteps"]:
        assert "Codes differ" in text


def test_mass_that_the_second_rules_out_is_infinite_and_counted(tmp_path: Path) -> None:
    a = stored(tmp_path / "a", Full())
    manifest = synthetic_manifest(Full()).model_copy(update={"forbidden": (31, 32)})
    b = synthetic_store(tmp_path / "b", manifest, 2, 1, 2)
    with b.writer(0) as writer:
        for key in b.plan[0]:
            codes, logits = logits_of(key, 0.0)
            logits[..., 31] = -np.inf
            logits -= logits.max(-1, keepdims=True)
            codes = np.where(codes == 31, 0, codes).astype(codes.dtype)
            arrays = {"codes": codes, "full.logits": logits.astype(np.float16)}
            writer.append(*key, arrays, stop_reason="end", weight=1.0, seed=1)
        writer.commit()
    found = describe_difference(a.path, b.path)
    json.dumps(found, allow_nan=False)
    (line, _) = found["stores"][0]["kl"]["streams"]
    assert line["infinite"] == line["rows"] > 0
    assert "infinite" in difference_text(found)


@pytest.mark.parametrize(("ours", "theirs", "reason"), [
    (TopK(k=3), Sampled(draws=5), "draws of a target"),
    (TopK(k=3), TopK(k=3, temperatures=(2.0,)), "no temperature in common"),
    (TopK(k=3), Dense(), "continuous"),
])  # fmt: skip
def test_what_cannot_be_compared_is_said(
    tmp_path: Path, ours: Target, theirs: Target, reason: str
) -> None:
    stores = []
    for name, target in (("a", ours), ("b", theirs)):
        store = synthetic_store(tmp_path / name, synthetic_manifest(target), 2, 1, 2)
        write_synthetic_shard(store, 0, 5)
        stores.append(store.path)
    found = describe_difference(*stores)
    json.dumps(found, allow_nan=False)
    assert reason in found["stores"][0]["incomparable"]
    assert found["stores"][0]["kl"] is None
    assert reason in " ".join(difference_text(found).split())


def test_continuous_targets_differ_by_their_mean_square(tmp_path: Path) -> None:
    stores = []
    for name, shift in (("a", 0.0), ("b", 0.5)):
        store = synthetic_store(tmp_path / name, synthetic_manifest(Dense()), 2, 1, 2)
        with store.writer(0) as writer:
            for key in store.plan[0]:
                arrays = synthetic_arrays(store.manifest, key, 4)
                arrays["dense.cond"] = arrays["dense.cond"] + np.float16(shift)
                writer.append(*key, arrays, stop_reason="end", weight=1.0, seed=1)
            writer.commit()
        stores.append(store.path)
    lines = {line["array"]: line for line in describe_difference(*stores)["stores"][0]["mse"]}
    assert lines["dense.cond"]["mse"] == pytest.approx(0.25, rel=1e-3)
    assert lines["dense.delta"]["mse"] == 0
    assert lines["dense.cond"]["rows"] == 8


def test_settings_are_told_by_dotted_names_with_both_values() -> None:
    a = {"x": {"y": 1, "z": [1, 2]}, "same": 0, "list": [{"k": 3}], "gone": None}
    b = {"x": {"y": 2, "z": [1, 2]}, "same": 0, "list": [{"k": 4}], "new": {}}
    assert dotted(a) == {"x.y": 1, "x.z": [1, 2], "same": 0, "list.0.k": 3, "gone": None}
    assert differing(a, b) == [
        {"name": "x.y", "a": 1, "b": 2},
        {"name": "list.0.k", "a": 3, "b": 4},
        {"name": "gone", "a": None},
        {"name": "new", "b": {}},
    ]


def test_runs_are_compared_by_their_stores_and_models(tmp_path: Path) -> None:
    for name, k in (("one", 3), ("two", 4)):
        (tmp_path / name / "stages").mkdir(parents=True)
        stored(tmp_path / name / "store", TopK(k=k))
    found = describe_difference(tmp_path / "one", tmp_path / "two")
    assert found["kind"] == "run"
    assert {"name": "store.target.k", "a": 3, "b": 4} in found["settings"]
    assert [store["store"] for store in found["stores"]] == ["store"]


def test_configurations_and_refusals(tmp_path: Path) -> None:
    configs = Path(__file__).parent.parent / "configs"
    found = describe_difference(configs / "mini.yaml", configs / "demo.yaml")
    assert {"name": "name", "a": "mini", "b": "demo"} in found["settings"]
    store = stored(tmp_path / "a", TopK(k=3))
    with pytest.raises(UserError, match="is a store and"):
        describe_difference(store.path, configs / "mini.yaml")
    with pytest.raises(UserError, match="no store"):
        describe_difference(tmp_path, tmp_path)


def lines_of(*arguments: object) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """What `--json` says of a difference, and the lines of `--csv` below its head."""

    def answer(option: str) -> str:
        done = CliRunner().invoke(app, ["inspect", "diff", *map(str, arguments), option])
        assert done.exit_code == 0, done.output
        return done.stdout

    head, *lines = map(tuple, csv.reader(StringIO(answer("--csv"))))
    assert head == ("store", "part", "name", "measure", "value"), "a schema that machines rely on"
    return json.loads(answer("--json")), lines


def told(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def expected_lines(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The lines that docs/inspect.md describes, key by key from what `--json` says."""
    lines = [
        ("", "setting", setting["name"], side, told(setting[side]))
        for setting in found["settings"]
        for side in ("a", "b")
        if side in setting
    ]
    for store in found["stores"]:
        keys, kl, name = store["keys"], store["kl"], store["store"]
        lines.append((name, "keys", "", "common", told(keys["common"])))
        for side in ("only_a", "only_b"):
            for measure in ("count", "first"):
                lines.append((name, "keys", "", f"{side}.{measure}", told(keys[side][measure])))
        for measure, value in store["rollouts"].items():
            lines.append((name, "rollouts", "", measure, told(value)))
        if store["incomparable"] is not None:
            lines.append((name, "targets", "", "incomparable", store["incomparable"]))
        if kl is not None:
            for measure in ("unit", "is", "temperature", "mean"):
                lines.append((name, "targets", "", f"kl.{measure}", told(kl[measure])))
            for stream in kl["streams"]:
                for measure in set(stream) - {"stream"}:
                    value = told(stream[measure])
                    lines.append((name, "stream", stream["stream"], measure, value))
        for array in store["mse"]:
            for measure in ("rows", "mse", "mse_share"):
                lines.append((name, "array", array["array"], measure, told(array[measure])))
    return lines


def test_csv_says_line_by_line_what_json_says(tmp_path: Path) -> None:
    for name, target in (("one", TopK(k=3)), ("two", TopK(k=4))):
        (tmp_path / name / "stages").mkdir(parents=True)
        stored(tmp_path / name / "store", target)
        continuous = synthetic_store(
            tmp_path / name / "images", synthetic_manifest(Dense()), 2, 1, 2
        )
        write_synthetic_shard(continuous, 0, 5)
        stored(tmp_path / name / "other", Full() if name == "one" else TopK(k=3))
    found, lines = lines_of(tmp_path / "one", tmp_path / "two")
    assert len(lines) == len(set(lines)), "a line for every number"
    assert sorted(lines) == sorted(expected_lines(found))
    assert {line[1] for line in lines} == {
        "setting",
        "keys",
        "rollouts",
        "targets",
        "stream",
        "array",
    }
    assert ("", "setting", "store.target.k", "a", "3") in lines
    assert ("", "setting", "store.target.k", "b", "4") in lines
    absent = [line for line in lines if line[2] == "other.target.branches"]
    assert [line[3] for line in absent] == ["a"], "what a side lacks has no line"


def test_csv_of_what_cannot_be_compared_and_of_configurations(tmp_path: Path) -> None:
    stores = []
    for name, target in (("a", TopK(k=3)), ("b", Sampled(draws=5))):
        store = synthetic_store(tmp_path / name, synthetic_manifest(target), 2, 1, 2)
        write_synthetic_shard(store, 0, 5)
        stores.append(store.path)
    found, lines = lines_of(*stores)
    assert sorted(lines) == sorted(expected_lines(found))
    assert [line[3] for line in lines if line[1] == "targets"] == ["incomparable"]
    configs = Path(__file__).parent.parent / "configs"
    found, lines = lines_of(configs / "mini.yaml", configs / "demo.yaml")
    assert lines == expected_lines(found)
    assert any(line[4] == "null" for line in lines), "null is told from an empty text"
    refused = CliRunner().invoke(app, ["inspect", "diff", *map(str, stores), "--json", "--csv"])
    assert "exclude each other" in str(refused.exception)


def test_the_command_prints_80_letters_wide_or_json(tmp_path: Path) -> None:
    paths = [str(stored(tmp_path / n, TopK(k=k)).path) for n, k in (("a", 3), ("b", 5))]

    def answer(*options: str) -> Any:
        done = CliRunner().invoke(app, ["inspect", "diff", *paths, *options])
        assert done.exit_code == 0, done.output
        return done.stdout

    assert json.loads(answer("--json"))["kind"] == "store"
    assert max(map(len, answer().splitlines()[2:])) <= 80
