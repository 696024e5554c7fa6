"""Where images come from: a folder with a table of them, or the demo's digits."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.diffusion.image_config import TargetSource
from stages.diffusion.images import Mode, read_image
from stages.errors import UserError
from stages.rejections import Rejection

TABLES = ("metadata.jsonl", "metadata.csv")
T = TypeVar("T")


class ImageRow(BaseModel):
    """What is read of a row of a table; other keys are ignored."""

    model_config = ConfigDict(
        frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    file_name: str = Field(min_length=1)
    """Path of the image below the folder of the table."""
    text: str | None = None
    """Its caption."""
    texts: tuple[str, ...] | None = None
    """Its captions, of which each text variation draws one."""
    label: Annotated[int, Field(ge=0)] | str | None = None
    """Its class: a number, or a name."""
    mask: str | None = None
    """Path of a grey image of the same size: white is what matters."""
    target: TargetSource = "teacher"
    """What a student learns of it."""
    weight: float = Field(1.0, gt=0)
    """Weight of its rows in training."""
    split: Annotated[str, Field(pattern="^(train|dev|test)$")] | None = None
    """Its split; drawn where there is none."""

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions, without blanks at their ends."""
        given = ([] if self.text is None else [self.text]) + list(self.texts or ())
        return tuple(text.strip() for text in given)


@dataclass(frozen=True)
class Listed:
    """A row of a source, sound or not."""

    file: str
    """What stands for it where it is rejected: the image's path, or the number of the line."""
    row: ImageRow | None
    fault: str = ""
    """Why there is no row: a kind, a colon, and what was found."""


class ImageSource(Protocol):
    """Rows in order, and the images that they name."""

    rows: list[Listed]
    digest: str
    """Hexadecimal sha256 of the table of rows."""

    def content(self, file: str) -> str:
        """Hexadecimal sha256 of a file; raises Rejection where it is missing or not to be read."""
        ...

    def image(self, file: str, mode: Mode) -> Image.Image:
        """Read an image; raises Rejection where that cannot be done."""
        ...


class ImageFolder:
    """A folder with metadata.jsonl or metadata.csv and the images that it names."""

    def __init__(self, folder: Path) -> None:
        """Read the table; raises UserError when there is not exactly one, or it is damaged."""
        self._root = folder.resolve()
        table = find_table(folder)
        content = table.read_bytes()
        self.digest = hashlib.sha256(content).hexdigest()
        self.rows = _read_table(table, content)
        if not self.rows:
            raise UserError(f"{table} has no rows, so there is nothing to prepare")

    def content(self, file: str) -> str:
        """Hexadecimal sha256 of a file; raises Rejection."""
        return self._read(file, lambda opened: hashlib.file_digest(opened, "sha256").hexdigest())

    def image(self, file: str, mode: Mode) -> Image.Image:
        """Read an image; raises Rejection."""
        return self._read(file, lambda opened: read_image(opened, mode))

    def _read(self, file: str, read: Callable[[BufferedReader], T]) -> T:
        try:
            path = (self._root / file).resolve()
            if not path.is_relative_to(self._root):
                raise Rejection(f"file outside the folder: {file}")
            if not path.is_file():
                raise Rejection(f"missing file: {file}")
            with path.open("rb") as opened:
                return read(opened)
        except OSError as error:
            raise Rejection(f"unreadable file: {file}: {error.strerror}") from error
        except ValueError as error:  # a zero byte in the path
            raise Rejection(f"unreadable file: {file!r}: {error}") from error
        except RuntimeError as error:  # from `resolve`, before Python 3.13
            raise Rejection(f"unreadable file: {file}: links lead in a circle") from error


