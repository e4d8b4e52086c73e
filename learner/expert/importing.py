"""Readers of demonstrations: JSON lines and reasoning_gym. Each yields rows for the store, or says why not."""

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from common.chat import ChatMessage
from common.config.schema import Config
from common.errors import ConfigError, OperatorError
from common.problems import Problem, ReasoningProblems
from learner.expert.store import NewRow

MAX_LISTED = 20
"""Bad rows that are listed; the others are only counted."""
_MAX_GOT_CHARS = 60
_EXPECTED = {"missing": "text", "extra_forbidden": "no keys but role and content"}
_TWO_FORMS = '"messages", or "prompt" and "response"'


class Response(StrEnum):
    """What the expert answers to a reasoning_gym question."""

    ANSWER = "answer"
    SOLUTION = "solution"


@dataclass(frozen=True)
class BadRow:
    """Something that was read and is no demonstration."""

    line: str
    """Where it stands, what is wrong, got and expected."""


class Screen:
    """Lets rows through; bad ones are left out and counted, or else end the import."""

    def __init__(self, *, skip_bad_rows: bool) -> None:
        self.listed: list[str] = []
        """The first bad rows, at most MAX_LISTED."""
        self.num_bad = 0
        self._skip_bad_rows = skip_bad_rows

    def good(self, rows: Iterable[NewRow | BadRow]) -> Iterator[NewRow]:
        """The good rows. Raises OperatorError at the end, unless bad rows are skipped and there were any."""
        for row in rows:
            if isinstance(row, BadRow):
                self.num_bad += 1
                self.listed += [row.line] if self.num_bad <= MAX_LISTED else []
            elif self._skip_bad_rows or not self.num_bad:
                yield row
        if self.num_bad and not self._skip_bad_rows:
            hint = f"{self.num_bad:,} bad rows, nothing was imported; --skip-bad-rows leaves them out"
            shown = f" (the first {MAX_LISTED} are listed)" if self.num_bad > MAX_LISTED else ""
            raise OperatorError("\n".join([*self.listed, hint + shown]))


class _Line(BaseModel):
    """The keys of a JSON line that are read; others are of no concern."""

    messages: tuple[ChatMessage, ...] | None = None
    prompt: str | None = None
    response: str | None = None
    source: str | None = None


def read_jsonl(paths: Sequence[Path], *, system_prompt: str = "") -> Iterator[NewRow | BadRow]:
    """Rows of JSON lines: {"messages": [{"role", "content"}, …]} or {"prompt", "response"}, "source" if given.

    `system_prompt` goes before a prompt, never into messages. Raises OperatorError where a file cannot be read.
    """
    for path in paths:
        try:
            with path.open("rb") as file:
                for number, raw in enumerate(file, start=1):
                    if raw.strip():
                        yield _read_line(raw, path=path, number=number, system_prompt=system_prompt)
        except OSError as error:
            raise OperatorError(f"{path}: cannot be read ({error.strerror}), expected a file of JSON lines") from error


def read_reasoning_gym(config: Config, *, num_rows: int, response: Response) -> Iterator[NewRow | BadRow]:
    """The first `num_rows` distinct training questions of the run's environment, fewer where it has no more.

    Raises ConfigError where the environment is no reasoning_gym family.
    """
    options: dict[str, Any] = {"seed": config.run.seed} | config.environment.options
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
        question, got = _clip(problem.question), _clip(text)
        where = f"reasoning_gym {problems.family}: question {question}"
        return BadRow(f"{where}: the {response} {got} scores {score:g}, expected 1 (an expert row must be right)")
    return NewRow((*problem.messages, _assistant(text)), f"reasoning_gym:{problems.family}")


def _read_line(raw: bytes, *, path: Path, number: int, system_prompt: str) -> NewRow | BadRow:
    where = f"{path}:{number}"
    try:
        line = _Line.model_validate_json(raw.removeprefix(codecs.BOM_UTF8))
    except ValidationError as error:
        return BadRow(f"{where}: {_mistake(raw, error)}")
    messages = line.messages if line.messages is not None else _conversation(line, system_prompt)
    mistake = _mistake_in(messages)
    if mistake:
        return BadRow(f"{where}: {mistake}")
    return NewRow(messages, path.name if line.source is None else line.source)


def _conversation(line: _Line, system_prompt: str) -> tuple[ChatMessage, ...]:
    """Prompt and response as messages; empty where either is missing."""
    if line.prompt is None or line.response is None:
        return ()
    system = (ChatMessage(role="system", content=system_prompt),) if system_prompt else ()
    return (*system, ChatMessage(role="user", content=line.prompt), _assistant(line.response))


def _assistant(text: str) -> ChatMessage:
    return ChatMessage(role="assistant", content=text)


def _mistake_in(messages: Sequence[ChatMessage]) -> str:
    """What keeps a conversation from being a demonstration, else nothing; every assistant turn bears loss."""
    if not messages:
        return f"got no messages, expected {_TWO_FORMS}"
    roles = [message.role for message in messages]
    if roles[-1] != "assistant":
        return f'messages: got a last turn of role "{roles[-1]}", expected "assistant"'
    if "user" not in roles[: roles.index("assistant")]:
        return 'messages: got no turn of role "user" before the assistant\'s, expected one'
    for index, message in enumerate(messages):
        if message.role == "assistant" and not message.content.strip():
            return f"messages[{index}].content: got {_clip(message.content)}, expected what the assistant says"
    return ""


def _mistake(raw: bytes, error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = first["msg"].removeprefix("Invalid JSON: ").replace(" at line 1 column", " at column")
        return f"got {_clip(raw.decode(errors='replace').rstrip())}, expected a JSON object ({reason})"
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).removeprefix(".")
    got = "nothing" if first["type"] == "missing" else _clip(first["input"])
    expected = _EXPECTED.get(first["type"]) or first["msg"].removeprefix("Input should be ")
    return f"{name + ': ' if name else ''}got {got}, expected {expected}"


def _clip(value: Any) -> str:
    """A value as one short line of JSON."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _MAX_GOT_CHARS else text[: _MAX_GOT_CHARS - 1] + "…"
