"""Which problems of a published dataset become expert rows, which prompts, and which are held out: pairwise disjoint.

Held out is what `split_of` says of the question, as everywhere: expert rows and prompts never come from there. Of the
others a seeded permutation gives the first to the experts and the next to the prompts.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import closing
from dataclasses import dataclass

from common.chat import Chat, ChatMessage
from common.config.schema import Config
from common.errors import OperatorError
from common.problems import split_of
from learner.expert.sampler import permutation
from learner.expert.store import ExpertStore, store_path


@dataclass(frozen=True)
class Asked:
    """How many problems are wanted for what."""

    num_rows: int
    """Expert rows."""
    num_prompts: int
    """RL prompts."""
    num_held_out: int
    """Problems that are written beside the prompts, for evaluation alone."""


@dataclass(frozen=True)
class Candidate:
    """A problem that qualifies."""

    position: int
    """Of its row in the source, counted from 0."""
    question: str
    record: dict[str, str]
    """Its line of the prompts file."""
    generation: int = 0
    """Which of the row's answers an expert row shows."""


@dataclass(frozen=True)
class Selection:
    """What was chosen of the candidates, in the order of the permutation."""

    experts: tuple[Candidate, ...]
    prompts: tuple[Candidate, ...]
    held_out: tuple[Candidate, ...]

    @property
    def records(self) -> list[dict[str, str]]:
        """The prompts file: its reader tells prompts and held-out problems apart by their questions."""
        return [candidate.record for candidate in (*self.prompts, *self.held_out)]


class Funnel:
    """How many rows came as far as each stage."""

    def __init__(self, stages: Sequence[str]) -> None:
        self._counts = dict.fromkeys(stages, 0)

    def reach(self, stage: str) -> None:
        self._counts[stage] += 1

    def lines(self) -> list[str]:
        return [f"{count:>10,} {stage}" for stage, count in self._counts.items()]


class Once:
    """Tells problems that came before from new ones; case and white space make no difference."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def is_new(self, question: str) -> bool:
        return self._key(question) not in self._seen

    def note(self, question: str) -> None:
        self._seen.add(self._key(question))

    def _key(self, question: str) -> bytes:
        return hashlib.sha256("".join(question.casefold().split()).encode()).digest()


def select(
    candidates: Sequence[Candidate], *, asked: Asked, seed: int, is_known: Callable[[Candidate], bool]
) -> Selection:
    """Choose among distinct candidates. What `is_known` is an expert row already: neither a prompt nor held out."""
    order = [candidates[position] for position in permutation(len(candidates), seed=seed, epoch=0).tolist()]
    trained = [candidate for candidate in order if split_of(candidate.question) == "train"]
    unknown = [candidate for candidate in trained[asked.num_rows :] if not is_known(candidate)]
    held_out = [c for c in order if split_of(c.question) == "held_out" and not is_known(c)]
    return Selection(
        experts=tuple(trained[: asked.num_rows]),
        prompts=tuple(unknown[: asked.num_prompts]),
        held_out=tuple(held_out[: asked.num_held_out]),
    )


def shortfalls(selection: Selection, asked: Asked) -> Iterator[str]:
    """A line for everything that there is less of than was asked for.

    Raises OperatorError where expert rows or prompts are asked for and there is none.
    """
    for what, found, wanted in (
        ("expert rows", selection.experts, asked.num_rows),
        ("prompts", selection.prompts, asked.num_prompts),
        ("held-out problems", selection.held_out, asked.num_held_out),
    ):
        if wanted and not found and what != "held-out problems":
            raise OperatorError(f"{what}: got none that qualifies, expected {wanted:,} (see the counts above)")
        if len(found) < wanted:
            yield f"asked for {wanted:,} {what}, found only {len(found):,}"


def leaves_room(prompt: Sequence[ChatMessage], chat: Chat, config: Config) -> bool:
    """Whether an actor can sample the longest answer to `prompt`."""
    return len(chat.prompt_tokens(prompt)) + config.sampling.max_tokens <= config.actor.max_model_tokens


def known_questions(config: Config) -> Set[str]:
    """What users ask in the rows that the run's store holds already."""
    path = store_path(config)
    if not path.is_file():
        return frozenset()
    with closing(ExpertStore(path)) as store:
        return {message.content for row in store.rows() for message in row.messages if message.role == "user"}
