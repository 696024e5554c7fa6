"""The configuration of a run: one YAML file, checked against frozen records before work begins."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.diffusion_config import DiffusionRunConfig
from pipeline.run_config import RunConfig
from stages.errors import UserError
from stages.loss_config import LOSS_FORMS

LARGEST_FILE_BYTES = 2**20
MOST_VALUES = 100_000
"""Values of a configuration, those that its aliases repeat counted again."""
MOST_SHOWN = 200
"""Letters of a value in a message."""
USER_INFO = re.compile(r"://[^/\s]*@")
REPR = reprlib.Repr()
REPR.maxstring = REPR.maxother = MOST_SHOWN

Run = RunConfig | DiffusionRunConfig
KINDS: dict[str, type[Run]] = {"speech": RunConfig, "diffusion": DiffusionRunConfig}
"""What the key `kind` of a configuration may be; it is `speech` where there is none."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> Run:
    """Read a YAML configuration and apply `key.path=value` overrides.

    Raises `UserError` that names every key at fault, what was given and what is possible.
    """
    document = _read_yaml(path)
    for override in overrides:
        _apply(document, override)
    kind = document.get("kind", "speech")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"{path}: kind is {_shown(kind)}, but must be one of {', '.join(KINDS)}")
    try:
        return KINDS[kind].model_validate(document)
    except ValidationError as error:
        # A union tells of each of its members alike.
        told = dict.fromkeys(_problems(error, document, KINDS[kind]))
        problems = "\n".join(f"  {line}" for line in told)
        raise UserError(f"{path} is not a valid configuration:\n{problems}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise UserError(
                f"{path} is larger than {LARGEST_FILE_BYTES} bytes: not a configuration"
            )
        document = _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        absent = isinstance(error, FileNotFoundError)
        advice = "; correct the path, or write one with `foretell init`" if absent else ""
        raise UserError(f"cannot read the configuration {path}: {error.strerror}{advice}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} must hold a mapping of sections, not {type(document).__name__}")
    return document


