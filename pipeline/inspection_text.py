"""What `pipeline.inspection` found, and what `verify` did, as text for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.inspection import Document
from store.verify import Verification

MOST_SHOWN_NUMBERS = 8
WIDE_LETTERS = 160
"""Width of what has a line for every timestep."""
CHECKSUMS = ("_crc", "_sum")
"""How columns end that tell people nothing."""
OF_CODES = ("longest", "stop_reasons", "stop_reason", "weights", "source", "sampler", "codes")
"""What is said of how codes were drawn, and nothing of images."""


def store_text(document: Document) -> str:
    """Return a readable table of `describe_store` or `describe_key`."""
    buffer = StringIO()
    width = WIDE_LETTERS if "rows" in document else 100
    console = Console(file=buffer, width=width, highlight=False)
    if "timestep" in document:
        console.print(_candidate_table(document))
        beside = {name: document[name] for name in document if name in ("columns", "drawn")}
        if beside:
            console.print(_value_table(beside))
    else:
        audio = "audio_s" in document
        shown = {n: value for n, value in document.items() if audio or n not in OF_CODES}
        console.print(_value_table(shown))
    return buffer.getvalue().rstrip()


def _value_table(document: Document) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in document.items():
        table.add_row(name, _text(name, value))
    return table


def _text(name: str, value: Any) -> str:
    if name in SHOWN and value is not None:
        return SHOWN[name](value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return f"{value:,}" if isinstance(value, int) and name != "seed" else str(value)


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


def _row_lines(rows: list[Document]) -> str:
    """A line for every timestep, without checksums."""
    heads = [name for name in rows[0] if not name.endswith(CHECKSUMS)]
    lines = [["timestep", *(head.removeprefix("dense.") for head in heads)]]
    for timestep, row in enumerate(rows):
        lines.append([str(timestep), *(_cell(row[head]) for head in heads)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def _cell(value: Document | float) -> str:
    if isinstance(value, dict):
        return f"{value['mean']:.2g} ± {value['std']:.3g}"
    return _number(value, 5)


def _number(value: float, digits: int) -> str:
    return str(value) if isinstance(value, int) else f"{value:.{digits}g}"


def _present(fingerprints: Document) -> str:
    """Those that are no empty text: a store has no tokenizer or codec of images."""
    return ", ".join(f"{part} {found}" for part, found in fingerprints.items() if found)


def _bytes(sizes: Document) -> str:
    total = sum(sizes.values())
    return f"{total:,} ({', '.join(f'{array} {size:,}' for array, size in sizes.items())})"


def _lineage(ancestors: list[Document]) -> str:
    steps = [f"{a['fingerprint'][:12]} ({_text('profile', a['profile'])})" for a in ancestors]
    return " → ".join(steps) or "none: its values are as the teacher gave them"


def _codes(rows: list[list[int]]) -> str:
    return "\n".join(" ".join(f"{code:>5}" for code in row) for row in rows)


def _weights(weights: Document) -> str:
    return ", ".join(f"{reason} {weight:,g}" for reason, weight in weights.items())


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
    "bytes": _bytes,
    "lineage": _lineage,
    "codes": _codes,
    "weight": lambda weight: f"{weight:,g}",
    "weights": _weights,
    "rejected_for": lambda kinds: _text("", kinds) or "none",
    "columns": _names,
    "drawn": _names,
    "buckets": _buckets,
    "tables": _tables,
    "recording": _recording,
    "fingerprints": _present,
    "rows": _row_lines,
    "architecture": _architecture,
    "quantization": _quantization,
}
"""Values that are written otherwise than as they are."""


def _size(stream: Document) -> str:
    if stream["kind"] == "categorical":
        return f"V={stream['vocabulary']}"
    return " × ".join(map(str, stream["shape"]))


def _candidate_table(document: Document) -> Table:
    title = f"{document['sample_id']}, variation {document['variation']}, "
    table = Table(title=title + f"timestep {document['timestep']}")
    if "code" not in document["streams"][0]:
        return _latent_table(table, document["streams"])
    for column in ("stream", "code", "most probable (id: probability)", "tail mass"):
        table.add_column(column)
    for stream in document["streams"]:
        best = ", ".join(_candidate(candidate) for candidate in stream["candidates"][:6])
        tail = "not stored" if stream["tail_mass"] is None else f"{stream['tail_mass']:.2g}"
        table.add_row(stream["stream"], str(stream["code"]), best, tail)
    return table


def _candidate(candidate: Document) -> str:
    text = f"{candidate['id']}: {candidate['probability']:.3f}"
    if "cond" not in candidate:
        return text
    return f"{text} (cond {candidate['cond']:.3f}, uncond {candidate['uncond']:.3f})"


def _latent_table(table: Table, streams: list[Document]) -> Table:
    for column in ("stream", "array", "mean", "std", "rms", "least", "most"):
        table.add_column(column)
    for stream in streams:
        for name, values in stream.items():
            if name != "stream":
                numbers = (f"{number:.4g}" for number in values.values())
                table.add_row(stream["stream"], name, *numbers)
    return table


def verification_text(result: Verification) -> str:
    """Return what `verify` found, a line for each fault."""
    lines = [
        f"{'store' if d.shard is None else f'shard {d.shard}'}: {d.file}: {d.reason}"
        for d in result.bad
    ]
    damaged = any(not d.unreadable for d in result.bad)
    verdict = "sound" if result.ok else "DAMAGED" if damaged else "NOT ALL COULD BE READ"
    lines.append(
        f"{verdict}: {result.shards} shards, {result.rollouts} "
        f"rollouts, {result.timesteps} timesteps verified; "
        f"{len(result.not_committed)} planned shards are not committed"
    )
    return "\n".join(lines)
