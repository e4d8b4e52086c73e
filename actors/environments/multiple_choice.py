"""The environment `multiple_choice`: questions with lettered options, answered by a letter."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from actors.environment import Judgement
from actors.environments.answers import MAX_ANSWER_CHARS, boxed_answer, stated_answer
from actors.environments.questions import Questions, columns_named, read_questions
from actors.environments.rewards import Reward, reward_of
from actors.environments.spelling import is_same
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
# Runs are bounded: an answer may be a long run of anything.
_OPEN = r"[\s:*$\\_`\"'“‘(\[{<（]{0,20}+"
_CLOSE = r"[\s.:*$\\_`\"'”’)\]}>）]{0,20}"
_FONT = r"(?:(?:text|mathrm|textbf|mathbf)\s{0,5}\{)?"  # its backslash is one of those signs
# In lower case where it is enclosed or ends its line: else it is the word "a".
_LETTER = rf"{_OPEN}(?:option\s{{1,5}})?{_FONT}{_OPEN}([A-Z](?![^\W_]|['’]\w)|[a-z](?=[)\]}}）]|{_CLOSE}$))"
_STATED = re.compile(r"(?<!/)(?i:\banswer[\s*]{0,5}(?:is\b|would be\b|[:=>]))" + _LETTER, re.MULTILINE)
_HEDGE = re.compile(rf"{_CLOSE}(?:or|and|/)\b{_OPEN}[A-Z]{_CLOSE}(?:$|[\s.,;])")
"""What follows a letter that is not the only answer."""
_PRONOUN = re.compile(r"\s+[a-z]")
"""What follows the word "I", and no letter of an option."""
_BOXED = re.compile(_LETTER, re.MULTILINE)
_CUE = "is|be|pick|choose|select|option|choice|answer|letter|with|for|so|thus|hence|therefore"
_LONE = re.compile(
    rf"""^[ \t*$_`"'“‘(\[{{<（]{{0,20}}([A-Z])[ \t.:*$_`"'”’)\]}}>）]{{0,20}}$
        | (?:\b(?i:{_CUE})\b[,:]?\s|[.:;=>(\[]){_OPEN}([A-Z]){_CLOSE}\Z
        | (?:^|[.,:;]\s|\b(?i:so|thus|hence|therefore|only)\s)
          {_OPEN}(?i:option\s)?{_OPEN}([A-Z]){_CLOSE}is\s(?:the\s)?(?:correct|right)\b
        | \A{_OPEN}([a-z]){_CLOSE}\Z""",
    re.MULTILINE | re.VERBOSE,
)
_DENIED = re.compile(r"(?:(?:\b(?:not|never|nor)|n['’]t)(?:\s\w{1,20}){0,2}|\b(?:or|and))\W{1,20}\Z", re.IGNORECASE)
"""What stands before a letter that is not the answer, or not the only one."""


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

    @property
    def spellings(self) -> str:
        """The letters in both cases, but for options that are small letters themselves."""
        has_small = any(len(option) == 1 and option.islower() for option in self.options)
        return self.letters if has_small else self.letters + self.letters.lower()


class ChoiceProblems(Questions[ChoiceTask]):
    r"""Multiple choice with given tasks. An answer is well formed that says "answer is (X)" or \boxed{X}."""

    usual_template = PROMPT_TEMPLATE

    def judge(self, task: ChoiceTask, text: str, *, is_truncated: bool) -> Judgement:
        formal = stated_letter(text, task.spellings) or boxed_letter(text, task.spellings)
        letter = formal or named_option(text, task.options) or lone_letter(text, task.spellings)
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
    matches = [match for match in _STATED.finditer(text) if match[1] in letters and not _HEDGE.match(text, match.end())]
    stated = [match[1].upper() for match in matches if match[1] != "I" or not _PRONOUN.match(text, match.end())]
    return stated[-1] if stated else None


def boxed_letter(text: str, letters: str) -> str | None:
    r"""X of the last \boxed{X}, where it is an option."""
    match = _BOXED.match(boxed_answer(text) or "")
    return match[1].upper() if match and match[1] in letters else None


def named_option(text: str, options: Sequence[str]) -> str | None:
    """The letter of the one option whose own text is boxed or stated, or is all there is."""
    for given in (boxed_answer(text), stated_answer(text), text):
        found = (given or "").strip(" \n*_`\"'.")
        if found and len(found) <= MAX_ANSWER_CHARS:
            same = [is_same(option.casefold(), found.casefold()) is True for option in options]
            if same.count(True) == 1:
                return ascii_uppercase[same.index(True)]
    return None


def lone_letter(text: str, letters: str) -> str | None:
    """The last option's letter alone on its line, called correct, or named at the very end; a small one all alone."""
    found = [(match.start(match.lastindex or 0), match[match.lastindex or 0]) for match in _LONE.finditer(text)]
    named = [
        letter for start, letter in found if letter in letters and not _DENIED.search(text[max(0, start - 50) : start])
    ]
    return named[-1].upper() if named else None


def _letter_of(given: Any, options: Sequence[str]) -> str | None:
    letters = ascii_uppercase[: len(options)]
    if isinstance(given, int):
        return letters[given] if 0 <= given < len(letters) else None
    answer, texts = str(given).strip(), [option.strip() for option in options]
    if answer not in list(letters) and answer in texts:
        return letters[texts.index(answer)]
    bare = answer.strip("().").upper()
    return bare if len(bare) == 1 and bare in letters else None
