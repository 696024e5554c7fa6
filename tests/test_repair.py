"""`verify --repair` takes out damaged shards and nothing else; the next rollout remakes them."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from store import PredictionStore, StoreError, verify
from store.garbage import find_garbage
from store.repair import repair, repairable
from store.schema import TopK
from store.synthetic import synthetic_manifest, synthetic_store, write_synthetic_shard
from tests.test_garbage import Terminal, foretell

pytestmark = pytest.mark.slow

DAMAGED = ("shards/00001/codes/c/0/0", "shards/00003/shard.json")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Five committed shards of six planned ones."""
    store = synthetic_store(tmp_path / "store", synthetic_manifest(TopK(k=3)), 12, 1, 2)
    for shard in range(5):
        write_synthetic_shard(store, shard, 5)
    return store.path


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 8
    file.write_bytes(content)


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def damaged(path: Path) -> dict[str, bytes]:
    """Damage two shards; return what the shards were before."""
    before = tree(path / "shards")
    for file in DAMAGED:
        flip(path / file)
    return before


def test_exactly_the_damaged_shards_are_taken_out_and_made_again_with_the_same_bytes(
    path: Path, damaged: dict[str, bytes]
) -> None:
    altered = {name: (path / name).read_bytes() for name in DAMAGED}
    done = foretell("verify", path, "--repair", "--yes", "--json")
    assert done.code == 0
    document = json.loads(done.out)
    assert [entry["shard"] for entry in document["repaired"]] == [1, 3]
    assert [entry["shard"] for entry in document["bad"]] == [1, 3]
    assert (document["ok"], document["not_committed"]) == (True, [1, 3, 5])
    store = PredictionStore.open(path)
    assert store.missing() == [1, 3, 5]
    # Nothing was deleted: the damaged bytes lie where the answer says, and gc lists them.
    for entry, (name, content) in zip(document["repaired"], altered.items(), strict=True):
        shard, file = name.removeprefix("shards/").split("/", 1)
        assert entry["folder"].startswith(f"tmp/damaged-{shard}-")
        assert (path / entry["folder"] / file).read_bytes() == content
    listed = [leftover.name for leftover in find_garbage(path)]
    assert sorted(f"tmp/{name}" for name in listed) == [e["folder"] for e in document["repaired"]]
    for shard in (1, 3):
        assert write_synthetic_shard(store, shard, 5)
    assert tree(path / "shards") == damaged
    assert verify(path).ok


def test_nothing_is_taken_out_before_someone_says_so(path: Path, damaged: dict[str, bytes]) -> None:
    before = tree(path)
    for answer in ("n\n", "\n"):
        done = foretell("verify", path, "--repair", stdin=Terminal(answer))
        assert done.code == 1
        assert "Take 2 damaged shards out" in done.out
        assert "shard 1: left as it is\nshard 3: left as it is" in done.out
    silent = foretell("verify", path, "--repair")
    assert silent.code == 2
    assert "nothing was taken out: there is no terminal to ask; --yes" in silent.err
    listed = foretell("verify", path, "--repair", "--json")
    assert (listed.code, json.loads(listed.out)["repaired"]) == (1, [])
    plain = foretell("verify", path, "--json")
    assert (plain.code, json.loads(plain.out)["repaired"]) == (1, [])
    assert foretell("verify", path, "--yes").code == 2
    assert tree(path) == before
    assert foretell("verify", path, "--repair", stdin=Terminal("y\n")).code == 0
    assert PredictionStore.open(path).missing() == [1, 3, 5]


def test_a_sound_store_has_nothing_to_repair(path: Path) -> None:
    before = tree(path)
    done = foretell("verify", path, "--repair")
    assert (done.code, "there is nothing to repair" in done.out) == (0, True)
    assert tree(path) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda shard: (shard / "rollouts.parquet").unlink(),
        lambda shard: (shard / "extra").write_bytes(b"x"),
        lambda shard: shutil.rmtree(shard / "codes"),
        lambda shard: [shutil.rmtree(shard), shard.symlink_to(shard.parent / "00000")],
        lambda shard: [shutil.rmtree(shard), shard.write_bytes(b"x")],
    ],
    ids=["missing file", "foreign file", "missing array", "link", "file"],
)
def test_whatever_lies_in_place_of_a_sound_shard_is_taken_out_whole(
    path: Path, damage: Callable[[Path], Any]
) -> None:
    before = tree(path / "shards")
    damage(path / "shards/00002")
    assert repairable(verify(path)) == [2]
    (moved,) = repair(path, [2])
    assert (path / moved.folder).exists()
    assert write_synthetic_shard(PredictionStore.open(path), 2, 5)
    assert tree(path / "shards") == before
    assert verify(path).ok


@pytest.mark.parametrize("name", ["manifest.json", "plan.parquet", "samples.parquet"])
def test_what_no_rollout_makes_cannot_be_repaired_and_is_left_where_it_is(
    path: Path, name: str
) -> None:
    flip(path / name)
    before = tree(path)
    done = foretell("verify", path, "--repair", "--yes")
    assert done.code == 1
    assert f"store: {name}: cannot be repaired from the store: no rollout makes it" in done.out
    assert tree(path) == before


def test_a_stranger_among_the_shards_is_the_user_s_and_the_damaged_shards_are_still_taken_out(
    path: Path, damaged: dict[str, bytes]
) -> None:
    (path / "shards/notes").write_text("mine")
    done = foretell("verify", path, "--repair", "--yes", "--json")
    document = json.loads(done.out)
    assert (done.code, document["ok"]) == (1, False)
    assert [entry["shard"] for entry in document["repaired"]] == [1, 3]
    assert (path / "shards/notes").read_text() == "mine"


def test_a_shard_that_the_system_does_not_let_us_read_is_not_taken_for_damaged(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refused(at: Any, *arguments: Any, **options: Any) -> int:
        if "00002/codes/c" in str(at):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(at))
        return real(at, *arguments, **options)

    monkeypatch.setattr(os, "open", refused)
    found = verify(path)
    assert [(damage.shard, damage.unreadable) for damage in found.bad] == [(2, True)]
    assert repairable(found) == []
    assert repair(path, [2]) == []
    done = foretell("verify", path, "--repair", "--yes")
    assert "shard 2: codes/c/0/0: cannot be repaired from the store: it could not be" in done.out
    assert PredictionStore.open(path).committed == [0, 1, 2, 3, 4]


def test_a_shard_that_was_made_again_meanwhile_stays(path: Path, damaged: dict[str, bytes]) -> None:
    found = repairable(verify(path))
    assert [moved.shard for moved in repair(path, found)] == [1, 3]
    assert write_synthetic_shard(PredictionStore.open(path), 1, 5)
    assert repair(path, found) == []  # 1 is sound, and 3 is not there
    assert PredictionStore.open(path).committed == [0, 1, 2, 4]


def test_a_tmp_that_is_a_link_is_refused(path: Path, damaged: dict[str, bytes]) -> None:
    shutil.rmtree(path / "tmp", ignore_errors=True)
    (path / "tmp").symlink_to(path.parent)
    with pytest.raises(StoreError, match="tmp is a link and may lead to anything"):
        repair(path, [1])
    assert PredictionStore.open(path).committed == [0, 1, 2, 3, 4]
