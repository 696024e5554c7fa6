"""One table of comma-separated values for every view of `foretell inspect`.

| view | a line for every | columns |
| --- | --- | --- |
| store | number of an array or a stream, and shard that cannot be read | `part`, `name`, `measure`, `value` |
| shard | rollout | `sample_id`, `variation`, `start`, `timesteps`, `stop_reason`, `weight`, `seed`, what was drawn, mean `entropy` or `rms ARRAY` |
| rollout of codes | timestep and stream | `timestep`, number of the `stream`, `code`, `entropy`, `code_probability`, `kept_mass`, `tail_mass` |
| rollout of rows | timestep | `timestep`, its columns, `ARRAY.mean`, `ARRAY.std` |
| timestep of codes | stream and candidate | `stream`, `code`, `tail_mass`, `rank`, `id`, `probability`, `cond`, `uncond` |
| timestep of rows | stream and array | `stream`, `array`, `mean`, `std`, `rms`, `least`, `most` |
| model | setting or size | `name`, `value` |
| difference | side of a setting, or number of a pair of stores | `store`, `part`, `name`, `measure`, `value` |

A cell is empty where a target has no such number. Lines end in a line feed; texts with commas,
quotes or line ends are quoted as in RFC 4180.

The parts of a difference are `setting`, with the measures `a` and `b`, of which one that a side
lacks has no line; and of a pair of stores `keys`, `rollouts`, `targets`, and by their names `stream`
and `array`. Texts stand as they are and all other values as JSON, so that null is no empty text.
"""  # noqa: E501, a table

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from io import StringIO
from typing import Any

from pipeline.dotted import dotted

Document = dict[str, Any]

OF_CODES = ("entropy", "code_probability", "kept_mass", "tail_mass")
OF_CANDIDATES = ("id", "probability", "cond", "uncond")


def csv_text(document: Document) -> str:
    """Return the table of what `foretell inspect` found, with a head and no line end at its end."""
    columns, lines = _table(document)
    buffer = StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue().rstrip("\n")


def _table(document: Document) -> tuple[list[str], list[Document]]:
    if "settings" in document:
        return ["store", "part", "name", "measure", "value"], list(_difference(document))
    if "statistics" in document:
        return ["part", "name", "measure", "value"], list(_store(document))
    if "shard" in document:
        return list(document["table"][0]), document["table"]
    if "certainty" in document or "rows" in document:
        return _rollout(document)
    if "timestep" in document:
        return _timestep(document["streams"])
    lines = [{"name": name, "value": value} for name, value in dotted(document).items()]
    return ["name", "value"], lines


def _rollout(document: Document) -> tuple[list[str], list[Document]]:
    if "certainty" in document:
        columns = ["timestep", "stream", "code", *OF_CODES]
        return columns, list(_certainty(document["certainty"]))
    lines = [{"timestep": at} | dotted(row) for at, row in enumerate(document["rows"])]
    return list(lines[0]), lines


def _timestep(streams: list[Document]) -> tuple[list[str], list[Document]]:
    if "code" in streams[0]:
        columns = ["stream", "code", "tail_mass", "rank", *OF_CANDIDATES]
        return columns, list(_candidates(streams))
    return ["stream", "array", "mean", "std", "rms", "least", "most"], list(_latents(streams))


def _store(document: Document) -> Iterator[Document]:
    for part, name, entries in (
        ("array", "array", document["arrays"]),
        ("stream", "stream", document["statistics"]["streams"]),
    ):
        for entry in entries:
            for measure, value in dotted(entry).items():
                if measure != name and value is not None:
                    yield {"part": part, "name": entry[name], "measure": measure, "value": value}
    for found in (document, document["statistics"]):
        for damaged in found["unreadable"]:
            line = {"part": "shard", "name": damaged["shard"], "measure": "unreadable"}
            yield line | {"value": damaged["reason"]}


def _difference(document: Document) -> Iterator[Document]:
    for setting in document["settings"]:
        values = {side: setting[side] for side in ("a", "b") if side in setting}
        yield from _measures("", "setting", setting["name"], values)
    for found in document["stores"]:
        store, kl = found["store"], found["kl"] or {}
        plain = {name: value for name, value in kl.items() if name != "streams"}
        targets = {"incomparable": found["incomparable"], "kl": plain}
        for part, numbers in (
            ("keys", found["keys"]),
            ("rollouts", found["rollouts"]),
            ("targets", targets),
        ):
            yield from _measures(store, part, "", _told(numbers))
        for part, entries in (("stream", kl.get("streams", [])), ("array", found["mse"])):
            for entry in entries:
                numbers = {measure: value for measure, value in entry.items() if measure != part}
                yield from _measures(store, part, entry[part], _told(numbers))


def _told(numbers: Document) -> Document:
    """Numbers by dotted names, without those that there are none of."""
    return {name: value for name, value in dotted(numbers).items() if value not in (None, {})}


def _measures(store: str, part: str, name: str, values: Document) -> Iterator[Document]:
    head = {"store": store, "part": part, "name": name}
    for measure, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        yield head | {"measure": measure, "value": text}


def _certainty(rows: list[Document]) -> Iterator[Document]:
    for row in rows:
        for stream, code in enumerate(row["codes"]):
            numbers = {name: row[name][stream] for name in OF_CODES if name in row}
            yield {"timestep": row["timestep"], "stream": stream, "code": code} | numbers


def _candidates(streams: list[Document]) -> Iterator[Document]:
    for stream in streams:
        head = {name: stream[name] for name in ("stream", "code", "tail_mass")}
        for rank, candidate in enumerate(stream["candidates"]):
            yield head | {"rank": rank} | candidate


def _latents(streams: list[Document]) -> Iterator[Document]:
    for stream in streams:
        for name, numbers in stream.items():
            if name != "stream":
                yield {"stream": stream["stream"], "array": name} | numbers
