"""The plan is a list of distinct keys, cut into shards."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from store import Plan, PredictionStore, StoreError
from store.plan import SCHEMA, check_sample_id, check_sample_ids
from store.schema import TopK
from store.synthetic import synthetic_manifest


def test_colliding_keys_are_refused_and_named() -> None:
    with pytest.raises(StoreError, match=r"key \(sample 'a', variation 1\) twice.*colliding keys"):
        Plan.of([[("a", 0), ("a", 1)], [("b", 0), ("a", 1)]])


def test_a_sample_that_is_laid_out_twice_is_refused() -> None:
    with pytest.raises(StoreError, match=r"key \(sample 'b', variation 0\) twice"):
        Plan.lay_out(["a", "b", "b"], 2, 3)


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
    for absent in [("s0", 3), ("s7", 0), ("s0", -1), ("s0", 2**31), ("", 0), ("s\ud800", 0)]:
        assert plan.locate(absent) is None


@pytest.mark.parametrize("key", ["s0", ("s0",), ("s0", 0, 0), (7, 0), ("s0", "0"), ("s0", 0.0)])
def test_what_is_no_key_is_not_planned(key: object) -> None:
    assert Plan.lay_out(["s0"], 1, 1).locate(key) is None  # type: ignore[arg-type]


def test_a_key_may_hold_an_integer_of_numpy() -> None:
    assert Plan.lay_out(["s0", "s1"], 2, 4).locate(("s1", np.int16(1))) == (0, 3)


SHARDS = st.lists(
    st.lists(st.tuples(st.sampled_from("abcdü日"), st.integers(0, 2**31 - 1)), min_size=1),
    min_size=1,
).filter(lambda shards: len(keys := list(chain.from_iterable(shards))) == len(set(keys)))


@given(SHARDS)
def test_any_plan_lists_and_finds_its_keys_as_they_were_given(shards: list[list[tuple[str, int]]]):
    plan = Plan.of(shards)
    assert [list(keys) for keys in plan] == shards
    assert plan.rollouts == sum(plan.sizes) == sum(map(len, shards))
    assert Plan.from_table(plan.to_table(), "plan.parquet") == plan
    for shard, keys in enumerate(shards):
        assert [plan.locate(key) for key in keys] == [(shard, row) for row in range(len(keys))]


def test_plans_that_differ_in_one_place_are_not_equal() -> None:
    plan = Plan.of([[("a", 0), ("b", 0)], [("c", 1)]])
    others = [
        [[("a", 0), ("b", 0)], [("c", 2)]],
        [[("a", 0), ("b", 0)], [("d", 1)]],
        [[("b", 0), ("a", 0)], [("c", 1)]],
        [[("a", 0)], [("b", 0), ("c", 1)]],
    ]
    assert all(plan != Plan.of(other) for other in others)
    assert plan != "plan"


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


@given(st.lists(st.text("ab\n\x00\x1f \x7f\x80\x9f\xa0é日", max_size=4), min_size=1))
def test_a_column_of_sample_ids_is_refused_as_its_first_bad_one(sample_ids: list[str]) -> None:
    assert refusal(check_sample_ids, pa.array(sample_ids)) == next(
        filter(None, (refusal(check_sample_id, sample_id) for sample_id in sample_ids)), None
    )


@pytest.mark.parametrize("last", ["", "ü" * 257, None])
def test_a_column_with_a_bad_size_or_nothing_is_refused(last: str | None) -> None:
    column = pa.array(["ü" * 256, last])
    assert refusal(check_sample_ids, column) == refusal(check_sample_id, last) is not None


def refusal(check: Callable[[Any], None], value: object) -> str | None:
    try:
        check(value)
    except StoreError as error:
        return str(error)
    return None


def test_a_column_of_another_type_or_of_no_unicode_is_refused() -> None:
    with pytest.raises(StoreError, match="sample id 7 must be a non-empty string"):
        check_sample_ids(pa.array([7]))
    broken = pa.StringArray.from_buffers(
        1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")
    )
    with pytest.raises(StoreError, match="no valid Unicode"):
        check_sample_ids(broken)
    check_sample_ids(pa.array(["a"], pa.large_string()))


@pytest.mark.parametrize("bad", ["a\ud800", b"a", None, 7])
def test_a_plan_refuses_a_sample_id_that_is_no_text(bad: object) -> None:
    for make in (lambda: Plan.of([[("a", 0), (bad, 0)]]), lambda: Plan.lay_out(["a", bad], 1, 2)):
        with pytest.raises(StoreError, match=r"non-empty string|no valid Unicode"):
            make()


@pytest.mark.parametrize("sample_id", ["a b", "../up", "😀", "ü" * 256, ".", "C:\\x"])
def test_any_other_text_is_a_sample_id(sample_id: str) -> None:
    check_sample_id(sample_id)


def test_a_plan_travels_to_other_processes() -> None:
    plan = Plan.lay_out(["a", "b"], 2, 3)
    copy = pickle.loads(pickle.dumps(plan))
    assert copy == plan
    assert copy.locate(("b", 1)) == (1, 0)


MEASURE = """
import sys
import numpy as np
import pyarrow as pa
from store import PredictionStore
from store.order import Order

def mib(name):
    status = dict(line.split(":") for line in open("/proc/self/status"))
    return int(status[name].split()[0]) / 1024

pa.array([0])  # which imports pandas where it is installed
before = mib("VmRSS")
store = PredictionStore.open(sys.argv[1])
print(mib("VmHWM") - before, mib("VmRSS") - before)
last = store.plan[len(store.plan) - 1][-1]
print(len(store), *store.plan.locate(last), store.sample(last[0])["text"])
print(mib("VmHWM") - before)
order = Order.of([np.arange(5, 5 + size) for size in store.plan.sizes], 0)
order.take(len(order) - 1, 2)
print(mib("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
@pytest.mark.parametrize(("samples", "variations"), [(250_000, 4), (1_000_000, 1)])
def test_a_million_rollouts_in_ten_thousand_shards_are_indexed_in_little_memory(
    tmp_path: Path, samples: int, variations: int
) -> None:
    sample_ids = [f"speaker-{n % 977:04d}/utterance-{n:08d}" for n in range(samples)]
    texts = [f"a sentence of the usual length, about sixty letters {n:08d}" for n in range(samples)]
    table = pa.table({"sample_id": sample_ids, "text": texts})
    plan = Plan.lay_out(sample_ids, variations, rollouts_per_shard=100)
    made = PredictionStore.create(tmp_path / "store", synthetic_manifest(TopK(k=4)), plan, table)
    for shard in range(len(plan)):
        (made.path / f"shards/{shard:05d}").mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", MEASURE, str(made.path)],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=True,
    )
    opened, content, used, ordered = done.stdout.splitlines()
    assert content == f"1000000 9999 99 {texts[-1]}"
    peak, held = map(float, opened.split())
    assert held < 140  # measured: 60 and 100
    assert peak < 220  # measured: 158 and 167
    assert float(used) < 290  # measured: 158 and 242
    assert float(ordered) < 300  # measured: 201 and 285
