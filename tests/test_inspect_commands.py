"""`foretell inspect`: a store needs no command's name, and every command keeps its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from store import PredictionStore
from store.schema import TopK
from store.synthetic import synthetic_manifest, synthetic_store, write_synthetic_shard


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
