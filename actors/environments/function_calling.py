"""The environment `function_calling`: a question with functions to call, right where the expected calls are made."""

from collections.abc import Sequence
from dataclasses import dataclass

from actors.environment import Judgement, SingleTurn
from actors.environments.questions import QuestionTables, read_questions
from common.chat import ChatMessage
from common.errors import OperatorError
from common.function_calls import read_calls
from common.problems import Split
from common.tables import TEXT, TableRow, clip, take, take_if_any

THOUGHT_END = "</think>"
"""What a model writes up to here is not its answer."""


@dataclass(frozen=True)
class CallingTask:
    """A question, and the calls that answer it."""

    system: str
    """Tells of the functions and how to call them; empty: no system message."""
    question: str
    expected: tuple[str, ...]
    """As `read_calls` spells them."""


class FunctionCalling(SingleTurn[CallingTask]):
    """Options: those of `QuestionTables`; columns `system`, `question`, `answer`, as `chord-expert import toolace` writes.

    The reward is binary: 1 where the answer, thoughts apart, is a list of calls and nothing else, and these are the
    expected ones: the same functions as often, with the same arguments of the same values. Order says nothing, as the
    calls of one answer cannot depend on one another's results. See `read_calls` for when values are the same.
    """

    def __init__(
        self,
        *,
        seed: int,
        source: str,
        split: str = "train",
        held_out_source: str = "",
        held_out_split: str = "",
        num_train_problems: int | None = None,
    ) -> None:
        tables = QuestionTables(source, split, held_out_source, held_out_split, num_train_problems)
        self._tasks = read_questions(tables, _read_task, seed=seed)

    def task(self, split: Split, index: int) -> tuple[CallingTask, Sequence[ChatMessage]]:
        tasks = self._tasks.train if split == "train" else self._tasks.held_out
        task = tasks[index % len(tasks) if split == "train" else index]
        system = [ChatMessage(role="system", content=task.system)] if task.system else []
        return task, [*system, ChatMessage(role="user", content=task.question)]

    def score(self, task: CallingTask, text: str) -> float:
        return self.judge(task, text, is_truncated=False).reward

    def judge(self, task: CallingTask, text: str, *, is_truncated: bool) -> Judgement:
        calls = read_calls(text.rpartition(THOUGHT_END)[2])
        return Judgement(float(calls == task.expected), is_parsed=calls is not None)


def _read_task(row: TableRow) -> CallingTask:
    answer = take(row, ["answer"], TEXT)
    expected = read_calls(answer)
    if expected is None:
        raise OperatorError(f"{row.where}: answer: got {clip(answer)}, expected calls such as [name(key=value)]")
    return CallingTask(take_if_any(row, ["system"], TEXT) or "", take(row, ["question"], TEXT), expected)
