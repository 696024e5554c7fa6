"""Stage two of stores that are sealed and whole, and not what they say: one message, no student."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from stages.dataset import Dataset
from stages.diffusion.distil import distil
from stages.diffusion.record_config import TrajectoryRows
from stages.distributed import Place
from stages.errors import Refused, UserError
from stages.interruption import StopRequest
from stages.sample_checks import require_frames
from store import PredictionStore, StoreError
from store.tables import parse_table, table_bytes
from tests.diffusion_stores import TEACHERS, FakeDenoiser, Written, config_of, write_store
from tests.faults.machine import little_memory
from tests.faults.test_hostile_stores import places, put, reseal_manifest, rewrite, values

pytestmark = pytest.mark.slow

HERE = Place(0, 1, torch.device("cpu"))
TRAJECTORY = Written(rows=TrajectoryRows(kind="trajectory", steps=3), samples=TEACHERS)
LATENTS, CONDITIONS = (f"tables/{name}/00000.safetensors" for name in ("latents", "conditions"))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("recorded")
    written = {"forward": Written(), "trajectory": TRAJECTORY}
    return {kind: write_store(folder / kind, each).path for kind, each in written.items()}


def learn(path: Path, student: Path) -> None:
    """Train a student for an epoch, in little memory."""
    config = config_of(optimizer={"steps": 9})
    with little_memory():
        store = PredictionStore.open(path)
        distil(
            FakeDenoiser(), store, config, student, seed=1, identity="i", place=HERE,
            stop=StopRequest(),
        )  # fmt: skip


def refused(path: Path, student: Path) -> str:
    """What is said of a store that no student may learn from."""
    with pytest.raises((UserError, StoreError)) as error:
        learn(path, student)
    assert not (student / "model.safetensors").exists()
    return str(error.value)


@pytest.fixture(params=["forward", "trajectory"])
def path(request: pytest.FixtureRequest, recorded: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(recorded[request.param], tmp_path / request.param)


def test_a_recording_that_is_whole_is_learnt_from(path: Path, tmp_path: Path) -> None:
    learn(path, tmp_path / "student")
    assert (tmp_path / "student/model.safetensors").exists()


@pytest.mark.parametrize("field", ["columns", "drawn", "conditions"])
def test_a_manifest_that_lacks_what_a_recording_has_is_refused_with_its_name(
    path: Path, tmp_path: Path, field: str
) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    names = [entry["name"] if field == "columns" else entry for entry in manifest[field]]
    for place, name in enumerate(names):
        copy = shutil.copytree(path, tmp_path / f"{path.name}-{name}")
        reseal_manifest(copy, lambda content, place=place: content[field].pop(place))
        said = refused(copy, tmp_path / "student")
        assert f"{field} of its manifest.json lack {name}" in said


def test_a_manifest_without_columns_at_all_is_refused(path: Path, tmp_path: Path) -> None:
    def bare(content: Any) -> None:
        content["buckets"] = [bucket for bucket in content["buckets"] if bucket["predicted"]]
        del content["columns"], content["drawn"]

    reseal_manifest(path, bare)
    assert str(path) in refused(path, tmp_path / "student")


@given(data=st.data(), value=values)
@settings(max_examples=25)
def test_no_value_anywhere_in_a_manifest_breaks_training_other_than_as_a_message(
    recorded: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    value: Any,
) -> None:
    folder = tmp_path_factory.mktemp("fuzz", numbered=True)
    path = shutil.copytree(recorded[data.draw(st.sampled_from([*recorded]))], folder / "store")
    manifest = json.loads((path / "manifest.json").read_text())
    place = data.draw(st.sampled_from(places(manifest)[1:]))
    with suppress(StoreError):
        reseal_manifest(path, lambda content: put(content, place, value))
    with suppress(UserError, StoreError):
        learn(path, folder / "student")


def other_tensors(path: Path, file: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors of a side table, as if they were meant."""
    tensors = load((path / file).read_bytes())
    change(tensors)
    rewrite(path, file, save(tensors))


