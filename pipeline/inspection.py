"""Looking into a store or a model: what it is, how large, and what was predicted at one place."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.candidates import describe_stream, summary
from stages.errors import UserError
from stages.rejections import kind_of
from stages.saved_model import is_saved, saved_model
from store import PredictionStore, Rollout, Timestep
from store.encoding import COLUMN
from store.schema import Manifest
from store.shard_folder import ShardFolder
from store.side_tables import table_files
from store.verify import Verification

Document = dict[str, Any]

ROLLOUT_KEY = re.compile(r"(?P<sample_id>.+)/(?P<variation>[0-9]{1,10})")
MOST_SHOWN_NUMBERS = 8
WIDE_LETTERS = 160
"""Width of what has a line for every timestep."""
CHECKSUMS = ("_crc", "_sum")
"""How columns end that tell people nothing."""
TIMESTEP_KEY = re.compile(ROLLOUT_KEY.pattern + r"/(?P<timestep>[0-9]{1,10})")


@dataclass
class _Content:
    """What the committed shards hold."""

    timesteps: int = 0
    longest: int = 0
    stop_reasons: Counter[str] = field(default_factory=Counter)
    weights: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Weights in training of the rollouts of every stop reason, added up."""
    sizes: Counter[str] = field(default_factory=Counter)
    """Bytes on disk of every array; other files count as `tables`."""

    def add(self, folder: ShardFolder) -> None:
        record = folder.record()
        table = folder.read_rollouts(record)
        self.timesteps += record.rows
        self.longest = max(self.longest, int(table.lengths.max()))
        self.stop_reasons.update(table.stop_reasons)
        for reason, weight in zip(table.stop_reasons, table.weights.tolist(), strict=True):
            self.weights[reason] += weight
        for file, check in record.files.items():
            array, separator, _ = file.partition("/")
            self.sizes[array if separator else "tables"] += check.bytes


def describe_store(
    path: Path, progress: Callable[[Sequence[int]], Iterable[int]] = iter
) -> Document:
    """Return what a store is and what is in it, as JSON values; reads no array.

    `progress` may wrap the list of shards (tqdm).
    """
    store = PredictionStore.open(path)
    manifest, content, rejected = store.manifest, _Content(), store.rejected
    for shard in progress(store.committed):
        content.add(store.folder(shard))
    return {
        "shards": len(store.committed),
        "planned_shards": store.planned_shards,
        "rollouts": len(store),
        "rejected": len(rejected),
        "rejected_for": dict(Counter(kind_of(reason) for _, reason in rejected).most_common()),
        "timesteps": content.timesteps,
        **_audio(content.timesteps, manifest),
        "bytes": dict(sorted(content.sizes.items())),
        "longest": content.longest,
        "stop_reasons": dict(content.stop_reasons),
        "weights": dict(content.weights),
        "weight": math.fsum(content.weights.values()),
        "streams": [stream.model_dump() for stream in manifest.streams],
        **_beside_target(store),
        "targets": manifest.target.model_dump(mode="json"),
        "profile": manifest.profile.model_dump(mode="json"),
        "lineage": [ancestor.model_dump(mode="json") for ancestor in manifest.lineage],
        "teacher": manifest.fingerprints.teacher,
        "architecture": manifest.architecture,
        "quantization": manifest.quantization and manifest.quantization.model_dump(mode="json"),
        "cfg_scale": manifest.guidance.scale,
        "family": manifest.family,
        "source": manifest.source,
        "sampler": manifest.sampler.model_dump(mode="json"),
        "split": manifest.split,
        "seed": manifest.seed,
        "fingerprints": manifest.fingerprints.model_dump(),
        "format_version": manifest.format_version,
    }


def _beside_target(store: PredictionStore) -> Document:
    """What a store holds beside its target, as far as there is any."""
    manifest, buckets = store.manifest, Counter(map(store.plan.bucket_of, store.committed))
    tables = {
        name: {"rows": facts.rows, "bytes": sum(manifest.files[f].bytes for f in files)}
        for name, facts in manifest.tables.items()
        for files in [list(table_files(name, facts))]
    }
    found = {
        "columns": [column.model_dump() for column in manifest.columns],
        "drawn": list(manifest.drawn),
        "buckets": [
            bucket.model_dump(mode="json") | {"shards": buckets[number]}
            for number, bucket in enumerate(manifest.buckets)
        ],
        "tables": tables,
        "recording": manifest.recording,
    }
    return {name: value for name, value in found.items() if value}


