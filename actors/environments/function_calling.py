"""The environment `function_calling`: a question with functions to call, right where the expected calls are made."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.environment import Judgement
from actors.environments.questions import Questions, read_questions
from common.chat import ChatMessage
from common.errors import OperatorError
from common.function_calls import read_calls
from common.problems import Split
from common.tables import ANY_TEXT, TEXT, TableRow, clip, take, take_if_any

THOUGHT_END = "</think>"
"""What a model writes up to here is not its answer."""


@dataclass(frozen=True)
class CallingTask:
    """A question, and the calls that answer it."""

    question: str
    system: str
    """Tells of the functions and how to call them; empty: no system message."""
    expected: tuple[str, ...]
    """As `read_calls` spells them."""
    category: str = ""

    @property
    def text(self) -> str:
        return self.question


class FunctionCalling(Questions[CallingTask]):
    """Tables of `system`, `question` and `answer`, as `chord-expert import toolace` writes them.

    The reward is binary: 1 where the answer, thoughts apart, is a list of calls and nothing else, and these are the
    expected ones: the same functions as often, with the same arguments of the same values. Order says nothing, as the
    calls of one answer cannot depend on one another's results. `read_calls` knows when values are the same.
    """

    def __init__(self, *, seed: int, **tables: Any) -> None:
        """`tables`: as `read_questions` takes them."""
        tasks = read_questions(_read_task, **tables)
        super().__init__(train=tasks.train, held_out=tasks.held_out)

    def task(self, split: Split, index: int) -> tuple[CallingTask, Sequence[ChatMessage]]:
        task, messages = super().task(split, index)
        system = (ChatMessage(role="system", content=task.system),) if task.system else ()
        return task, (*system, *messages)

    def judge(self, task: CallingTask, text: str, *, is_truncated: bool) -> Judgement:
        calls = read_calls(text.rpartition(THOUGHT_END)[2])
        return Judgement(float(calls == task.expected), is_parsed=calls is not None)


def _read_task(row: TableRow) -> CallingTask:
    answer = take(row, ["answer"], TEXT)
    expected = read_calls(answer)
    if expected is None:
        raise OperatorError(f"{row.where}: answer: got {clip(answer)}, expected calls such as [name(key=value)]")
    return CallingTask(take(row, ["question"], TEXT), take_if_any(row, ["system"], ANY_TEXT) or "", expected)
