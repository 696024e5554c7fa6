"""The plan is a list of distinct keys, cut into shards."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from store import Plan, StoreError
from store.plan import SCHEMA, check_sample_id


def test_colliding_keys_are_refused_and_named() -> None:
    with pytest.raises(StoreError, match=r"key \(sample 'a', variation 1\) twice.*colliding keys"):
        Plan.of([[("a", 0), ("a", 1)], [("b", 0), ("a", 1)]])


def test_colliding_keys_in_a_stored_plan_are_refused_with_the_file() -> None:
    table = pa.table([["a", "a"], [0, 0], [0, 1]], schema=SCHEMA)
    with pytest.raises(
        StoreError, match=r"plan\.parquet: the plan holds .* 'a', variation 0\) twice"
    ):
        Plan.from_table(table, "store/plan.parquet")


def test_every_variation_of_every_sample_is_planned_once() -> None:
    plan = Plan.lay_out(["a", "b", "c"], variations=2, rollouts_per_shard=4)
    assert len(plan) == 2
    assert plan[0] == (("a", 0), ("b", 0), ("c", 0), ("a", 1))
    assert plan[1] == (("b", 1), ("c", 1))
    assert list(plan) == [plan[0], plan[1]]


def test_a_key_is_found_where_it_was_planned() -> None:
    plan = Plan.lay_out([f"s{n}" for n in range(7)], variations=3, rollouts_per_shard=4)
    for shard, keys in enumerate(plan):
        for row, key in enumerate(keys):
            assert plan.locate(key) == (shard, row)
    assert plan.locate(("s0", 3)) is None


def test_a_plan_survives_its_table() -> None:
    plan = Plan.of([[("ein Gruß", 0)], [("日本", 2), ("../../etc/passwd", 0)]])
    assert Plan.from_table(plan.to_table(), "plan.parquet") == plan


@pytest.mark.parametrize("shard", [[1, 1], [0, 2], [1, 0], [-1, 0]])
def test_a_table_whose_shards_do_not_count_up_is_refused(shard: list[int]) -> None:
    table = pa.table([["a", "b"], [0, 0], np.array(shard)], schema=SCHEMA)
    with pytest.raises(StoreError, match="does not count its shards 0, 1, 2"):
        Plan.from_table(table, "plan.parquet")


def test_a_table_with_other_columns_is_refused() -> None:
    with pytest.raises(StoreError, match="not a plan's"):
        Plan.from_table(pa.table({"a": [1]}), "plan.parquet")


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([], "holds no rollout"),
        ([[]], "holds no rollout"),
        ([[("a", 0)], []], "shard 1 of the plan is empty"),
        ([[("a", -1)]], "variation -1 of sample 'a' must be an integer in"),
        ([[("a", 0.5)]], "variation 0.5"),
        ([[("a", True)]], "variation True"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(shards: list[list[tuple[str, int]]], message: str):
    with pytest.raises(StoreError, match=message):
        Plan.of(shards)


@pytest.mark.parametrize(
    ("sample_id", "message"),
    [
        ("", "non-empty string"),
        (7, "non-empty string"),
        ("a\nb", "control character"),
        ("a\x9f", "control character"),
        ("a\ud800", "no valid Unicode"),
        ("ü" * 257, "has 514 bytes, the limit is 512"),
    ],
)
def test_a_sample_id_that_cannot_name_a_sample_is_refused(sample_id: object, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        check_sample_id(sample_id)


@pytest.mark.parametrize("sample_id", ["a b", "../up", "😀", "ü" * 256, ".", "C:\\x"])
def test_any_other_text_is_a_sample_id(sample_id: str) -> None:
    check_sample_id(sample_id)
