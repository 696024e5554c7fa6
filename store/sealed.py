"""Sealed JSON: one canonical text per value, with the checksum of the rest inside.

A document is the JSON object with sorted keys and an indent of two spaces, and a key `checksum`:
the SHA-256 of the object without that key, in compact form. A reader accepts no other spelling,
so every altered byte is noticed, even a blank.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json

from store.errors import StoreError, explain_os_errors
from store.plain_file import open_plain
from store.schema import FORMAT_VERSION, Record

MAX_DOCUMENT_BYTES = 16 * 2**20
MAX_SHOWN_FAULTS = 8

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
    what `record` allows, field for field. At most 16 MiB are read.
    """
    return unsealed(_read(path), path, record)


def unsealed(text: bytes, path: Path | str, record: type[R]) -> tuple[R, str]:
    """The sealed record in a text that lay at `path`, and its checksum; raises StoreError."""
    content = _parse(path, text)
    seal_found = content.pop("checksum", None)
    if seal_found != checksum(content):
        raise StoreError(f"{path} does not match its own checksum: restore it from a copy")
    content = record.completed(content)
    try:
        found = record.model_validate_json(_encode(content, indent=None), strict=True)
    except ValidationError as error:
        faults = (
            f"{'.'.join(map(str, fault['loc'])) or 'document'}: {fault['msg']}"
            for fault in error.errors(include_url=False)
        )
        raise _invalid(path, record, faults) from error
    whole = found.model_dump(mode="json")
    # A default is for the writer of a record; a reader that took it would guess what was meant.
    if whole != content and (lacking := sorted(_fields(whole) - _fields(content))):
        raise _invalid(path, record, (f"{field}: Field required" for field in lacking))
    return found, seal_found


def _invalid(path: Path | str, record: type[Record], faults: Iterable[str]) -> StoreError:
    return StoreError(
        f"{path} is no valid {record.__name__}: {'; '.join(islice(faults, MAX_SHOWN_FAULTS))}; if "
        "a newer foretell wrote it, install that, else restore it from a copy"
    )


def _fields(value: Any, path: str = "") -> set[str]:
    """The fields of a JSON value by their paths."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
    below = {f"{path}{name}": item for name, item in items}
    return set(below).union(*(_fields(item, f"{here}.") for here, item in below.items()))


def _read(path: Path) -> bytes:
    with open_plain(path, str(path)) as file, explain_os_errors(f"read {path}"):
        text = file.read(min(os.fstat(file.fileno()).st_size, MAX_DOCUMENT_BYTES) + 1)
    if len(text) > MAX_DOCUMENT_BYTES:
        raise StoreError(f"{path} is over the limit of {MAX_DOCUMENT_BYTES} bytes: restore it")
    return text


def _parse(path: Path | str, text: bytes) -> dict[str, Any]:
    try:
        content = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise StoreError(f"{path} is not JSON ({error}): restore it from a copy") from error
    if isinstance(content, dict):
        _check_version(path, content)  # first, for a newer format may spell and seal otherwise
    if not isinstance(content, dict) or not _is_canonical(content, text):
        raise StoreError(f"{path} was altered: it is no sealed document; restore it from a copy")
    return content


def _is_canonical(content: dict[str, Any], text: bytes) -> bool:
    try:
        return _text(content) == text
    except StoreError:  # a number such as 1e400, which no writer can have meant
        return False


def _check_version(path: Path | str, content: dict[str, Any]) -> None:
    version = content.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise StoreError(
            f"{path} has format_version {version!r} but must have an integer >= 1: no foretell "
            "wrote it so, restore it from a copy"
        )
    if version > FORMAT_VERSION:
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