def require_scikit_learn() -> Callable[[], Any]:
    """Return what loads the digits; raises `UserError` where scikit-learn is missing."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise UserError(
            "prepare.digits needs scikit-learn, which is not installed: "
            "pip install 'foretell[diffusion]'"
        ) from error
    load: Callable[[], Any] = load_digits
    return load


@dataclass
class Digits:
    """Scikit-learn's 1,797 handwritten digits, 8×8, 17 levels of grey that reach from 0 to 255."""

    rows: list[Listed] = field(init=False)
    digest: str = field(init=False)
    _images: Mapping[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        """Load them; raises UserError where scikit-learn is missing."""
        digits = require_scikit_learn()()
        levels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        names = [f"digits/{number:04d}" for number in range(len(levels))]
        self._images = dict(zip(names, levels, strict=True))
        self.rows = [
            Listed(name, ImageRow(file_name=name, label=int(label)))
            for name, label in zip(names, digits.target, strict=True)
        ]
        self.digest = hashlib.sha256(levels.tobytes()).hexdigest()

    def content(self, file: str) -> str:
        """Hexadecimal sha256 of the pixels of a digit."""
        return hashlib.sha256(self._images[file].tobytes()).hexdigest()

    def image(self, file: str, mode: Mode) -> Image.Image:
        """Return a digit."""
        return Image.fromarray(self._images[file]).convert(mode)


def find_table(source: Path) -> Path:
    """The table of a folder of images; raises UserError where there is not exactly one."""
    if not source.is_dir():
        raise UserError(f"prepare.source={source} is no folder: name one that holds images")
    found = [path for name in TABLES if (path := source / name).is_file()]
    if len(found) != 1:
        raise UserError(
            f"prepare.source={source} holds {len(found)} tables, but exactly one of "
            f"{' and '.join(TABLES)} is needed; docs/images.md shows what they hold"
        )
    return found[0]


def _read_table(table: Path, content: bytes) -> list[Listed]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{table} is not UTF-8 ({error}); convert it with iconv") from error
    rows = _json_rows(table, text) if table.suffix == ".jsonl" else _csv_rows(table, text)
    return [_listed(number, row) for number, row in rows]


def _json_rows(table: Path, text: str) -> Iterator[tuple[int, ImageRow | ValidationError]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, ImageRow.model_validate_json(line)
        except ValidationError as error:
            if not all(fault["loc"] for fault in error.errors()):
                raise UserError(
                    f"{table} line {number} is no row: {error.errors()[0]['msg']}; one JSON object "
                    "a line is needed, as docs/images.md shows"
                ) from error
            yield number, error


def _csv_rows(table: Path, text: str) -> Iterator[tuple[int, ImageRow | ValidationError]]:
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(lines, [])]
        _check_header(table, header)
        for cells in lines:
            if len(cells) not in (0, len(header)):
                raise UserError(
                    f"{table} line {lines.line_num} has {len(cells)} cells, but the header has "
                    f"{len(header)}: quote cells that hold commas"
                )
            given = {name: cell for name, cell in zip(header, cells, strict=False) if cell.strip()}
            if cells:
                yield lines.line_num, _of_cells(given)
    except csv.Error as error:
        raise UserError(f"{table} line {lines.line_num} is no CSV: {error}") from error


def _check_header(table: Path, header: Sequence[str]) -> None:
    if "file_name" not in header or len(set(header)) < len(header):
        raise UserError(
            f"{table} has the columns {header}: its first line must name each column once, "
            "file_name among them"
        )
    if "texts" in header:
        raise UserError(
            f"{table} has a column texts, but a cell is one caption: name it text, or list "
            "captions in metadata.jsonl"
        )


def _of_cells(cells: Mapping[str, str]) -> ImageRow | ValidationError:
    try:
        return ImageRow.model_validate(cells, strict=False)
    except ValidationError as error:
        return error


def _listed(number: int, row: ImageRow | ValidationError) -> Listed:
    if isinstance(row, ImageRow):
        return Listed(row.file_name, row)
    faults: dict[str, str] = {str(f["loc"][0]): f["msg"] for f in row.errors()}
    found = "; ".join(f"{key}: {message}" for key, message in faults.items())
    return Listed(f"line {number}", None, f"unreadable row: {found}")
