"""Whatever is altered in a store is found, named, never read as data, and repaired if it can be."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest

from store import DamagedShard, Plan, PredictionStore, StoreError, verify
from store.layout import parse_shard
from store.repair import repair, repairable, unrepairable
from store.schema import Compact, Hidden, TopK
from store.synthetic import synthetic_heads, synthetic_manifest, write_synthetic_shard
from store.verify import Damage
from tests.row_stores import rows_store
from tests.test_store_commit import tree

pytestmark = pytest.mark.slow

FLIPS = 350
"""Single bits, of every kind of store."""
REPAIRED = 30
"""Of these, one in so many is repaired and made again."""
TIMESTEPS = 5


def hidden(path: Path) -> None:
    """A store with heads, samples that were rejected, and encoded arrays."""
    manifest = synthetic_manifest(Hidden(branches="both"), profile=Compact())
    of_text(path, manifest, [("refused", "text_characters: 'x'")])


def top_k(path: Path) -> None:
    of_text(path, synthetic_manifest(TopK(k=3, moments=True, tail_samples=2)), [])


def of_text(path: Path, manifest, rejected: list[tuple[str, str]]) -> None:
    ids = ["plain", "ünïcödé ✓", "../climbs", "日本"]
    samples = pa.table({"sample_id": ids, "text": ids})
    plan = Plan.lay_out(ids, 1, 2)
    heads = synthetic_heads(manifest)
    store = PredictionStore.create(path, manifest, plan, samples, heads, rejected)
    for shard in store.missing():
        write_synthetic_shard(store, shard, TIMESTEPS)


def rows(path: Path) -> None:
    """A store of a diffusion model: columns, buckets, drawn numbers and a side table."""
    rows_store(path, path.parent / "table", timesteps=TIMESTEPS)


KINDS: dict[str, Callable[[Path], None]] = {"hidden": hidden, "top_k": top_k, "rows": rows}
FILES = {
    "hidden": {"heads/heads.safetensors", "rejected.parquet"},
    "top_k": {"shards/00001/top_k.tail_ids/c/0/0/0"},
    "rows": {"tables/latents/00001.safetensors", "shards/00002/row.t/c/0"},
}


class Sound(NamedTuple):
    """A store as it was written."""

    path: Path
    files: dict[str, bytes]
    content: dict[str, np.ndarray]


@pytest.fixture(params=KINDS)
def sound(request: pytest.FixtureRequest, tmp_path: Path) -> Sound:
    path = tmp_path / "store"
    KINDS[request.param](path)
    shutil.rmtree(path / "tmp")
    files = tree(path)
    common = {"manifest.json", "plan.parquet", "samples.parquet", "shards/00000/shard.json"}
    assert set(files) >= common | FILES[request.param]
    return Sound(path, files, everything(path))


def everything(path: Path) -> dict[str, np.ndarray]:
    """All that a reader gets of a store by any way, as arrays; raises StoreError."""
    store = PredictionStore.open(path)
    found = {f"heads/{name}": head for name, head in store.heads.items()}
    found["rejected"] = np.array(store.rejected)
    found["samples"] = np.array([str(row) for row in store.samples.to_pylist()])
    for name in store.manifest.tables:
        table = store.table(name)
        for row in range(len(table)):
            found |= {f"{name}/{row}/{n}": tensor for n, tensor in table[row].items()}
    for shard in store.committed:
        for rollout in store.shard(shard):
            key = f"{rollout.sample_id}/{rollout.variation}"
            found |= {f"{key}/{name}": array for name, array in rollout.arrays.items()}
            drawn = sorted(rollout.drawn.items())
            facts = (rollout.stop_reason, rollout.weight, rollout.seed, drawn)
            found[f"{key}/facts"] = np.array(str(facts))
    return found


def reads_the_same_or_refuses(sound: Sound) -> bool:
    """Whether a reader refuses; raises AssertionError where it gets other data."""
    try:
        found = everything(sound.path)
    except StoreError:
        return True
    assert found.keys() == sound.content.keys()
    for name, values in found.items():
        np.testing.assert_array_equal(values, sound.content[name])
    return False


def check_named(sound: Sound, file: str, bad: tuple[Damage, ...]) -> None:
    """Whether what was found is this file, with its shard, array and rollouts."""
    (damage,) = bad
    folder, _, rest = file.partition("/")
    if folder != "shards":
        assert (damage.shard, damage.file, damage.array) == (None, file, None)
        return
    number, _, inner = rest.partition("/")
    array = inner.split("/")[0] if "/" in inner else None
    assert (damage.shard, damage.file, damage.array) == (parse_shard(number), inner, array)
    first, *more = PredictionStore.open(sound.path).plan[damage.shard]
    named = f"sample {first[0]!r}, variation {first[1]}"
    assert damage.reason.startswith(named + (f" and {len(more)} more" if more else ""))


@pytest.mark.slow
def test_every_bit_that_flips_is_found_named_never_read_and_repaired(sound: Sound) -> None:
    chance = random.Random(7)
    for number in range(FLIPS):
        file = chance.choice(sorted(sound.files))
        altered = bytearray(sound.files[file])
        altered[chance.randrange(len(altered))] ^= 1 << chance.randrange(8)
        (sound.path / file).write_bytes(altered)
        found = verify(sound.path)
        assert not found.ok
        check_named(sound, file, found.bad)
        assert reads_the_same_or_refuses(sound)
        shards = {damage.shard for damage in found.bad} - {None}
        assert repairable(found) == sorted(shards)
        assert bool(unrepairable(found)) == (not shards)
        if shards and number % REPAIRED == 0:
            assert [moved.shard for moved in repair(sound.path, repairable(found))] == [*shards]
            store = PredictionStore.open(sound.path)
            assert set(store.missing()) == shards
            for shard in shards:
                assert write_synthetic_shard(store, shard, TIMESTEPS)
            shutil.rmtree(sound.path / "tmp")
            assert tree(sound.path) == sound.files
        else:
            (sound.path / file).write_bytes(sound.files[file])
    assert verify(sound.path).ok


def cut_at(file: Path, share: float) -> None:
    os.truncate(file, int(file.stat().st_size * share))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda file: cut_at(file, 0),
    "half": lambda file: cut_at(file, 0.5),
    "one byte short": lambda file: os.truncate(file, file.stat().st_size - 1),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "a folder": lambda file: [file.unlink(), file.mkdir()],
}


@pytest.mark.slow
def test_every_file_that_is_missing_cut_or_replaced_is_found_and_never_read(sound: Sound) -> None:
    for file in sorted(sound.files):
        place = sound.path / file
        for damage in DAMAGES.values():
            damage(place)
            found = verify(sound.path)
            shards = {bad.shard for bad in found.bad}
            expected = file.split("/")[1] if file.startswith("shards/") else None
            assert shards == {None if expected is None else parse_shard(expected)}
            assert reads_the_same_or_refuses(sound)
            if place.is_dir():
                place.rmdir()
            place.write_bytes(sound.files[file])
    assert verify(sound.path).ok


@pytest.mark.parametrize("name", ["shards/00000/extra", "shards/00000/new/zarr.json", "shards/x"])
def test_what_does_not_belong_is_found_and_a_shard_with_it_is_made_again(
    sound: Sound, name: str
) -> None:
    (sound.path / name).parent.mkdir(exist_ok=True)
    (sound.path / name).write_bytes(b"x")
    found = verify(sound.path)
    assert not found.ok
    refused = reads_the_same_or_refuses(sound)
    assert refused == (name != "shards/x")
    if name == "shards/x":
        assert repairable(found) == []
        return
    assert [moved.shard for moved in repair(sound.path, repairable(found))] == [0]
    assert write_synthetic_shard(PredictionStore.open(sound.path), 0, TIMESTEPS)
    shutil.rmtree(sound.path / "tmp")
    assert tree(sound.path) == sound.files


def test_a_damaged_shard_keeps_no_other_from_being_read(sound: Sound) -> None:
    place = sound.path / "shards/00001/rollouts.parquet"
    place.write_bytes(place.read_bytes()[:-1])
    store = PredictionStore.open(sound.path)
    for rollout in store.shard(0):
        for name, array in rollout.arrays.items():
            expected = sound.content[f"{rollout.sample_id}/{rollout.variation}/{name}"]
            np.testing.assert_array_equal(array, expected)
    with pytest.raises(DamagedShard, match=r"shard 00001, file 'rollouts\.parquet'"):
        store.shard(1)
