"""The keys that `--set` may name, with the values of those that have few."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pipeline.config import KINDS, Run
from store.schema import Record

LEADING = "student"
"""Name of the student that a run has at least, where no configuration names its own."""


@dataclass(frozen=True)
class SettableKey:
    """One key of a configuration that may hold a value, if only null, and not a section alone."""

    values: tuple[str, ...]
    """What it may be, as YAML, as far as that are words; empty where it may be anything."""
    help: str
    """What it means, in a sentence."""


def settable_keys(config: Run | None) -> dict[str, SettableKey]:
    """Return the dotted keys of a configuration in their order, those that it leaves out too.

    A section that may be of several kinds has the keys of its own kind, or those of all where the
    configuration has no such section. None stands for configurations of all families.
    """
    kinds = [type(config)] if config is not None else [*KINDS.values()]
    found: dict[str, SettableKey] = {}
    for record in kinds:
        _merge(found, _of_record("", record, config, {"kind": tuple(KINDS)}))
    return found


def _merge(found: dict[str, SettableKey], more: Iterable[tuple[str, SettableKey]]) -> None:
    for name, key in more:
        known = found.setdefault(name, key)
        if known is not key:
            anything = not known.values or not key.values
            values = () if anything else tuple(dict.fromkeys((*known.values, *key.values)))
            found[name] = SettableKey(values, known.help)


def _of_record(
    prefix: str, record: type[Record], value: Record | None, tags: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[str, SettableKey]]:
    """Yield the keys of a record; `tags` are the values of those that choose among records."""
    for field, described in record.model_fields.items():
        name, forms = prefix + field, tuple(_forms(described.annotation))
        inner = None if value is None else getattr(value, field)
        records = [form for form in forms if _is_record(form)]
        if NoneType in forms or any(map(_is_plain, forms)):
            values = tags.get(field) or tuple(v for form in forms for v in _values(form))
            yield name, SettableKey(values, " ".join((described.description or "").split()))
        if records and (inner is None or isinstance(inner, Record)):
            yield from _of_section(name, records, inner)
        for each, sections in (pair for form in forms for pair in _named(field, form, inner)):
            one = inner[each] if inner is not None else None
            yield from _of_section(f"{name}.{each}", sections, one)


def _of_section(
    name: str, records: Sequence[type[Record]], value: Record | None
) -> Iterator[tuple[str, SettableKey]]:
    found: dict[str, SettableKey] = {}
    for record in records if value is None else (type(value),):
        _merge(found, _of_record(f"{name}.", record, value, _tags(records)))
    yield from found.items()


def _named(field: str, form: Any, value: Any) -> Iterator[tuple[str, list[type[Record]]]]:
    """Yield the names of sections that stand below a key, each with the records it may be."""
    if _of_sections(form):
        records = [inner for inner in _forms(get_args(form)[1]) if _is_record(inner)]
        names = value if value is not None else [LEADING] if field == "students" else []
        yield from ((name, records) for name in names)


def _of_sections(form: Any) -> bool:
    return get_origin(form) is dict and any(map(_is_record, _forms(get_args(form)[1])))


def _is_plain(form: Any) -> bool:
    """Whether a value of this form is no section, nor sections by name."""
    return form is not NoneType and not _is_record(form) and not _of_sections(form)


def _is_record(form: Any) -> bool:
    return isinstance(form, type) and issubclass(form, Record)


def _tags(records: Sequence[type[Record]]) -> dict[str, tuple[str, ...]]:
    """Return the values of each field of one value, over all records that may stand in a place."""
    found: dict[str, tuple[str, ...]] = {}
    for record in records:
        for name, field in record.model_fields.items():
            values = _values(field.annotation)
            if len(values) == 1:
                found[name] = (*found.get(name, ()), *values)
    return found


def _values(form: Any) -> tuple[str, ...]:
    """Return the words that a value of one form may be, as YAML has them."""
    if form is bool:
        return ("true", "false")
    if form is NoneType:
        return ("null",)
    if get_origin(form) is Literal:
        return tuple(map(str, get_args(form)))
    return ()


def _forms(annotation: Any) -> Iterator[Any]:
    """Yield the types that a value may have, of which none is a union."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        yield from _forms(arguments[0])
    elif get_origin(annotation) in (Union, UnionType):
        for each in arguments:
            yield from _forms(each)
    else:
        yield annotation
