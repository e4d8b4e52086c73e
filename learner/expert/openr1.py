"""OpenR1-Math-220k as CHORD's maths run takes it: a selection of its problems, and DeepSeek-R1's answers to them.

A problem qualifies where it has two or more generations, its answer is an integer, and one generation is verified (by
Math-Verify), complete, and short enough. An expert row shows the first such generation in the published order. The
source is read twice and never held: once to find what qualifies, once for the answers that were chosen.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.chat import Chat, ChatMessage
from common.config.schema import Config
from common.errors import ConfigError, OperatorError
from common.tables import ANY_TEXT, LIST, TEXT, TableRow, take, take_if_any
from learner.expert.importing import QUESTION
from learner.expert.selection import Asked, Candidate, Funnel, Once, Selection, known_questions, leaves_room, select
from learner.expert.store import NewRow

SOURCE = "open-r1/OpenR1-Math-220k"
COLUMNS = ("problem", "answer", "uuid", "generations", "correctness_math_verify", "is_reasoning_complete")
"""Those of the published ones that are read."""
MIN_GENERATIONS = 2

READ = "problems read"
SEVERAL = "with two or more generations"
INTEGER = "whose answer is an integer"
VERIFIED = "with a generation that is verified and complete"
DISTINCT = "not taken already"
SHORT = "with such a generation that is short enough"
ROOM = "whose prompt leaves room for an answer"

_WRAPPED = re.compile(r"\$(.*)\$|\\\((.*)\\\)|\\\[(.*)\\\]|\\boxed\{(.*)\}", re.DOTALL)
_THOUSANDS = re.compile(r"(?<=[0-9])(,?\\[,!;: ]|[ ~]|\{,\})(?=[0-9]{3}(?![0-9]))")
"""What stands for a comma between thousands, some of LaTeX's spacing among it."""
_INTEGER = re.compile(r"([+-]?)\s*([0-9]{1,100}|[0-9]{1,3}(?:,[0-9]{3}){1,30})")

Rows = Callable[[], Iterable[TableRow]]
"""Reads the source from its beginning."""


@dataclass(frozen=True)
class Prompting:
    """How the environment asks a question, so that expert rows answer the same prompt."""

    template: str
    system_prompt: str

    @classmethod
    def of(cls, config: Config) -> "Prompting":
        """Raises ConfigError where the run's environment is not `math` with a prompt template."""
        options, name = config.environment.options, config.environment.name
        if name != "math":
            raise ConfigError([f'environment.name: got "{name}", expected "math"'])
        template = options.get("prompt_template")
        if not (isinstance(template, str) and QUESTION in template):
            got = "none" if template is None else repr(template)
            raise ConfigError(
                [f"environment.options.prompt_template: got {got}, expected text with {QUESTION}, for expert rows too"]
            )
        return cls(template, str(options.get("system_prompt", "")))

    def user(self, question: str) -> str:
        return self.template.replace(QUESTION, question)

    def messages(self, question: str) -> tuple[ChatMessage, ...]:
        system = (ChatMessage(role="system", content=self.system_prompt),) if self.system_prompt else ()
        return (*system, ChatMessage(role="user", content=self.user(question)))


def choose(config: Config, rows: Rows, *, asked: Asked, max_tokens: int) -> tuple[Selection, Funnel]:
    """What becomes of the problems of `rows`, and how many came how far."""
    prompting = Prompting.of(config)
    chat = Chat(Path(config.model.path))
    funnel = Funnel((READ, SEVERAL, INTEGER, VERIFIED, DISTINCT, ROOM, SHORT))
    candidates = list(_candidates(rows(), prompting, chat, config, max_tokens=max_tokens, funnel=funnel))
    known = known_questions(config)
    selection = select(
        candidates, asked=asked, seed=config.run.seed, is_known=lambda c: prompting.user(c.question) in known
    )
    return selection, funnel


