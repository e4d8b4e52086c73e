"""The inbox: the learner's front door. It grants leases, journals results, and acknowledges only what is on disk.

Consumes messages of peers; waits for nobody; produces committed groups in the ledger. Each round drains what has
arrived, handles it in one transaction, then replies: many results share one write to disk, and no receipt leaves before
the commit.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import zmq

from common.version import Version
from common.watchdog import Watch
from common.wire.codec import Buffer, ProtocolMismatch, WireError, decode, encode
from common.wire.groups import GroupLimits, read_group, to_blob
from common.wire.messages import (
    EvaluationResult,
    Goodbye,
    GroupHeader,
    Hello,
    Lease,
    LeaseFailure,
    Message,
    Outcome,
    Receipt,
    Refusal,
    Role,
    Welcome,
    Work,
    WorkRequest,
)
from learner.ledger.ledger import Ledger, Sample
from learner.peers import Peer, Peers

log = logging.getLogger(__name__)

MAX_ROUND = 256
"""Messages handled under one commit at most."""
POLL_MS = 200
MAX_SEED = 2**53
"""Seeds of leases lie below it, whatever run.seed is; a message carries no larger number."""


@dataclass(frozen=True)
class LeaseTerms:
    """What every lease of the run says, and how long a silent actor keeps it."""

    group_size: int
    temperature: float
    max_tokens: int
    seed: int
    lease_s: float


@dataclass(frozen=True)
class Door:
    """What a newcomer is told, and what it must bring."""

    config_hash: str
    weights_port: int
    announcements_port: int
    max_message_bytes: int


class Inbox:
    """Owns the ROUTER socket and its thread."""

    def __init__(
        self, socket: "zmq.Socket[bytes]", ledger: Ledger, *, door: Door, terms: LeaseTerms, vocab_size: int,
        newest: Callable[[], Version | None], is_published: Callable[[Version], bool],
        evaluation: Callable[[], Version | None], on_evaluation: Callable[[EvaluationResult], Outcome],
        watch: Watch | None = None,
    ) -> None:  # fmt: skip
        self._socket = socket
        self._ledger = ledger
        self._door = door
        self._terms = terms
        self._vocab_size = vocab_size
        self._newest = newest
        self._is_published = is_published
        self._evaluation = evaluation
        self._on_evaluation = on_evaluation
        self._watch = watch
        self.peers = Peers()
        self.refusals: dict[str, int] = {}
        """Refused messages by kind of fault."""
        self.received_bytes = 0
        self.grants_leases = False
        """Set when every committed batch has been replayed: only then may new leases and results come."""
        self.is_run_finished = False
        self.failure: Exception | None = None
        """What ended the thread, a disk that is full as a rule; the train loop raises it."""
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="inbox", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._is_closing.set()
        self._thread.join(timeout=5)

    def _serve(self) -> None:
        try:
            while not self._is_closing.is_set():
                if self._watch:
                    self._watch.beat()
                arrived = self._drain()
                with self._ledger.transaction():
                    replies = [reply for peer, frames in arrived if (reply := self._handle(peer, frames))]
                    self._expire_silent()
                for reply in replies:
                    self._send(reply)
        except Exception as error:  # nobody else would notice that the door is shut
            self.failure = error
            with self._ledger.changed:
                self._ledger.changed.notify_all()
        finally:
            if self._watch:
                self._watch.rest()  # a failure that is stored ends with its own line
            self._socket.close()

    def _drain(self) -> list[tuple[bytes, list[bytes]]]:
        arrived: list[tuple[bytes, list[bytes]]] = []
        timeout = POLL_MS
        while len(arrived) < MAX_ROUND and self._socket.poll(timeout):
            peer, *frames = self._socket.recv_multipart()
            self.received_bytes += sum(len(frame) for frame in frames)
            arrived.append((peer, frames))
            timeout = 0
        return arrived

    def _send(self, frames: list[Buffer]) -> None:
        try:
            self._socket.send_multipart(frames, flags=zmq.NOBLOCK)
        except zmq.ZMQError:
            log.info("a reply to %s was not delivered: it will ask again", bytes(frames[0]).decode(errors="replace"))

    def _handle(self, routing_id: bytes, frames: list[bytes]) -> list[Buffer] | None:
        try:
            envelope = decode(frames, max_bytes=self._door.max_message_bytes)
            reply = self._answer(routing_id, envelope.message, envelope.frames)
            request_id = envelope.message.request_id
        except WireError as error:
            kind = type(error).__name__
            self.refusals[kind] = self.refusals.get(kind, 0) + 1
            log.warning("refused a message of %s: %s", routing_id.decode(errors="replace")[:64], error)
            reply = Refusal(reason=str(error)[:500], is_final=isinstance(error, ProtocolMismatch))
            request_id = 0
        if reply is None:
            return None
        header = reply.model_copy(
            update={"run_id": self._ledger.run_id, "incarnation": self._ledger.incarnation, "request_id": request_id}
        )
        return [routing_id, *encode(header)]

    def _answer(self, routing_id: bytes, message: Message, frames: Any) -> Message | None:
        if isinstance(message, Hello):
            return self._welcome(routing_id, message)
        peer = self.peers.get(routing_id)
        if peer is None or message.incarnation != self._ledger.incarnation or message.run_id != self._ledger.run_id:
            return Refusal(reason="unknown peer: say hello first", is_final=False)
        peer.last_heard = time.monotonic()
        match message:
            case GroupHeader() if not self.grants_leases:
                return Refusal(reason="the learner replays its last steps", is_final=False)
            case WorkRequest():
                return self._work(peer, message)
            case GroupHeader() | LeaseFailure() if not self._ledger.was_issued_to(message.lease_id, peer.peer_id):
                reason = f"lease {message.lease_id} was not issued to {peer.peer_id}"
                return Receipt(outcome=Outcome.REFUSED, reason=reason)
            case GroupHeader():
                return self._commit(message, frames)
            case LeaseFailure():
                log.warning("%s failed on lease %s: %s", peer.peer_id, message.lease_id, message.reason)
                self._ledger.expire_lease(message.lease_id)
                return Receipt(outcome=Outcome.COMMITTED)
            case EvaluationResult():
                return Receipt(outcome=self._on_evaluation(message))
            case Goodbye():
                return self._part(routing_id, message)
            case _:
                raise WireError(f"got {type(message).__name__}, expected a request of an actor or evaluator")

    def _welcome(self, routing_id: bytes, hello: Hello) -> Message:
        if hello.config_hash != self._door.config_hash:
            reason = (
                f"configuration: {hello.peer_id} has hash {hello.config_hash}, expected {self._door.config_hash}: "
                "give it the learner's sampling, environment, algorithm, run.seed and eval values"
            )
            return Refusal(reason=reason, is_final=True)
        earlier = self.peers.join(routing_id, hello)
        if earlier:
            self._ledger.expire(earlier)
        log.info("%s %s joined (%s engine)", hello.role, hello.peer_id, hello.engine)
        return Welcome(
            weights_port=self._door.weights_port,
            announcements_port=self._door.announcements_port,
            newest=self._newest(),
        )

    def _work(self, peer: Peer, request: WorkRequest) -> Message:
        self.peers.heard(peer, request)
        if peer.role is Role.EVALUATOR:
            return Work(newest=self._newest(), evaluation=self._evaluation(), is_finished=self.is_run_finished)
        if request.held:
            self._ledger.reclaim(request.held, peer.session)
        newest = self._newest()
        leases: tuple[Lease, ...] = ()
        if request.serving and self.grants_leases and not self.is_run_finished and self._is_published(request.serving):
            granted = self._ledger.lease(
                peer.peer_id,
                peer.session,
                capacity=request.capacity,
                serving_step=request.serving.step,
                held=request.held,
            )
            leases = tuple(self._lease(lease.lease_id, lease.prompt_index, lease.group_id) for lease in granted)
        return Work(newest=newest, leases=leases, is_finished=self.is_run_finished)

    def _lease(self, lease_id: str, prompt_index: int, group_id: int) -> Lease:
        terms = self._terms
        return Lease(
            lease_id=lease_id, prompt_index=prompt_index, group_size=terms.group_size, temperature=terms.temperature,
            max_tokens=terms.max_tokens, seed=(terms.seed * 1_000_003 + group_id) * terms.group_size % MAX_SEED,
        )  # fmt: skip

    def _commit(self, header: GroupHeader, frames: Any) -> Message:
        newest = self._newest()
        limits = GroupLimits(self._vocab_size, self._terms.group_size, newest.step if newest else 0)
        try:
            group = read_group(header, frames, limits)
        except WireError as error:
            self._ledger.expire_lease(header.lease_id)
            self.refusals["group"] = self.refusals.get("group", 0) + 1
            log.warning("refused a group: %s", error)
            return Receipt(outcome=Outcome.REFUSED, reason=str(error)[:500])
        outcome, reason = self._ledger.commit(
            header.lease_id,
            to_blob(header, frames),
            Sample(
                min_version=group.min_version,
                num_trajectories=len(group.trajectories),
                num_answer_tokens=group.num_answer_tokens,
                reward_sum=group.reward_sum,
                sampling_s=group.sampling_s,
            ),
        )
        return Receipt(outcome=outcome, reason=reason)

    def _part(self, routing_id: bytes, goodbye: Goodbye) -> Message:
        peer = self.peers.leave(routing_id)
        if peer:
            self._ledger.expire(peer.session)
            log.info("%s left: %s", peer.peer_id, goodbye.reason or "no reason given")
        return Receipt(outcome=Outcome.COMMITTED)

    def _expire_silent(self) -> None:
        for routing_id, peer in self.peers.silent(self._terms.lease_s):
            self.peers.leave(routing_id)
            given_back = self._ledger.expire(peer.session)
            log.warning("%s silent for %.0f s: %d leases given back", peer.peer_id, peer.silence_s, given_back)
