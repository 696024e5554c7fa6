"""Pictures of a store: what they say is what was found, and nothing else is imported for them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.inspection import store_parts
from pipeline.plots import plot_rollout
from pipeline.rollout_inspection import describe_rollout
from stages.errors import UserError
from store import Plan, PredictionStore
from store.schema import Dense, Full, Hidden, Sampled, Target, TopK
from store.synthetic import synthetic_manifest, synthetic_store, write_synthetic_shard
from tests.row_stores import rows_store

ROOT = Path(__file__).parent.parent


def drawn(*arguments: object) -> str:
    command = ["inspect", "plot", *map(str, arguments)]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def stored(path: Path, target: Target) -> PredictionStore:
    store = synthetic_store(path, synthetic_manifest(target), 4, 1, 2)
    for shard in range(2):
        write_synthetic_shard(store, shard, 9)
    return store


def texts(path: Path) -> str:
    """All that is written in an SVG, whose texts stay texts."""
    return " ".join("".join(ElementTree.parse(path).getroot().itertext()).split())


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", [TopK(k=3), Full(branches="both"), Hidden(), Sampled(draws=5), Dense()],
    ids=lambda target: target.kind,
)  # fmt: skip
def test_every_target_has_pictures_of_a_store_and_a_rollout(tmp_path: Path, target: Target) -> None:
    store = stored(tmp_path / "s", target)
    assert "wrote" in drawn(store.path, "-o", tmp_path / "a.svg")
    shown = texts(tmp_path / "a.svg")
    assert "4 rollouts" in shown
    assert "bytes per timestep" in shown
    assert ("nats" in shown) == (target.kind != "dense")
    assert ("Tail" in shown) == (target.kind == "top_k")
    drawn(store.path, "--key", "sample-1/0", "-o", tmp_path / "b.png")
    pixels = np.asarray(Image.open(tmp_path / "b.png").convert("L"))
    assert pixels.std() > 10, "something is drawn"


@pytest.mark.slow
def test_rows_are_drawn_by_noise_level(tmp_path: Path) -> None:
    store = rows_store(tmp_path / "s", tmp_path / "table", timesteps=9)
    drawn(store.path, "-o", tmp_path / "a.svg")
    assert "noise level t" in texts(tmp_path / "a.svg")
    for key in ("a/0", "d/1"):
        drawn(store.path, "--key", key, "-o", tmp_path / "b.svg")
        assert key in texts(tmp_path / "b.svg")


def test_the_heat_map_has_a_cell_for_every_timestep_and_stream(tmp_path: Path) -> None:
    store = stored(tmp_path / "s", TopK(k=3))
    document = describe_rollout(store.path, "sample-1/0")
    low, high = (row["entropy"] for row in document["certainty"][:2])
    for row in document["certainty"]:
        row["entropy"] = low
    plot_rollout(document, ["one", "$two$"], tmp_path / "flat.svg")
    shown = texts(tmp_path / "flat.svg")
    assert "$two$" in shown, "names are no formulas"
    assert "nats" in shown
    document["certainty"][1]["entropy"] = high
    plot_rollout(document, ["one", "$two$"], tmp_path / "other.svg")
    found = [(tmp_path / name).read_text() for name in ("flat.svg", "other.svg")]
    assert found[0] != found[1]


def test_a_picture_depends_on_what_is_drawn_alone(tmp_path: Path) -> None:
    store = stored(tmp_path / "s", TopK(k=3))
    document = describe_rollout(store.path, "sample-1/0")
    for name in ("a.svg", "b.svg"):
        plot_rollout(document, ["one", "two"], tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert re.search(r"\d{4}-\d\d-\d\dT", (tmp_path / "a.svg").read_text()) is None


def test_what_cannot_be_drawn_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    store = stored(tmp_path / "s", TopK(k=3))
    with pytest.raises(UserError, match=r"ends in \.png or \.svg"):
        drawn(tmp_path / "nothing", "-o", tmp_path / "a.pdf")
    with pytest.raises(UserError, match="one timestep"):
        drawn(store.path, "--key", "sample-1/0/1", "-o", tmp_path / "a.png")
    empty = synthetic_store(tmp_path / "e", synthetic_manifest(TopK(k=3)), 2, 1, 2)
    with pytest.raises(UserError, match="nothing can be drawn"):
        drawn(empty.path, "-o", tmp_path / "a.png")
    assert not list(tmp_path.glob("*.png"))
    assert list(store_parts(empty, everything=False))[-1]["statistics"]["shards"] == 0


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_ids_of_other_alphabets_are_drawn_without_a_warning(tmp_path: Path, kind: str) -> None:
    samples = pa.table({"sample_id": ["日本語"], "text": ["t"]})
    manifest, plan = synthetic_manifest(TopK(k=3)), Plan.lay_out(["日本語"], 1, 1)
    store = PredictionStore.create(tmp_path / "s", manifest, plan, samples)
    write_synthetic_shard(store, 0, 5)
    drawn(store.path, "--key", "日本語/0", "-o", tmp_path / "new" / f"a.{kind}")
    if kind == "svg":
        assert "日本語/0" in (tmp_path / "new" / "a.svg").read_text(encoding="utf-8")


def test_who_asks_for_a_picture_is_told_which_shards_it_leaves_out(tmp_path: Path) -> None:
    store = synthetic_store(tmp_path / "s", synthetic_manifest(TopK(k=3)), 6, 1, 2)
    for shard in range(3):
        write_synthetic_shard(store, shard, 5)
    (store.path / "shards/00000/rollouts.parquet").write_bytes(b"none")
    (store.path / "shards/00001/top_k.logits/c/0/0/0").write_bytes(b"none")
    command = ["inspect", "plot", str(store.path), "-o", str(tmp_path / "a.png")]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert (done.exit_code, done.stdout) == (0, f"wrote {tmp_path / 'a.png'}\n")
    assert re.findall("shard ([0-9]) is left out", done.stderr) == ["0", "1"]


@pytest.mark.slow
def test_looking_into_stores_imports_no_torch_and_matplotlib_only_to_draw(tmp_path: Path) -> None:
    paths = [str(stored(tmp_path / name, TopK(k=k)).path) for name, k in (("a", 3), ("b", 4))]
    script = f"""
import sys
from pipeline.cli import app
def inspect(*arguments):
    app(["inspect", *arguments], standalone_mode=False)
    assert "torch" not in sys.modules, arguments
inspect({paths[0]!r})
inspect({paths[0]!r}, "--shard", "0", "--csv")
inspect({paths[0]!r}, "--key", "sample-1/0")
inspect({paths[0]!r}, "--key", "sample-1/0/1", "--json")
inspect("diff", *{paths!r})
assert "matplotlib" not in sys.modules
inspect("plot", {paths[0]!r}, "-o", {str(tmp_path / "a.png")!r})
"""
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").stat().st_size > 10_000