def every(name: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for key in [key for key in tensors if key.endswith(f"/{name}")]:
            tensors[key] = make(tensors[key])

    return change


def renamed(name: str) -> Callable[[Any], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for key in [key for key in tensors if key.endswith(f"/{name}")]:
            tensors[key.replace(name, "other")] = tensors.pop(key)

    return change


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (LATENTS, every("latent", lambda x: x[:1])),
        (LATENTS, every("latent", lambda x: x.astype(np.float32))),
        (LATENTS, every("latent", lambda x: np.full_like(x, np.nan))),
        (LATENTS, renamed("latent")),
        (CONDITIONS, every("embeds", lambda x: x[:1])),
        (CONDITIONS, every("embeds", lambda x: np.zeros((2, *x.shape), x.dtype))),
        (CONDITIONS, every("embeds", lambda x: x.astype(np.float64))),
        (CONDITIONS, renamed("embeds")),
    ],
)
def test_tensors_of_another_kind_are_refused_with_the_row(
    recorded: dict[str, Path], tmp_path: Path, file: str, change: Callable[[Any], object]
) -> None:
    path = shutil.copytree(recorded["forward"], tmp_path / "store")
    other_tensors(path, file, change)
    said = refused(path, tmp_path / "student")
    assert "of sample" in said
    assert "variation" in said


@pytest.mark.parametrize(
    ("column", "cells"),
    [
        ("target", pa.array(["teacher"] * 5 + ["oracle"])),
        ("target", pa.array([None] * 6, pa.string())),
        ("target", pa.array(range(6))),
        ("weight", pa.array([1.0] * 5 + [float("nan")])),
        ("weight", pa.array([1.0] * 5 + [-1.0])),
        ("weight", pa.array([1.0] * 5 + [None])),
        ("weight", pa.array(["1"] * 6)),
    ],
)
def test_samples_that_say_nothing_of_what_is_taught_are_refused_with_their_id(
    recorded: dict[str, Path], tmp_path: Path, column: str, cells: pa.Array
) -> None:
    path = shutil.copytree(recorded["forward"], tmp_path / "store")
    table = parse_table((path / "samples.parquet").read_bytes(), "samples.parquet")
    table = table.set_column(table.schema.get_field_index(column), column, cells)
    rewrite(path, "samples.parquet", table_bytes(table))
    said = refused(path, tmp_path / "student")
    assert "(samples.parquet) has the target" in said
    assert str(path) in said


@pytest.mark.parametrize(
    ("column", "cell", "reason"),
    [
        ("text", 7, "no text: text is 7"),
        ("text", ["a"], "no text: text is"),
        ("text", None, "empty text"),
        ("text", "日本 ✓", "text outside the alphabet"),
        ("speaker", ["a"], "unknown speaker"),
        ("speaker", None, "unknown speaker"),
    ],
)
def test_samples_that_no_speech_student_can_read_are_refused_with_their_id(
    run_of, tiny_run, column: str, cell: Any, reason: str
) -> None:
    run = run_of("own", fitted=True)
    path = shutil.copytree(tiny_run.root / "store", run.root / "store")
    table = parse_table((path / "samples.parquet").read_bytes(), "samples.parquet")
    place, cells = table.schema.get_field_index(column), pa.array([cell] * len(table))
    rewrite(path, "samples.parquet", table_bytes(table.set_column(place, column, cells)))
    with pytest.raises(UserError, match=reason) as refused:
        run.do("train:student")
    assert "sample" in str(refused.value)


@pytest.mark.parametrize(
    ("codes", "reason"),
    [
        ("codes", "no codes: codes are 'codes', no list of integers"),
        (None, "no codes"),
        ([0.5, 1.5], "no codes"),
        ([[1, 2], [3, 4]], "no codes"),
        ([1, 2, 3], "truncated frame"),
        ([2**40, -1], "code outside its codebook"),
    ],
)
def test_codes_that_are_none_are_refused(tiny_run, codes: Any, reason: str) -> None:
    facts = Dataset.open(tiny_run.root / "dataset").facts
    with pytest.raises(Refused, match=reason):
        require_frames({"sample_id": "x", "codes": codes}, "codes", facts)
    require_frames({"sample_id": "x", "codes": []}, "codes", facts)
