"""Naming a store: a local folder, or a prefix of a bucket and how this machine uses it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Field, ValidationError, field_validator

from store.errors import StoreError
from store.schema import Record

SCHEME = "s3://"
URL = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(/(?P<prefix>.*))?")
PREFIX = re.compile(r"[A-Za-z0-9_.=+-]+(/[A-Za-z0-9_.=+-]+)*")
CACHE_BYTES = 50 * 10**9
RETRY_S = 300.0


def _cache_by_default() -> Path:
    given = os.environ.get("FORETELL_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foretell"


class ObjectUrl(Record):
    """A store in object storage, and how this machine uses it; nothing of it is stored there."""

    url: str
    """s3://BUCKET/PREFIX; credentials and endpoint come from the environment (AWS_*) alone."""
    cache: Path = Field(default_factory=_cache_by_default)
    """Folder on a local disk for downloaded shards, shared by all processes of a machine; by
    default FORETELL_CACHE, or foretell/ in the user's cache."""
    cache_bytes: int = Field(
        default_factory=lambda: os.environ.get("FORETELL_CACHE_BYTES", CACHE_BYTES),
        validate_default=True,
        gt=0,
    )
    """Most bytes of downloaded shards in that folder; by default FORETELL_CACHE_BYTES, or 50 GB."""
    retry_s: float = Field(
        default_factory=lambda: os.environ.get("FORETELL_RETRY_S", RETRY_S),
        validate_default=True,
        ge=0,
        allow_inf_nan=False,
    )
    """Seconds for which a request that fails is tried again before the command gives up; by
    default FORETELL_RETRY_S, or 300."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        found = URL.fullmatch(url.rstrip("/"))
        prefix = found["prefix"] if found else None
        climbs = prefix is not None and {".", ".."} & set(prefix.split("/"))
        if found is None or climbs or (prefix and not PREFIX.fullmatch(prefix)):
            # Not shown: people put passwords into URLs, and messages into logs.
            raise ValueError(
                "the URL of a store must be s3://BUCKET/PREFIX, the bucket of 3 to 63 letters a-z "
                "0-9 . -, the prefix of A-Z a-z 0-9 _ . = + -, without user, password, port or "
                "query: credentials and endpoint belong into the environment (AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)"
            )
        return url.rstrip("/")

    @property
    def bucket(self) -> str:
        """Name of the bucket."""
        return self.url.removeprefix(SCHEME).partition("/")[0]

    @property
    def prefix(self) -> str:
        """Prefix of the store in the bucket; empty for all of it."""
        return self.url.removeprefix(SCHEME).partition("/")[2]

    def __str__(self) -> str:
        return self.url


def _parsed(value: Any) -> Any:
    """What a configuration may say: a path, a URL, or a URL with settings."""
    if isinstance(value, str) and "://" in value:
        return {"url": value}
    return value


Place: TypeAlias = Annotated[Path | ObjectUrl, BeforeValidator(_parsed)]
"""Where a store lies."""


def folder_here(place: Path | ObjectUrl) -> Path:
    """Folder on this machine that takes what is written into a store, or on its way there."""
    return place if isinstance(place, Path) else place.cache


def place_of(text: str | Path | ObjectUrl) -> Path | ObjectUrl:
    """Where a store lies that a person names; raises StoreError for a URL that is none."""
    if isinstance(text, ObjectUrl) or "://" not in str(text):
        return text if isinstance(text, ObjectUrl) else Path(text)
    try:
        return ObjectUrl(url=str(text))
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
        raise StoreError(
            "; ".join(
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}"
                for fault in faults
            )
        ) from None
