"""What `pipeline.inspection` found, and what `verify` did, as text for people."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from pipeline.inspection_tables import TABLES, shard_parts, timestep_parts
from pipeline.rollout_inspection import Document
from pipeline.text_tables import rendered, value_table, visible
from store.verify import Verification

MOST_SHOWN_NUMBERS = 8
SHOWN_LETTERS = 24
OF_CODES = ("longest", "stop_reasons", "stop_reason", "weights", "source", "sampler")
"""What is said of how codes were drawn, and nothing of images."""
IN_TABLES = (*TABLES, "bytes", "longest", "entropy_is", "temperature", "codes")
"""What stands in a table, or at its head."""


def store_text(document: Document) -> str:
    """Return a readable text of `describe_store`, of a part of it, or of `describe_key`."""
    shown = visible(document)
    if "timestep" in shown:
        beside = {name: shown[name] for name in ("columns", "drawn") if name in shown}
        return rendered([*timestep_parts(shown), _values(beside)])
    if "shard" in shown:
        return rendered(shard_parts(shown))
    audio = "audio_s" in shown or "timestep_s" in shown
    values = {
        name: value
        for name, value in shown.items()
        if name not in IN_TABLES and (audio or name not in OF_CODES)
    }
    parts: list[RenderableType] = [_values(values)] if values else []
    for name, parts_of in TABLES.items():
        if name in shown:
            parts.extend(parts_of(shown))
    return rendered(parts)


def _values(document: Document) -> Table:
    return value_table((name, _text(name, value)) for name, value in document.items())


def _text(name: str, value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name in SHOWN:
        return SHOWN[name](value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    return f"{value:,}" if isinstance(value, int) and name != "seed" else str(value)


def _plain(value: Any) -> str:
    """A value within a line, as JSON and not as Python spells it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _streams(streams: list[Document]) -> str:
    groups = Counter((s["group"], _size(s)) for s in streams)
    return ", ".join(f"{n} × {group} ({size})" for (group, size), n in groups.items())


def _names(columns: list[Any] | Document) -> str:
    if isinstance(columns, dict):  # of one timestep or rollout
        return ", ".join(f"{name} {_number(value, 9)}" for name, value in columns.items())
    return ", ".join(c if isinstance(c, str) else f"{c['name']} ({c['dtype']})" for c in columns)


def _buckets(buckets: list[Document]) -> str:
    return ", ".join(
        f"{' × '.join(map(str, b['shape']))}{'' if b['predicted'] else ' without predictions'} "
        f"({b['shards']:,} shards)"
        for b in buckets
    )


def _tables(tables: Document) -> str:
    found = (f"{name} {t['rows']:,} rows ({t['bytes']:,} bytes)" for name, t in tables.items())
    return ", ".join(found)


def _recording(document: Document, path: str = "") -> str:
    """A line for every value, long lists by their length."""
    lines = []
    for name, value in document.items():
        if isinstance(value, dict):
            lines.append(_recording(value, f"{path}{name}."))
        elif isinstance(value, list) and len(value) > MOST_SHOWN_NUMBERS:
            lines.append(f"{path}{name}: {len(value):,} values")
        else:
            lines.append(f"{path}{name}: {value}")
    return "\n".join(line for line in lines if line)


def _number(value: float, digits: int) -> str:
    return str(value) if isinstance(value, int) else f"{value:.{digits}g}"


def _present(fingerprints: Document) -> str:
    """Those that are no empty text: a store has no tokenizer or codec of images."""
    return "\n".join(f"{part} {_head(found)}" for part, found in fingerprints.items() if found)


def _head(fingerprint: str) -> str:
    """Enough of a hash to tell it from others; `--json` has all of it."""
    head = fingerprint[:SHOWN_LETTERS]
    return head if head == fingerprint else f"{head}…"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} ({seconds / 3600:,.1f} hours)" if seconds >= 60 else f"{seconds:.3g}"


