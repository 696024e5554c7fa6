"""What `foretell inspect diff` found, as text for people."""

from __future__ import annotations

import json
import re
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from pipeline.text_tables import number_table, rendered, short, value_table, visible

Document = dict[str, Any]
HASH = re.compile(r"[0-9a-f]{32,}")
SHOWN_LETTERS = 20
"""Letters of a hash that are shown."""


def difference_text(document: Document) -> str:
    """Return a readable text of `describe_difference`."""
    found = visible(document)
    parts: list[RenderableType] = [
        value_table([("A", found["a"]), ("B", found["b"])]),
        *_settings(found["settings"]),
    ]
    for store in found["stores"]:
        parts += _store(store, named=found["kind"] == "run")
    return rendered(parts)


def _settings(settings: list[Document]) -> list[RenderableType]:
    if not settings:
        return ["\nNo setting differs."]
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0))
    table.add_column("setting", no_wrap=True)
    for side in "AB":
        table.add_column(side, overflow="fold")
    for line in settings:
        table.add_row(line["name"], *(_value(line, side) for side in ("a", "b")))
    return ["\nSettings that differ", table]


def _value(line: Document, side: str) -> str:
    if side not in line:
        return "(absent)"
    value = line[side]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if HASH.fullmatch(text):
        return f"{text[:SHOWN_LETTERS]}…"
    return text or '""'


def _store(found: Document, *, named: bool) -> list[RenderableType]:
    keys, rollouts = found["keys"], found["rollouts"]
    compared = rollouts["compared"]
    facts = [
        ("keys in both", short(keys["common"])),
        ("only in A", _names(keys["only_a"])),
        ("only in B", _names(keys["only_b"])),
        ("compared", f"{compared:,} rollouts of A, {rollouts['timesteps']:,} timesteps"),
    ]
    if compared:
        for name in ("equal_conditions", "equal_lengths", "equal_codes"):
            if name in rollouts:
                shown = f"{rollouts[name]:,} ({rollouts[name] / compared:.1%})"
                facts.append((name.replace("_", " "), shown))
    parts: list[RenderableType] = ["\n" + (f"Store {found['store']}" if named else "Stores")]
    parts.append(value_table(facts))
    if found["incomparable"] is not None:
        parts.append(f"\nTargets were not compared: {found['incomparable']}.")
    if found["kl"] is not None:
        parts += _kl(found["kl"], rollouts)
    if found["mse"]:
        parts += _mse(found["mse"], rollouts)
    return parts


def _names(keys: Document) -> str:
    if not keys["count"]:
        return "0"
    more = ", …" if keys["count"] > len(keys["first"]) else ""
    return f"{keys['count']:,} ({', '.join(keys['first'])}{more})"


def _kl(found: Document, rollouts: Document) -> list[RenderableType]:
    parts: list[RenderableType] = [
        f"\nKL(A ‖ B) of the targets in nats, at temperature {found['temperature']:g}"
    ]
    if found["is"] != "exact":
        parts.append("A lower bound: the ids that not both kept count as one.")
    if rollouts["at_equal_history"] < rollouts["timesteps"]:
        parts.append(
            f"Codes differ, and what follows on other codes is another prediction: over the "
            f"{rollouts['at_equal_history']:,} of {rollouts['timesteps']:,} timesteps before that."
        )
    names = ("mean", "p50", "p90", "p99", "most")
    counts = ["rows", *(["infinite"] if any(s["infinite"] for s in found["streams"]) else [])]
    rows = [
        [stream["stream"], *(short(stream.get(name)) for name in (*counts, *names))]
        for stream in found["streams"]
    ]
    mean = f"mean of all streams: {short(found['mean'])}"
    return [*parts, number_table(["stream", *counts, *names], rows), mean]


def _mse(lines: list[Document], rollouts: Document) -> list[RenderableType]:
    rows = [
        [line["array"], short(line["rows"]), short(line["mse"]), f"{line['mse_share']:.2%}"]
        for line in lines
    ]
    title = (
        f"\nMean squared difference, over the {rollouts['at_equal_history']:,} of "
        f"{rollouts['timesteps']:,} rows of equal noise level and noised latent"
    )
    return [title, number_table(["array", "rows", "MSE", "share of A's mean square"], rows)]
