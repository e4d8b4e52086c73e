"""ToolACE's single-turn function calling as CHORD's tools run takes it: expert rows and prompts.

A conversation qualifies where it has one user turn, and the assistant answers it with a list of function calls; what
comes after (results, a summary) is left out. The expert's answer is ToolACE's own: the paper has DeepSeek-R1 answer.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from common.chat import Chat, ChatMessage
from common.config.schema import Config
from common.errors import ConfigError, OperatorError
from common.function_calls import read_calls
from common.tables import ANY_TEXT, LIST, TableRow, clip, take, take_if_any
from learner.expert.selection import Asked, Candidate, Funnel, Once, Selection, known_questions, leaves_room, select
from learner.expert.store import NewRow

SOURCE = "Team-ACE/ToolACE"
COLUMNS = ("system", "conversations")

READ = "conversations read"
SINGLE = "with one user turn, which the assistant answers"
CALLS = "with function calls and nothing else"
DISTINCT = "not taken already"
ROOM = "whose prompt leaves room for an answer"


def choose(config: Config, rows: Iterable[TableRow], *, asked: Asked) -> tuple[Selection, Funnel]:
    """What becomes of the conversations, and how many came how far."""
    if config.environment.name != "function_calling":
        raise ConfigError([f'environment.name: got "{config.environment.name}", expected "function_calling"'])
    funnel, chat = Funnel((READ, SINGLE, CALLS, DISTINCT, ROOM)), Chat(Path(config.model.path))
    candidates = list(_candidates(rows, chat, config, funnel))
    known = known_questions(config)
    selection = select(candidates, asked=asked, seed=config.run.seed, is_known=lambda c: c.question in known)
    return selection, funnel


def expert_rows(selection: Selection) -> Iterator[NewRow]:
    """The chosen conversations with ToolACE's own answers, in the order of the source."""
    for candidate in sorted(selection.experts, key=lambda candidate: candidate.position):
        answer = ChatMessage(role="assistant", content=candidate.record["answer"])
        yield NewRow((*_prompt(candidate.record), answer), SOURCE)


def _candidates(rows: Iterable[TableRow], chat: Chat, config: Config, funnel: Funnel) -> Iterator[Candidate]:
    once = Once()
    for position, row in enumerate(rows):
        funnel.reach(READ)
        record = _record(row, funnel)
        if record is None or not once.is_new(record["question"]):
            continue
        funnel.reach(DISTINCT)
        if leaves_room(_prompt(record), chat, config):
            funnel.reach(ROOM)
            once.note(record["question"])
            yield Candidate(position, record["question"], record)


def _record(row: TableRow, funnel: Funnel) -> dict[str, str] | None:
    """A conversation as a line of the prompts file, where it is single-turn function calling."""
    turns = _turns(row)
    speakers = [speaker for speaker, _ in turns]
    if speakers[:2] != ["user", "assistant"] or speakers.count("user") != 1:
        return None
    funnel.reach(SINGLE)
    question, answer = (text.strip() for _, text in turns[:2])
    if not question or read_calls(answer) is None:
        return None
    funnel.reach(CALLS)
    return {"system": (take_if_any(row, ["system"], ANY_TEXT) or "").strip(), "question": question, "answer": answer}


def _prompt(record: Mapping[str, str]) -> tuple[ChatMessage, ...]:
    system = (ChatMessage(role="system", content=record["system"]),) if record["system"] else ()
    return (*system, ChatMessage(role="user", content=record["question"]))


def _turns(row: TableRow) -> Sequence[tuple[str, str]]:
    """Who says what."""
    missing = [column for column in COLUMNS if column not in row.values]
    if missing:
        got = ", ".join(row.values)
        raise OperatorError(f"{row.where}: got columns {got}, expected also {', '.join(missing)} (see {SOURCE})")
    turns = take(row, ["conversations"], LIST)
    for turn in turns:
        if not (isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)):
            raise OperatorError(f'{row.where}: conversations: got {clip(turn)}, expected {{"from": …, "value": …}}')
    return [(turn["from"], turn["value"]) for turn in turns]
