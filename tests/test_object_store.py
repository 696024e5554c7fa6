"""Stores in object storage, on a real server: one writer wins, nothing acknowledged is lost."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr

from pipeline.inspection_text import verification_text
from store import DamagedShard, PredictionStore, StoreError, object_client, remote, verify
from store.garbage import delete_garbage, find_garbage
from store.layout import Layout
from store.object_client import ObjectStorageFailure
from store.object_url import ObjectUrl, place_of
from store.remote import RemoteLayout, layout_of
from store.repair import repair, repairable
from store.schema import Full, Hidden, TableFacts, TopK
from store.side_tables import SideTableWriter
from store.synthetic import synthetic_manifest, synthetic_store, write_synthetic_shard
from tests.object_server import BUCKET, SECRET_KEY, FaultyProxy, ObjectServer
from tests.test_store_commit import by_profile, tree

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
MANIFEST = synthetic_manifest(TopK(k=4, moments=True))
WRITERS = 3
RACE = """
import sys
from store import PredictionStore
from store.synthetic import write_synthetic_shard
store = PredictionStore.open(sys.argv[1])
input()
print([write_synthetic_shard(store, shard, 20) for shard in range(store.planned_shards)])
"""


def filled(place: str | Path | ObjectUrl, shards: int = 3, timesteps: int = 20) -> PredictionStore:
    store = synthetic_store(place, MANIFEST, shards * 2, 1, 2)
    for shard in store.missing():
        assert write_synthetic_shard(store, shard, timesteps)
    return PredictionStore.open(place)


def opened(url: str | ObjectUrl) -> RemoteLayout:
    layout = layout_of(url)
    assert isinstance(layout, RemoteLayout)
    return layout.opened()


def data_of(url: str, shard: int = 0) -> str:
    """Folder of the objects of a shard, below the URL."""
    (name,) = (n for n in opened(url).client.folder("shards")[1] if n.startswith(f"{shard:05d}."))
    return f"shards/{name}"


def assert_equal(ours: PredictionStore, theirs: PredictionStore) -> None:
    assert list(ours.keys()) == list(theirs.keys())
    for key in theirs.keys():  # noqa: SIM118 - a store is no mapping
        one, other = ours[key], theirs[key]
        assert one.arrays.keys() == other.arrays.keys()
        for name, values in other.arrays.items():
            np.testing.assert_array_equal(one.arrays[name], values)


@pytest.fixture
def proxy(object_server: ObjectServer, object_url: str, monkeypatch) -> Iterator[FaultyProxy]:
    """Stands before the server, for all that is opened from now on."""
    proxy = FaultyProxy(object_server.ports[3])
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    yield proxy
    proxy.close()


@by_profile
def test_a_shard_has_the_bytes_of_a_local_one_and_plain_zarr_opens_it(
    object_url, tmp_path, profile
) -> None:
    import obstore
    from zarr.storage import ObjectStore

    manifest = synthetic_manifest(TopK(k=4), profile=profile)
    stores = [synthetic_store(place, manifest, 4, 1, 2) for place in (object_url, tmp_path / "a")]
    for store in stores:
        assert write_synthetic_shard(store, 1, 20)
    source = data_of(object_url, 1)
    for found in opened(object_url).client.below(source):
        target = tmp_path / "down" / found.name
        opened(object_url).client.download(f"{source}/{found.name}", target, found.bytes)
    assert tree(tmp_path / "down") == tree(tmp_path / "a/shards/00001")
    prefix = f"{object_url.removeprefix(f's3://{BUCKET}/')}/{source}"
    bucket = obstore.store.S3Store(BUCKET, prefix=prefix, client_options={"allow_http": True})
    group = zarr.open_group(ObjectStore(bucket, read_only=True), mode="r")
    shard = PredictionStore.open(tmp_path / "a").shard(1)
    for name, values in shard.arrays.items():
        np.testing.assert_array_equal(group[name][:], values)


def test_readers_get_what_a_local_store_gives(object_url, tmp_path) -> None:
    ours, theirs = filled(object_url), filled(tmp_path / "local")
    assert_equal(ours, theirs)
    assert ours.fingerprint == theirs.fingerprint
    assert ours.samples == theirs.samples
    for one, other in zip(ours.lengths(), theirs.lengths(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert_equal(pickle.loads(pickle.dumps(ours)), theirs)
    found = verify(object_url)
    assert found.model_dump() == verify(tmp_path / "local").model_dump()


def test_heads_and_side_tables_are_stored_beside_the_shards(object_url, tmp_path) -> None:
    writer = SideTableWriter(tmp_path / "texts", 2)
    for row in range(3):
        writer.append({"states": np.full((2, 3), row, np.float32)})
    manifest = synthetic_manifest(Hidden(branches="guided")).model_copy(
        update={"tables": {"texts": writer.finish()}}
    )
    local = synthetic_store(
        tmp_path / "plain", synthetic_manifest(Hidden(branches="guided")), 2, 1, 2
    )
    store = PredictionStore.create(
        object_url, manifest, local.plan, local.samples, local.heads,
        tables={"texts": tmp_path / "texts"},
    )  # fmt: skip
    shutil.rmtree(tmp_path / "cache")
    store = PredictionStore.open(object_url)
    assert store.heads.keys() == local.heads.keys()
    assert store.manifest.tables == {"texts": TableFacts(rows=3, rows_per_part=2)}
    np.testing.assert_array_equal(store.table("texts")[2]["states"], np.full((2, 3), 2))
    opened(object_url).client.create("tables/texts/stranger", b"x")
    assert [damage.file for damage in verify(object_url).bad] == ["tables/texts/stranger"]


@pytest.mark.slow
def test_of_processes_that_write_the_same_shards_one_wins_each_and_the_others_leave_nothing(
    object_url, tmp_path
) -> None:
    store = synthetic_store(object_url, MANIFEST, 8, 1, 2)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, object_url], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for _ in range(WRITERS)
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    answers = [writer.communicate()[0] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * WRITERS
    won = [json.loads(answer.lower()) for answer in answers]
    assert [sum(each) for each in zip(*won, strict=True)] == [1] * store.planned_shards
    assert opened(object_url).orphans() == {}
    assert list(store.folder_here.joinpath("tmp").iterdir()) == []
    assert_equal(PredictionStore.open(object_url), filled(tmp_path / "local", shards=4))


def test_of_threads_that_make_a_store_all_have_it_and_another_one_is_refused(object_url) -> None:
    with ThreadPoolExecutor(WRITERS) as threads:
        made = threads.map(lambda _: synthetic_store(object_url, MANIFEST, 4, 1, 2), range(WRITERS))
        assert len({store.fingerprint for store in made}) == 1
    other = synthetic_manifest(TopK(k=3, moments=True))
    with pytest.raises(StoreError, match=f"{object_url} exists and differs in target.k: 4 in the"):
        synthetic_store(object_url, other, 4, 1, 2)
    with pytest.raises(StoreError, match=f"lies inside the store {object_url}: choose"):
        synthetic_store(f"{object_url}/inner", MANIFEST, 4, 1, 2)


def test_a_store_that_was_begun_is_finished_by_the_same_plan_alone(object_url, tmp_path) -> None:
    local = synthetic_store(tmp_path / "local", MANIFEST, 4, 1, 2)
    client = layout_of(object_url).client
    assert client.create("plan.parquet", tmp_path / "local/plan.parquet")
    with pytest.raises(StoreError, match=r"plan\.parquet differs .* delete what is below the URL"):
        synthetic_store(object_url, MANIFEST, 6, 1, 2)
    assert synthetic_store(object_url, MANIFEST, 4, 1, 2).fingerprint == local.fingerprint
    client.create("notes.txt", b"mine")
    client.delete(["manifest.json"])
    with pytest.raises(StoreError, match=r"holds \['notes.txt'\], which no store has"):
        synthetic_store(object_url, MANIFEST, 4, 1, 2)


def test_who_hears_no_reply_knows_its_own_success(object_url, proxy) -> None:
    path = object_url.removeprefix("s3://").encode()
    for name in (b"plan.parquet", b"manifest.json"):
        proxy.request = b"PUT /" + path + b"/" + name
        store = synthetic_store(object_url, MANIFEST, 4, 1, 2)
        assert proxy.request is None
        assert store.fingerprint == opened(object_url).manifest_seal
        opened(object_url).client.delete(["manifest.json", "plan.parquet", "samples.parquet"])
    store = synthetic_store(object_url, MANIFEST, 4, 1, 2)
    proxy.request = b"PUT /" + path + b"/shards/00000.json"
    assert write_synthetic_shard(store, 0, 20)
    assert proxy.request is None
    proxy.request = b"PUT /" + path + b"/shards/00000."
    assert not write_synthetic_shard(PredictionStore.open(object_url), 0, 20)
    assert verify(object_url).shards == 1
    assert opened(object_url).orphans() == {}


def test_a_writer_that_gives_up_before_its_commit_deletes_what_it_sent(
    object_url, monkeypatch
) -> None:
    store = synthetic_store(object_url, MANIFEST, 4, 1, 2)
    monkeypatch.setattr(remote, "GRACE_S", 0.0)
    with pytest.raises(ObjectStorageFailure, match="may take it for garbage"):
        write_synthetic_shard(store, 0, 20)
    assert opened(object_url).client.below("shards") == []
    assert list(store.folder_here.joinpath("tmp").iterdir()) == []


def test_more_commits_than_a_page_holds_are_all_found(object_url) -> None:
    count = 1234
    store = synthetic_store(object_url, MANIFEST, count, 1, 1)
    client = opened(object_url).client
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda n: client.create(f"shards/{n:05d}.json", b"x"), range(count)))
        list(threads.map(lambda n: client.create(f"shards/{n:05d}.{n:032x}/a", b"x"), range(99)))
    store = PredictionStore.open(object_url)
    assert store.committed == list(range(count))
    assert len(client.below("shards")) == count + 99
    client.delete(f"shards/{n:05d}.json" for n in range(1, count))
    assert PredictionStore.open(object_url).committed == [0]


def test_a_download_that_comes_wrong_is_made_again(object_url, proxy, tmp_path) -> None:
    filled(object_url)
    source = f"{object_url.removeprefix('s3://')}/{data_of(object_url, 1)}"
    proxy.spoil, proxy.request = True, f"GET /{source}/top_k.ids/c".encode()
    assert_equal(PredictionStore.open(object_url), filled(tmp_path / "local"))
    assert proxy.request is None


def test_a_copy_in_the_cache_that_was_altered_is_downloaded_again(object_url, tmp_path) -> None:
    list(map(filled(object_url).shard, range(3)))
    altered = 0
    for path in sorted((tmp_path / "cache/shards").rglob("top_k.logits/c/0/0/0")):
        content = bytearray(path.read_bytes())
        content[5] ^= 1
        path.write_bytes(content)
        altered += 1
    assert altered == 3
    assert_equal(PredictionStore.open(object_url), filled(tmp_path / "local"))


def test_damage_in_object_storage_is_named_taken_out_and_made_again(
    object_url, tmp_path, monkeypatch
) -> None:
    store = filled(object_url)
    client, source = opened(object_url).client, data_of(object_url, 1)
    content = client.read(f"{source}/top_k.ids/c/0/0/0")
    assert content is not None
    client.delete([f"{source}/top_k.ids/c/0/0/0", f"{data_of(object_url, 2)}/codes/zarr.json"])
    client.create(f"{source}/top_k.ids/c/0/0/0", content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DamagedShard, match=r"shard 00001, .*'top_k.ids/c/0/0/0'.* was altered"):
        store.shard(1)
    with pytest.raises(DamagedShard, match=r"shard 00002, .*'codes/zarr.json'.* is missing"):
        store.shard(2)
    found = verify(object_url)
    assert [(bad.shard, bad.file, bad.array) for bad in found.bad] == [
        (1, "top_k.ids/c/0/0/0", "top_k.ids"),
        (2, "codes/zarr.json", "codes"),
    ]
    assert found.shards == 1
    assert [each.shard for each in repair(object_url, repairable(found))] == [1, 2]
    store = PredictionStore.open(object_url)
    assert store.missing() == [1, 2]
    for shard in (1, 2):
        assert write_synthetic_shard(store, shard, 20)
    assert verify(object_url).ok
    assert_equal(PredictionStore.open(object_url), filled(tmp_path / "local"))
    # What they were is garbage, once it is old enough that nobody may still write it.
    assert find_garbage(object_url) == []
    monkeypatch.setattr(remote, "GRACE_S", 0.0)
    garbage = find_garbage(object_url)
    assert sum(leftover.name.startswith("tmp/damaged-0000") for leftover in garbage) == 2
    assert sum(leftover.name.startswith("shards/0000") for leftover in garbage) == 2
    assert delete_garbage(object_url, garbage) == []
    assert find_garbage(object_url) == []
    assert verify(object_url).shards == 3


def test_a_commit_that_is_no_longer_what_it_was_is_damage(object_url) -> None:
    filled(object_url)
    client = opened(object_url).client
    contents = [client.read(f"shards/{shard:05d}.json") for shard in range(3)]
    client.delete([f"shards/{shard:05d}.json" for shard in (1, 2)])
    client.create("shards/00001.json", contents[0])
    client.create("shards/00002.json", contents[2][:-2])
    client.create("shards/notes.txt", b"x")
    found = {(bad.shard, bad.file): bad.reason for bad in verify(object_url).bad}
    assert found.keys() == {
        (None, "shards/notes.txt"), (1, "shards/00001.json"), (2, "shards/00002.json"),
    }  # fmt: skip
    assert "of another shard" in found[1, "shards/00001.json"]


def test_what_a_commit_names_since_is_no_garbage_any_more(object_url, monkeypatch) -> None:
    store = filled(object_url, shards=1)
    content = opened(object_url).client.read("shards/00000.json")
    opened(object_url).client.delete(["shards/00000.json"])
    monkeypatch.setattr(remote, "GRACE_S", 0.0)
    (orphan,) = find_garbage(object_url)
    opened(object_url).client.create("shards/00000.json", content)
    (kept,) = delete_garbage(object_url, [orphan])
    assert "was committed since: it stays" in kept.reason
    assert find_garbage(object_url) == []
    assert len(store.shard(0)) == 2


def test_a_name_that_leads_out_of_the_cache_is_refused(object_url, tmp_path) -> None:
    """Whoever can write the bucket must not write this machine's files."""
    from store.schema import FileSum
    from store.sealed import seal, unseal
    from store.shard import ShardRecord
    from store.sums import file_sum

    store = filled(object_url, shards=1)
    layout, source = opened(object_url), data_of(object_url)
    path = layout.tables_of(0) / "shard.json"
    record, _ = unseal(path, ShardRecord)
    evil = file_sum(b"evil")
    climbing = "../../../evil"
    record = record.model_copy(update={"files": {**record.files, climbing: evil}})
    assert isinstance(evil, FileSum)
    commit = layout._commit(0).model_copy(update={"record": file_sum(seal(record))})
    layout.client.delete([f"{source}/shard.json", "shards/00000.json"])
    layout.client.create(f"{source}/shard.json", seal(record))
    layout.client.create("shards/00000.json", seal(commit))
    shutil.rmtree(tmp_path / "cache")
    store = PredictionStore.open(object_url)
    with pytest.raises(DamagedShard, match="is not the name of a file of a shard"):
        store.shard(0)
    assert not list(tmp_path.rglob("evil"))


