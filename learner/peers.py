"""The peers of the learner as it sees them: who is there, what they serve, when they were last heard."""

import time
from dataclasses import dataclass, field
from typing import Self

from common.wire.connections import IDLE_BYTES_PER_S, Connection
from common.wire.messages import ActorState, Hello, Role, WorkRequest

COUNT_S = 1.0
"""Between two looks at the bytes that a peer's connection has brought, and between two counts of actors."""
NEVER = float("-inf")


@dataclass(frozen=True)
class Labour:
    """What actors have done, each since this learner first heard it serve a version."""

    sampled_tokens: int = 0
    served_s: float = 0.0
    """Time in which it had weights to sample with, up to its last report."""
    idle_s: float = 0.0
    """The part of it without a group to sample or score."""

    def __add__(self, other: Self) -> "Labour":
        return Labour(
            self.sampled_tokens + other.sampled_tokens, self.served_s + other.served_s, self.idle_s + other.idle_s
        )

    def since(self, before: Self) -> "Labour":
        """What was added to `before`; never less than nothing, even where an actor is just leaving."""
        return Labour(
            max(self.sampled_tokens - before.sampled_tokens, 0),
            max(self.served_s - before.served_s, 0.0),
            max(self.idle_s - before.idle_s, 0.0),
        )

    @property
    def idle_frac(self) -> float:
        """0 where nobody served."""
        return min(self.idle_s / self.served_s, 1.0) if self.served_s else 0.0


@dataclass
class Peer:
    """One actor or evaluator process."""

    peer_id: str
    session: str
    role: Role
    engine: str
    connection: Connection
    """The one that it was last heard by."""
    state: ActorState = ActorState.STARTING
    serving_step: int | None = None
    """None while it serves no announced weights."""
    labour: Labour = Labour()
    served_from: tuple[float, int, float] | None = None
    """When it was first heard to serve a version, and its sampled tokens and idle seconds then: an actor may be older
    than its learner."""
    last_heard: float = field(default_factory=time.monotonic)
    num_refused_groups: int = 0
    """Since its last good one."""
    failed_groups: set[str] = field(default_factory=set[str])
    """Groups that it failed on since its last good one."""
    rival: tuple[str, float] | None = None
    """Session of another process that wants its name, and since when."""
    counted: tuple[float, int] = 0.0, 0
    """When its connection was last looked at, and the bytes that it had brought."""

    @property
    def silence_s(self) -> float:
        return time.monotonic() - self.last_heard

    @property
    def is_serving(self) -> bool:
        """Whether it is there and has weights of the run."""
        return self.serving_step is not None and self.state is not ActorState.GONE

    def note_bytes(self) -> None:
        """A message that is still coming in counts as being heard: more bytes than heartbeats alone would bring."""
        now, (counted_at, num_before) = time.monotonic(), self.counted
        if now - counted_at < COUNT_S:
            return
        num_bytes = self.connection.received_bytes()
        if counted_at and num_bytes - num_before > IDLE_BYTES_PER_S * (now - counted_at):
            self.last_heard = max(self.last_heard, counted_at)  # when in between they came is not known
        self.counted = now, num_bytes


class Peers:
    """By name: one process at a time has it."""

    def __init__(self) -> None:
        self._peers: dict[str, Peer] = {}
        self._departed = Labour()
        self._counted_at, self._num_serving = NEVER, 0

    def join(self, hello: Hello, connection: Connection) -> str | None:
        """Note a peer; returns the session of an earlier process of the same name, whose leases are void."""
        earlier = self._peers.get(hello.peer_id)
        if earlier and earlier.session == hello.session:
            earlier.connection = connection
            return None
        if earlier:
            self._departed += earlier.labour
            self._counted_at = NEVER
        self._peers[hello.peer_id] = Peer(hello.peer_id, hello.session, hello.role, hello.engine, connection)
        return earlier.session if earlier else None

    def get(self, routing_id: bytes) -> Peer | None:
        """The process that calls its connections so (see Hello.routing_id)."""
        name, _, session = routing_id.decode(errors="replace").partition("/")
        peer = self._peers.get(name)
        return peer if peer and peer.session == session else None

    def rival_of(self, hello: Hello, *, silence_s: float) -> tuple[Peer, float] | None:
        """Another process that has the name and lives, and how long `hello` has wanted it.

        It lives while it has a connection and was heard within `silence_s`.
        """
        holder = self._peers.get(hello.peer_id)
        if holder is None or holder.session == hello.session:
            return None
        if not holder.connection.is_open or holder.silence_s > silence_s:
            return None
        if holder.rival is None or holder.rival[0] != hello.session:
            holder.rival = hello.session, time.monotonic()
        return holder, time.monotonic() - holder.rival[1]

    def heard(self, peer: Peer, request: WorkRequest) -> None:
        was_serving = peer.is_serving
        peer.last_heard = time.monotonic()
        peer.state = request.state
        peer.serving_step = request.serving.step if request.serving else None
        if peer.is_serving != was_serving:
            self._counted_at = NEVER
        if peer.role is not Role.ACTOR:
            return
        if request.serving and peer.served_from is None:
            peer.served_from = peer.last_heard, request.sampled_tokens, request.idle_s
        if peer.served_from:
            since, tokens, idle_s = peer.served_from
            served_s = peer.last_heard - since
            idle_s = max(idle_s, request.idle_s - served_s)  # a first request that was sent again tells of earlier
            peer.served_from = since, tokens, idle_s
            peer.labour = Labour(request.sampled_tokens - tokens, served_s, request.idle_s - idle_s)

    def leave(self, peer: Peer) -> None:
        if self._peers.get(peer.peer_id) is peer:
            del self._peers[peer.peer_id]
            self._counted_at = NEVER
            self._departed += peer.labour

    def silent(self, limit_s: float) -> list[Peer]:
        """Peers not heard for longer than `limit_s`."""
        return [peer for peer in self.all() if peer.silence_s > limit_s]

    def all(self) -> list[Peer]:
        """A snapshot, safe to read from another thread."""
        return list(self._peers.values())

    def actors(self) -> list[Peer]:
        return [peer for peer in self.all() if peer.role is Role.ACTOR]

    @property
    def num_serving(self) -> int:
        """Actors that are there and have weights of the run; counted now and then, as everyone who asks for work asks
        for this too."""
        now = time.monotonic()
        if now - self._counted_at > COUNT_S:
            self._counted_at, self._num_serving = now, sum(peer.is_serving for peer in self.actors())
        return self._num_serving

    @property
    def labour(self) -> Labour:
        """Of all actors that ever joined."""
        return sum((peer.labour for peer in self.actors()), self._departed)

    def describe(self) -> str:
        """Who is there, in one line, for messages about waiting."""
        if not self._peers:
            return "no actor has connected"
        return ", ".join(
            f"{peer.peer_id} {peer.state} version {peer.serving_step if peer.serving_step is not None else '-'}, "
            f"heard {peer.silence_s:.0f} s ago" for peer in self.all()
        )  # fmt: skip
