"""Both stages and `copy` over object storage, while the server and the commands are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from store import PredictionStore, StoreError, object_client, remote, verify
from store.copying import copy_store
from store.garbage import delete_garbage, find_garbage
from store.layout import Layout
from store.object_url import ObjectUrl
from store.remote import RemoteLayout, layout_of, store_exists
from store.schema import TopK
from store.synthetic import synthetic_manifest, synthetic_store, write_synthetic_shard
from tests.conftest import ROOT, Run
from tests.object_server import ACCESS_KEY, SECRET_KEY, ObjectServer
from tests.test_cli import foretell
from tests.test_store_commit import tree

pytestmark = pytest.mark.slow

MANIFEST = synthetic_manifest(TopK(k=4))
COPY = "import sys; from store.copying import copy_store; copy_store(*sys.argv[1:])"
PYTHON_PATH = os.pathsep.join([str(ROOT), *filter(None, sys.path)])


class Retries:
    """Stands in for `random` where waits are drawn, and counts them."""

    count = 0

    def uniform(self, _least: float, most: float) -> float:
        self.count += 1
        return most


@pytest.fixture
def retries(monkeypatch) -> Retries:
    counted = Retries()
    monkeypatch.setattr(object_client, "random", counted)
    return counted


def crash_when(ready: Callable[[], bool], server: ObjectServer) -> threading.Thread:
    """Kill the server once something holds, and start it again."""

    def crash() -> None:
        while not ready():
            time.sleep(0.01)
        server.kill()
        time.sleep(0.5)
        server.start()
        server.wait()

    thread = threading.Thread(target=crash)
    thread.start()
    return thread


def commits(layout: Layout) -> int:
    try:
        return len(layout.committed())
    except StoreError:
        return 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def test_both_stages_outlive_a_crash_of_the_server_and_end_as_a_local_run_does(
    run_of, tiny_run, object_url, object_server, tmp_path, retries
) -> None:
    rollout = tiny_run.document["rollout"] | {"rollouts_per_shard": 4, "batch_size": 2}
    student = tiny_run.document["students"]["student"] | {
        "buffer_shards": 2,
        "loader": {"prefetch": 1},
    }
    sections: dict[str, Any] = {"rollout": rollout, "students": {"student": student}}
    local: Run = run_of("local", fitted=True, **sections)
    local.do("rollout", "train:student")
    sizes = [
        sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        for folder in (local.root / "store/shards").iterdir()
    ]
    assert len(sizes) >= 6
    # Fewer than there are: stage two has to come back for shards that it had before.
    cache = {"cache": str(tmp_path / "cache"), "cache_bytes": 3 * max(sizes), "retry_s": 90}
    own: Run = run_of("own", fitted=True, store={"url": object_url, **cache}, **sections)

    layout = layout_of(object_url)
    crash = crash_when(lambda: commits(layout) >= 2, object_server)
    own.do("rollout")
    crash.join()
    assert retries.count > 0
    store = PredictionStore.open(object_url)
    assert store.missing() == []
    assert verify(object_url).ok
    copy_store(object_url, tmp_path / "back")
    assert tree(tmp_path / "back") == tree(local.root / "store")

    retries.count = 0
    downloaded = tmp_path / "cache/shards"
    crash = crash_when(lambda: any(downloaded.glob("*/*")), object_server)
    own.do("train:student")
    crash.join()
    assert retries.count > 0
    ours, theirs = weights(own.root / "student"), weights(local.root / "student")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    kept = sum(path.stat().st_size for path in downloaded.rglob("*") if path.is_file())
    assert kept <= cache["cache_bytes"]

    # What machines ask for works as on a folder.
    done = foretell("verify", object_url, "--json")
    assert (done.returncode, json.loads(done.stdout)["ok"]) == (0, True)
    done = foretell("inspect", object_url, "--json")
    assert json.loads(done.stdout)["rollouts"] == len(store)
    one, other = (
        json.loads(foretell("inspect", place, "--json").stdout)
        for place in (object_url, local.root / "store")
    )
    assert one == other
    key = "/".join(map(str, next(store.keys())))
    assert foretell("inspect", object_url, "--key", key).stdout
    done = foretell("status", own.path, "--json")
    assert json.loads(done.stdout)["stages"]["rollout"]["missing"] == 0
    assert foretell("gc", object_url).stdout.startswith("tmp/ is empty")

    # Nothing that was written, here or there, holds a credential.
    secrets = (ACCESS_KEY.encode(), SECRET_KEY.encode())
    for folder in (own.root, tmp_path / "cache", tmp_path / "back"):
        for path, content in tree(folder).items():
            assert not any(secret in content for secret in secrets), path
    client = layout.client  # type: ignore[attr-defined]
    for found in client.below("shards"):
        assert not any(secret in client.read(f"shards/{found.name}") for secret in secrets)


def filled(place: str | Path, shards: int) -> PredictionStore:
    store = synthetic_store(place, MANIFEST, 2 * shards, 1, 2)
    for shard in store.missing():
        write_synthetic_shard(store, shard, 200)
    return PredictionStore.open(place)


def start_copy(source: str | Path, destination: str | Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", COPY, str(source), str(destination)],
        env=os.environ | {"PYTHONPATH": PYTHON_PATH},
        stderr=subprocess.DEVNULL,
    )


def test_a_copy_that_was_killed_goes_on_where_it_ended_both_ways(
    object_url, tmp_path, monkeypatch
) -> None:
    shards = 12
    local = filled(tmp_path / "local", shards)
    for source, destination in ((local.path, object_url), (object_url, tmp_path / "back")):
        process = start_copy(source, destination)
        while commits(layout_of(destination)) < 2:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        there = commits(layout_of(destination))
        assert 2 <= there < shards
        assert verify(destination).shards == there
        result = copy_store(source, destination)
        assert (result.there, result.shards) == (there, shards - there)
        assert verify(destination).shards == shards
        again = copy_store(source, destination)
        assert (again.there, again.shards, again.bytes) == (shards, 0, 0)
    # What the killed one had sent is garbage, and nothing else is.
    monkeypatch.setattr(remote, "GRACE_S", 0.0)
    assert delete_garbage(object_url, find_garbage(object_url)) == []
    assert find_garbage(object_url) == []
    assert verify(object_url).shards == shards
    back = {name: data for name, data in tree(tmp_path / "back").items() if "tmp/" not in name}
    assert back == tree(local.path)


def test_a_copy_refuses_what_is_something_else_and_overwrites_nothing(object_url, tmp_path) -> None:
    local = filled(tmp_path / "local", 2)
    other = synthetic_store(tmp_path / "other", synthetic_manifest(TopK(k=3)), 4, 1, 2)
    with pytest.raises(StoreError, match=r"holds another store than .*; nothing was copied"):
        copy_store(local.path, other.path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").write_text("mine")
    with pytest.raises(StoreError, match=r"holds \['notes'\], which no store has"):
        copy_store(local.path, tmp_path / "full")
    for inner in (local.path, local.path / "inner"):
        with pytest.raises(StoreError, match="lie within each other"):
            copy_store(local.path, inner)
    with pytest.raises(StoreError, match="is no store"):
        copy_store(tmp_path / "none", object_url)
    assert not store_exists(object_url)

    # A shard that is there in other bytes stays as it is.
    copy_store(local.path, object_url)
    target = synthetic_store(tmp_path / "mixed", MANIFEST, 4, 1, 2)
    write_synthetic_shard(target, 0, 100)
    before = tree(target.path / "shards")
    done = foretell("copy", object_url, target.path, "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert (found["differing"], found["shards"], found["there"]) == ([0], 1, 0)
    assert {n: d for n, d in tree(target.path / "shards").items() if n in before} == before
    done = foretell("copy", object_url, target.path)
    assert "shard 0 is there in other bytes, and was left alone" in done.stdout


@pytest.mark.parametrize("where", ["shards/00001/top_k.ids/c/0/0/0", "samples.parquet"])
def test_a_damaged_source_is_not_copied(object_url, tmp_path, where) -> None:
    local = filled(tmp_path / "local", 2)
    path = tmp_path / "local" / where
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    for destination in (object_url, tmp_path / "copy"):
        with pytest.raises(StoreError, match="was altered"):
            copy_store(local.path, destination)
        layout = layout_of(destination)
        assert not layout.exists() or layout.committed() == [0]


def test_what_does_not_arrive_as_it_was_sent_is_not_committed(
    object_url, tmp_path, monkeypatch
) -> None:
    local = filled(tmp_path / "local", 2)
    upload = object_client.ObjectClient.upload

    def spoilt(client: object_client.ObjectClient, key: str, path: Path) -> None:
        if key.endswith("codes/c/0/0"):
            path = tmp_path / "spoilt"
            path.write_bytes(b"x")
        upload(client, key, path)

    monkeypatch.setattr(object_client.ObjectClient, "upload", spoilt)
    with pytest.raises(StoreError, match="did not arrive as it was sent"):
        copy_store(local.path, object_url)
    layout = layout_of(object_url)
    assert isinstance(layout, RemoteLayout)
    assert layout.committed() == []
    assert layout.opened().orphans() == {}


def test_commands_that_cannot_reach_object_storage_fail_with_what_to_do(
    run_of, object_url, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("FORETELL_RETRY_S", "0.3")
    own = run_of(store=object_url)
    for arguments in (
        ("status", own.path),
        ("inspect", object_url),
        ("copy", object_url, tmp_path),
    ):
        done = foretell(*arguments)
        assert done.returncode == 1
        assert done.stderr.startswith("foretell: cannot ")
        assert object_url in done.stderr
        assert "run the same command again: what was committed is safe" in done.stderr
    assert foretell("convert", object_url, tmp_path / "a", "--profile", "fast").returncode == 2


def test_workers_over_object_storage_share_by_task_alone(object_url, tmp_path) -> None:
    from stages.interruption import StopRequest
    from stages.sharing import Share

    store = synthetic_store(object_url, MANIFEST, 6, 1, 2)
    written: list[int] = []

    def write(shards: Any) -> bool:
        written.extend(shards)
        return True

    assert Share(task=1, tasks=2).write(store, write, StopRequest())
    assert written == [1]
    assert store.claims is None


def test_the_store_of_a_configuration_may_be_a_url(run_of, tmp_path) -> None:
    own = run_of(store="s3://bucket/prefix", evaluate=None).load()
    assert isinstance(own.store, ObjectUrl)
    assert str(own.store) == "s3://bucket/prefix"
    own = run_of(store={"url": "s3://bucket/prefix", "cache_bytes": 5, "retry_s": 1}).load()
    assert (own.store.cache_bytes, own.store.retry_s) == (5, 1.0)
    from stages.errors import UserError

    with pytest.raises(UserError, match="must be s3://BUCKET/PREFIX") as refused:
        run_of(store="s3://user:hidden@bucket/prefix").load()
    assert "hidden" not in str(refused.value)
    with pytest.raises(
        UserError, match=r"store\.cache_byte: unknown key; did you mean 'cache_bytes'"
    ):
        run_of(store={"url": "s3://bucket/prefix", "cache_byte": 5}).load()
