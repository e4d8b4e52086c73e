"""The peers of the learner as it sees them: who is there, what they serve, when they were last heard."""

import time
from dataclasses import dataclass, field

from common.wire.messages import ActorState, Hello, Role, WorkRequest


@dataclass
class Peer:
    """One actor or evaluator process."""

    peer_id: str
    session: str
    role: Role
    engine: str
    state: ActorState = ActorState.STARTING
    serving_step: int | None = None
    """None while it serves no announced weights."""
    sampled_tokens: int = 0
    idle_s: float = 0.0
    first_heard: float = field(default_factory=time.monotonic)
    last_heard: float = field(default_factory=time.monotonic)

    @property
    def silence_s(self) -> float:
        return time.monotonic() - self.last_heard


class Peers:
    """By the ZeroMQ routing id that each peer set for itself."""

    def __init__(self) -> None:
        self._peers: dict[bytes, Peer] = {}
        self._departed_tokens = 0

    def join(self, routing_id: bytes, hello: Hello) -> str | None:
        """Note a peer; returns the session of an earlier process of the same name, whose leases are void."""
        earlier = self.get(routing_id)
        if earlier and earlier.session == hello.session:
            return None
        if earlier:
            self._departed_tokens += earlier.sampled_tokens
        self._peers[routing_id] = Peer(hello.peer_id, hello.session, hello.role, hello.engine)
        return earlier.session if earlier else None

    def get(self, routing_id: bytes) -> Peer | None:
        return self._peers.get(routing_id)

    def heard(self, peer: Peer, request: WorkRequest) -> None:
        peer.last_heard = time.monotonic()
        peer.state = request.state
        peer.serving_step = request.serving.step if request.serving else None
        peer.sampled_tokens, peer.idle_s = request.sampled_tokens, request.idle_s

    def leave(self, routing_id: bytes) -> Peer | None:
        peer = self._peers.pop(routing_id, None)
        if peer:
            self._departed_tokens += peer.sampled_tokens
        return peer

    def silent(self, limit_s: float) -> list[tuple[bytes, Peer]]:
        """Peers not heard for longer than `limit_s`."""
        return [(routing_id, peer) for routing_id, peer in self._peers.items() if peer.silence_s > limit_s]

    def all(self) -> list[Peer]:
        """A snapshot, safe to read from another thread."""
        return list(self._peers.values())

    def actors(self) -> list[Peer]:
        return [peer for peer in self.all() if peer.role is Role.ACTOR]

    @property
    def sampled_tokens(self) -> int:
        """By all actors that ever joined."""
        return self._departed_tokens + sum(peer.sampled_tokens for peer in self.actors())

    def describe(self) -> str:
        """Who is there, in one line, for messages about waiting."""
        if not self._peers:
            return "no actor has connected"
        return ", ".join(
            f"{peer.peer_id} {peer.state} version {peer.serving_step if peer.serving_step is not None else '-'}, "
            f"heard {peer.silence_s:.0f} s ago" for peer in self.all()
        )  # fmt: skip