def _parse(text: str) -> Any:
    """Value of a YAML document.

    Raises yaml.YAMLError for what yaml.safe_load takes and nobody means, a key that stands twice in
    a mapping among it, ValueError for a date or number that is none, RecursionError.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count(node: yaml.Node, counted: dict[yaml.Node, int]) -> int:
    """Count the values of a node as if every alias were written out; raises yaml.YAMLError."""
    if node not in counted:
        counted[node] = MOST_VALUES  # until it is known: who holds itself has no end
        counted[node] = 1 + sum(_count(inner, counted) for inner in _inner(node))
    if counted[node] > MOST_VALUES:
        message = f"its aliases stand for more than {MOST_VALUES} values"
        raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
    return counted[node]


def _inner(node: yaml.Node) -> Iterator[yaml.Node]:
    """Yield what a node holds; raises yaml.YAMLError for a key that stands there twice."""
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
            if name in keys:
                message = f"the key {key.value!r} stands there twice"
                raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
            keys.add(name)
            yield from (key, value)


def _shown(value: Any) -> str:
    """Return a value for a message: long ones, and those within others, are cut.

    What stands before the host of a URL is left out, for it may be a password.
    """
    shown = USER_INFO.sub("://…@", REPR.repr(value))
    return shown if len(shown) <= MOST_SHOWN else f"{shown[:MOST_SHOWN]}…"


def _apply(document: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise UserError(f"--set {override!r} is not of the form section.key=value")
    try:
        value = _parse(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--set {override!r}: the value is not valid YAML: {error}") from None
    *sections, last = key.split(".")
    place = document
    for section in sections:
        inner = place.get(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {override!r}: {section!r} is a value, not a section")
        # A section may stand in several places (YAML anchors): only the one that is named changes.
        place[section] = dict(inner)
        place = place[section]
    place[last] = value


def speech_run(path: Path, overrides: Sequence[str], command: str) -> RunConfig:
    """Read the configuration of a run of speech models, which alone `command` is for."""
    config = load_config(path, overrides)
    if not isinstance(config, RunConfig):
        raise UserError(f"{path} is of kind {config.kind!r}, but {command} is for speech alone")
    return config


def _problems(error: ValidationError, document: Mapping[str, Any], run: type[Run]) -> Iterator[str]:
    for problem in error.errors(include_url=False):
        where = _place(problem, document)
        match problem["type"]:
            case "extra_forbidden":
                yield f"{where}: unknown key{_suggestion(problem['loc'], run)}"
            case "missing":
                yield f"{where}: missing; this key has no default"
            case "union_tag_not_found":
                known = ", ".join(map(repr, _tags_at(problem["loc"], run)))
                yield f"{where}.{_discriminator(problem)}: missing; give one of {known}"
            case "union_tag_invalid":
                yield f"{where}.{_discriminator(problem)}: {_unknown_tag(problem, run)}"
            case "model_type" | "model_attributes_type" | "dict_type":
                given = _shown(problem["input"])
                yield f"{where}: must be a section, with keys of its own below it (given: {given})"
            case _:
                message = problem["msg"].removeprefix("Value error, ")
                given = problem["input"]
                shown = "" if isinstance(given, Mapping) else f" (given: {_shown(given)})"
                yield f"{where}: {message}{shown}"


def _place(problem: ErrorDetails, document: Mapping[str, Any]) -> str:
    """Return the key at fault as the document has it.

    Pydantic's location also names the member of a union that was tried, which nobody wrote: what
    the document does not hold is left out, but for the key that is missing.
    """
    *path, last = problem["loc"] or ("the configuration",)
    parts: list[int | str] = []
    value: Any = document
    for part in path:
        if _holds(value, part):
            parts.append(part)
            value = value[part]
    if problem["type"] == "missing" or _holds(value, last) or not problem["loc"]:
        parts.append(last)
    return ".".join(map(str, parts)) or "the configuration"


def _holds(value: Any, part: int | str) -> bool:
    if isinstance(value, Mapping):
        return part in value
    return isinstance(value, list) and isinstance(part, int) and part < len(value)


def _discriminator(problem: ErrorDetails) -> str:
    return str(problem["ctx"]["discriminator"]).strip("'")


def _unknown_tag(problem: ErrorDetails, run: type[Run]) -> str:
    given, known = problem["ctx"]["tag"], _tags_at(problem["loc"], run)
    close = difflib.get_close_matches(given, known, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return f"{given!r} is none of {', '.join(map(repr, known))}{meant}"


def _suggestion(location: tuple[int | str, ...], run: type[Run]) -> str:
    known = {name for record in _records_at(location[:-1], run) for name in record.model_fields}
    close = difflib.get_close_matches(str(location[-1]), sorted(known), n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known here: {', '.join(sorted(known))}" if known else ""


def _tags_at(location: Sequence[int | str], run: type[Run]) -> list[str]:
    """Return what tells the records apart that may stand at a location, in their order."""
    return [tag for record in _records_at(location, run) for tag in _tags(record)]


def _records_at(location: Sequence[int | str], run: type[Run]) -> list[type[BaseModel]]:
    """Return the records that a location of pydantic's may lead to, in their order."""
    records: list[type[BaseModel]] = [run]
    for part in location:
        if part in LOSS_FORMS:
            records = [LOSS_FORMS[str(part)]]
            continue
        inner = [
            record
            for candidate in records
            if part in candidate.model_fields
            for record in _records_in(candidate.model_fields[str(part)].annotation)
        ]
        tagged = [candidate for candidate in records if part in list(_tags(candidate))]
        # A part that is neither is a key of a mapping or a place in a list: stay where we are.
        records = inner or tagged or records
    return records


def _tags(record: type[BaseModel]) -> Iterator[str]:
    """Yield the one value that a field of a record may have, which tells it from its union."""
    for field in record.model_fields.values():
        if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1:
            yield from get_args(field.annotation)


def _records_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _records_in(argument)
