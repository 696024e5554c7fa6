"""Side tables: tensors that many rollouts share, each stored once, in rows of a few named tensors.

A table is a folder of safetensors files of the same number of rows, read lazily, row by row.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from store.durable import sync_folder, write_file
from store.encoding import Array
from store.errors import StoreError, SystemFailure, explain_os_errors
from store.mapped_file import Identity, MappedFile
from store.recent import Recent
from store.schema import GROUP, FileSum, Manifest, TableFacts, require
from store.sums import check_size, check_sum

TABLES = "tables"
"""Folder of the side tables of a store."""

OPEN_PARTS = 128
"""Files of a table that stay mapped, without descriptors; another takes 0.4 ms to map again."""

RECHECK_S = 0.01
"""Seconds for which a file may be gone, cut or written to before a reader looks again."""

DTYPES = {
    "bool": "BOOL", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "uint8": "U8",
    "uint16": "U16", "uint32": "U32", "uint64": "U64", "float16": "F16", "float32": "F32",
    "float64": "F64",
}  # fmt: skip
"""Types that a tensor may have, and what safetensors calls them."""

KEY = re.compile(rf"(?P<row>0|[1-9][0-9]{{0,9}})/(?P<name>{GROUP.pattern})")
"""Name of a tensor in a file: its row in the table, and its name in the row."""


class RowNotFound(StoreError, IndexError):
    """A row that a table does not have."""


def part_file(part: int) -> str:
    """Name of a file of a table."""
    return f"{part:05d}.safetensors"


def table_files(name: str, facts: TableFacts) -> Iterator[str]:
    """Paths below the store of the files of a table, in order."""
    return (f"{TABLES}/{name}/{part_file(part)}" for part in range(facts.parts))


def check_listing(manifest: Manifest, source: str) -> None:
    """Refuse a manifest that does not list exactly the files of its tables.

    Raises StoreError that begins with `source`.
    """
    listed = {file for file in manifest.files if file.startswith(f"{TABLES}/")}
    parts = sum(facts.parts for facts in manifest.tables.values())
    wrong = listed or {f"{TABLES}/"}
    # Compared first: a table may claim more rows than files can be named.
    if len(listed) == parts:
        tables = manifest.tables.items()
        wrong = listed - {file for name, facts in tables for file in table_files(name, facts)}
    if wrong:
        raise StoreError(
            f"{source} lists {sorted(wrong)[:3]}, which are not the {parts} files of the tables "
            f"{sorted(manifest.tables)}: restore the manifest"
        )


class SideTableWriter:
    """Writes a table into a folder, a file whenever it has its rows; nothing is overwritten."""

    def __init__(self, folder: str | Path, rows_per_part: int) -> None:
        """Make the folder if need be; raises ValueError for a part without rows, StoreError."""
        limit, advice = "in [1, 2**31)", "correct it"
        require(1 <= rows_per_part < 2**31, "rows_per_part", rows_per_part, limit, advice)
        self._folder = Path(folder)
        self._rows_per_part = rows_per_part
        self._rows = 0
        self._waiting: dict[str, Array] = {}
        with explain_os_errors(f"make {self._folder}"):
            self._folder.mkdir(parents=True, exist_ok=True)

    def append(self, arrays: Mapping[str, Array]) -> int:
        """Add a row of tensors, which are copied, and return its number.

        Raises StoreError for a row without tensors, a name that no array may have, a type that is
        not a plain number's, and for what the system refuses.
        """
        where, types = f"row {self._rows} of the table {self._folder}", list(DTYPES)
        if not arrays:
            raise StoreError(f"{where} has no tensor: give at least one")
        for name, values in arrays.items():
            if not GROUP.fullmatch(name):
                raise StoreError(
                    f"{where}: tensor {name!r} must be 1 to 64 of the letters A-Z a-z 0-9 _ . - "
                    "and not begin with a dot: rename it"
                )
            if values.dtype.name not in DTYPES:
                raise StoreError(
                    f"{where}: tensor {name!r} is {values.dtype} but must be one of {types}: "
                    "convert it"
                )
        for name, values in arrays.items():
            native = values.dtype.newbyteorder("=")
            self._waiting[f"{self._rows}/{name}"] = np.array(values, native, order="C")
        self._rows += 1
        if self._rows % self._rows_per_part == 0:
            self._write()
        return self._rows - 1

    def finish(self) -> TableFacts:
        """Write what is left and make the folder durable; raises StoreError."""
        if self._waiting:
            self._write()
        with explain_os_errors(f"sync {self._folder}"):
            sync_folder(self._folder)
        return TableFacts(rows=self._rows, rows_per_part=self._rows_per_part)

    def _write(self) -> None:
        path = self._folder / part_file((self._rows - 1) // self._rows_per_part)
        with explain_os_errors(f"write {path}"):
            write_file(path, [save(self._waiting)])
        self._waiting = {}


@dataclass
class _Part:
    """An open file of a table."""

    mapped: MappedFile
    tensors: Any
    """What safetensors reads of it."""
    names: Mapping[int, Sequence[str]]
    """Of the tensors of every row."""
    checked_s: float = field(default_factory=monotonic)

    def unchanged_lately(self) -> bool:
        """Whether the file lies there as it was when one last looked, `RECHECK_S` ago."""
        if monotonic() - self.checked_s < RECHECK_S:
            return True
        self.checked_s = monotonic()
        return self.mapped.unchanged()


class SideTable:
    """A table of tensors: `table[row]` is a row, `len(table)` their number.

    Files are opened when first needed, and at most `OPEN_PARTS` stay so. With `sums`, by the names
    of the files, each is compared with its own before a tensor of it is handed out, and again when
    it is not as it was then. Processes may fork a table or pickle it; threads may share it.
    """

    def __init__(
        self, folder: str | Path, facts: TableFacts, sums: Mapping[str, FileSum] | None = None
    ) -> None:
        self.folder = Path(folder).absolute()
        self.facts = facts
        self._sums = sums
        self._open: Recent[_Part] = Recent(OPEN_PARTS)
        self._verified: dict[int, Identity] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels as its path: another process opens the files again."""
        return SideTable, (self.folder, self.facts, self._sums)

    def __len__(self) -> int:
        return self.facts.rows

    def __getitem__(self, row: int) -> dict[str, Array]:
        """Tensors of a row by name, copied.

        Raises RowNotFound (an IndexError), StoreError when its file is missing, altered or none of
        a table.
        """
        if not isinstance(row, int | np.integer) or not 0 <= row < self.facts.rows:
            raise RowNotFound(
                f"row {row!r} is not in the table {self.folder}: it has the rows 0 to "
                f"{self.facts.rows - 1}"
            )
        part = self._part(int(row) // self.facts.rows_per_part)
        with _blaming(Path(part.mapped.path)):
            return {name: part.tensors.get_tensor(f"{row}/{name}") for name in part.names[int(row)]}

    def check(self) -> None:
        """Read all files whole; raises StoreError."""
        for part in range(self.facts.parts):
            self.check_part(part)

    def check_part(self, part: int) -> None:
        """Read a file whole, its sum and every tensor, whatever is known; raises StoreError."""
        self._verified.pop(part, None)
        opened = self._opened(part)
        with _blaming(Path(opened.mapped.path)):
            for row, names in opened.names.items():
                for name in names:
                    opened.tensors.get_tensor(f"{row}/{name}")

    def _part(self, number: int) -> _Part:
        part = self._open.get(number)
        if part is None or not part.unchanged_lately():
            self._open.make_room()
            part = self._opened(number)
            self._open.put(number, part)
        return part

    def _opened(self, number: int) -> _Part:
        path = self.folder / part_file(number)
        with _blaming(path):
            mapped = MappedFile.open(path)
            known = self._verified.get(number) == mapped.identity
            if not known and self._sums is not None:
                expected = self._sums[path.name]
                check_size(mapped.identity.bytes, expected, "it")
                check_sum(mapped.content, expected, "it")
            tensors: Any = safe_open(path, framework="numpy")
            # Not the time of change: that of a file changes when it is linked into another store.
            if Identity.of(os.lstat(path))[:3] != mapped.identity[:3]:
                raise StoreError("it was written to meanwhile")
            if not known:
                self._check_names(number, tensors)
        self._verified[number] = mapped.identity
        names: dict[int, list[str]] = defaultdict(list)
        for key in tensors.keys():  # noqa: SIM118, it is no mapping
            row, _, name = key.partition("/")
            names[int(row)].append(name)
        return _Part(mapped, tensors, names)

    def _check_names(self, number: int, tensors: Any) -> None:
        """Refuse a file with other rows than its own, or other types; raises StoreError."""
        start = number * self.facts.rows_per_part
        rows = range(start, min(start + self.facts.rows_per_part, self.facts.rows))
        found = set()
        for key in tensors.keys():  # noqa: SIM118, it is no mapping
            match, dtype = KEY.fullmatch(key), tensors.get_slice(key).get_dtype()
            if match is None or int(match["row"]) not in rows:
                raise StoreError(f"it holds {key!r}, which is in none of the rows {rows}")
            if dtype not in DTYPES.values():
                raise StoreError(f"it holds {key!r} of the type {dtype}, which no table has")
            found.add(int(match["row"]))
        if len(found) < len(rows):
            raise StoreError(f"it holds {len(found)} rows but must hold {len(rows)}")


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Ascribe what goes wrong in the block to a file; raises StoreError."""
    try:
        with explain_os_errors(f"read {path}"):
            yield
    except SystemFailure:
        raise
    except (StoreError, SafetensorError) as error:
        raise StoreError(f"{path}: {error}: restore it from a copy") from error
