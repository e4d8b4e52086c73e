"""Questions that are known in advance: environments of one prompt and one answer, from tables or from given tasks."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from actors.environment import SingleTurn
from actors.environments.rewards import Reward, reward_named
from common.chat import ChatMessage
from common.errors import ConfigError
from common.problems import Split, split_of
from common.tables import TableRow, clip, read_table, refuse_split

QUESTION = "{question}"


class QuestionTask(Protocol):
    """What every task has."""

    @property
    def question(self) -> str:
        """Decides, with nothing else, whether the task is held out."""
        ...

    @property
    def text(self) -> str:
        """What the prompt shows of the task; tasks that show the same are one."""
        ...

    @property
    def category(self) -> str: ...


Task = TypeVar("Task", bound=QuestionTask)


@dataclass(frozen=True)
class QuestionSplits(Generic[Task]):
    """Tasks to train on and to evaluate; no question is in both."""

    train: Sequence[Task]
    held_out: Sequence[Task]


class Questions(SingleTurn[Task]):
    """Tasks in a fixed order; training goes through them again and again, held-out ones end."""

    usual_template = QUESTION
    """The prompt, where no option names another."""

    def __init__(
        self,
        *,
        train: Sequence[Task],
        held_out: Sequence[Task],
        prompt_template: str | None = None,
        system_prompt: str = "",
        reward: str = Reward.BINARY,
    ) -> None:
        """Raises ConfigError where the template has no place for a question, or there is no such reward."""
        prompt_template = self.usual_template if prompt_template is None else prompt_template
        if not isinstance(prompt_template, str) or QUESTION not in prompt_template:
            got, expected = clip(prompt_template), f"text with {QUESTION} where the question goes"
            raise ConfigError([f"environment.options.prompt_template: got {got}, expected {expected}"])
        _require_texts(system_prompt=system_prompt)
        self._tasks = {"train": train, "held_out": held_out}
        self._template = prompt_template
        self._system = (ChatMessage(role="system", content=system_prompt),) if system_prompt else ()
        self._reward = reward_named(reward)

    def task(self, split: Split, index: int) -> tuple[Task, Sequence[ChatMessage]]:
        tasks = self._tasks[split]
        if not tasks or (split == "held_out" and index >= len(tasks)):
            raise IndexError(f"there are only {len(tasks)} {split.replace('_', '-')} questions")
        task = tasks[index % len(tasks)]
        content = self._template.replace(QUESTION, task.text)  # not format: \boxed{} is no place for a value
        return task, (*self._system, ChatMessage(role="user", content=content))

    def score(self, task: Task, text: str) -> float:
        return self.judge(task, text, is_truncated=False).reward

    def category(self, task: Task) -> str:
        return task.category


def read_questions(
    read: Callable[[TableRow], Task],
    *,
    source: str,
    split: str = "train",
    held_out_source: str = "",
    held_out_split: str = "",
    num_train_problems: int | None = None,
) -> QuestionSplits[Task]:
    """The rows of tables as tasks, each once, in the order of the table: it alone decides their numbers, not the seed.

    Held out is the table `held_out_source`, or another split of `source`, or else one question of `source` in four.
    Raises OperatorError at the first row that `read` refuses, and where nothing is left to train on.
    """
    _require_texts(source=source, split=split, held_out_source=held_out_source, held_out_split=held_out_split)
    if num_train_problems is not None and not (type(num_train_problems) is int and num_train_problems >= 1):
        got = f"environment.options.num_train_problems: got {num_train_problems!r}"
        raise ConfigError([f"{got}, expected a whole number of at least 1, or nothing for all"])
    if split != "train":
        refuse_split(source, split, name="environment.options.split")
    if held_out_split:
        refuse_split(held_out_source or source, held_out_split, name="environment.options.held_out_split")
    rows = [read(row) for row in read_table(source, split=split)]
    if held_out_source or held_out_split:
        table = read_table(held_out_source or source, split=held_out_split or "test")
        held_out = [read(row) for row in table]
    else:
        held_out = [task for task in rows if split_of(task.question) == "held_out"]
    kept_back = {task.question for task in held_out}
    train = _distinct(task for task in rows if task.question not in kept_back)
    if not train:
        got = f"environment.options.source: {source}: got {len(rows)} rows, none of them to train on"
        raise ConfigError([f"{got}, expected questions that are not held out"])
    return QuestionSplits(train[:num_train_problems], _distinct(held_out))


def columns_named(column: str, usual: Sequence[str]) -> Sequence[str]:
    """The column that an option names, else the usual ones."""
    if not isinstance(column, str):
        raise ConfigError([f"environment.options: got {clip(column)} as a column, expected its name"])
    return (column,) if column else usual


def _require_texts(**options: Any) -> None:
    for name, value in options.items():
        if not isinstance(value, str):
            raise ConfigError([f"environment.options.{name}: got {clip(value)}, expected text"])


def _distinct(tasks: Iterable[Task]) -> list[Task]:
    first: dict[str, Task] = {}
    for task in tasks:
        first.setdefault(task.text, task)
    return list(first.values())
