"""The environment `multiple_choice`: questions with lettered options, answered by a letter."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from actors.environment import Judgement
from actors.environments.answers import boxed_answer
from actors.environments.questions import Questions, columns_named, read_questions
from actors.environments.rewards import Reward, reward_of
from common.errors import OperatorError
from common.tables import TEXT, TEXT_OR_NUMBER, TEXTS, TableRow, clip, take, take_if_any

QUESTION_COLUMNS = ("question", "problem", "prompt", "Question")
OPTIONS_COLUMNS = ("options", "choices")
ANSWER_COLUMNS = ("answer", "answer_index", "label", "Answer")
CATEGORY_COLUMNS = ("category", "subject")
MAX_OPTIONS = len(ascii_uppercase)
PROMPT_TEMPLATE = (
    '{question}\n\nThink step by step, and end with "The answer is (X)", where X is the right option\'s letter.'
)
_FONT = r"(?:\\(?:text|mathrm|textbf|mathbf)\s{0,5}\{)?\s{0,5}"
# Runs are bounded: an answer may be a long run of anything.
_STATED = re.compile(
    r"(?i:\banswer[\s*]{0,5}(?:is\b|:))[\s:*$\\]{0,20}(?:option\s{1,5})?" + _FONT + r"(\(?)([A-Z])(?![\w'’])"
)
_PRONOUN = re.compile(r"\s+[a-z]")
"""What follows the word "I", and no letter of an option."""
_BOXED = re.compile(_FONT + r"\(?([A-Z])(?![\w'’])")
_LONE = re.compile(r"^[ \t*$(]{0,20}([A-Z])[)*$.: \t]{0,20}$|(?<![\w'’])([A-Z])[)*$.\s]*\Z", re.MULTILINE)


@dataclass(frozen=True)
class ChoiceTask:
    """A question with its options."""

    question: str
    options: tuple[str, ...]
    """2 to 26; the first is A."""
    answer: str
    """The right option's letter."""
    where: str = ""
    """The row it was read from."""
    category: str = ""

    @property
    def text(self) -> str:
        lines = (f"{letter}. {option}" for letter, option in zip(ascii_uppercase, self.options, strict=False))
        return "\n".join([self.question, *lines])

    @property
    def letters(self) -> str:
        return ascii_uppercase[: len(self.options)]


class ChoiceProblems(Questions[ChoiceTask]):
    r"""Multiple choice with given tasks. An answer is well formed that says "answer is (X)" or \boxed{X}."""

    usual_template = PROMPT_TEMPLATE

    def judge(self, task: ChoiceTask, text: str, *, is_truncated: bool) -> Judgement:
        formal = stated_letter(text, task.letters) or boxed_letter(text, task.letters)
        letter = formal or lone_letter(text, task.letters)
        reward = reward_of(
            self._reward,
            is_right=letter == task.answer,
            is_well_formed=formal is not None,
            has_answer=letter is not None,
            is_truncated=is_truncated,
        )
        return Judgement(reward, is_parsed=letter is not None)


class MultipleChoice(ChoiceProblems):
    """Multiple choice from tables."""

    def __init__(
        self,
        *,
        seed: int,
        question_column: str = "",
        options_column: str = "",
        answer_column: str = "",
        category_column: str = "",
        prompt_template: str | None = None,
        system_prompt: str = "",
        reward: str = Reward.BINARY,
        **tables: Any,
    ) -> None:
        """`tables`: as `read_questions` takes them."""

        def read(row: TableRow) -> ChoiceTask:
            columns = {"question": question_column, "options": options_column, "answer": answer_column}
            return read_task(row, **columns, category=category_column)

        tasks = read_questions(read, **tables)
        super().__init__(
            train=tasks.train,
            held_out=tasks.held_out,
            prompt_template=prompt_template,
            system_prompt=system_prompt,
            reward=reward,
        )


def read_task(
    row: TableRow, *, question: str = "", options: str = "", answer: str = "", category: str = ""
) -> ChoiceTask:
    """A row as a task; the usual columns where none is named. The answer: a letter, an index from 0, or an option."""
    name = "environment.options.{}_column".format
    asked = take(row, columns_named(question, QUESTION_COLUMNS), TEXT, name=name("question"))
    choices = take(row, columns_named(options, OPTIONS_COLUMNS), TEXTS, name=name("options"))
    if not 2 <= len(choices) <= MAX_OPTIONS:
        raise OperatorError(f"{row.where}: got {len(choices)} options, expected 2 to {MAX_OPTIONS}")
    columns = columns_named(answer, ANSWER_COLUMNS)
    take(row, columns, TEXT_OR_NUMBER, name=name("answer"))
    given = next(row.values[column] for column in columns if row.values.get(column) is not None)
    letter = _letter_of(given, choices)
    if letter is None:
        expected = f"a letter from A to {ascii_uppercase[len(choices) - 1]}, an index from 0, or one of the options"
        raise OperatorError(f"{row.where}: {' or '.join(columns)}: got {clip(given)}, expected {expected}")
    if category:
        found = take(row, (category,), TEXT_OR_NUMBER, name=name("category"))
    else:
        found = take_if_any(row, CATEGORY_COLUMNS, TEXT_OR_NUMBER) or ""
    return ChoiceTask(asked, tuple(choices), letter, row.where, found)


def stated_letter(text: str, letters: str) -> str | None:
    """X of the last "answer is (X)" or "answer: X" that names an option."""
    matches = (match for match in _STATED.finditer(text) if match[2] in letters)
    stated = [match[2] for match in matches if match[1] or match[2] != "I" or not _PRONOUN.match(text, match.end())]
    return stated[-1] if stated else None


def boxed_letter(text: str, letters: str) -> str | None:
    r"""X of the last \boxed{X}, where it is an option."""
    match = _BOXED.match(boxed_answer(text) or "")
    return match[1] if match and match[1] in letters else None


def lone_letter(text: str, letters: str) -> str | None:
    """The last option's letter that stands alone on its line, or at the very end."""
    found = [match[1] or match[2] for match in _LONE.finditer(text)]
    named = [letter for letter in found if letter in letters]
    return named[-1] if named else None


def _letter_of(given: Any, options: Sequence[str]) -> str | None:
    letters = ascii_uppercase[: len(options)]
    if isinstance(given, int):
        return letters[given] if 0 <= given < len(letters) else None
    answer, texts = str(given).strip(), [option.strip() for option in options]
    if answer not in letters and answer in texts:
        return letters[texts.index(answer)]
    bare = answer.strip("().").upper()
    return bare if len(bare) == 1 and bare in letters else None
