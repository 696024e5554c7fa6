"""Requests to object storage: tried again while there is hope, and explained when there is none.

A request fails for a moment (a server restarts, a network drops a reply) or for good (no such
bucket, no permission). The first kind is tried again with waits that double and are drawn at
random, so that many workers do not come back at once. A reply may be lost after the request had
its effect: who creates an object must look whose it is (`create`).
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import xxhash

from store.durable import sync_file
from store.errors import StoreError, SystemFailure, explain_os_errors
from store.object_url import ObjectUrl
from store.schema import FileSum

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 15.0
TOLD_WAIT_S = 1.0
"""Waits from here on are told, so that a person sees why nothing moves."""
REQUEST_S = 120
"""A request that takes longer has failed; a range and a part are small enough."""
CONNECT_S = 10
RANGE_BYTES = 16 * 2**20
"""Bytes of a file that are asked for, or sent, at once."""
LARGEST_SINGLE_BYTES = 5 * 2**30
"""Object storage takes no more in one request, and only one request can be conditional."""
DELETED_AT_ONCE = 1000
CREDENTIALS = (
    "AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_SKIP_SIGNATURE",
)  # fmt: skip
"""Any of these says how to sign requests."""
SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")


class ObjectStorageFailure(SystemFailure):
    """Object storage refused a request, or did not answer for as long as one may wait."""


class NotConfigured(StoreError):
    """Nothing was asked: the environment does not say how, or a package is missing."""


class Found(NamedTuple):
    """An object that a listing shows."""

    name: str
    """Below the folder that was listed."""
    bytes: int
    modified_s: float
    """Seconds since 1970 by the server's clock."""


