"""Tables of questions, answers or demonstrations: JSON lines, Parquet, or a dataset of the Hugging Face hub by its id.

Files are streamed as they lie; a dataset id goes through `common.hub`.
"""

import codecs
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from pydantic_core import from_json

from common.errors import OperatorError
from common.hub import EXPECTED_SOURCE, fetch_batches, in_one_line

T = TypeVar("T")

_DATASET_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.+-]+)?")
_SPLIT_NAMES = ("train", "validation", "valid", "dev", "test")
"""What the file names of a downloaded dataset begin with."""
_BATCH_ROWS = 1024
_MAX_GOT_CHARS = 60


class Columns(Mapping[str, Any]):
    """The values of a row by column; outer.inner is a column of the object in the column `outer`."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __getitem__(self, name: str) -> Any:
        outer, dot, inner = name.partition(".")
        if name in self._values or not dot:
            return self._values[name]
        nested = self._values[outer]
        if not isinstance(nested, Mapping):
            raise KeyError(name)
        return Columns(cast("Mapping[str, Any]", nested))[inner]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclass(frozen=True)
class TableRow:
    """One row as it was read."""

    where: str
    """For messages: "questions.jsonl:12", "train.parquet row 3", "owner/name[test] row 3"; lines and rows from 1."""
    values: Mapping[str, Any]
    """By column. A column without a value may be None or missing."""


@dataclass(frozen=True)
class BadTableRow:
    """A line that is no row."""

    line: str
    """Where it stands, got and expected."""


@dataclass(frozen=True)
class Kind(Generic[T]):
    """What a column may hold."""

    expected: str
    """For messages, such as "text"."""
    read: Callable[[Any], T | None]
    """The value as this kind, None where it is another."""


def read_table(source: str, *, split: str = "train") -> Iterator[TableRow]:
    """Rows of `source`, in order. Raises OperatorError at a bad row, or where the source cannot be read."""
    for row in read_rows(source, split=split):
        if isinstance(row, BadTableRow):
            raise OperatorError(row.line)
        yield row


def read_rows(source: str, *, split: str = "train") -> Iterator[TableRow | BadTableRow]:
    """As `read_table`, for who goes on after a bad row."""
    path = Path(source).expanduser()
    if path.is_dir():
        for file in _parquet_files(path, split):
            yield from _read_parquet(file)
    elif path.suffix == ".jsonl":
        yield from read_json_lines(path)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.exists() or not _DATASET_ID.fullmatch(source):
        got = f"a {path.suffix or 'nameless'} file" if path.exists() else "no such file"
        raise OperatorError(f"{source}: got {got}, expected {EXPECTED_SOURCE}")
    else:
        yield from _numbered(fetch_batches(source, split), f"{source}[{split}]")


def refuse_split(source: str, split: str, *, name: str) -> None:
    """Raises OperatorError where `name` asks for a split of one file, which has none."""
    if Path(source).suffix in (".jsonl", ".parquet") and not Path(source).expanduser().is_dir():
        raise OperatorError(f"{name}: got {clip(split)} of {source}, expected no split of a single file")


def read_json_lines(path: Path) -> Iterator[TableRow | BadTableRow]:
    """Rows of a file of JSON objects, one a line; empty lines are passed over."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    yield _parse_line(raw.removeprefix(codecs.BOM_UTF8), f"{path}:{number}")
    except OSError as error:
        raise OperatorError(f"{path}: cannot be read ({error.strerror}), expected a file of JSON lines") from error


def take(row: TableRow, columns: Sequence[str], kind: Kind[T], *, name: str = "") -> T:
    """The value of the first of `columns` that has one. Raises OperatorError where none has, or of another kind.

    `name` says by what an operator can name another column, such as "environment.options.question_column".
    """
    value = take_if_any(row, columns, kind)
    if value is None:
        wanted = " or ".join(f'"{column}"' for column in columns)
        hint = f" ({name} names another)" if name else ""
        raise OperatorError(f"{row.where}: got columns {', '.join(row.values)}, expected a value of {wanted}{hint}")
    return value


