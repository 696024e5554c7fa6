"""What the documents name exists: commands, targets, files; and the README's Python runs."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from store.schema import TopK
from store.synthetic import synthetic_manifest, synthetic_store, write_synthetic_shard

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_is_in_the_table_and_the_table_names_no_other():
    from typer.main import get_command

    from pipeline.cli import app

    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `foretell (\w+)`", text, flags=re.MULTILINE)
    commands = get_command(app).commands
    assert sorted(named) == sorted(commands)
    text = (ROOT / "docs" / "inspect.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `foretell inspect ([a-z]+) [^`]*`", text, flags=re.MULTILINE)
    assert sorted([*named, "show"]) == sorted(commands["inspect"].commands)


def test_every_make_target_of_the_readme_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.MULTILINE))
    assert named == {"demo", "test"} <= targets


def test_the_readme_opens_with_what_it_is_the_picture_and_two_commands():
    places = [README.index(part) for part in ("# foretell", "docs/flow.svg", "make demo", "\n## ")]
    assert places == sorted(places)


def test_the_python_of_the_readme_runs(tmp_path):
    manifest = synthetic_manifest(TopK(k=4))
    store = synthetic_store(tmp_path, manifest, samples=2, variations=1, rollouts_per_shard=2)
    write_synthetic_shard(store, 0, mean_timesteps=5)
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert "runs/demo/store" in block
    names = {}
    exec(block.replace("runs/demo/store", str(tmp_path)), names)
    rollout = names["rollout"]
    shape = rollout.codes.shape
    assert rollout.arrays["top_k.ids"].shape == (*shape, 4)
    assert rollout.arrays["top_k.tail_logmass"].shape == (*shape, 1)


def test_the_picture_needs_nothing_and_can_be_read_aloud():
    picture = ElementTree.parse(ROOT / "docs" / "flow.svg").getroot()
    names = {element.tag.rpartition("}")[2] for element in picture.iter()}
    assert {"title", "desc"} < names
    assert not names & {"image", "script", "foreignObject"}
    assert "prefers-color-scheme: dark" in (ROOT / "docs" / "flow.svg").read_text()
