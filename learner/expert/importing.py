"""Readers of demonstrations: tables and reasoning_gym. Each yields rows for the store, or says why not."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from common.chat import ChatMessage
from common.config.schema import Config
from common.errors import ConfigError, OperatorError
from common.problems import Problem, ReasoningProblems, first_item, split_of
from common.tables import BadTableRow, TableRow, clip, read_json_lines, read_rows
from learner.expert.store import NewRow

MAX_LISTED = 20
"""Bad rows that are listed; the others are only counted."""
_EXPECTED = {"tuple_type": "a list of turns", "missing": "text", "extra_forbidden": "no keys but role and content"}
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
"""Of turns that have "from" and "value"; other roles keep their names."""
_NAMING = "--messages-column, --prompt-column and --response-column name others"
QUESTION = "{question}"


class Response(StrEnum):
    """What the expert answers to a reasoning_gym question."""

    ANSWER = "answer"
    SOLUTION = "solution"


@dataclass(frozen=True)
class BadRow:
    """Something that was read and is no demonstration."""

    line: str
    """Where it stands, what is wrong, got and expected."""


@dataclass(frozen=True)
class HeldOutRow:
    """Something that was read and is kept for evaluation."""


class Screen:
    """Lets rows through; held-out ones are left out and counted, bad ones too, or else they end the import."""

    def __init__(self, *, skip_bad_rows: bool) -> None:
        self.listed: list[str] = []
        """The first bad rows, at most MAX_LISTED."""
        self.num_bad = 0
        self.num_held_out = 0
        self._skip_bad_rows = skip_bad_rows

    def good(self, rows: Iterable[NewRow | BadRow | HeldOutRow]) -> Iterator[NewRow]:
        """The good rows. Raises OperatorError at the end, unless bad rows are skipped and there were any."""
        for row in rows:
            if isinstance(row, HeldOutRow):
                self.num_held_out += 1
            elif isinstance(row, BadRow):
                self.num_bad += 1
                self.listed += [row.line] if self.num_bad <= MAX_LISTED else []
            elif self._skip_bad_rows or not self.num_bad:
                yield row
        if self.num_bad and not self._skip_bad_rows:
            hint = f"{self.num_bad:,} bad rows, nothing was imported; --skip-bad-rows leaves them out"
            shown = f" (the first {MAX_LISTED} are listed)" if self.num_bad > MAX_LISTED else ""
            raise OperatorError("\n".join([*self.listed, hint + shown]))


@dataclass(frozen=True)
class DemonstrationColumns:
    """Where a row has its parts: the first of each that has a value."""

    prompt: tuple[str, ...] = ("prompt",)
    response: tuple[str, ...] = ("response",)
    messages: tuple[str, ...] = ("messages",)
    """They go before prompt and response."""
    source: tuple[str, ...] = ("source",)
    """What the store is to name as the row's source; without it, the table."""

    @property
    def expected(self) -> str:
        """For messages."""
        messages, prompt, response = map(_alternatives, (self.messages, self.prompt, self.response))
        both = f"{prompt} and {response}" if prompt and response else ""
        return ", or ".join(form for form in (messages, both) if form)


USUAL_COLUMNS = DemonstrationColumns(
    ("prompt", "question", "problem"), ("response", "solution", "answer"), ("messages", "conversations"), ()
)
"""Of tables that others made."""


@dataclass(frozen=True)
class PromptForm:
    """What is made of a prompt; messages are left as they are."""

    system_prompt: str = ""
    """Goes before it."""
    template: str | None = None
    """The prompt stands where it has {question}; None: as it is."""

    def __post_init__(self) -> None:
        if self.template is not None and QUESTION not in self.template:
            raise OperatorError(f'--prompt-template: got "{self.template}", expected text with {QUESTION}')

    def ask(self, prompt: str) -> str:
        return (self.template or QUESTION).replace(QUESTION, prompt)

    def question_in(self, turn: str) -> str | None:
        """What was asked in a turn of this form; None where it is of another."""
        before, _, after = (self.template or QUESTION).partition(QUESTION)
        has_form = turn.startswith(before) and turn.endswith(after) and len(turn) > len(before) + len(after)
        return turn.removeprefix(before).removesuffix(after) if has_form else None


