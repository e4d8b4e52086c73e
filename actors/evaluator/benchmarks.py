"""Published benchmarks: where each is found, how its rows are laid out, and its problems as an environment.

How they are scored in publications, which is for the operator to set (`eval.samples_per_problem`, `eval.temperature`):

| benchmark | problems | usual score | remarks |
|---|---|---|---|
| amc | 83 (AMC 12 of 2022 and 2023; math-ai/amc23 has 40) | avg@8 or avg@32, temperature 0.6 to 1 | |
| aime24, aime25 | 30 | avg@32, temperature 0.6 to 1 | integers from 0 to 999 |
| math500 | 500 | one greedy answer, or avg@4 | categories: subjects |
| gsm8k | 1,319 (test) | one greedy answer | few-shot in the paper, none here |
| mmlu_pro | 12,032 (test) | one greedy answer | 14 categories; five worked examples in the paper, none here |

CHORD's own: avg@32 on AIME, avg@8 on AMC, MMLU-Pro; temperature 1.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from actors.environment import Environment
from common.config.evaluation import BenchmarkName
from common.errors import OperatorError
from common.tables import (
    INTEGER,
    TEXT,
    TEXT_OR_NUMBER,
    TEXTS,
    TableRow,
    clip,
    read_table,
    refuse_split,
    take,
    take_if_any,
)

_SPLIT = re.compile(r"(.+)\[([\w.-]+)\]")
"""A dataset id with a split."""
_PARTS = {"question": "questions", "answer": "answers", "category": "categories", "options": "options"}
"""What an operator can name a column for, and the field of a layout."""
PADDING = "N/A"
"""What MMLU-Pro fills up missing options with."""


@dataclass(frozen=True)
class Layout:
    """How a benchmark is published."""

    sources: Mapping[str, str]
    """Dataset id → split, of publications in this layout; the first is taken where no source is named."""
    questions: tuple[str, ...]
    """Names that the column has in one or the other of them; so below."""
    answers: tuple[str, ...]
    categories: tuple[str, ...] = ()
    options: tuple[str, ...] = ("options",)
    is_multiple_choice: bool = False
    accepts: Callable[[str], bool] = lambda _: True
    """Whether an answer is one that the benchmark can have."""
    expected: str = "a final answer"
    """What `accepts` accepts, for messages."""


@dataclass(frozen=True)
class Benchmark:
    """Its problems, all held out."""

    environment: Environment
    golds: Sequence[str]
    """Right answers, by problem."""


@dataclass(frozen=True)
class Row:
    """One problem as it was read."""

    where: str
    question: str
    answer: str
    category: str
    options: tuple[str, ...] = ()


def _is_below_1000(answer: str) -> bool:
    return re.fullmatch(r"\d{1,3}", answer) is not None


_AIME = {"questions": ("problem", "question", "Problem"), "answers": ("answer", "Answer", "solution", "Solution")}

LAYOUTS: dict[BenchmarkName, Layout] = {
    BenchmarkName.AMC: Layout(
        sources={"AI-MO/aimo-validation-amc": "train", "math-ai/amc23": "test", "zwhe99/amc23": "test"},
        questions=("problem", "question"),
        answers=("answer",),
    ),
    BenchmarkName.AIME24: Layout(
        sources={"HuggingFaceH4/aime_2024": "train", "Maxwell-Jia/AIME_2024": "train", "math-ai/aime24": "test"},
        **_AIME,
        accepts=_is_below_1000,
        expected="an integer from 0 to 999",
    ),
    BenchmarkName.AIME25: Layout(
        sources={"math-ai/aime25": "test", "yentinglin/aime_2025": "train", "MathArena/aime_2025": "train",
                 "opencompass/AIME2025": "test"},
        **_AIME,
        accepts=_is_below_1000,
        expected="an integer from 0 to 999",
    ),
    BenchmarkName.MATH500: Layout(
        sources={"HuggingFaceH4/MATH-500": "test", "math-ai/math500": "test"},
        questions=("problem",),
        answers=("answer",),
        categories=("subject",),
    ),
    BenchmarkName.GSM8K: Layout(sources={"openai/gsm8k:main": "test"}, questions=("question",), answers=("answer",)),
    BenchmarkName.MMLU_PRO: Layout(
        sources={"TIGER-Lab/MMLU-Pro": "test"},
        questions=("question",),
        answers=("answer",),
        categories=("category",),
        is_multiple_choice=True,
    ),
}  # fmt: skip


def load_benchmark(name: str, source: str = "") -> Benchmark:
    """Read `source` (a file, or a dataset id, `owner/name[split]` where the split is not the usual one).

    After a question mark it may name columns: `?question=prompt&answer=reward_model.ground_truth`. Raises
    OperatorError, in one line, where it cannot be had or a row is not in the layout.
    """
    source, _, columns = source.partition("?")
    layout = _with_columns(LAYOUTS[BenchmarkName(name)], columns, name)
    if match := _SPLIT.fullmatch(source):
        refuse_split(match[1], match[2], name=f"eval.benchmarks: {name}")
    table, split = split_of_source(layout, source or next(iter(layout.sources)))
    rows = list(_read_rows(layout, table, split))
    if not rows:
        raise OperatorError(f"eval.benchmarks: {name}: got no rows from {table}, expected problems")
    return _multiple_choice(rows) if layout.is_multiple_choice else _mathematics(rows)


def split_of_source(layout: Layout, source: str) -> tuple[str, str]:
    """Where to read, and which split: the one named in brackets, else the published one, else test."""
    if match := _SPLIT.fullmatch(source):
        return match[1], match[2]
    published = {key.partition(":")[0]: split for key, split in layout.sources.items()}
    return source, published.get(source.partition(":")[0], "test")


def _with_columns(layout: Layout, columns: str, name: str) -> Layout:
    """The layout with the columns that an operator names instead of the published ones."""
    named: dict[str, tuple[str, ...]] = {}
    for pair in columns.split("&") if columns else ():
        part, _, column = pair.partition("=")
        if part not in _PARTS or not column:
            expected = f"PART=COLUMN&… of {', '.join(_PARTS)}"
            raise OperatorError(f"eval.benchmarks: {name}: got {clip(pair)} after the ?, expected {expected}")
        named[_PARTS[part]] = (column,)
    return replace(layout, **named)


def _read_rows(layout: Layout, source: str, split: str) -> Iterator[Row]:
    read = _read_choice if layout.is_multiple_choice else _read_mathematics
    for row in read_table(source, split=split):
        yield read(layout, row)


def _read_mathematics(layout: Layout, row: TableRow) -> Row:
    """The answer may be the end of a solution, in a box or after ####."""
    from actors.environments.answers import gold_answer

    question = take(row, layout.questions, TEXT)
    given = take(row, layout.answers, TEXT_OR_NUMBER)
    answer = _without_zero_decimals(gold_answer(given) or "")
    if not answer or not layout.accepts(answer):
        column = next(column for column in layout.answers if row.values.get(column) is not None)
        raise OperatorError(f"{row.where}: {column}: got {clip(given)}, expected {layout.expected}")
    return Row(row.where, question, answer, _category_of(layout, row))


