"""Every message between an actor, an evaluator and the learner, as a frozen, bounded model.

Life of a peer: Hello → Welcome; then WorkRequest → Work, groups and evaluation results → Receipt, until Goodbye.
Weights travel beside it: an Announcement to all, then ManifestRequest → ManifestReply and ChunkRequest → Chunk, each
peer at its own pace.
"""

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from common.version import Version

PROTOCOL = 2
"""Raised with every change that an older peer would misread."""

MAX_LEASES = 1024
"""Leases of one actor at a time at most; so many fit into one header."""

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
Reason = Annotated[str, Field(max_length=500)]
Number = Annotated[int, Field(ge=0, le=2**53)]
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
    """Time without a running answer since it first served."""


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
    """A TrajectoryGroup; four array frames follow: tokens, logprobs, mask, versions."""

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


class EvaluationResult(Message):
    kind: Literal["evaluation"] = "evaluation"
    version: Version
    task: Name
    num_problems: Annotated[int, Field(ge=1)]
    num_correct: Number
    mean_score: Annotated[float, Field(allow_inf_nan=False)]
    mean_answer_tokens: Measure
    wall_s: Measure


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


class ManifestReply(Message):
    """One frame follows: the chunk hashes, one after the other. Zero bytes: the version is no longer kept."""

    kind: Literal["manifest"] = "manifest"
    version: Version
    num_bytes: Number
    chunk_bytes: Annotated[int, Field(ge=1, le=1 << 26)]


class ChunkRequest(Message):
    """One unit of credit."""

    kind: Literal["chunk_request"] = "chunk_request"
    version: Version
    index: Number


class Chunk(Message):
    """One frame follows: the bytes; none where the version is no longer kept."""

    kind: Literal["chunk"] = "chunk"
    version: Version
    index: Number


AnyMessage = Annotated[
    Hello | Welcome | Refusal | WorkRequest | Work | GroupHeader | LeaseFailure | EvaluationResult | Receipt | Goodbye
    | Announcement | ManifestRequest | ManifestReply | ChunkRequest | Chunk,
    Field(discriminator="kind"),
]  # fmt: skip

MESSAGES: TypeAdapter[AnyMessage] = TypeAdapter(AnyMessage)
