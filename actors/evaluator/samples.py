"""Answers of an evaluation as JSON lines: what was scored, and what was sampled elsewhere and waits for a score."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from common.errors import OperatorError
from common.tables import INTEGER, TEXT, BadTableRow, Kind, TableRow, clip, read_json_lines, take, take_if_any

Place = tuple[str, int, int]
"""Task, problem, sample."""

_ANSWER = Kind("text", lambda value: value if isinstance(value, str) else None)
"""An answer may be empty, other than the texts of a table."""
_FLAG = Kind("true or false", lambda value: value if isinstance(value, bool) else None)


@dataclass(frozen=True)
class Sample:
    """One scored answer, as a line of `--samples` tells it."""

    task: str
    problem: int
    """Its number in the task, from 0; of a benchmark, the row of its table."""
    sample: int
    """Which of the k answers, from 0."""
    category: str
    question: str
    """The last message before the first answer."""
    gold: str
    """The right answer where the task has one at hand, else empty."""
    text: str
    reward: float
    is_correct: bool
    is_parsed: bool
    is_truncated: bool
    num_answer_tokens: int


@dataclass(frozen=True)
class SavedAnswer:
    """One answer that has no score yet."""

    where: str
    text: str
    is_truncated: bool
    num_answer_tokens: int
    """0 where its line does not tell."""


def write_samples(path: Path, samples: Iterable[Sample], *, is_begin: bool) -> None:
    """Write a line for each; after what is there already, unless this is the beginning."""
    try:
        with path.open("w" if is_begin else "a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
    except OSError as error:
        raise OperatorError(f"{path}: {error.strerror}, expected a file that can be written") from error


def read_answers(path: Path) -> Mapping[Place, SavedAnswer]:
    """The lines of `path`, by what they answer. Raises OperatorError at one that is malformed or there twice."""
    found: dict[Place, SavedAnswer] = {}
    for row in read_json_lines(path):
        if isinstance(row, BadTableRow):
            raise OperatorError(row.line)
        place = take(row, ["task"], TEXT), _number(row, "problem"), _number(row, "sample")
        if earlier := found.get(place):
            raise OperatorError(f"{row.where}: got the same task, problem and sample as {earlier.where}, expected one")
        found[place] = SavedAnswer(
            where=row.where,
            text=take(row, ["text"], _ANSWER),
            is_truncated=take_if_any(row, ["is_truncated"], _FLAG) or False,
            num_answer_tokens=take_if_any(row, ["num_answer_tokens"], INTEGER) or 0,
        )
    if not found:
        raise OperatorError(f"{path}: got no answers, expected a line for each")
    return found


def _number(row: TableRow, column: str) -> int:
    value = take(row, [column], INTEGER)
    if value < 0:
        raise OperatorError(f"{row.where}: {column}: got {clip(value)}, expected 0 or more")
    return value
