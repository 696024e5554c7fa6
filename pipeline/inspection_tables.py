"""Tables of what `foretell inspect` found: of a store, a shard, a rollout, a timestep."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

from rich.console import RenderableType

from pipeline.text_tables import Lines, number_table, probable, short, value_table

Document = dict[str, Any]
Parts = list[RenderableType]

BAR_LETTERS = 50
CODE_LETTERS = 5
"""Room of a code in a table; more where one needs it."""
MOST_CODE_LETTERS = 54
"""Room beside the other columns of 80."""
MOST_CANDIDATES = 6
"""Candidates of a stream that are shown; `--json` and `--csv` have all."""
CHECKSUMS = ("_crc", "_sum")
"""How columns end that tell people nothing."""
EXACTNESS = {
    "exact": "entropy in nats, exact",
    "lower bound": "entropy in nats, a lower bound: all ids that are not kept count as one",
    "estimate": "entropy in nats, of the draws: too low, the fewer there are the more",
}


def array_parts(document: Document) -> Parts:
    """Bytes of every array."""
    audio = any("bytes_per_audio_s" in line for line in document["arrays"])
    heads = ["array", "bytes", "per timestep", *(["per s of audio"] if audio else []), "ratio"]
    rows = [
        [
            line["array"],
            short(line["bytes"]),
            f"{line['bytes_per_timestep']:,.1f}",
            *([f"{line['bytes_per_audio_s']:,.0f}"] if audio else []),
            "-" if line["ratio"] is None else f"{line['ratio']:.2f}",
        ]
        for line in document["arrays"]
    ]
    title = "\nBytes (ratio: those of the plain values over those on disk)"
    return [title, number_table(heads, rows)]


def length_parts(document: Document) -> Parts:
    """How long rollouts are: quantiles, and a bar for every range."""
    found = document["lengths"]
    if not found["counts"]:
        return []
    names = ("least", "p10", "p50", "p90", "most", "mean")
    numbers = ", ".join(f"{name} {short(found[name])}" for name in names)
    most = max(found["counts"])
    bars = [
        [f"{low:,} to {high - 1:,}", short(count), "#" * round(BAR_LETTERS * count / most)]
        for low, high, count in zip(
            found["edges"], found["edges"][1:], found["counts"], strict=False
        )
    ]
    table = number_table(["timesteps", "rollouts", ""], bars)
    table.columns[2].justify = "left"
    return [f"\nLengths in timesteps: {numbers}", table]


def statistic_parts(document: Document) -> Parts:
    """How sure the teacher was, by stream; how large continuous predictions are, by noise level."""
    found = document["statistics"]
    read = (
        f"\nOver {found['shards']:,} of {found['of_shards']:,} shards: "
        f"{found['rollouts']:,} rollouts, {found['timesteps']:,} timesteps"
    )
    tried = found["shards"] + len(found["unreadable"])
    parts: Parts = [read if tried == found["of_shards"] else f"{read} (--all reads all)"]
    parts += unreadable_parts(found)
    if not found["shards"]:
        return parts
    if found["entropy_is"] is not None:
        parts += _certainty(found)
    elif "levels" in found:
        parts += _levels(found["levels"])
    else:
        parts += _sizes(found["streams"])
    return parts


def unreadable_parts(found: Document) -> Parts:
    """Shards that are damaged, and left out of what is shown."""
    return [f"shard {s['shard']} cannot be read: {s['reason']}" for s in found["unreadable"]]


def _certainty(found: Document) -> Parts:
    heat = f" (at temperature {found['temperature']:g})" if found["temperature"] != 1 else ""
    wanted = [("entropy", "p10"), ("entropy", "p50"), ("entropy", "p90")]
    if "kept_mass" in found["streams"][0]:
        wanted += [("kept_mass", "p1"), ("kept_mass", "p50")]
        wanted += [("tail_mass", "p50"), ("tail_mass", "p99")]
    wanted.append(("code_probability", "p50"))
    names = {"entropy": "entropy", "kept_mass": "kept", "tail_mass": "tail",
             "code_probability": "drawn"}  # fmt: skip
    heads = ["stream", *(f"{names[measure]}\n{at}" for measure, at in wanted)]
    rows = [
        [stream["stream"], *(_measured(measure, stream[measure][at]) for measure, at in wanted)]
        for stream in found["streams"]
    ]
    legend = "kept, tail: probability of the kept ids and of all others; drawn: of the drawn code"
    return [
        f"{EXACTNESS[found['entropy_is']]}{heat}",
        legend if "kept_mass" in found["streams"][0] else "drawn: probability of the drawn code",
        number_table(heads, rows),
    ]


def _measured(measure: str, number: float) -> str:
    """A number as is usual for what it measures."""
    if measure == "entropy":
        return f"{number:.2f}"
    probability = measure in ("code_probability", "kept_mass", "tail_mass")
    return probable(number) if probability else short(number)


def _levels(levels: list[Document]) -> Parts:
    names = [name for name in levels[0] if name not in ("from", "to", "rows")]
    heads = ["noise level t", "rows", *(f"{name.removeprefix('rms ')}\nmean" for name in names)]
    rows = [
        [
            f"{short(level['from'])} to {short(level['to'])}",
            short(level["rows"]),
            *(short(level[name].get("mean")) for name in names),
        ]
        for level in levels
    ]
    return ["root mean square of what is stored of a row", number_table(heads, rows)]


def _sizes(streams: list[Document]) -> Parts:
    at = ("p10", "p50", "p90", "most")
    rows = [
        [stream["stream"], name.removeprefix("rms "), *(short(found.get(place)) for place in at)]
        for stream in streams
        for name, found in stream.items()
        if name != "stream"
    ]
    return ["root mean square of what is stored of a row",
            number_table(["stream", "array", *at], rows, texts=2)]  # fmt: skip


def duplicate_parts(document: Document) -> Parts:
    """What is there twice."""
    found = document["duplicates"]
    said = {"rollouts": "rollouts that are equal", "samples": "samples of equal conditions"}
    lines = []
    for kind, text in said.items():
        members, groups = found[kind]["members"], found[kind]["groups"]
        lines.append((text, f"{members:,} in {groups:,} groups" if members else "none"))
        lines += [("", " = ".join(names)) for names in found[kind]["examples"]]
    return ["\nDuplicates among these", value_table(lines)]


def outlier_parts(document: Document) -> Parts:
    """What lies far from the median."""
    rows = [
        [measure, line["key"], _measured(measure, line["value"]), f"{line['z']:+.1f}"]
        for measure, lines in document["outliers"].items()
        for line in lines
    ]
    if not rows:
        return ["\nOutliers: none"]
    title = "\nOutliers (z: distance from the median in robust standard deviations)"
    return [title, number_table(["of", "key", "value", "z"], rows, texts=2)]


def shard_parts(document: Document) -> Parts:
    """The arrays and rollouts of a shard."""
    facts = [
        ("shard", f"{document['shard']:05d}"),
        ("rollouts", short(document["rollouts"])),
        ("timesteps", short(document["timesteps"])),
        ("bytes", short(sum(document["bytes"].values()))),
        ("sums", "every file is as it was written" if not document["faults"] else "DAMAGED"),
        *((fault["file"], fault["reason"]) for fault in document["faults"]),
    ]
    heads = ["array", "type", "shape", "chunks", "bytes", "ratio"]
    arrays = [
        [
            line["array"],
            line["dtype"],
            " × ".join(map(str, line["shape"])),
            f"{line['chunks']} of {line['chunk_timesteps']}",
            short(line["bytes"]),
            f"{line['ratio']:.2f}",
        ]
        for line in document["arrays"]
    ]
    return [
        value_table(facts),
        "\nArrays (chunks of timesteps; ratio: plain bytes over those on disk)",
        number_table(heads, arrays, texts=3),
        "\nRollouts",
        _rollout_lines(document["table"]),
    ]


def _rollout_lines(rows: list[Document]) -> RenderableType:
    measure = next((name for name in rows[0] if name == "entropy" or "rms" in name), None)
    heads = ["key", "stop reason", "start", "timesteps", "weight", *([measure] if measure else [])]
    lines = [
        [
            f"{row['sample_id']}/{row['variation']}",
            row["stop_reason"],
            short(row["start"]),
            short(row["timesteps"]),
            short(row["weight"]),
            *([_measured(measure, row[measure])] if measure else []),
        ]
        for row in rows
    ]
    return number_table(heads, lines, texts=2)


def certainty_parts(document: Document) -> Parts:
    """Every timestep of a rollout of codes: what was drawn, and how sure the teacher was."""
    rows = document["certainty"]
    streams = len(rows[0]["codes"])
    heads = ["timestep", "codes", "entropy", "drawn"]
    lines = [
        [
            str(row["timestep"]),
            cells,
            f"{sum(row['entropy']) / streams:.2f}",
            probable(min(row["code_probability"])),
        ]
        for row, cells in zip(rows, _code_cells([row["codes"] for row in rows]), strict=True)
    ]
    title = (
        f"\n{EXACTNESS[document['entropy_is']]}; mean of the {streams} streams\n"
        "drawn: probability of the least probable of the codes"
    )
    return [title, number_table(heads, lines, texts=2)]


def _code_cells(rows: list[list[int]]) -> list[str]:
    """The codes of every row, in as many lines of equal length as the column needs."""
    letters = max(CODE_LETTERS, *(len(str(code)) for row in rows for code in row))
    fitting = (MOST_CODE_LETTERS + 1) // (letters + 1)
    streams = len(rows[0])
    length = math.ceil(streams / math.ceil(streams / fitting))
    return [
        "\n".join(
            " ".join(f"{code:>{letters}}" for code in row[start : start + length])
            for start in range(0, streams, length)
        )
        for row in rows
    ]


def row_parts(document: Document) -> Parts:
    """Every timestep of a rollout without codes, without checksums; above them what is alike."""
    rows = document["rows"]
    heads = [name for name in rows[0] if not name.endswith(CHECKSUMS)]
    alike = [head for head in heads if len(rows) > 1 and len({str(row[head]) for row in rows}) == 1]
    heads = [head for head in heads if head not in alike]
    lines = [["timestep", *(head.removeprefix("dense.") for head in heads)]]
    for timestep, row in enumerate(rows):
        lines.append([str(timestep), *(_cell(row[head]) for head in heads)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = Lines("\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        for line in lines
    ))  # fmt: skip
    said = ", ".join(f"{head} {_cell(rows[0][head])}" for head in alike)
    title = "\nRows (of latents: mean ± standard deviation)"
    return [title, *([f"in all of them {said}"] if said else []), table]


def _cell(value: Document | float) -> str:
    if isinstance(value, dict):
        return f"{value['mean']:.2g} ± {value['std']:.3g}"
    return str(value) if isinstance(value, int) else f"{value:.5g}"


def timestep_parts(document: Document) -> Parts:
    """One timestep: the candidates of every stream, or how large its latents are."""
    title = (
        f"{document['sample_id']}, variation {document['variation']}, "
        f"timestep {document['timestep']}"
    )
    categorical = "code" in document["streams"][0]
    return [title, (_candidates if categorical else _latents)(document["streams"])]


def _candidates(streams: list[Document]) -> RenderableType:
    branches = [name for name in ("cond", "uncond") if name in streams[0]["candidates"][0]]
    lines = []
    for stream in streams:
        tail = "not stored" if stream["tail_mass"] is None else f"tail {short(stream['tail_mass'])}"
        beside = [stream["stream"], tail]
        if "level" in stream:
            beside.append(f"level {short(stream['level'])}")
        shown = _shown(stream)
        for name, candidate in zip_longest(beside, shown):
            cells = [""] * (3 + len(branches))
            if candidate is not None:
                drawn = "drawn" if candidate["id"] == stream["code"] else ""
                numbers = [probable(candidate[part]) for part in ("probability", *branches)]
                cells = [str(candidate["id"]), *numbers, drawn]
            lines.append([name or "", *cells])
        lines.append([""] * (4 + len(branches)))
    return number_table(["stream", "id", "probability", *branches, ""], lines[:-1])


def _shown(stream: Document) -> list[Document]:
    """The likeliest candidates of a stream, and the drawn code wherever it stands."""
    best: list[Document] = stream["candidates"][:MOST_CANDIDATES]
    others = stream["candidates"][MOST_CANDIDATES:]
    return best + [candidate for candidate in others if candidate["id"] == stream["code"]]


def _latents(streams: list[Document]) -> RenderableType:
    heads = ["stream", "array", "mean", "std", "rms", "least", "most"]
    lines = [
        [stream["stream"], name, *(f"{number:.4g}" for number in values.values())]
        for stream in streams
        for name, values in stream.items()
        if name != "stream"
    ]
    return number_table(heads, lines, texts=2)


TABLES: dict[str, Callable[[Document], Parts]] = {
    "unreadable": unreadable_parts,
    "arrays": array_parts,
    "lengths": length_parts,
    "statistics": statistic_parts,
    "duplicates": duplicate_parts,
    "outliers": outlier_parts,
    "certainty": certainty_parts,
    "rows": row_parts,
}
"""What of a document is shown as a table of its own."""
