"""Sealed JSON: one canonical text per value, with the checksum of the rest inside.

A document is the JSON object with sorted keys and an indent of two spaces, and a key `checksum`:
the SHA-256 of the object without that key, in compact form. A reader accepts no other spelling,
so every altered byte is noticed, even a blank.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json

from store.errors import StoreError, explain_os_errors
from store.plain_file import open_plain
from store.schema import FORMAT_VERSION, Record

MAX_DOCUMENT_BYTES = 16 * 2**20

R = TypeVar("R", bound=Record)


def seal(record: Record) -> bytes:
    """Canonical bytes of a record with its checksum; raises StoreError if JSON cannot hold it."""
    content = record.model_dump(mode="json")
    document = _text(content | {"checksum": checksum(content)})
    if len(document) > MAX_DOCUMENT_BYTES:
        raise StoreError(
            f"a {type(record).__name__} of {len(document)} bytes is over the limit of "
            f"{MAX_DOCUMENT_BYTES}: keep large facts in samples.parquet"
        )
    return document


def checksum(content: dict[str, Any]) -> str:
    """SHA-256, in hex, of a JSON object in compact form with sorted keys; raises StoreError."""
    return hashlib.sha256(_encode(content, indent=None)).hexdigest()


def unseal(path: Path, record: type[R]) -> tuple[R, str]:
    """Read a sealed record and its checksum.

    Raises StoreError when the file is missing, over 16 MiB, altered, of a newer format, or not
    what `record` allows. At most 16 MiB are read.
    """
    content = _parse(path, _read(path))
    seal_found = content.pop("checksum", None)
    _check_version(path, content)
    if seal_found != checksum(content):
        raise StoreError(f"{path} does not match its own checksum: restore it from a copy")
    try:
        return record.model_validate_json(_encode(content, indent=None), strict=True), seal_found
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'document'}: {fault['msg']}"
            for fault in error.errors(include_url=False)[:8]
        )
        raise StoreError(
            f"{path} is no valid {record.__name__}: {faults}; if a newer foretell wrote it, "
            "install that, else restore it from a copy"
        ) from error


def _read(path: Path) -> bytes:
    with open_plain(path, str(path)) as file, explain_os_errors(f"read {path}"):
        text = file.read(min(os.fstat(file.fileno()).st_size, MAX_DOCUMENT_BYTES) + 1)
    if len(text) > MAX_DOCUMENT_BYTES:
        raise StoreError(f"{path} is over the limit of {MAX_DOCUMENT_BYTES} bytes: restore it")
    return text


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        content = from_json(text, allow_inf_nan=False)
        canonical = isinstance(content, dict) and _text(content) == text
    except ValueError as error:
        raise StoreError(f"{path} is not JSON ({error}): restore it from a copy") from error
    if not canonical:
        raise StoreError(f"{path} was altered: it is no sealed document; restore it from a copy")
    return dict(content)


def _check_version(path: Path, content: dict[str, Any]) -> None:
    version = content.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise StoreError(
            f"{path} has format version {version}, this foretell reads up to {FORMAT_VERSION}: "
            "install a newer foretell"
        )


def _text(content: dict[str, Any]) -> bytes:
    return _encode(content, indent=2) + b"\n"


def _encode(content: dict[str, Any], indent: int | None) -> bytes:
    separators = (",", ":") if indent is None else (",", ": ")
    try:
        text = json.dumps(
            content,
            sort_keys=True,
            indent=indent,
            separators=separators,
            ensure_ascii=False,
            allow_nan=False,
        )
        return text.encode()
    except ValueError as error:
        raise StoreError(f"a value cannot be written as JSON ({error}): correct it") from error
