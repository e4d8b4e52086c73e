r"""The environment `math`: questions with a final answer, judged by math-verify on \boxed{…} or a stated answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

from actors.environment import Judgement
from actors.environments.answers import boxed_answer, gold_answer, last_number, leading_expression, stated_answer
from actors.environments.comparer import COMPARER
from actors.environments.comparison import Verdict
from actors.environments.questions import Questions, columns_named, read_questions
from actors.environments.rewards import Reward, reward_of
from actors.environments.spelling import as_latex, is_same
from common.errors import ConfigError, OperatorError
from common.tables import TEXT, TEXT_OR_NUMBER, TableRow, clip, take

QUESTION_COLUMNS = ("question", "problem", "prompt", "Question", "Problem")
ANSWER_COLUMNS = ("answer", "final_answer", "expected_answer", "Answer", "solution")
PROMPT_TEMPLATE = "{question}\n\nReason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class MathTask:
    """A question with its right answer."""

    question: str
    answer: str
    """Final and bare, as LaTeX without dollar signs: "72", "\\frac{1}{2}"."""
    where: str = ""
    """The row it was read from."""
    category: str = ""

    @property
    def text(self) -> str:
        return self.question


class Extraction(StrEnum):
    """Where a final answer is looked for."""

    STATED = "stated"
    r"""In the last \boxed{…}, else where one is stated: "the answer is …", "#### …"."""
    LAST_NUMBER = "last_number"
    """There, else the last number of the text, cut off or not: for models that answer in free sentences."""


class MathProblems(Questions[MathTask]):
    r"""Mathematics with given tasks. An answer is well formed that has a \boxed{…}."""

    usual_template = PROMPT_TEMPLATE

    def __init__(
        self,
        *,
        train: Sequence[MathTask],
        held_out: Sequence[MathTask],
        extraction: str = Extraction.STATED,
        **options: Any,
    ) -> None:
        """`options`: as `Questions` takes them. Raises ConfigError where there is no such extraction."""
        super().__init__(train=train, held_out=held_out, **options)
        if extraction not in list(Extraction):
            expected = " or ".join(f'"{known}"' for known in Extraction)
            raise ConfigError([f'environment.options.extraction: got "{extraction}", expected {expected}'])
        self._extraction = Extraction(extraction)

    def judge(self, task: MathTask, text: str, *, is_truncated: bool) -> Judgement:
        boxed = boxed_answer(text)
        stated = self._stated(text) if boxed is None else None
        verdict = _verdict(task.answer, boxed, stated)
        reward = reward_of(
            self._reward,
            is_right=verdict is Verdict.SAME,
            is_well_formed=boxed is not None,
            has_answer=boxed is not None or stated is not None,
            is_truncated=is_truncated,
        )
        return Judgement(reward, is_parsed=verdict is not Verdict.UNREADABLE)

    def _stated(self, text: str) -> str | None:
        found = stated_answer(text)
        return last_number(text) if found is None and self._extraction is Extraction.LAST_NUMBER else found


class Math(MathProblems):
    """Mathematics from tables."""

    def __init__(
        self,
        *,
        seed: int,
        question_column: str = "",
        answer_column: str = "",
        category_column: str = "",
        prompt_template: str | None = None,
        system_prompt: str = "",
        reward: str = Reward.BINARY,
        extraction: str = Extraction.STATED,
        **tables: Any,
    ) -> None:
        """`tables`: as `read_questions` takes them."""

        def read(row: TableRow) -> MathTask:
            return read_task(row, question=question_column, answer=answer_column, category=category_column)

        tasks = read_questions(read, **tables)
        super().__init__(
            train=tasks.train,
            held_out=tasks.held_out,
            prompt_template=prompt_template,
            system_prompt=system_prompt,
            reward=reward,
            extraction=extraction,
        )


def read_task(row: TableRow, *, question: str = "", answer: str = "", category: str = "") -> MathTask:
    r"""A row as a task; the usual columns where none is named. The answer may be a solution with \boxed{…} or ####."""
    name = "environment.options.{}_column".format
    asked = take(row, columns_named(question, QUESTION_COLUMNS), TEXT, name=name("question"))
    columns = columns_named(answer, ANSWER_COLUMNS)
    solution = take(row, columns, TEXT_OR_NUMBER, name=name("answer"))
    gold = gold_answer(solution)
    if gold is None:
        expected = r"a bare answer of one line, or one in \boxed{} or after ####"
        raise OperatorError(f"{row.where}: {' or '.join(columns)}: got {clip(solution)}, expected {expected}")
    found = take(row, (category,), TEXT_OR_NUMBER, name=name("category")) if category else ""
    return MathTask(asked, gold, row.where, found)


def _verdict(gold: str, boxed: str | None, stated: str | None) -> Verdict:
    found = boxed
    if boxed is None and stated is not None:
        found = stated if is_same(gold, stated) else leading_expression(stated)
    if found is None:
        return Verdict.UNREADABLE
    is_right = is_same(gold, found)
    if is_right is not None:
        return Verdict.SAME if is_right else Verdict.DIFFERENT
    latex = as_latex(found)
    return _compare(as_latex(gold.strip("$")), f"${latex}$" if boxed is None else f"\\boxed{{{latex}}}")


@lru_cache(maxsize=4096)  # the answers of a group are much alike, and so are those that take long
def _compare(gold: str, answer: str) -> Verdict:
    return COMPARER.compare(gold, answer)