# ---- the cache


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_cache_keeps_its_limit_and_readers_get_the_same(object_url, tmp_path) -> None:
    shards = 8
    filled(object_url, shards)
    local = filled(tmp_path / "local", shards)
    largest = max(bytes_below(local.path / f"shards/{s:05d}") for s in range(shards))
    place = ObjectUrl(url=object_url, cache=tmp_path / "small", cache_bytes=int(3.5 * largest))
    stores = [PredictionStore.open(place, cached_shards=1) for _ in range(2)]
    order = np.random.default_rng(0).integers(0, shards, 24).tolist()
    for turn, shard in enumerate(order):
        ours, theirs = stores[turn % 2].shard(shard), local.shard(shard)
        for name, values in theirs.arrays.items():
            np.testing.assert_array_equal(ours.arrays[name], values)
        del ours
        used = sum(bytes_below(tmp_path / "small" / name) for name in ("shards", "tmp"))
        assert used <= place.cache_bytes
    stores[0].expect(range(shards))  # half of the cache may be filled ahead
    stores[0]._ahead.wait()
    assert bytes_below(tmp_path / "small/shards") <= place.cache_bytes


def test_a_shard_in_use_stays_and_who_finds_no_room_says_so(
    object_url, tmp_path, monkeypatch
) -> None:
    filled(object_url, 4)
    size = max(opened(object_url)._size(shard) for shard in range(4))
    place = ObjectUrl(url=object_url, cache=tmp_path / "small", cache_bytes=int(2.5 * size))
    first = PredictionStore.open(place, cached_shards=2)
    held = [first.shard(0), first.shard(1)]
    folders = set((tmp_path / "small/shards").iterdir())
    monkeypatch.setattr(remote, "ROOM_S", 0.1)
    second = PredictionStore.open(place)
    with pytest.raises(StoreError, match="full of shards that other processes use"):
        second.shard(2)
    assert set((tmp_path / "small/shards").iterdir()) == folders
    np.testing.assert_array_equal(second.shard(1).arrays["codes"], held[1].arrays["codes"])
    tiny = ObjectUrl(url=object_url, cache=tmp_path / "tiny", cache_bytes=size // 2)
    with pytest.raises(StoreError, match=r"bytes, but the cache .* may have .*: raise store.cache"):
        PredictionStore.open(tiny).shard(0)


def test_a_download_that_was_killed_does_not_fill_the_cache(object_url, tmp_path) -> None:
    filled(object_url, 2)
    size = max(opened(object_url)._size(shard) for shard in range(2))
    place = ObjectUrl(url=object_url, cache=tmp_path / "small", cache_bytes=int(1.5 * size))
    left = tmp_path / "small/tmp" / f"{uuid.uuid4().hex}-{size}"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    PredictionStore.open(place).shard(0)
    assert not left.exists()


# ---- what cannot work is said at once


def test_a_server_that_does_not_answer_is_given_up_with_what_to_do(object_url, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    place = ObjectUrl(url=object_url, retry_s=0.7)
    with pytest.raises(ObjectStorageFailure) as failed:
        PredictionStore.open(place)
    message = str(failed.value)
    assert message.startswith(f"cannot read {object_url}/manifest.json: ")
    assert "tries in " in message
    assert "(limit: 1 s, FORETELL_RETRY_S or store.retry_s). Check the network" in message
    (bad,) = verify(place).bad
    assert bad.unreadable
    assert bad.file == "manifest.json"
    assert "NOT ALL COULD BE READ: 0 shards" in verification_text(verify(place))


def test_waits_double_are_drawn_at_random_and_end_at_the_limit(object_url, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")

    class Clock:
        def __init__(self) -> None:
            self.waits: list[float] = []

        def monotonic(self) -> float:
            return sum(self.waits)

        def sleep(self, seconds: float) -> None:
            self.waits.append(seconds)

    clocks = [Clock(), Clock()]
    for clock in clocks:
        monkeypatch.setattr(object_client, "time", clock)
        with pytest.raises(ObjectStorageFailure, match="given up after"):
            layout_of(ObjectUrl(url=object_url, retry_s=200)).exists()
        for turn, wait in enumerate(clock.waits):
            longest = min(object_client.FIRST_WAIT_S * 2**turn, object_client.LONGEST_WAIT_S)
            assert longest / 2 <= wait <= longest
        assert 150 < sum(clock.waits) <= 200
    assert clocks[0].waits != clocks[1].waits


def test_refused_credentials_are_said_at_once_and_never_shown(object_url, monkeypatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    with pytest.raises(ObjectStorageFailure, match="check AWS_ACCESS_KEY_ID") as failed:
        PredictionStore.open(object_url)
    assert "another-secret" not in str(failed.value)
    assert os.environ["AWS_ACCESS_KEY_ID"] not in str(failed.value)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    for ask in (PredictionStore.open, verify):
        with pytest.raises(StoreError, match="needs credentials, and the environment has none"):
            ask(object_url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://me:{SECRET_KEY}@127.0.0.1:9")
    with pytest.raises(StoreError, match="AWS_ENDPOINT_URL holds a user or password") as failed:
        PredictionStore.open(object_url)
    assert SECRET_KEY not in str(failed.value)


def test_a_bucket_that_does_not_exist_is_named(object_url) -> None:
    with pytest.raises(ObjectStorageFailure, match="the bucket 'no-such-bucket' does not exist"):
        PredictionStore.open("s3://no-such-bucket/store")
    with pytest.raises(StoreError, match=r"is no store: it holds no manifest\.json"):
        PredictionStore.open(f"{object_url}/nothing")


@pytest.mark.parametrize(
    "url",
    [
        "s3://user:hidden@bucket/store", "s3://bucket/store?token=hidden", "s3://bucket:hidden/a",
        "s3://bucket/../hidden", "gs://bucket/hidden", "s3://", "s3://bucket/a//hidden",
        "s3://Bucket/hidden", "https://bucket/hidden",
    ],
)  # fmt: skip
def test_urls_that_are_none_are_refused_and_not_repeated(url) -> None:
    with pytest.raises(StoreError, match="must be s3://BUCKET/PREFIX") as refused:
        place_of(url)
    assert "hidden" not in str(refused.value)


def test_settings_come_from_the_environment_or_the_place(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("FORETELL_CACHE_BYTES", "12345")
    monkeypatch.setenv("FORETELL_CACHE", str(tmp_path))
    monkeypatch.setenv("FORETELL_RETRY_S", "2.5")
    place = place_of("s3://bucket/a/b/")
    assert isinstance(place, ObjectUrl)
    assert (place.url, place.bucket, place.prefix) == ("s3://bucket/a/b", "bucket", "a/b")
    assert (place.cache, place.cache_bytes, place.retry_s) == (tmp_path, 12345, 2.5)
    monkeypatch.setenv("FORETELL_CACHE_BYTES", "many")
    with pytest.raises(StoreError, match="cache_bytes: Input should be a valid integer"):
        place_of("s3://bucket/a")
    assert place_of("some/folder") == Path("some/folder")


def test_without_the_extra_one_line_says_what_to_install(object_url, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(
        StoreError, match=r"^s3://.* needs a package: pip install 'foretell\[s3\]'$"
    ):
        PredictionStore.open(object_url)


def test_a_process_that_was_forked_says_so(object_url) -> None:
    store = filled(object_url, 1)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            store.is_committed(0)
            store._layout.client.exists("manifest.json")
        except StoreError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    assert b"set loader.start_method to forkserver" in os.read(reader, 1000)
    os.close(reader)
    assert isinstance(store._layout, Layout)


def test_full_targets_are_read_ahead(object_url, tmp_path) -> None:
    manifest = synthetic_manifest(Full())
    store = synthetic_store(object_url, manifest, 6, 1, 2)
    for shard in store.missing():
        write_synthetic_shard(store, shard, 20)
    store = PredictionStore.open(object_url)
    store.expect([2, 0])
    store._ahead.wait()
    assert {path.name for path in (tmp_path / "cache/shards").glob("*/*")} == {"00000", "00002"}