def _lineage(ancestors: list[Document]) -> str:
    steps = [f"{a['fingerprint'][:12]} ({_text('profile', a['profile'])})" for a in ancestors]
    return " → ".join(steps) or "none: its values are as the teacher gave them"


def _by_reason(numbers: Document) -> str:
    return ", ".join(f"{reason} {_amount(number)}" for reason, number in numbers.items())


def _amount(number: float) -> str:
    return f"{number:,.0f}" if number >= 1e5 else f"{number:,g}"


def _architecture(counted: Document) -> str:
    if not counted:
        return "not recorded: it was written by an earlier foretell"
    parts = ", ".join(f"{part} {size:,}" for part, size in counted["parts"].items())
    lines = [
        f"{counted['parameters']:,} parameters, {counted['active_parameters']:,} of them active "
        f"at a position ({parts})",
        f"{counted['flops_per_timestep']:,} FLOPs per timestep and pass, attention over a history "
        "left out",
    ]
    if counted["experts"]:
        lines.append(
            f"{counted['active_experts']} of {counted['experts']} experts per layer; with a dense "
            f"feed-forward as wide as all of them {counted['dense_flops_per_timestep']:,} FLOPs"
        )
    return "\n".join(lines)


def _quantization(found: Document) -> str:
    lines = [f"weights and arithmetic in {found['dtype']}"]
    if found["method"] != "none":
        backend = f"{found['backend']} {found['backend_version']}"
        lines.append(f"{found['method']} by {backend}: {', '.join(found['layers'])}")
    if found["kept"]:
        kept = (f"{name} ({reason})" for name, reason in found["kept"].items())
        lines.append(f"kept: {', '.join(kept)}")
    return "\n".join([*lines, *audit_lines(found["audit"])])


def audit_lines(audit: Document | None) -> list[str]:
    """Return what an audit found, for people to read; nothing where there was none."""
    if audit is None:
        return []
    measured = f"{audit['samples']} recordings, {audit['predictions']:,} predictions"
    if audit["kl_mean"] is None:
        return [
            f"from float32, over {measured}: mean squared difference {audit['mse']:.3g}, "
            f"{audit['mse_share']:.2%} of the mean square"
        ]
    return [
        f"KL from float32, over {measured}: mean {audit['kl_mean']:.3g} nats, largest of a "
        f"recording {audit['kl_largest']:.3g}, 99 % below {audit['kl_p99']:.3g}; most probable id "
        f"the same in {audit['agreement']:.2%}"
    ]


SHOWN: dict[str, Callable[[Any], str]] = {
    "streams": _streams,
    "teacher": _head,
    "fingerprint": _head,
    "audio_s": _seconds,
    "timestep_s": lambda seconds: f"{seconds:.4g}",
    "lineage": _lineage,
    "weight": _amount,
    "weights": _by_reason,
    "stop_reasons": _by_reason,
    "rejected_for": lambda kinds: "\n".join(f"{k} {n:,}" for k, n in kinds.items()) or "none",
    "columns": _names,
    "drawn": _names,
    "buckets": _buckets,
    "tables": _tables,
    "recording": _recording,
    "fingerprints": _present,
    "architecture": _architecture,
    "quantization": _quantization,
}
"""Values that are written otherwise than as they are."""


def _size(stream: Document) -> str:
    if stream["kind"] == "categorical":
        return f"V={stream['vocabulary']}"
    return " × ".join(map(str, stream["shape"]))


def verification_text(result: Verification) -> str:
    """Return what `verify` found, a line for each fault."""
    lines = [
        f"{'store' if d.shard is None else f'shard {d.shard}'}: {d.file}: {d.reason}"
        for d in result.bad
    ]
    damaged = any(not d.unreadable for d in result.bad)
    verdict = "sound" if result.ok else "DAMAGED" if damaged else "NOT ALL COULD BE READ"
    lines.append(
        f"{verdict}: {result.shards:,} shards, {result.rollouts:,} "
        f"rollouts, {result.timesteps:,} timesteps verified; "
        f"{len(result.not_committed):,} planned shards are not committed"
    )
    return "\n".join(lines)