def expert_rows(config: Config, rows: Rows, selection: Selection) -> Iterator[NewRow]:
    """The chosen demonstrations, in the order of the source."""
    prompting = Prompting.of(config)
    chosen = {candidate.position: candidate for candidate in selection.experts}
    for position, row in enumerate(rows() if chosen else ()):
        if position in chosen:
            candidate = chosen.pop(position)
            text = take(row, ["generations"], LIST)[candidate.generation]
            yield NewRow((*prompting.messages(candidate.question), _assistant(text)), SOURCE)
        if not chosen:
            return


def integer_of(answer: str) -> str | None:
    """An answer as a plain integer, None where it is none.

    $ $, \\( \\), \\[ \\] and \\boxed{} around it are taken away; what is left must be an optional sign and digits, with
    a comma, a space or LaTeX's spacing between all thousands or nowhere. 12.0, 6/2, 180^\\circ and "2 3" are none.
    """
    text = answer.strip()
    while wrapped := _WRAPPED.fullmatch(text):
        text = next(part for part in wrapped.groups() if part is not None).strip()
    found = _INTEGER.fullmatch(_THOUSANDS.sub(",", text.replace("−", "-")))
    return str(int("".join(found.groups()).replace(",", ""))) if found else None


def _candidates(
    rows: Iterable[TableRow], prompting: Prompting, chat: Chat, config: Config, *, max_tokens: int, funnel: Funnel
) -> Iterator[Candidate]:
    once = Once()
    for position, row in enumerate(rows):
        funnel.reach(READ)
        problem = _problem(row, funnel)
        if problem is None or not once.is_new(problem.question):
            continue
        funnel.reach(DISTINCT)
        messages = prompting.messages(problem.question)
        if not leaves_room(messages, chat, config):
            continue
        funnel.reach(ROOM)
        generation = _first_short(problem, messages, chat, max_tokens)
        if generation is not None:
            funnel.reach(SHORT)
            once.note(problem.question)
            record = {"question": problem.question, "answer": problem.answer, "uuid": problem.uuid}
            yield Candidate(position, problem.question, record, generation)


@dataclass(frozen=True)
class _Problem:
    """A row that qualifies but for its length."""

    question: str
    answer: str
    uuid: str
    generations: Sequence[str]
    verified: Sequence[int]
    """Which generations are."""


def _problem(row: TableRow, funnel: Funnel) -> _Problem | None:
    missing = [column for column in COLUMNS if column not in row.values]
    if missing:
        got = ", ".join(row.values)
        raise OperatorError(f"{row.where}: got columns {got}, expected also {', '.join(missing)} (see {SOURCE})")
    generations = take_if_any(row, ["generations"], LIST) or []
    if len(generations) < MIN_GENERATIONS:
        return None
    funnel.reach(SEVERAL)
    answer = integer_of(take_if_any(row, ["answer"], ANY_TEXT) or "")
    if answer is None:
        return None
    funnel.reach(INTEGER)
    verified = _verified(row, generations)
    if not verified:
        return None
    funnel.reach(VERIFIED)
    question, uuid = take(row, ["problem"], TEXT).strip(), take_if_any(row, ["uuid"], ANY_TEXT) or ""
    return _Problem(question, answer, uuid, generations, verified)


def _verified(row: TableRow, generations: Sequence[Any]) -> list[int]:
    is_right = take_if_any(row, ["correctness_math_verify"], LIST) or []
    is_complete = take_if_any(row, ["is_reasoning_complete"], LIST) or []
    marks = enumerate(zip(generations, is_right, is_complete, strict=False))
    return [i for i, (text, right, complete) in marks if isinstance(text, str) and text.strip() and right and complete]


def _first_short(problem: _Problem, messages: Sequence[ChatMessage], chat: Chat, max_tokens: int) -> int | None:
    """The first verified generation of at most `max_tokens`, its end-of-turn token included."""
    for generation in problem.verified:
        answer = chat.demonstration([*messages, _assistant(problem.generations[generation])])
        if sum(answer.mask) <= max_tokens:
            return generation
    return None


def _assistant(text: str) -> ChatMessage:
    return ChatMessage(role="assistant", content=text)