class _Parts(BaseModel):
    """What is read of a row; its other columns are of no concern."""

    messages: tuple[ChatMessage, ...] | None = None
    prompt: str | None = None
    response: str | None = None
    source: str | None = None


def read_jsonl(paths: Sequence[Path], *, system_prompt: str = "") -> Iterator[NewRow | BadRow]:
    """Rows of JSON lines: {"messages": [{"role", "content"}, …]} or {"prompt", "response"}, "source" if given.

    `system_prompt` goes before a prompt, never into messages. Raises OperatorError where a file cannot be read.
    """
    form = PromptForm(system_prompt)
    for path in paths:
        for row in _at_least_one(read_json_lines(path), str(path)):
            yield _read_row(row, DemonstrationColumns(), form=form, place=path.name)


def read_tables(
    sources: Sequence[str],
    *,
    split: str = "train",
    columns: DemonstrationColumns = USUAL_COLUMNS,
    form: PromptForm = PromptForm(),
    leave_out_held_out: bool = False,
) -> Iterator[NewRow | BadRow | HeldOutRow]:
    """Rows of tables, as `common.tables.read_rows` takes them; a turn may be {"from", "value"}, as in ShareGPT.

    `leave_out_held_out` tells rows apart whose question, as it stands in the table, belongs to the held-out split; in
    messages `form` tells it. Raises OperatorError where a table cannot be read, or messages are not of that form.
    """
    for source in sources:
        place = Path(source).name if Path(source).exists() else source
        for row in _at_least_one(read_rows(source, split=split), source):
            is_held_out = leave_out_held_out and isinstance(row, TableRow) and _is_held_out(row, columns, form)
            yield HeldOutRow() if is_held_out else _read_row(row, columns, form=form, place=place)


def read_reasoning_gym(config: Config, *, num_rows: int, response: Response) -> Iterator[NewRow | BadRow]:
    """The first `num_rows` distinct training questions of the run's environment, fewer where it has no more.

    Raises ConfigError where the environment is no reasoning_gym family.
    """
    options: dict[str, Any] = {"seed": first_item(config.run.seed)} | config.environment.options
    if config.environment.name != "reasoning_gym":
        raise ConfigError([f'environment.name: got "{config.environment.name}", expected "reasoning_gym"'])
    if not isinstance(options.get("family"), str):
        raise ConfigError(["environment.options: got no family, expected one of reasoning_gym, such as chain_sum"])
    problems = ReasoningProblems(**options)
    questions = islice(problems.distinct("train"), num_rows)
    return (_solved(problems, problem, response) for problem in questions)


def _solved(problems: ReasoningProblems, problem: Problem, response: Response) -> NewRow | BadRow:
    """The question with its response, which must score as right: some families' solutions are no answers at all."""
    text = problem.answer if response is Response.ANSWER else problem.solution
    score = problems.score(problem, text)
    if score < 1.0 or not text.strip():
        question, got = clip(problem.question), clip(text)
        where = f"reasoning_gym {problems.family}: question {question}"
        return BadRow(f"{where}: the {response} {got} scores {score:g}, expected 1 (an expert row must be right)")
    return NewRow((*problem.messages, _assistant(text)), f"reasoning_gym:{problems.family}")


def _at_least_one(rows: Iterator[TableRow | BadTableRow], source: str) -> Iterator[TableRow | BadTableRow]:
    first = next(rows, None)
    if first is None:
        raise OperatorError(f"{source}: got no rows, expected at least one demonstration")
    yield first
    yield from rows


def _read_row(
    row: TableRow | BadTableRow, columns: DemonstrationColumns, *, form: PromptForm, place: str
) -> NewRow | BadRow:
    if isinstance(row, BadTableRow):
        return BadRow(row.line)
    found = _found(row, columns)
    values = {part: row.values[column] for part, column in found.items()}
    try:
        parts = _Parts.model_validate(values | {"messages": _turns(values.get("messages"))})
    except ValidationError as error:
        return BadRow(f"{row.where}: {_mistake(error, found)}")
    messages = parts.messages if parts.messages is not None else _conversation(parts, form)
    mistake = _mistake_in(messages, row, columns)
    if mistake:
        return BadRow(f"{row.where}: {mistake}")
    return NewRow(messages, place if parts.source is None else parts.source)