def is_model(path: Path) -> bool:
    """Whether a folder is that of a model and not of a store."""
    return (path / "config.json").exists() and not (path / "manifest.json").exists()


def describe_model(folder: Path) -> Document:
    """Return what a model is, from its config.json alone, as JSON values."""
    model = saved_model(folder)
    counted = model.architecture
    return {
        "family": model.config.family,
        "finished": is_saved(folder),
        "architecture": {} if counted is None else counted.model_dump(mode="json"),
        "config": model.config.model_dump(mode="json"),
        "facts": model.facts,
    }


def describe_key(path: Path, key: str) -> Document:
    """Return what is stored of SAMPLE/VARIATION, or of SAMPLE/VARIATION/TIMESTEP.

    Sample ids may hold slashes: the last one or two parts are numbers. Raises `UserError` for a
    key of another form and `StoreError` for one that the store does not hold.
    """
    store = PredictionStore.open(path)
    for pattern in (TIMESTEP_KEY, ROLLOUT_KEY):
        match = pattern.fullmatch(key)
        if match is None:
            continue
        sample_id, variation = match["sample_id"], int(match["variation"])
        if pattern is ROLLOUT_KEY:
            return _rollout(store, store[sample_id, variation])
        # A sample id may itself end in "/3", so a key can be read in two ways.
        if (sample_id, variation) in store:
            return _timestep(store, store[sample_id, variation, int(match["timestep"])])
    raise UserError(
        f"key {key!r} is not SAMPLE/VARIATION or SAMPLE/VARIATION/TIMESTEP of a rollout in "
        f"{path}: `foretell inspect {path}` says what is there"
    )


def _audio(timesteps: int, manifest: Manifest) -> Document:
    """Seconds of audio of some timesteps, where they are audio."""
    seconds = manifest.timestep_s
    return {} if seconds is None else {"audio_s": timesteps * seconds}


def _rollout(store: PredictionStore, rollout: Rollout) -> Document:
    return {
        "sample_id": rollout.sample_id,
        "variation": rollout.variation,
        "conditions": {
            name: value
            for name, value in store.sample(rollout.sample_id).items()
            if isinstance(value, str | int | float)
        },
        "timesteps": len(rollout),
        **_audio(len(rollout), store.manifest),
        "stop_reason": rollout.stop_reason,
        "weight": rollout.weight,
        "seed": rollout.seed,
        "codes": rollout.codes.tolist() if "codes" in rollout.arrays else None,
        **({"drawn": dict(rollout.drawn)} if rollout.drawn else {}),
        **({} if "codes" in rollout.arrays else {"rows": _rows(rollout)}),
    }


def _rows(rollout: Rollout) -> list[Document]:
    """Every timestep of a rollout without codes: its columns, and how large its predictions are."""
    return [
        _columns(timestep)
        | {
            name: {part: found[part] for part in ("mean", "std")}
            for name, values in timestep.arrays.items()
            if not name.startswith(COLUMN)
            for found in [summary(values)]
        }
        for timestep in map(rollout.__getitem__, range(len(rollout)))
    ]


def _columns(timestep: Timestep) -> Document:
    """The columns of a timestep that are numbers."""
    return {
        name.removeprefix(COLUMN): value.item()
        for name, value in timestep.arrays.items()
        if name.startswith(COLUMN) and not value.ndim
    }


def _timestep(store: PredictionStore, timestep: Timestep) -> Document:
    document = {
        "sample_id": timestep.sample_id,
        "variation": timestep.variation,
        "timestep": timestep.timestep,
        "streams": [
            {"stream": stream.name, **describe_stream(store, timestep, index)}
            for index, stream in enumerate(store.manifest.streams)
        ],
    }
    beside = {"columns": _columns(timestep), "drawn": dict(timestep.drawn)}
    return document | {name: values for name, values in beside.items() if values}


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
        console.print(_value_table(document))
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
    lines.append(
        f"{'sound' if result.ok else 'DAMAGED'}: {result.shards} shards, {result.rollouts} "
        f"rollouts, {result.timesteps} timesteps verified; "
        f"{len(result.not_committed)} planned shards are not committed"
    )
    return "\n".join(lines)