def _read_choice(layout: Layout, row: TableRow) -> Row:
    """The letter and, where there is one, the index must name the same option; padding is left out after that."""
    question, options = take(row, layout.questions, TEXT), take(row, layout.options, TEXTS)
    given = take(row, layout.answers, TEXT)
    index = ord(given) - ord("A") if len(given) == 1 else -1
    if not 0 <= index < len(options) or options[index] == PADDING:
        raise OperatorError(
            f"{row.where}: answer: got {clip(given)}, expected the letter of one of {len(options)} options"
        )
    answer_index = take_if_any(row, ("answer_index",), INTEGER)
    if answer_index not in (None, index):
        raise OperatorError(
            f"{row.where}: answer_index: got {answer_index} with answer {clip(given)}, expected {index}"
        )
    kept = [option for option in options if option != PADDING]
    if not 2 <= len(kept) <= 26:
        raise OperatorError(f"{row.where}: options: got {len(kept)}, expected 2 to 26")
    letter = chr(ord("A") + sum(option != PADDING for option in options[:index]))
    return Row(row.where, question, letter, _category_of(layout, row), tuple(kept))


def _mathematics(rows: Sequence[Row]) -> Benchmark:
    from actors.environments.math import MathProblems, MathTask

    tasks = [MathTask(row.question, row.answer, row.where, row.category) for row in rows]
    return Benchmark(MathProblems(train=[], held_out=tasks), [row.answer for row in rows])


def _multiple_choice(rows: Sequence[Row]) -> Benchmark:
    from actors.environments.multiple_choice import ChoiceProblems, ChoiceTask

    tasks = [ChoiceTask(row.question, row.options, row.answer, row.where, row.category) for row in rows]
    return Benchmark(ChoiceProblems(train=[], held_out=tasks), [row.answer for row in rows])


def _category_of(layout: Layout, row: TableRow) -> str:
    return take(row, layout.categories, TEXT) if layout.categories else ""


def _without_zero_decimals(answer: str) -> str:
    """Integers are published as 27.0 too."""
    return answer[:-2] if re.fullmatch(r"-?\d+\.0", answer) else answer
