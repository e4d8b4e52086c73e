"""What chord-local reads of a run: the learner's status board and its lines, as far as they are shown.

Whatever is missing has a default, and whatever is not as it should be is as if it were not there: a file may be
damaged, half written, or of another version of the learner.
"""

from pathlib import Path
from typing import Annotated, Generic, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Count = Annotated[int, Field(ge=0, le=1 << 53)]


class Readable(BaseModel):
    """A JSON object, some of whose fields are of interest."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    @classmethod
    def parse(cls, text: bytes) -> Self | None:
        """None where it is no such object."""
        try:
            return cls.model_validate_json(text)
        except ValidationError:
            return None


class BoardPeer(Readable):
    """An actor or the evaluator, as the learner sees it."""

    peer_id: str
    role: str = "actor"
    engine: str = ""
    state: str = ""
    serving_step: Count | None = None
    sampled_tokens: Count = 0
    silence_s: float = 0.0


class Board(Readable):
    """status.json."""

    phase: str = ""
    step: Count = 0
    num_steps: Count = 0
    waiting_for: str = ""
    groups: dict[str, Count] = {}
    dropped: dict[str, Count] = {}
    evaluations_owed: list[Count] = []
    sinks_failed: dict[str, str] = {}
    peers: list[BoardPeer] = []


class StepLine(Readable):
    """Of metrics.jsonl; None where the step had nothing of the kind."""

    step: Count
    reward_mean: float | None = None
    groups_with_signal_frac: float | None = None
    staleness_mean: float | None = None
    staleness_max: float | None = None
    mu: float | None = None
    policy_loss: float | None = None
    expert_loss: float | None = None
    expert_nll_mean: float | None = None
    policy_entropy: float | None = None
    answer_tokens_mean: float | None = None
    grad_norm: float | None = None
    num_policy_tokens: float = 0.0
    num_expert_tokens: float = 0.0
    actor_tokens_per_s: float | None = None
    learner_tokens_per_s: float | None = None
    learner_wait_frac: float | None = None
    actor_idle_frac: float | None = None
    step_s: float | None = None
    run_wall_s: float | None = None
    time: float | None = None


class EvaluationLine(Readable):
    """Of eval.jsonl."""

    step: Count
    task: str = ""
    accuracy: float
    confidence_95: tuple[float, float] | None = None
    num_correct: Count | None = None
    num_problems: Count | None = None
    samples_per_problem: Count = 1
    wall_s: float | None = None


T = TypeVar("T", bound=Readable)


class Tail(Generic[T]):
    """The complete lines of a growing JSONL file that were not read yet."""

    def __init__(self, path: Path, kind: type[T]) -> None:
        self._path = path
        self._kind = kind
        self._offset = 0

    def read(self) -> list[T]:
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._offset:
                    self._offset = 0  # the file was written anew after a crash
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [line for text in complete.splitlines() if (line := self._kind.parse(text))]
