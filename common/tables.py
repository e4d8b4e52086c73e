"""Tables of questions, answers or demonstrations: JSON lines, Parquet, or a dataset of the Hugging Face hub by its id.

Files are streamed as they lie; a dataset id goes through the `datasets` library and its cache.
"""

import codecs
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from pydantic_core import from_json

from common.errors import OperatorError

T = TypeVar("T")

HUB_TIMEOUT_S = 10.0
"""Longest wait for the hub's first word; where none comes, only what `datasets` has cached can be read."""
EXPECTED_SOURCE = "a .jsonl or .parquet file, a folder of .parquet files, or a dataset id owner/name[:config]"
_DATASET_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.+-]+)?")
_SPLIT_NAMES = ("train", "validation", "valid", "dev", "test")
"""What the file names of a downloaded dataset begin with."""
_BATCH_ROWS = 1024
_MAX_GOT_CHARS = 60
_MAX_REASON_CHARS = 300


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
        yield from _read_dataset(source, split)


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
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else _as_text(value)


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
"""Numbers are read as text."""
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
    return TableRow(where, cast("dict[str, Any]", values))


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
        reason = getattr(error, "strerror", None) or _in_one_line(error)
        raise OperatorError(f"{path}: cannot be read ({reason}), expected a Parquet file") from error


def _read_dataset(source: str, split: str) -> Iterator[TableRow]:
    dataset = _load_dataset(source, split).with_format("arrow")  # as stored: media columns stay undecoded
    yield from _numbered(dataset.iter(batch_size=_BATCH_ROWS), f"{source}[{split}]")


def _numbered(batches: Any, place: str) -> Iterator[TableRow]:
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            number += 1
            yield TableRow(f"{place} row {number}", values)


def _load_dataset(source: str, split: str) -> Any:
    """One split by its id; where the hub does not answer, what is cached of it."""
    import datasets  # pyright: ignore[reportMissingTypeStubs]
    import huggingface_hub
    import huggingface_hub.constants

    libraries = cast(Any, datasets), cast(Any, huggingface_hub)
    levels = [library.logging.get_verbosity() for library in libraries]
    was_offline = huggingface_hub.constants.HF_HUB_OFFLINE
    name, _, config = source.partition(":")
    reason = ""
    try:
        for library in libraries:
            library.logging.set_verbosity(50)  # what goes wrong is told below, in one line
            if not sys.stderr.isatty():
                library.utils.disable_progress_bars()
        reason = _unreachable(name)
        if reason:
            huggingface_hub.constants.HF_HUB_OFFLINE = True  # else every file is asked for six times, with pauses
        return cast(Any, datasets).load_dataset(name, config or None, split=split)
    except Exception as error:
        is_uncached = reason and isinstance(error, ConnectionError)
        got = f"not cached, and the hub cannot be reached: {reason}" if is_uncached else _in_one_line(error)
        raise OperatorError(f"{source}[{split}]: cannot be fetched ({got}), expected {EXPECTED_SOURCE}") from error
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = was_offline
        for library, level in zip(libraries, levels, strict=True):
            library.logging.set_verbosity(level)


def _unreachable(name: str) -> str:
    """Why the hub cannot be asked for the dataset `name`, empty where it answered: whatever it says, it is there."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
    except HfHubHTTPError:
        return ""
    except Exception as error:
        return _in_one_line(error) or type(error).__name__
    return ""


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= _MAX_REASON_CHARS else text[: _MAX_REASON_CHARS - 1] + "…"