@dataclass(frozen=True)
class ObjectClient:
    """The objects below the URL of a store, by their keys there."""

    place: ObjectUrl

    def require_configured(self) -> None:
        """Ask nothing; raises NotConfigured where the package or credentials are missing."""
        _ = self._api
        _check_environment(self.place)

    def read(self, key: str) -> bytes | None:
        """Content of a small object; None where there is none."""

        def get() -> bytes | None:
            try:
                return bytes(self._api.get(self._store, key).bytes())
            except FileNotFoundError as error:
                _refuse_bucket(error)
                return None

        return self._tried("read", key, get)

    def exists(self, key: str) -> bool:
        """Whether there is an object of this key."""

        def head() -> bool:
            try:
                self._api.head(self._store, key)
            except FileNotFoundError:
                return False
            return True

        return self._tried("look up", key, head)

    def create(self, key: str, content: bytes | Path) -> bool:
        """Create an object; False when there is one, which may be ours, its reply having got lost.

        Nothing is ever overwritten. Raises StoreError for a file that is too large to be sent at
        once.
        """
        if isinstance(content, Path) and content.stat().st_size > LARGEST_SINGLE_BYTES:
            raise StoreError(
                f"{content} has more than the {LARGEST_SINGLE_BYTES} bytes that object storage "
                "creates at once: use smaller parts (rows_per_part), or a local folder"
            )

        def put() -> bool:
            try:
                self._api.put(self._store, key, content, mode="create", use_multipart=False)
            except self._errors.AlreadyExistsError:
                if not self.exists(key):  # another request for it was under way, and has failed
                    raise
                return False
            return True

        return self._tried("create", key, put)

    def upload(self, key: str, path: Path) -> None:
        """Send a file to a key that nobody else uses."""
        self._tried(
            "upload",
            key,
            lambda: self._api.put(self._store, key, path, chunk_size=RANGE_BYTES),
        )

    def download(self, key: str, path: Path, expected: int) -> FileSum:
        """Write an object into a new file, and return the size and hash of what came.

        At most the `expected` bytes and one more are taken. Raises StoreError where there is none.
        """
        with explain_os_errors(f"write {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                found = _summed(self._ranges(key, expected), file.write)
            sync_file(path)
        return found

    def digest(self, key: str, expected: int) -> FileSum:
        """Read an object, and return the size and hash of what came; see `download`."""
        return _summed(self._ranges(key, expected), len)

    def folder(self, folder: str) -> tuple[list[Found], list[str]]:
        """Objects of a folder (empty for the store's own), and names of the folders in it."""
        prefix = f"{folder}/" if folder else None

        def get() -> tuple[list[Found], list[str]]:
            found = self._api.list_with_delimiter(self._store, prefix)
            folders = [path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"]]
            return _all_found(found["objects"], folder), sorted(folders)

        return self._tried("list", folder, get)

    def below(self, folder: str) -> list[Found]:
        """Every object below a folder, page by page."""

        def get() -> list[Found]:
            pages = self._api.list(self._store, f"{folder}/", chunk_size=1000)
            return _all_found((meta for page in pages for meta in page), folder)

        return self._tried("list", folder, get)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that are gone are not missed."""
        left = list(keys)
        while left:
            some, left = left[:DELETED_AT_ONCE], left[DELETED_AT_ONCE:]
            self._tried("delete", some[0], partial(self._delete, some))

    def hasty(self) -> ObjectClient:
        """The same objects, but for requests that fail, which are not tried again."""
        return ObjectClient(self.place.model_copy(update={"retry_s": 0.0}))

    def delete_quietly(self, folder: str) -> None:
        """Delete what is below a folder if that works at the first try: it is garbage anyway."""
        hasty = self.hasty()
        try:
            hasty.delete(f"{folder}/{found.name}" for found in hasty.below(folder))
        except StoreError as error:
            logger.info("%s; `foretell gc %s` finds what is left", error, self.place)

    def _delete(self, keys: list[str]) -> None:
        try:
            self._api.delete(self._store, keys)
        except FileNotFoundError as error:
            _refuse_bucket(error)

    def _ranges(self, key: str, expected: int) -> Iterator[bytes]:
        """Content of an object, range by range; at most one byte more than is expected."""
        size = self._size(key)
        size = min(size, expected + 1)
        for start in range(0, size, RANGE_BYTES):
            length = min(RANGE_BYTES, size - start)
            yield self._tried("download", key, partial(self._range, key, start, length))

    def _range(self, key: str, start: int, length: int) -> bytes:
        return bytes(self._api.get_range(self._store, key, start=start, length=length))

    def _size(self, key: str) -> int:
        return self._tried("look up", key, lambda: int(self._api.head(self._store, key)["size"]))

    def _tried(self, action: str, key: str, request: Callable[[], Answer]) -> Answer:
        """Answer of a request, tried again as long as the settings allow."""
        began, wait_s, tries = time.monotonic(), FIRST_WAIT_S, 0
        subject = f"cannot {action} {self.place}{f'/{key}' if key else ''}"
        while True:
            tries += 1
            try:
                return request()
            except (self._errors.PermissionDeniedError, self._errors.UnauthenticatedError) as error:
                raise ObjectStorageFailure(
                    f"{subject}: {_told(error)}; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY "
                    "and what the key may do, then run the same command again"
                ) from None
            except (self._errors.BaseError, OSError) as error:
                reason = _told(error)
                if "NoSuchBucket" in reason:
                    raise ObjectStorageFailure(
                        f"{subject}: the bucket {self.place.bucket!r} does not exist there; create "
                        "it, or correct the URL or AWS_ENDPOINT_URL"
                    ) from None
                if isinstance(error, FileNotFoundError):
                    raise StoreError(f"{subject}: it is missing") from None
            pause_s = random.uniform(0.5, 1.0) * wait_s
            passed_s = time.monotonic() - began
            if passed_s + pause_s > self.place.retry_s:
                raise ObjectStorageFailure(
                    f"{subject}: {reason}; given up after {tries} tries in {passed_s:.0f} s "
                    f"(limit: {self.place.retry_s:.0f} s, FORETELL_RETRY_S or store.retry_s). "
                    "Check the network, the server and AWS_ENDPOINT_URL, then run the same command "
                    "again: what was committed is safe"
                )
            if pause_s >= TOLD_WAIT_S:
                logger.warning("%s: %s; trying again in %.0f s", subject, reason, pause_s)
            time.sleep(pause_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    @cached_property
    def _api(self) -> Any:
        try:
            import obstore  # noqa: PLC0415, an extra
        except ModuleNotFoundError:
            raise NotConfigured(
                f"{self.place} is in object storage, which needs a package: "
                "pip install 'foretell[s3]'"
            ) from None
        return obstore

    @cached_property
    def _errors(self) -> Any:
        return self._api.exceptions

    @property
    def _store(self) -> Any:
        if os.getpid() != self._opened[0]:
            raise StoreError(
                f"{self.place} was opened before this process was forked, and its connections do "
                "not survive that: set loader.start_method to forkserver or spawn"
            )
        return self._opened[1]

    @cached_property
    def _opened(self) -> tuple[int, Any]:
        """The process that opened it, and obstore's own object."""
        endpoint = _check_environment(self.place)
        plain = endpoint.startswith("http://")
        store = self._api.store.S3Store(
            self.place.bucket,
            prefix=self.place.prefix or None,
            client_options={
                "timeout": timedelta(seconds=REQUEST_S),
                "connect_timeout": timedelta(seconds=CONNECT_S),
                "allow_http": plain,
            },
            retry_config={"max_retries": 0, "retry_timeout": timedelta(0)},  # `_tried` does
        )
        return os.getpid(), store


def endpoint_url() -> str:
    """Where requests go by the environment; empty for Amazon's own."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")


def _check_environment(place: ObjectUrl) -> str:
    """Endpoint of the environment; raises NotConfigured for what would not work or could leak."""
    endpoint = endpoint_url()
    if "@" in urlsplit(endpoint).netloc:
        raise NotConfigured(
            "AWS_ENDPOINT_URL holds a user or password, which would end up in logs: give them as "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if not any(os.environ.get(name) for name in CREDENTIALS):
        raise NotConfigured(
            f"{place} needs credentials, and the environment has none: set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY (or AWS_SKIP_SIGNATURE=true for a public bucket), and "
            "AWS_ENDPOINT_URL for a server that is not Amazon's"
        )
    return endpoint


def _refuse_bucket(error: Exception) -> None:
    """Pass on that the bucket is missing, and not the object."""
    if "NoSuchBucket" in str(error):
        raise error


def _told(error: Exception) -> str:
    """The first line of an error, without anything secret: servers may repeat the key's id."""
    text = " ".join(str(error).partition("\n\nDebug source")[0].split())
    for name in SECRETS:
        value = os.environ.get(name)
        text = text.replace(value, f"<{name}>") if value else text
    return text


def _all_found(listed: Iterable[Any], folder: str) -> list[Found]:
    """The objects of a listing but for empty ones that stand for a folder, as consoles make."""
    start = len(folder) + 1 if folder else 0
    return [
        Found(meta["path"][start:], int(meta["size"]), meta["last_modified"].timestamp())
        for meta in listed
        if meta["path"][start:] and not meta["path"].endswith("/")
    ]


def _summed(parts: Iterable[bytes], take: Callable[[bytes], object]) -> FileSum:
    digest, size = xxhash.xxh3_128(), 0
    for part in parts:
        digest.update(part)
        size += len(part)
        take(part)
    return FileSum(bytes=size, xxh3=digest.hexdigest())
