"""A store in object storage, where nothing can be renamed and everything may have to be repeated.

    URL/manifest.json, plan.parquet, …      as in a local store, each created and never replaced
    URL/shards/00042.ATTEMPT/               a shard as a local store holds it, shard.json and all
    URL/shards/00042.json                   exists ⇔ committed: which attempt the shard is

A writer makes the shard on its own disk, sends it under an attempt of its own, and creates the
commit on the condition that there is none (If-None-Match). So of several writers one wins, and the
others delete what they sent. What a reader needs is downloaded, compared with its sums, and then
read as that of a local store.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

from pydantic import Field

from store.durable import write_file
from store.errors import StoreError, explain_os_errors
from store.layout import ENTRIES, Layout, parse_shard, shard_name
from store.mapped_file import MappedFile
from store.object_client import Found, ObjectClient, ObjectStorageFailure, endpoint_url
from store.object_url import ObjectUrl, place_of
from store.schema import FORMAT_VERSION, FileSum, Manifest, Record
from store.sealed import seal, unseal, unsealed
from store.shard import ShardRecord
from store.shard_cache import Lease, ShardCache
from store.shard_folder import RECORD_FILE, ROLLOUTS_FILE, leaves_below
from store.side_tables import TABLES
from store.sums import file_sum

logger = logging.getLogger(__name__)

Job = TypeVar("Job")

ATTEMPT = re.compile(r"[0-9a-f]{32}")
ATTEMPT_FOLDER = re.compile(r"(?P<shard>[0-9]{5,10})\.(?P<attempt>[0-9a-f]{32})")
GRACE_S = 24 * 3600.0
"""Age from which what no commit names is garbage; no writer takes half as long over a shard."""
CONNECTIONS = 8
"""Files of a shard that are sent or downloaded at the same time."""
DOWNLOADS = 3
"""How often a file is downloaded that comes other than it was written."""
ROOM_S = 60.0
"""Seconds to wait for other processes that fill the cache."""


class Commit(Record):
    """The content of shards/00042.json: where the shard lies, and what its record is."""

    format_version: int = Field(FORMAT_VERSION, ge=1, le=FORMAT_VERSION)
    shard: int
    """Number of the shard in the plan."""
    manifest: str
    """Checksum of the manifest of the store that the shard belongs to."""
    attempt: str = Field(pattern=ATTEMPT.pattern, min_length=32, max_length=32)
    """Ends the name of the folder: shards/00042.ATTEMPT/."""
    record: FileSum
    """Of shard.json in that folder."""


class ObjectFault(StoreError):
    """What is wrong with an object that a commit promises."""

    def __init__(self, file: str, reason: str) -> None:
        self.file = file
        """Below the shard, or the commit's own name."""
        self.reason = reason
        super().__init__(f"{file}: {reason}")

    def __reduce__(self) -> tuple[type[ObjectFault], tuple[str, str]]:
        return type(self), (self.file, self.reason)


class Orphan(NamedTuple):
    """What no commit names: of a writer that was killed, lost, or still works."""

    keys: list[str]
    bytes: int
    age_s: float


