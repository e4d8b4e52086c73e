"""Every message between an actor, an evaluator and the learner, as a frozen, bounded model.

Life of a peer: Hello → Welcome; then WorkRequest → Work, groups and evaluation results → Receipt, until Goodbye.
Weights travel beside it: an Announcement to all, then ManifestRequest → ManifestReply and ChunkRequest → Chunk, each
peer at its own pace; or directly, TransferRequest → TransferReply, TransferStart.
"""

from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from common.version import Version

PROTOCOL = 6
"""Raised with every change that an older peer would misread."""

MAX_LEASES = 1024
"""Leases of one actor at a time at most; so many fit into one header."""
MAX_TASKS = 32
"""Scores of one evaluation at most."""
MAX_CATEGORIES = 64
"""Of one task at most."""
MAX_CATEGORY_CHARACTERS = 64
MAX_PASS_SIZES = 16
MAX_DELTAS = 4
"""From one version of a chunk to another; each comes in a frame of its own."""

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
Reason = Annotated[str, Field(max_length=500)]
TaskName = Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9_./-]+$")]
Category = Annotated[str, Field(min_length=1, max_length=MAX_CATEGORY_CHARACTERS)]
PassSize = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}$")]
Number = Annotated[int, Field(ge=0, le=2**53)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Measure = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Role(StrEnum):
    ACTOR = "actor"
    EVALUATOR = "evaluator"


class ActorState(StrEnum):
    """What a peer is doing, in the order of its life."""

    STARTING = "starting"
    FITTING = "fitting"
    SERVING = "serving"
    STALE = "stale"
    DRAINING = "draining"
    GONE = "gone"
    """Not heard for longer than `network.silence_s`; said by the learner, never by the peer."""


class Outcome(StrEnum):
    """What became of a result that a peer sent."""

    COMMITTED = "committed"
    REDELIVERED = "redelivered"
    REFUSED = "refused"


class Message(BaseModel):
    """What every message carries."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    run_id: Annotated[str, Field(max_length=64)] = ""
    """Empty until a Welcome has told it."""
    incarnation: Number = 0
    request_id: Number = 0
    """Set by the asking side; the reply repeats it."""

    def stamped(self, version: Version) -> Self:
        """This message, of the run and incarnation that `version` is of."""
        return self.model_copy(update={"run_id": version.run_id, "incarnation": version.incarnation})


class Hello(Message):
    kind: Literal["hello"] = "hello"
    peer_id: Name
    session: Name
    """Differs at every start of the process, so that leases of an earlier one can be given back at once."""
    role: Annotated[Role, Field(strict=False)]
    engine: Name
    config_hash: Name

    @property
    def routing_id(self) -> bytes:
        """What the process calls its connections, so that two of the same name never take each other's."""
        return f"{self.peer_id}/{self.session}".encode()


class Welcome(Message):
    kind: Literal["welcome"] = "welcome"
    weights_port: Annotated[int, Field(ge=1, le=65535)]
    announcements_port: Annotated[int, Field(ge=1, le=65535)]
    courier_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Where versions are handed over directly; 0: nowhere."""
    newest: Version | None


class Refusal(Message):
    """The learner will not serve this peer or this message; `is_final` tells that asking again is of no use."""

    kind: Literal["refusal"] = "refusal"
    reason: Reason
    is_final: bool
    wants_hello: bool = False
    """The learner does not know the peer: it must greet before it asks again."""


class Lease(BaseModel):
    """The right to sample one prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    lease_id: Name
    prompt_index: Number
    """Which problem of the training split."""
    group_size: Annotated[int, Field(ge=2, le=4096)]
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    max_tokens: Annotated[int, Field(ge=1, le=2**24)]
    seed: Number
    """Answer k is seeded with seed + k."""


class WorkRequest(Message):
    """Sent at least once a second: asks for work, keeps the held leases alive, and reports."""

    kind: Literal["work_request"] = "work_request"
    state: Annotated[ActorState, Field(strict=False)]
    capacity: Annotated[int, Field(ge=0, le=MAX_LEASES)]
    """Leases it could begin now."""
    serving: Version | None
    held: Annotated[tuple[Name, ...], Field(max_length=2 * MAX_LEASES)] = ()
    """Leases it works on or has not had a receipt for."""
    sampled_tokens: Number = 0
    """Since the process started."""
    idle_s: Measure = 0.0
    """Time without a group to sample or score, since its first weights."""


class Work(Message):
    kind: Literal["work"] = "work"
    newest: Version | None
    leases: Annotated[tuple[Lease, ...], Field(max_length=MAX_LEASES)] = ()
    evaluation: Version | None = None
    """The version that an evaluator is to score now."""
    is_finished: bool = False
    """The run is over: leave."""


class TrajectoryHeader(BaseModel):
    """The scalars of one trajectory; its arrays are in the frames."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    num_tokens: Annotated[int, Field(ge=2, le=2**24)]
    reward: Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
    is_truncated: bool


class GroupHeader(Message):
    """A TrajectoryGroup; four array frames follow: tokens, logprobs, mask, versions (see common/wire/groups.py)."""

    kind: Literal["group"] = "group"
    lease_id: Name
    num_prompt_tokens: Annotated[int, Field(ge=1, le=2**24)]
    trajectories: Annotated[tuple[TrajectoryHeader, ...], Field(min_length=2, max_length=4096)]
    sampling_s: Measure = 0.0
    """From the lease to the finished group, by the actor's clock."""


class LeaseFailure(Message):
    """The prompt of a lease could not be sampled or scored; the lease is given back."""

    kind: Literal["lease_failure"] = "lease_failure"
    lease_id: Name
    reason: Reason


class TaskScore(BaseModel):
    """What one version achieved on one task, k answers to each problem."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    task: TaskName
    num_problems: Annotated[int, Field(ge=1, le=2**24)]
    samples_per_problem: Annotated[int, Field(ge=1, le=4096)]
    """k."""
    num_correct: Number
    """Right answers, of num_problems · samples_per_problem."""
    num_unparsed: Number
    """Answers in which the environment did not find what it looks for; they count as wrong."""
    num_truncated: Number
    """Answers that were cut off at the limit of tokens."""
    confidence_95: tuple[Share, Share]
    """Bootstrap interval of the accuracy over problems."""
    pass_at_k: Annotated[dict[PassSize, Share], Field(max_length=MAX_PASS_SIZES)]
    """Unbiased, by k: powers of two, and samples_per_problem."""
    categories: Annotated[dict[Category, Share], Field(max_length=MAX_CATEGORIES)] = {}
    """Accuracy by category; empty where the task has none."""
    mean_score: Annotated[float, Field(allow_inf_nan=False)]
    """Mean reward of an answer."""
    mean_answer_tokens: Measure
    wall_s: Measure

    @property
    def num_samples(self) -> int:
        return self.num_problems * self.samples_per_problem

    @property
    def accuracy(self) -> float:
        """avg@k: the mean over problems of the share of right answers, all problems having k."""
        return self.num_correct / self.num_samples

    @property
    def adds_up(self) -> bool:
        """No count exceeds the number of answers."""
        return max(self.num_correct, self.num_unparsed, self.num_truncated) <= self.num_samples

    def line(self) -> dict[str, Any]:
        """As eval.jsonl and `chord-eval --json` tell it."""
        values = self.model_dump(mode="json", exclude={"categories"} if not self.categories else None)
        return {
            "task": values.pop("task"),
            "num_problems": values.pop("num_problems"),
            "samples_per_problem": values.pop("samples_per_problem"),
            "num_correct": values.pop("num_correct"),
            "accuracy": self.accuracy,
            "avg_at_k": self.accuracy,
            **values,
        }


class EvaluationResult(Message):
    """All that one version achieved, in the order in which the tasks are configured."""

    kind: Literal["evaluation"] = "evaluation"
    version: Version
    scores: Annotated[tuple[TaskScore, ...], Field(min_length=1, max_length=MAX_TASKS)]

    @property
    def adds_up(self) -> bool:
        """Each task is there once, and every score is a possible one."""
        return all(score.adds_up for score in self.scores) and len({score.task for score in self.scores}) == len(
            self.scores
        )


class Receipt(Message):
    """Sent after the result is on disk."""

    kind: Literal["receipt"] = "receipt"
    outcome: Annotated[Outcome, Field(strict=False)]
    reason: Reason = ""


class Goodbye(Message):
    """The peer leaves; its leases are free."""

    kind: Literal["goodbye"] = "goodbye"
    reason: Reason = ""


class Announcement(Message):
    kind: Literal["announcement"] = "announcement"
    version: Version


class ManifestRequest(Message):
    kind: Literal["manifest_request"] = "manifest_request"
    version: Version
    relay_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Where the peer passes versions on to others, and so may be sent to another one itself; 0: it does neither."""


class ManifestReply(Message):
    """One frame follows: the chunk hashes, one after the other. Zero bytes: the version is not kept here."""

    kind: Literal["manifest"] = "manifest"
    version: Version
    num_bytes: Number
    chunk_bytes: Annotated[int, Field(ge=1, le=1 << 26)]
    relay: Annotated[str, Field(max_length=64)] = ""
    """Who is to be asked for chunks: HOST:PORT of a peer that has them, or soon will; empty: whoever replied."""
    progress: Number = 0
    """Of a peer that still fetches the version: rises with all that comes in; 0: it does not fetch it."""


class ChunkRequest(Message):
    """One unit of credit."""

    kind: Literal["chunk_request"] = "chunk_request"
    version: Version
    index: Number
    base: Annotated[str, Field(max_length=64)] = ""
    """Hash of a version that the peer holds, so that deltas will do; empty: none."""


class Chunk(Message):
    """Frames follow: the deltas that lead there from the peer's base, in order; or one, the bytes themselves; or none,
    where the version is no longer kept."""

    kind: Literal["chunk"] = "chunk"
    version: Version
    index: Number
    num_deltas: Annotated[int, Field(ge=0, le=MAX_DELTAS)] = 0
    """0: the bytes themselves."""


class TransferRequest(Message):
    """An engine wants a version over a group that it shares with the courier."""

    kind: Literal["transfer_request"] = "transfer_request"
    version: Version
    num_workers: Annotated[int, Field(ge=1, le=4096)]
    is_member: bool
    """Whether they are in the group that they were invited to last."""


class TransferReply(Message):
    """The courier's turn has come; a frame follows, the outlines of the tensors as JSON. Sending begins with a
    TransferStart, and not without one."""

    kind: Literal["transfer"] = "transfer"
    version: Version
    transport: Annotated[str, Field(max_length=16)] = ""
    invitation: Annotated[str, Field(max_length=512)] = ""
    """To a new group; empty: to that of last time."""
    fingerprint: Annotated[str, Field(max_length=64)] = ""
    """Of all tensors of the version; see common.weights.fingerprint."""
    reason: Reason = ""
    """Why there is no transfer; empty: there is one."""


class TransferStart(Message):
    """All workers are about to receive."""

    kind: Literal["transfer_start"] = "transfer_start"
    version: Version


AnyMessage = Annotated[
    Hello | Welcome | Refusal | WorkRequest | Work | GroupHeader | LeaseFailure | EvaluationResult | Receipt | Goodbye
    | Announcement | ManifestRequest | ManifestReply | ChunkRequest | Chunk | TransferRequest | TransferReply
    | TransferStart,
    Field(discriminator="kind"),
]  # fmt: skip

MESSAGES: TypeAdapter[AnyMessage] = TypeAdapter(AnyMessage)
