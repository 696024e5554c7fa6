"""Making a store: idempotent, and safe when many workers start at once."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from store.durable import sync_file, sync_folder, write_file
from store.errors import StoreError, SystemFailure, explain_os_errors
from store.heads import HEADS_FILE, Heads, check_heads, heads_bytes, read_heads
from store.layout import Layout, refuse_nesting, refuse_strangers
from store.mapped_file import MappedFile
from store.plain_file import lies_at
from store.plan import Plan
from store.rejected import Rejected, read_rejected, rejected_table
from store.remote import RemoteLayout
from store.samples import SampleRows, check_conditions
from store.schema import FileSum, Manifest
from store.sealed import seal, unseal
from store.side_tables import SideTable, table_files
from store.sums import file_sum
from store.tables import read_table, table_bytes

MAX_SHOWN_LETTERS = 200
SETTLED_ELSEWHERE = (
    "files", "architecture", "quantization.audit", "recording.versions", "recording.layout"
)  # fmt: skip
"""Fields of a manifest in which two stores of the same rollouts may differ."""
EMPTY: Mapping[str, Path] = MappingProxyType({})


def create_store(
    layout: Layout,
    manifest: Manifest,
    plan: Plan,
    samples: pa.Table,
    heads: Heads,
    rejected: Rejected = (),
    tables: Mapping[str, Path] = EMPTY,
) -> None:
    """Make the store unless an equal one exists.

    Plan, samples, heads and tables are linked into place first (or created in object storage), the
    manifest last; neither replaces anything, so of two creators one wins and the other compares.
    Raises StoreError when a different store exists (naming the fields), the path is unsuitable, or
    the disk fails.
    """
    given = f"samples given for {layout}"
    check_conditions(samples.column_names, manifest, given)
    SampleRows.of(samples["sample_id"].chunks, plan, given)
    check_heads(heads, manifest, f"heads given for {layout}")
    plan.check_buckets(len(manifest.buckets), f"plan given for {layout}")
    parts = _table_parts(manifest, tables, f"tables given for {layout}")
    remote = isinstance(layout, RemoteLayout)
    if not remote:
        refuse_nesting(layout.root)
    if not layout.exists():
        if not remote:
            refuse_strangers(layout.root)
        contents: dict[str, bytes | Path] = {
            "plan.parquet": table_bytes(plan.to_table()),
            "samples.parquet": table_bytes(samples),
        }
        if rejected:
            contents[layout.rejected.name] = table_bytes(rejected_table(rejected))
        if heads:
            contents[HEADS_FILE] = heads_bytes(heads)
        for name, folder in tables.items():
            SideTable(folder, manifest.tables[name]).check()
        contents |= parts
        sums = {name: _sum(content) for name, content in contents.items()}
        contents["manifest.json"] = seal(manifest.model_copy(update={"files": sums}))
        place(layout, contents)
    _compare(layout.opened(), manifest, plan, samples, heads, rejected, parts)


def _table_parts(manifest: Manifest, tables: Mapping[str, Path], source: str) -> dict[str, Path]:
    """Files of the tables by their paths in the store.

    Raises StoreError that begins with `source` unless the tables are the manifest's.
    """
    if set(tables) != set(manifest.tables):
        raise StoreError(
            f"{source} are {sorted(tables)} but the manifest calls for {sorted(manifest.tables)}: "
            "give the folder of each"
        )
    return {
        file: tables[name].absolute() / Path(file).name
        for name, facts in manifest.tables.items()
        for file in table_files(name, facts)
    }


def _sum(content: bytes | Path) -> FileSum:
    """Size and hash of what is there, or of a file that is; raises StoreError."""
    if isinstance(content, bytes):
        return file_sum(content)
    try:
        return file_sum(MappedFile.open(content).content)
    except SystemFailure:
        raise
    except StoreError as error:
        raise StoreError(f"{content}: {error}: restore it from a copy") from error


def place(layout: Layout, contents: Mapping[str, bytes | Path]) -> None:
    """Make the files beside the shards of a store in their order, the manifest last.

    No file is replaced. Raises StoreError where something else is there and no manifest; where
    there is a manifest, who calls compares.
    """
    if isinstance(layout, RemoteLayout):
        layout.place_new(contents)
        return
    with explain_os_errors(f"create the store {layout.root}"):
        _place(layout, contents)


def _place(layout: Layout, contents: Mapping[str, bytes | Path]) -> None:
    for folder in (layout.root, layout.shards, layout.tmp):
        folder.mkdir(parents=True, exist_ok=True)
    staged = layout.tmp / f"create-{uuid.uuid4().hex}"
    staged.mkdir()
    try:
        for name, content in contents.items():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            _stage(content, staged / name)
        for name, content in contents.items():
            target = layout.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if target == layout.manifest:
                for below in sorted(set(_folders(contents)), reverse=True):
                    sync_folder(layout.root / below)
            if not _link(staged / name, target, content, layout):
                return
        sync_folder(layout.root)
        sync_folder(layout.root.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _folders(files: Iterable[str]) -> Iterator[PurePosixPath]:
    """Every folder above some relative paths, the root among them."""
    return (folder for file in files for folder in PurePosixPath(file).parents)


def _stage(content: bytes | Path, path: Path) -> None:
    """Write a file, or link one that exists; else copy it. Raises OSError."""
    if isinstance(content, bytes):
        write_file(path, [content])
        return
    try:
        os.link(content, path, follow_symlinks=False)
    except OSError:  # another file system, or one without links
        write_file(path, [MappedFile.open(content).content])
    else:
        sync_file(path)


def _link(source: Path, target: Path, content: bytes | Path, layout: Layout) -> bool:
    """Link a file to a free name; False when a whole store is there already."""
    try:
        os.link(source, target)
    except FileExistsError:
        if lies_at(layout.manifest):
            return False
        if not _holds(target, content):
            raise StoreError(
                f"{target} differs from the one to be written and no manifest.json is beside it: "
                f"a store was begun here with another plan; remove {layout.root} or choose another "
                "folder"
            ) from None
    return True


def _holds(path: Path, content: bytes | Path) -> bool:
    """Whether a file holds this, or what another file holds; raises OSError, StoreError."""
    if isinstance(content, bytes):
        return path.read_bytes() == content
    return path.samefile(content) or _sum(path) == _sum(content)


def _compare(
    layout: Layout,
    manifest: Manifest,
    plan: Plan,
    samples: pa.Table,
    heads: Heads,
    rejected: Rejected,
    parts: Mapping[str, Path],
) -> None:
    stored, _ = unseal(layout.manifest, Manifest)
    changes = list(_differences(stored.model_dump(mode="json"), manifest.model_dump(mode="json")))
    for path, ours in ((layout.plan, plan.to_table()), (layout.samples, samples)):
        theirs = read_table(path, stored)
        # Another version of the Parquet library may spell the same table in other bytes.
        if file_sum(table_bytes(ours)) != stored.files[path.name] and not theirs.equals(ours):
            changes.append(f"{path.name}: {_table_difference(theirs, ours)}")
    # Who is left out, and not why: another release may give the same reason in other words.
    theirs_out, ours_out = (
        {sample_id for sample_id, _ in pairs}
        for pairs in (read_rejected(layout.rejected, stored), rejected)
    )
    if theirs_out != ours_out:
        other = min(theirs_out ^ ours_out)
        place = "in the store" if other in theirs_out else "given"
        changes.append(f"{layout.rejected.name}: {other!r} is left out only {place}")
    if heads and not changes and file_sum(heads_bytes(heads)) != stored.files[HEADS_FILE]:
        found = read_heads(layout.heads, stored)
        names = sorted(name for name in heads if not np.array_equal(found[name], heads[name]))
        changes += [f"{HEADS_FILE}: other values in {names}"] if names else []
    if not changes:
        changes += _other_parts(layout, stored, parts)
    if changes:
        raise StoreError(
            f"the store {layout} exists and differs in {'; '.join(changes)}. "
            "Choose another folder, or give the configuration that made it"
        )


def _other_parts(layout: Layout, stored: Manifest, parts: Mapping[str, Path]) -> Iterator[str]:
    """Files of tables that differ from those given; raises StoreError."""
    for file, source in parts.items():
        with explain_os_errors(f"look up {source}"):
            remote = isinstance(layout, RemoteLayout)
            same = not remote and (layout.root / file).samefile(source)
        if not same and _sum(source) != stored.files[file]:
            yield f"{file}: other tensors than in {source}"


def _differences(stored: dict[str, Any], given: dict[str, Any], path: str = "") -> Iterator[str]:
    for name in sorted(stored.keys() | given.keys()):
        here = f"{path}{name}"
        # What is said of how timesteps were made is not written where it is nothing.
        nothing: Any = {} if here == "recording" else None
        one, two = stored.get(name, nothing), given.get(name, nothing)
        # The architecture follows from the teacher, whose fingerprint is compared, and so do its
        # layout of ids, which an earlier release did not write, and what an audit measured, to the
        # last digits, which depend on the machine. Packages may be newer than those that began a
        # recording.
        if here in SETTLED_ELSEWHERE or one == two:
            continue
        if isinstance(one, dict) and isinstance(two, dict):
            yield from _differences(one, two, f"{here}.")
        else:
            yield f"{here}: {_shown(one)} in the store, {_shown(two)} given"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_LETTERS else f"{text[:MAX_SHOWN_LETTERS]}…"


def _table_difference(stored: pa.Table, given: pa.Table) -> str:
    if stored.schema.names != given.schema.names:
        return f"columns {stored.schema.names} in the store, {given.schema.names} given"
    if stored.num_rows != given.num_rows:
        return f"{stored.num_rows} rows in the store, {given.num_rows} given"
    columns = [name for name in stored.schema.names if stored[name] != given[name]]
    return f"other values in the columns {columns}"