@dataclass(frozen=True)
class RemoteLayout(Layout):
    """Where things lie in a store in object storage, and their copies on this machine.

    `root` holds the copies: of what is beside the shards whole, of each shard its record and its
    table of rollouts. It is of use once the layout is `opened`.
    """

    client: ObjectClient
    cache: ShardCache
    manifest_seal: str = ""
    files: Mapping[str, FileSum] = field(default_factory=dict)
    """Beside the shards, by the manifest."""
    commits: dict[int, Commit] = field(default_factory=dict)
    """Those that were read."""
    modified_s: dict[int, float] = field(default_factory=dict)
    """When each was created by the server's clock, as the last listing has it."""
    obtained: set[str] = field(default_factory=set)
    """Of these files those that were compared with their sums."""
    sizes: dict[int, int] = field(default_factory=dict)
    """Bytes of shards, as far as they were asked for."""

    @property
    def place(self) -> ObjectUrl:
        """What to open the store by."""
        return self.client.place

    def __str__(self) -> str:
        return str(self.place)

    def exists(self) -> bool:
        """Whether there is a store; raises StoreError."""
        return self.client.exists("manifest.json")

    def opened(self) -> RemoteLayout:
        """The layout with all of the store on this machine that is small; raises StoreError."""
        text = self.client.read("manifest.json")
        if text is None:
            raise StoreError(
                f"{self} is no store: it holds no manifest.json; correct the URL, or make the "
                "store with `foretell rollout`"
            )
        manifest, fingerprint = unsealed(text, f"{self}/manifest.json", Manifest)
        name = hashlib.sha256(f"{endpoint_url()} {self} {fingerprint}".encode()).hexdigest()[:32]
        layout = replace(
            self,
            root=self.cache.root / "stores" / name,
            manifest_seal=fingerprint,
            files=manifest.files,
        )
        with explain_os_errors(f"make {layout.root}"):
            layout.tmp.mkdir(parents=True, exist_ok=True)
        layout.obtain(file for file in manifest.files if not file.startswith(f"{TABLES}/"))
        if not layout.manifest.exists():
            layout._put_in_place(layout.manifest, lambda path: write_file(path, [text]))
        return layout

    def obtain(self, files: Iterable[str]) -> None:
        """Have some files beside the shards here; raises StoreError."""
        for file in files:
            path, expected = self.root / file, self.files[file]
            if file not in self.obtained and not _holds(path, expected):
                self._put_in_place(path, partial(self._download_beside, file, expected))
            self.obtained.add(file)

    def place_new(self, contents: Mapping[str, bytes | Path]) -> None:
        """Create the files of a store in their order, the manifest last.

        What is there and equal is left as it is, so that of two creators of the same store both
        succeed. Raises StoreError where something else is there but no manifest; where there is a
        manifest, who calls compares.
        """
        self._refuse_strangers()
        for name, content in contents.items():
            if self.client.create(name, content) or name == self.manifest.name:
                continue
            expected = _sum_of(content)
            if self.client.digest(name, expected.bytes) == expected:
                continue
            if self.exists():
                return
            raise StoreError(
                f"{self}/{name} differs from the one to be written and no manifest.json is beside "
                "it: a store was begun here with another plan; delete what is below the URL, or "
                "choose another"
            )

    def shard_entries(self) -> list[str]:
        """Names of committed shards, and of what does not belong there, sorted."""
        objects, folders = self.client.folder(self.shards.name)
        names = [f"{name}/" for name in folders if not ATTEMPT_FOLDER.fullmatch(name)]
        modified_s: dict[int, float] = {}
        for found in objects:
            name, dot, ending = found.name.partition(".")
            number = parse_shard(name)
            if number is None or dot + ending != ".json":
                names.append(found.name)
            else:
                names.append(name)
                modified_s[number] = found.modified_s
        self._note(modified_s)
        return sorted(names)

    def _note(self, modified_s: Mapping[int, float]) -> None:
        """Keep when commits were created; what was read of those that are gone is forgotten."""
        for shard, before_s in list(self.modified_s.items()):
            if modified_s.get(shard) != before_s:
                self.commits.pop(shard, None)
                self.sizes.pop(shard, None)
                self.modified_s.pop(shard, None)
        self.modified_s.update(modified_s)

    def stamps(self) -> dict[int, float]:
        """Committed shards, rising, and when each was committed by the server's clock."""
        return {shard: self.modified_s[shard] for shard in self.committed()}

    def is_committed(self, shard: int) -> bool:
        """Whether a shard is committed by now; raises StoreError."""
        return shard in self.commits or self.client.exists(_commit_key(shard))

    def committed_s(self, shard: int) -> float:
        """When a committed shard was committed, in seconds since 1970."""
        return self.modified_s[shard]

    def tables_of(self, shard: int) -> Path:
        """Folder of the record and the table of rollouts of a committed shard.

        Raises ObjectFault, and StoreError.
        """
        commit = self._commit(shard)
        folder = self.root / "records" / commit.attempt / shard_name(shard)
        if not folder.exists():
            self._put_in_place(folder, partial(self._download_tables, commit))
        return folder

    @contextmanager
    def whole(self, shard: int) -> Iterator[Path]:
        """Folder with every object of a committed shard, as they are; raises ObjectFault."""
        source = _data_key(self._commit(shard))
        with self._scratch() as scratch:
            folder = scratch / shard_name(shard)
            folder.mkdir()
            found = self.client.below(source)
            for each in found:
                _refuse_climbing(each.name)
            _in_parallel(
                lambda f: self.client.download(f"{source}/{f.name}", folder / f.name, f.bytes),
                found,
            )
            yield folder

    def lease(self, shard: int, let_go: Callable[[], None]) -> tuple[Path, Lease]:
        """Folder of a shard in the cache, which stays there as long as the lease is kept.

        `let_go` is called where shards that are still kept take the room of this one. Raises
        ObjectFault, and StoreError where the cache is too small.
        """
        key, download = self._cached(shard)
        self._refuse_small_cache(key[1], shard)
        lease, deadline = self.cache.lease(*key), time.monotonic() + ROOM_S
        while lease is None:
            lease = self.cache.fetch(*key, download)
            if lease is None:
                let_go()
                if time.monotonic() > deadline:
                    raise self._full_cache(shard)
                time.sleep(0.05)
        return lease.path, lease

    def fetch_ahead(self, shard: int) -> None:
        """Download a shard ahead of its use, unless what is in use fills the cache.

        Nothing is tried twice: that is for who needs the shard. Raises StoreError.
        """
        key, download = self._hasty._cached(shard)
        lease = self.cache.lease(*key) or self.cache.fetch(*key, download)
        if lease is not None:
            lease.end()

    def fitting(self, shards: Sequence[int]) -> list[int]:
        """As many of some shards, from the first, as half of the cache holds."""
        ends = itertools.accumulate(map(self._size, shards))
        return [s for s, end in zip(shards, ends, strict=True) if end <= self.cache.limit // 2]

    def forget(self, shard: int) -> bool:
        """Delete a shard from the cache, where it was damaged; raises StoreError."""
        self.cache.forget(self._commit(shard).attempt, self._size(shard))
        return True

    def publish(self, staged: Path, shard: int, *, read_back: bool = False) -> bool:
        """Send a folder and commit it as a shard; False if another writer was first.

        With `read_back` every object is compared with its file before. The loser's objects are
        deleted. Raises StoreError: then it is not known whether the shard is committed, unless
        nothing was sent.
        """
        began = time.monotonic()
        attempt = uuid.uuid4().hex
        record = file_sum((staged / RECORD_FILE).read_bytes())
        commit = Commit(shard=shard, manifest=self.manifest_seal, attempt=attempt, record=record)
        target = _data_key(commit)
        try:
            self._send(staged, target, read_back)
            if time.monotonic() - began > GRACE_S / 2:
                raise ObjectStorageFailure(
                    f"cannot commit {self}/{target}: it took over {GRACE_S / 7200:.0f} hours to "
                    "send, and `gc` may take it for garbage; check the network, then run the same "
                    "command again"
                )
        except BaseException:
            self.client.delete_quietly(target)
            raise
        content = seal(commit)
        # Not within the block: when this fails, the commit may be there nevertheless.
        won = self.client.create(_commit_key(shard), content)
        won = won or self.client.read(_commit_key(shard)) == content  # whose reply was lost
        if not won:
            self.client.delete_quietly(target)
        return won

    def take_out(self, shard: int) -> str:
        """Make a committed shard one that is missing; return the name of what is left of it."""
        content = self.client.read(_commit_key(shard)) or b""
        kept = f"{self.tmp.name}/damaged-{shard_name(shard)}-{uuid.uuid4().hex}.json"
        self.client.create(kept, content)
        self.client.delete([_commit_key(shard)])
        self.commits.pop(shard, None)
        return kept

    def orphans(self) -> dict[str, Orphan]:
        """By their names below the URL: attempts that no commit names, and what lies in tmp/."""
        objects, folders = self.client.folder(self.shards.name)
        committed = {found.name.removesuffix(".json") for found in objects}
        attempts: dict[str, list[str]] = {}
        for match in filter(None, map(ATTEMPT_FOLDER.fullmatch, folders)):
            attempts.setdefault(match["shard"], []).append(match["attempt"])
        orphans = {}
        for shard, names in attempts.items():
            if shard in committed and len(names) == 1:
                continue  # else the store is damaged, which `verify` tells
            kept = self._attempt_named(shard) if shard in committed else None
            for attempt in sorted(set(names) - {kept}):
                key = f"{self.shards.name}/{shard}.{attempt}"
                # Some servers keep showing a folder for a while after its last object is gone.
                if objects := self.client.below(key):
                    orphans[key] = _orphan(key, objects)
        for found in self.client.below(self.tmp.name):
            orphans[f"{self.tmp.name}/{found.name}"] = _orphan(self.tmp.name, [found])
        return orphans

    def delete_orphan(self, name: str) -> None:
        """Delete what `orphans` found; raises StoreError where a commit names it by now."""
        match = ATTEMPT_FOLDER.fullmatch(PurePosixPath(name).name)
        if match is None:
            self.client.delete([name])
            return
        if self._attempt_named(match["shard"]) == match["attempt"]:
            raise StoreError(f"{self}/{name} was committed since: it stays")
        self.client.delete(f"{name}/{found.name}" for found in self.client.below(name))

    def _attempt_named(self, shard: str) -> str | None:
        """Attempt that the commit of a shard names by now; raises StoreError if it is damaged."""
        key = f"{self.shards.name}/{shard}.json"
        text = self.client.read(key)
        return None if text is None else unsealed(text, f"{self}/{key}", Commit)[0].attempt

    @cached_property
    def _hasty(self) -> RemoteLayout:
        """The same, but for requests that fail, which are not tried again."""
        return replace(self, client=self.client.hasty())

    def _cached(self, shard: int) -> tuple[tuple[str, int, str], Callable[[Path], None]]:
        """What a shard is called in the cache, and what downloads it."""
        commit = self._commit(shard)
        key = commit.attempt, self._size(shard), shard_name(shard)
        return key, partial(self._download_shard, commit)

    def _record(self, shard: int) -> ShardRecord:
        return unseal(self.tables_of(shard) / RECORD_FILE, ShardRecord)[0]

    def _size(self, shard: int) -> int:
        """Bytes of a shard, its record among them."""
        if shard not in self.sizes:
            files = self._record(shard).files.values()
            self.sizes[shard] = self._commit(shard).record.bytes + sum(f.bytes for f in files)
        return self.sizes[shard]

    def _commit(self, shard: int) -> Commit:
        if shard not in self.commits:
            key = _commit_key(shard)
            text = self.client.read(key)
            if text is None:
                raise ObjectFault(key, "it is missing")
            try:
                commit, _ = unsealed(text, f"{self}/{key}", Commit)
            except StoreError as error:
                raise ObjectFault(key, str(error)) from error
            if (commit.manifest, commit.shard) != (self.manifest_seal, shard):
                raise ObjectFault(key, "it is of another shard or store")
            self.commits[shard] = commit
        return self.commits[shard]

    def _download_tables(self, commit: Commit, folder: Path) -> None:
        with explain_os_errors(f"make {folder}"):
            folder.mkdir()
        self._download(commit, RECORD_FILE, commit.record, folder)
        try:
            record, _ = unseal(folder / RECORD_FILE, ShardRecord)
            expected = record.files[ROLLOUTS_FILE]
        except (StoreError, KeyError) as error:
            raise ObjectFault(RECORD_FILE, f"it is no record of a shard: {error}") from error
        self._download(commit, ROLLOUTS_FILE, expected, folder)

    def _download_shard(self, commit: Commit, folder: Path) -> None:
        tables, record = self.tables_of(commit.shard), self._record(commit.shard)
        with explain_os_errors(f"write {folder}"):
            folder.mkdir()
            for file in (RECORD_FILE, ROLLOUTS_FILE):
                shutil.copyfile(tables / file, folder / file)
        for file in record.files:
            _refuse_climbing(file)
        _in_parallel(
            lambda item: self._download(commit, *item, folder),
            [item for item in record.files.items() if item[0] != ROLLOUTS_FILE],
        )

    def _download(self, commit: Commit, file: str, expected: FileSum, folder: Path) -> None:
        try:
            self._download_checked(f"{_data_key(commit)}/{file}", folder / file, expected)
        except ObjectStorageFailure:
            raise
        except StoreError as error:
            raise ObjectFault(file, str(error)) from error

    def _download_beside(self, file: str, expected: FileSum, path: Path) -> None:
        try:
            self._download_checked(file, path, expected)
        except ObjectStorageFailure:
            raise
        except StoreError as error:
            raise StoreError(f"{error}: restore it from a copy") from error

    def _download_checked(self, key: str, path: Path, expected: FileSum) -> None:
        """Download a file, again if it does not come as it was written; raises StoreError."""
        for _ in range(DOWNLOADS):
            found = self.client.download(key, path, expected.bytes)
            if found == expected:
                return
            logger.warning("%s/%s did not come as it was written; downloading again", self, key)
            path.unlink()
        raise StoreError(
            f"{self}/{key} was altered: of {DOWNLOADS} downloads none has its "
            f"{expected.bytes} bytes with the right XXH3"
        )

    def _send(self, staged: Path, target: str, read_back: bool) -> None:
        def send(file: str) -> None:
            self.client.upload(f"{target}/{file}", staged / file)
            if not read_back:
                return
            expected = _sum_of(staged / file)
            if self.client.digest(f"{target}/{file}", expected.bytes) != expected:
                raise StoreError(
                    f"{self}/{target}/{file} did not arrive as it was sent: run the same command "
                    "again"
                )

        _in_parallel(send, sorted(leaves_below(staged)))

    def _refuse_strangers(self) -> None:
        """Refuse to make a store among objects of others, or within another store."""
        objects, folders = self.client.folder("")
        strangers = sorted({*folders, *(found.name for found in objects)} - set(ENTRIES))
        if strangers:
            raise StoreError(
                f"{self} holds {strangers[:3]}, which no store has: choose a prefix of its own"
            )
        for above in PurePosixPath(self.place.prefix or ".").parents:
            prefix = "" if str(above) == "." else f"/{above}"
            url = f"s3://{self.place.bucket}{prefix}"
            if url == str(self):
                continue
            if ObjectClient(self.place.model_copy(update={"url": url})).exists("manifest.json"):
                raise StoreError(f"{self} lies inside the store {url}: choose a URL outside it")

    def _refuse_small_cache(self, size: int, shard: int) -> None:
        if size > self.cache.limit:
            raise StoreError(
                f"shard {shard_name(shard)} of {self} has {size:,} bytes, but the cache "
                f"{self.cache.root} may have {self.cache.limit:,}: raise store.cache_bytes or "
                "FORETELL_CACHE_BYTES"
            )

    def _full_cache(self, shard: int) -> StoreError:
        return StoreError(
            f"no room for shard {shard_name(shard)} of {self} in the cache {self.cache.root}: its "
            f"{self.cache.limit:,} bytes are full of shards that other processes use. Raise "
            "store.cache_bytes or FORETELL_CACHE_BYTES, or give them a cache of their own"
        )

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """A folder of its own in tmp/, gone afterwards."""
        folder = self.tmp / uuid.uuid4().hex
        with explain_os_errors(f"make {folder}"):
            folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _put_in_place(self, path: Path, make: Callable[[Path], None]) -> None:
        """Have a file or folder made in tmp/ and moved to its place, unless it is there by then."""
        with self._scratch() as scratch:
            make(scratch / path.name)
            with explain_os_errors(f"make {path}"):
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.rename(scratch / path.name, path)
                except OSError:
                    if not path.is_dir():  # another process has made the same folder
                        raise


def layout_of(place: str | Path | ObjectUrl) -> Layout:
    """Layout of the store at a path or URL; raises StoreError for what is neither."""
    found = place_of(place)
    if isinstance(found, Path):
        return Layout.at(found)
    cache = found.cache.absolute()
    return RemoteLayout(cache / "stores", ObjectClient(found), ShardCache(cache, found.cache_bytes))


def store_exists(place: str | Path | ObjectUrl) -> bool:
    """Whether there is a store at a path or URL; raises StoreError where one cannot look."""
    return layout_of(place).exists()


def _commit_key(shard: int) -> str:
    return f"shards/{shard_name(shard)}.json"


def _data_key(commit: Commit) -> str:
    return f"shards/{shard_name(commit.shard)}.{commit.attempt}"


def _orphan(folder: str, objects: list[Found]) -> Orphan:
    newest = max((found.modified_s for found in objects), default=0.0)
    keys = [f"{folder}/{found.name}" for found in objects]
    return Orphan(keys, sum(found.bytes for found in objects), max(time.time() - newest, 0.0))


def _refuse_climbing(file: str) -> None:
    """Refuse a name that would lead out of the folder of a shard; raises ObjectFault."""
    parts = file.split("/")
    if "\0" in file or any(part in ("", ".", "..") for part in parts):
        raise ObjectFault(file.replace("\0", "?"), "it is not the name of a file of a shard")


def _holds(path: Path, expected: FileSum) -> bool:
    try:
        return path.stat().st_size == expected.bytes and _sum_of(path) == expected
    except FileNotFoundError:
        return False


def _sum_of(content: bytes | Path) -> FileSum:
    return file_sum(content if isinstance(content, bytes) else MappedFile.open(content).content)


def _in_parallel(work: Callable[[Job], object], jobs: Iterable[Job]) -> None:
    """Do all jobs in a few threads, which end with the call; what fails is raised here."""
    with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="objects") as pool:
        tasks = [pool.submit(work, job) for job in jobs]
        try:
            for task in tasks:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
