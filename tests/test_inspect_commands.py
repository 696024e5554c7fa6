"""`foretell inspect`: a store needs no command's name, and every command keeps its own."""

from __future__ import annotations

import csv
import json
import re
import shutil
from io import StringIO
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from stages.errors import UserError
from store import Plan, PredictionStore, StoreError
from store.copying import copy_store
from store.schema import TopK
from store.synthetic import synthetic_manifest, synthetic_store, write_synthetic_shard
from tests.row_stores import rows_store

pytestmark = pytest.mark.slow


@pytest.fixture
def store(tmp_path: Path) -> PredictionStore:
    store = synthetic_store(tmp_path / "show", synthetic_manifest(TopK(k=3)), 2, 1, 2)
    write_synthetic_shard(store, 0, 5)
    return store


def answer(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["inspect", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_store_is_shown_without_a_command_s_name_wherever_the_options_stand(
    store: PredictionStore,
) -> None:
    shown = answer(store.path, "--json")
    assert json.loads(shown)["rollouts"] == 2
    assert answer("show", store.path, "--json") == shown
    assert answer("--json", store.path) == shown
    keyed = answer("--key", "sample-1/0", store.path, "--json")
    assert json.loads(keyed)["sample_id"] == "sample-1"


def test_a_folder_that_is_called_like_a_command_is_reached_by_a_path(
    store: PredictionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.path.parent)
    assert json.loads(answer("./show", "--json"))["rollouts"] == 2
    assert CliRunner().invoke(app, ["inspect", "show"]).exit_code == 2
    assert "./diff" in answer("--help")


def test_without_arguments_the_commands_are_listed() -> None:
    done = CliRunner().invoke(app, ["inspect"])
    assert done.exit_code == 2
    assert "show" in done.output


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(StringIO(text)))


def test_every_view_is_one_table_of_comma_separated_values(store: PredictionStore) -> None:
    found = json.loads(answer(store.path, "--json"))
    lines = {
        (line["part"], line["name"], line["measure"]): line["value"]
        for line in table(answer(store.path, "--csv"))
    }
    codes = next(a for a in found["arrays"] if a["array"] == "codes")
    assert float(lines["array", "codes", "bytes_per_timestep"]) == codes["bytes_per_timestep"]
    first = found["statistics"]["streams"][0]
    assert float(lines["stream", first["stream"], "entropy.p50"]) == first["entropy"]["p50"]

    shard = json.loads(answer(store.path, "--shard", 0, "--json"))["table"]
    rows = table(answer(store.path, "--shard", 0, "--csv"))
    assert [row["sample_id"] for row in rows] == [row["sample_id"] for row in shard]
    assert [float(row["entropy"]) for row in rows] == [row["entropy"] for row in shard]

    rollout = json.loads(answer(store.path, "--key", "sample-1/0", "--json"))
    rows = table(answer(store.path, "--key", "sample-1/0", "--csv"))
    assert len(rows) == rollout["timesteps"] * 2
    last = rollout["certainty"][-1]
    assert (int(rows[-1]["code"]), float(rows[-1]["entropy"])) == (
        last["codes"][1], last["entropy"][1]
    )  # fmt: skip

    streams = json.loads(answer(store.path, "--key", "sample-1/0/2", "--json"))["streams"]
    rows = table(answer(store.path, "--key", "sample-1/0/2", "--csv"))
    expected = [c for stream in streams for c in stream["candidates"]]
    assert [(int(r["id"]), float(r["probability"])) for r in rows] == [
        (c["id"], c["probability"]) for c in expected
    ]
    assert {row["cond"] for row in rows} == {""}


def test_the_table_of_a_store_names_its_damaged_shards(store: PredictionStore) -> None:
    (store.path / "shards/00000/rollouts.parquet").write_bytes(b"none")
    (line,) = (x for x in table(answer(store.path, "--csv")) if x["part"] == "shard")
    assert (line["name"], line["measure"]) == ("0", "unreadable")
    assert "rollouts.parquet" in line["value"]


def test_where_a_store_is_looked_for_in_vain_the_next_step_is_named(
    store: PredictionStore, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "my"
    shutil.copytree(store.path, run / "store")
    for place, hint in (
        (run, f"it is the folder of a run; give {run / 'store'}"),
        (tmp_path / "absent", "there is no such folder"),
        (tmp_path, "it holds no manifest.json"),
    ):
        with pytest.raises(StoreError, match=f"is no store: {re.escape(hint)}"):
            answer(place)


def test_a_key_that_is_not_there_is_told_from_one_that_is_not_yet(tmp_path: Path) -> None:
    store = synthetic_store(tmp_path / "s", synthetic_manifest(TopK(k=3)), 2, 1, 1)
    write_synthetic_shard(store, 0, 5)
    for key in ("sample-1/0", "sample-1/0/2"):
        with pytest.raises(StoreError, match=r"'sample-1', variation 0 .* not committed"):
            answer(store.path, "--key", key)
    with pytest.raises(StoreError, match=r"'x', variation 0 is not planned .* --shard NUMBER"):
        answer(store.path, "--key", "x/0")
    with pytest.raises(UserError, match="--shard 0` lists those"):
        answer(store.path, "--key", "sample-1")


def test_rows_of_images_are_tables_too(tmp_path: Path) -> None:
    store = rows_store(tmp_path / "s", tmp_path / "table")
    rollout = json.loads(answer(store.path, "--key", "a/0", "--json"))["rows"]
    rows = table(answer(store.path, "--key", "a/0", "--csv"))
    assert [float(row["dense.cond.std"]) for row in rows] == [
        row["dense.cond"]["std"] for row in rollout
    ]
    rows = table(answer(store.path, "--key", "a/0/1", "--csv"))
    assert {row["array"] for row in rows} == {"dense.cond", "dense.delta", "row.noise"}
    parts = {line["measure"] for line in table(answer(store.path, "--csv"))}
    assert {"bytes", "rms dense.delta.p99"} < parts
    assert "rms dense.cond" in table(answer(store.path, "--shard", 0, "--csv"))[0]


def test_options_that_exclude_each_other_are_refused(store: PredictionStore) -> None:
    for options in (["--json", "--csv"], ["--key", "a/0", "--shard", 0], ["--shard", 0, "--all"]):
        with pytest.raises(UserError, match="exclude each other"):
            answer(store.path, *options)


def test_what_an_id_holds_steers_no_terminal_and_forges_no_line(tmp_path: Path) -> None:
    hostile = "x\u202e[bold]:smile:"  # the store refuses control characters
    manifest = synthetic_manifest(TopK(k=3))
    samples = pa.table({"sample_id": [hostile, "b"], "text": ["\x1b[31m\n\x9b2J\r", "t"]})
    plan = Plan.lay_out([hostile, "b"], 1, 2)
    store = PredictionStore.create(tmp_path / "s", manifest, plan, samples)
    write_synthetic_shard(store, 0, 5)
    for options in ([], ["--shard", 0], ["--key", f"{hostile}/0"], ["--key", f"{hostile}/0/1"]):
        shown = answer(store.path, *options)
        assert all(c.isprintable() for line in shown.split("\n") for c in line)
        if options:
            joined = "".join(shown.split())
            assert r"x\u202e[bold]:smile:" in joined
    assert r"\x1b[31m\n\x9b2J\r" in answer(store.path, "--key", f"{hostile}/0")


@pytest.mark.parametrize("options", [[], ["--shard", 0], ["--key", "sample-1/0"],
                                     ["--key", "sample-1/0/2"]])  # fmt: skip
def test_no_line_is_wider_than_80_letters(store: PredictionStore, options: list[object]) -> None:
    assert max(map(len, answer(store.path, *options).splitlines())) <= 80


@pytest.mark.parametrize(("streams", "vocabulary"), [(9, 99_000), (16, 2024), (21, 152_064)])
def test_codes_of_many_streams_stand_below_each_other(
    tmp_path: Path, streams: int, vocabulary: int
) -> None:
    manifest = synthetic_manifest(TopK(k=3), streams, vocabulary)
    store = synthetic_store(tmp_path / "s", manifest, 1, 1, 1)
    write_synthetic_shard(store, 0, 5)
    lines = answer(store.path, "--key", "sample-0/0").splitlines()
    head = next(line for line in lines if line.startswith("timestep  codes"))
    columns = slice(head.index("codes"), head.index("entropy"))
    found: list[int] = []
    ends = set()
    for line in lines[lines.index(head) + 1 :]:
        assert len(line) <= 80
        for code in re.finditer("[0-9]+", line[columns]):
            found.append(int(code.group()))
            ends.add(code.end())
    assert found == PredictionStore.open(store.path)["sample-0", 0].codes.ravel().tolist()
    assert streams / 3 <= len(ends) < streams or streams == len(ends) == 9


def keys_of(document: object) -> set[str]:
    return set(document) if isinstance(document, dict) else set()


def test_the_schema_is_the_documented_one(store: PredictionStore, tmp_path: Path) -> None:
    """Names that machines rely on: one may be added here, none may go."""
    found = json.loads(answer(store.path, "--json"))
    assert found.keys() == {
        "shards", "planned_shards", "missing_shards", "rollouts", "planned_rollouts", "timesteps",
        "audio_s", "timestep_s", "bytes", "arrays", "longest", "lengths", "stop_reasons", "weights",
        "weight", "statistics", "duplicates", "outliers", "streams", "targets", "profile",
        "lineage", "teacher", "architecture", "quantization", "cfg_scale", "family", "source",
        "sampler", "split", "seed", "fingerprints", "fingerprint", "format_version", "rejected",
        "rejected_for", "unreadable",
    }  # fmt: skip
    assert keys_of(found["arrays"][0]) == {
        "array", "bytes", "plain_bytes", "ratio", "bytes_per_timestep", "bytes_per_audio_s"
    }  # fmt: skip
    quantiles = {"least", "p1", "p10", "p50", "p90", "p99", "most", "mean"}
    assert keys_of(found["lengths"]) == quantiles | {"edges", "counts"}
    assert keys_of(found["statistics"]) == {
        "shards", "of_shards", "rollouts", "timesteps", "entropy_is", "temperature", "streams",
        "unreadable",
    }  # fmt: skip
    stream = found["statistics"]["streams"][0]
    measures = {"entropy", "code_probability", "kept_mass", "tail_mass"}
    assert keys_of(stream) == measures | {"stream"}
    assert keys_of(stream["entropy"]) == quantiles
    assert keys_of(found["duplicates"]["rollouts"]) == {"groups", "members", "examples"}
    assert keys_of(found["outliers"]) == {"length", "entropy"}

    shard = json.loads(answer(store.path, "--shard", 0, "--json"))
    assert shard.keys() == {
        "shard", "rollouts", "timesteps", "audio_s", "bytes", "arrays", "faults", "table"
    }  # fmt: skip
    rollout = json.loads(answer(store.path, "--key", "sample-0/0", "--json"))
    assert rollout.keys() == {
        "sample_id", "variation", "conditions", "timesteps", "audio_s", "stop_reason", "weight",
        "seed", "codes", "entropy_is", "temperature", "certainty",
    }  # fmt: skip
    assert keys_of(rollout["certainty"][0]) == measures | {"timestep", "codes"}
    page = (Path(__file__).parent.parent / "docs" / "inspect.md").read_text(encoding="utf-8")
    documented = found.keys() | stream.keys() | shard.keys() | rollout.keys()
    assert [name for name in documented if f"`{name}`" not in page] == []


def test_object_storage_is_looked_into_as_a_folder_is(
    store: PredictionStore, object_url: str, tmp_path: Path
) -> None:
    copy_store(store.path, object_url)
    for options in (
        ["--json"],
        ["--shard", 0, "--json"],
        ["--key", "sample-1/0", "--json"],
        ["--key", "sample-1/0/2", "--csv"],
    ):
        assert answer(object_url, *options) == answer(store.path, *options)
    found = json.loads(answer("diff", object_url, store.path, "--json"))
    assert found["settings"] == []
    assert found["stores"][0]["kl"]["mean"] == 0
    assert "wrote" in answer("plot", object_url, "-o", tmp_path / "a.svg")