def take_if_any(row: TableRow, columns: Sequence[str], kind: Kind[T]) -> T | None:
    """As `take`, but None where none of `columns` has a value."""
    for column in columns:
        got = row.values.get(column)
        if got is None:
            continue
        value = kind.read(got)
        if value is None:
            raise OperatorError(f"{row.where}: {column}: got {clip(got)}, expected {kind.expected}")
        return value
    return None


def clip(value: Any) -> str:
    """A value as one short line of JSON, for messages."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _MAX_GOT_CHARS else text[: _MAX_GOT_CHARS - 1] + "…"


def _as_text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _as_any_text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _as_integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _as_text_or_number(value: Any) -> str | None:
    if isinstance(value, Decimal):
        return f"{value:f}"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number and abs(value) < math.inf else _as_text(value)


def _as_texts(value: Any) -> list[str] | None:
    items = cast("list[Any]", value) if isinstance(value, list) else []
    return [str(item) for item in items] if items and all(_as_text_or_number(item) for item in items) else None


def _as_list(value: Any) -> list[Any] | None:
    return cast("list[Any]", value) if isinstance(value, list) else None


TEXT = Kind("text", _as_text)
"""Not blank."""
ANY_TEXT = Kind("text", _as_any_text)
"""Blank or not."""
INTEGER = Kind("an integer", _as_integer)
TEXT_OR_NUMBER = Kind("text or a number", _as_text_or_number)
"""Numbers are read as text; NaN and infinity are none."""
TEXTS = Kind("a list of texts", _as_texts)
"""Not empty; numbers in it are read as text."""
LIST = Kind("a list", _as_list)


def _parse_line(raw: bytes, where: str) -> TableRow | BadTableRow:
    try:
        values = from_json(raw)
    except ValueError as error:
        got = clip(raw.decode(errors="replace").rstrip())
        reason = str(error).replace(" at line 1 column", " at column")
        return BadTableRow(f"{where}: got {got}, expected a JSON object ({reason})")
    if not isinstance(values, dict):
        return BadTableRow(f"{where}: got {clip(values)}, expected an object")
    return TableRow(where, Columns(cast("dict[str, Any]", values)))


def _parquet_files(folder: Path, split: str) -> list[Path]:
    """The folder's files, those of `split` alone where their names begin with splits, as downloaded datasets' do."""
    files = sorted(folder.glob("*.parquet"))
    of_splits = [file for file in files if re.split(r"[-.]", file.name)[0] in (*_SPLIT_NAMES, split)]
    chosen = [file for file in of_splits if re.split(r"[-.]", file.name)[0] == split] if of_splits else files
    if not chosen:
        wanted = f" that begin with {split}" if of_splits else ""
        got = "no .parquet files" if not of_splits else f"{', '.join(file.name for file in of_splits[:5])}"
        raise OperatorError(f"{folder}: got a folder with {got}, expected .parquet files{wanted}")
    return chosen


def _read_parquet(path: Path) -> Iterator[TableRow]:
    from pyarrow import ArrowException  # pyright: ignore
    from pyarrow.parquet import ParquetFile  # pyright: ignore

    try:
        with path.open("rb") as raw, cast(Any, ParquetFile)(raw) as file:
            yield from _numbered(file.iter_batches(batch_size=_BATCH_ROWS), str(path))
    except (OSError, cast("type[Exception]", ArrowException)) as error:
        reason = getattr(error, "strerror", None) or in_one_line(error)
        raise OperatorError(f"{path}: cannot be read ({reason}), expected a Parquet file") from error


def _numbered(batches: Any, place: str) -> Iterator[TableRow]:
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            number += 1
            yield TableRow(f"{place} row {number}", Columns(values))