def _found(row: TableRow, columns: DemonstrationColumns) -> dict[str, str]:
    """The column that holds each part of a demonstration, of those parts that the row has."""
    wanted = {part: getattr(columns, part) for part in ("messages", "prompt", "response", "source")}
    present = {part: [name for name in names if row.values.get(name) is not None] for part, names in wanted.items()}
    unwanted = ("prompt", "response") if present["messages"] else ()
    return {part: names[0] for part, names in present.items() if names and part not in unwanted}


def _is_held_out(row: TableRow, columns: DemonstrationColumns, form: PromptForm) -> bool:
    """Whether the environments of questions keep the row's question for evaluation."""
    found = _found(row, columns)
    if "messages" not in found:
        question = row.values[found["prompt"]] if "prompt" in found else None
        return isinstance(question, str) and split_of(question) == "held_out"
    turns = _turns(row.values[found["messages"]]) or ()
    asked = next((turn.get("content") for turn in turns if isinstance(turn, dict) and turn.get("role") == "user"), None)
    if not isinstance(asked, str):
        return False  # a bad row, of which is told elsewhere
    question = form.question_in(asked) if form.template else None
    if question is None:
        got = f"{row.where}: --leave-out-held-out: got {clip(asked)}"
        raise OperatorError(f'{got}, expected --prompt-template to be its form ("{QUESTION}" where it is bare)')
    return split_of(question) == "held_out"


def _turns(messages: Any) -> Any:
    """Turns with "role" and "content", also where they had "from" and "value"; what is no turn stays what it is."""
    return [_turn(message) for message in messages] if isinstance(messages, list) else messages


def _turn(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    turn = {key: value for key, value in message.items() if value is not None}  # Parquet has all keys in all turns
    if "from" in turn and "role" not in turn:
        role = turn.pop("from")
        turn["role"] = _ROLES.get(role, role) if isinstance(role, str) else role
    if "value" in turn and "content" not in turn:
        turn["content"] = turn.pop("value")
    return turn


def _conversation(parts: _Parts, form: PromptForm) -> tuple[ChatMessage, ...]:
    """Prompt and response as messages; empty where either is missing."""
    if parts.prompt is None or parts.response is None:
        return ()
    system = (ChatMessage(role="system", content=form.system_prompt),) if form.system_prompt else ()
    return (*system, ChatMessage(role="user", content=form.ask(parts.prompt)), _assistant(parts.response))


def _alternatives(columns: Sequence[str]) -> str:
    return " or ".join(f'"{column}"' for column in columns)


def _assistant(text: str) -> ChatMessage:
    return ChatMessage(role="assistant", content=text)


def _mistake_in(messages: Sequence[ChatMessage], row: TableRow, columns: DemonstrationColumns) -> str:
    """What keeps a conversation from being a demonstration, else nothing; every assistant turn bears loss."""
    if not messages:
        if columns == DemonstrationColumns():
            return f"got no messages, expected {columns.expected}"
        return f"got columns {', '.join(row.values)}, expected {columns.expected} ({_NAMING})"
    roles = [message.role for message in messages]
    if roles[-1] != "assistant":
        return f'messages: got a last turn of role "{roles[-1]}", expected "assistant"'
    if "user" not in roles[: roles.index("assistant")]:
        return 'messages: got no turn of role "user" before the assistant\'s, expected one'
    for index, message in enumerate(messages):
        if message.role == "assistant" and not message.content.strip():
            return f"messages[{index}].content: got {clip(message.content)}, expected what the assistant says"
    return ""


def _mistake(error: ValidationError, found: Mapping[str, str]) -> str:
    first = error.errors()[0]
    part, *within = first["loc"]
    name = found[str(part)] + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in within)
    got = "nothing" if first["type"] == "missing" else clip(first["input"])
    expected = _EXPECTED.get(first["type"]) or first["msg"].removeprefix("Input should be ")
    return f"{name}: got {got}, expected {expected}"
