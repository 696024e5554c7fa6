"""Configurations that nobody meant well: a message with the place, and never much memory."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import load_config
from stages.errors import UserError
from tests.conftest import ROOT, tiny_document

pytestmark = pytest.mark.slow

MEMORY_BYTES = 2**28
"""That a process may take to refuse a hostile file, beside its interpreter and libraries."""
LONGEST_MESSAGE = 20_000
SCRIPT = f"""
import json, resource, sys
from pathlib import Path
from pipeline.config import load_config
from stages.errors import UserError

status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
limit = int(status["VmData"].split()[0]) * 1024 + {MEMORY_BYTES}
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
for path in sys.argv[1:]:
    try:
        load_config(Path(path))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def refuse_all(texts: list[str], folder: Path) -> list[str]:
    """What is said of configurations, which a process of little memory reads."""
    paths = [folder / f"hostile-{number}.yaml" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, encoding="utf-8")
    command = [sys.executable, "-c", SCRIPT, *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [str(path) in words for path, words in zip(paths, said, strict=True)] == [True] * len(
        said
    )
    assert all(len(words) < LONGEST_MESSAGE for words in said)
    return said


def bomb(levels: int, kind: str) -> str:
    """The same list or mapping ten times in the one above it, and so on: 10 ** levels leaves."""
    lines = ["a0: &a0 lol"]
    for level in range(1, levels):
        refs = [f"*a{level - 1}" for _ in range(10)]
        pairs = [f"k{at}: {ref}" for at, ref in enumerate(refs)]
        value = "[" + ", ".join(refs) + "]" if kind == "list" else "{" + ", ".join(pairs) + "}"
        lines.append(f"a{level}: &a{level} {value}")
    return "\n".join(lines)


def test_aliases_of_aliases_cost_no_memory(tmp_path: Path) -> None:
    places = ("name", "rollout", "students", "seed", "kind")
    kinds = ("list", "mapping")
    texts = [f"{bomb(10, kind)}\n{place}: *a9\n" for kind in kinds for place in places]
    for said in refuse_all(texts, tmp_path):
        assert "its aliases stand for more than 100000 values" in said


def test_deep_yaml_and_what_holds_itself_is_refused(tmp_path: Path) -> None:
    deep = [opening * 50_000 for opening in ("[", "{a: ", "- ", "? ")]
    themselves = ["name: x\nrollout: &r {sampler: *r}\n", "name: &n [*n]\n"]
    for said in refuse_all(deep + themselves, tmp_path):
        assert "is not valid YAML" in said


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch executed']",
        "name: !!python/object/new:subprocess.Popen [[touch, executed]]",
        "name: !include /etc/passwd",
    ],
)
def test_nothing_is_executed(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="is not valid YAML"):
        load_config(Path("hostile.yaml"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nname: b\n", r"(?s)'name'.*twice.*line 2"),
        (
            "name: a\nrollout:\n  samples: 3\n  batch_size: 2\n  samples: 4\n",
            r"(?s)'samples'.*twice.*line 5",
        ),
        ("students: {x: {}, 'x': {}}\n", "'x'.*twice"),
        ("name: a\n? [1, 2]\n: b\n", "is not valid YAML|name"),
    ],
)
def test_a_key_that_stands_there_twice_is_refused_with_its_line(
    tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "hostile.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        load_config(tmp_path / "hostile.yaml")


def test_a_key_that_a_merged_section_has_too_may_be_given_again(tmp_path: Path) -> None:
    text = "name: &n a\nstudents: {}\nruns: &r {}\nx: {<<: {a: 1}, a: 2}\n"
    (tmp_path / "hostile.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as refused:
        load_config(tmp_path / "hostile.yaml")
    assert "twice" not in str(refused.value)


NUMBERS = {
    "seed": (".nan", ".inf", "-1", "1e400", "99999999999999999999999999"),
    "rollout.guidance.scale": (".nan", ".inf", "-.inf"),
    "rollout.sampler.temperature": (".nan", ".inf", "-1"),
    "rollout.sampler.top_p": (".nan", "2"),
    "rollout.sampler.max_timesteps": (".nan", "-1", "0", "1e30"),
    "rollout.sampler.truncated_weight": (".nan", ".inf", "-1"),
    "rollout.free_floor": (".nan", "-1"),
    "rollout.batch_size": (".nan", ".inf", "0", "-7"),
    "fit.condition_dropout": (".nan", ".inf", "2"),
    "fit.optimizer.learning_rate": (".nan", ".inf", "0"),
    "fit.optimizer.clip_norm": (".nan", ".inf", "-1"),
    "fit.optimizer.weight_decay": (".nan", ".inf"),
    "fit.alignment_weight": (".nan", ".inf"),
    "teacher.model.dropout": (".nan", "1.5"),
    "students.student.optimizer.ema_decay": (".nan", "1.5"),
    "students.student.loss.ce": (".nan", ".inf", "-1"),
}


@pytest.mark.parametrize(
    ("key", "number"), [(key, number) for key, numbers in NUMBERS.items() for number in numbers]
)
def test_numbers_that_are_none_are_refused_where_they_stand(
    tmp_path: Path, key: str, number: str
) -> None:
    document = tiny_document(tmp_path / "corpus", tmp_path / "runs")
    path = tmp_path / "hostile.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    with pytest.raises(UserError) as refused:
        load_config(path, [f"{key}={number}"])
    *_, section, last = ("", *key.split("."))
    assert section in str(refused.value)
    assert last in str(refused.value)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a document."""
    items = value.items() if isinstance(value, dict) else ()
    return [at, *(place for key, inner in items for place in places(inner, (*at, key)))]


@given(data=st.data(), value=values)
def test_no_value_anywhere_breaks_reading_other_than_as_a_message(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("fuzz", numbered=True)
    document = deepcopy(tiny_document(folder, folder))
    place = data.draw(st.sampled_from(places(document)[1:]))
    parent = document
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    path = folder / "hostile.yaml"
    path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    with suppress(UserError):
        load_config(path)


@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_bytes_break_reading_other_than_as_a_message(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz", numbered=True) / "hostile.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match="hostile"):
        load_config(path)


@given(override=st.text(max_size=40))
def test_no_override_breaks_reading_other_than_as_a_message(
    tmp_path_factory: pytest.TempPathFactory, override: str
) -> None:
    folder = tmp_path_factory.mktemp("fuzz", numbered=True)
    path = folder / "hostile.yaml"
    path.write_text(yaml.safe_dump(tiny_document(folder, folder)), encoding="utf-8")
    with pytest.raises(UserError):
        load_config(path, [override])
