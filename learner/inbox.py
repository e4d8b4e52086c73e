"""The inbox: the learner's front door. It grants leases, journals results, and acknowledges only what is on disk.

Consumes messages of peers; waits for nobody; produces committed groups in the ledger. Each round drains what has
arrived, handles it in one transaction, then replies: many results share one write to disk, and no receipt leaves before
the commit. While the disk is busy, the next round is received and read.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from common.trajectory import TrajectoryGroup
from common.version import Version
from common.watchdog import Watch
from common.wire.codec import Buffer, ProtocolMismatch, WireError, encode
from common.wire.connections import Closing
from common.wire.groups import GroupLimits, to_blob
from common.wire.listener import Listener
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
    Work,
    WorkRequest,
)
from learner.attendance import Attendance
from learner.intake import Intake, Letter
from learner.ledger.leases import DropReason
from learner.ledger.ledger import Ledger, Sample
from learner.peers import Peer, Peers
from learner.reception import Door, NotYourName, Reception, check_name

log = logging.getLogger(__name__)

MAX_FAILED_GROUPS = 8
"""Prompts, all different, that one peer may fail on without a good group between them."""
MAX_REFUSED_GROUPS = 3
"""Of one peer in a row; then it is sent away, so that a broken one does not use up the prompts' leases."""
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


class Inbox:
    """Owns the front door and its thread."""

    def __init__(
        self, listener: Listener, ledger: Ledger, *, door: Door, terms: LeaseTerms, vocab_size: int,
        newest: Callable[[], Version | None], is_published: Callable[[Version], bool],
        evaluation: Callable[[], Version | None], on_evaluation: Callable[[EvaluationResult], Outcome],
        judge: Callable[[TrajectoryGroup], DropReason | None] | None = None, watch: Watch | None = None,
        observe_commit: Callable[[float], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """`judge` says why a valid group is to be dropped all the same; None: none is. `observe_commit` is told the
        seconds from a round's first message to its commit, where it held groups."""
        self._listener = listener
        self._ledger = ledger
        self._door = door
        self._terms = terms
        self._vocab_size = vocab_size
        self._newest = newest
        self._is_published = is_published
        self._evaluation = evaluation
        self._on_evaluation = on_evaluation
        self._judge = judge
        self._watch = watch
        self._observe_commit = observe_commit
        self.peers = Peers()
        self._reception = Reception(door, self.peers, ledger, newest=newest)
        self._attendance = Attendance(self.peers, ledger, silence_s=door.silence_s, lease_s=terms.lease_s)
        self.refusals = listener.refusals
        """Refused messages by kind of fault."""
        self._intake = Intake(
            listener,
            max_message_bytes=door.max_message_bytes,
            max_round_bytes=door.max_round_bytes,
            limits=self._group_limits,
        )
        self.grants_leases = False
        """Set when every committed batch has been replayed: only then may new leases and results come."""
        self.is_run_finished = False
        self.failure: Exception | None = None
        """What ended the thread, a disk that is full as a rule; the train loop raises it."""
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="inbox", daemon=True)

    @property
    def received_bytes(self) -> int:
        return self._intake.received_bytes

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._is_closing.set()
        self._thread.join(timeout=5)

    def _serve(self) -> None:
        letters: list[Letter] = []
        try:
            while not self._is_closing.is_set():
                if self._watch:
                    self._watch.beat()
                self._attendance.forgive_own_absence()
                letters += self._intake.collect(0 if letters else POLL_MS)
                letters = self._handle_round(letters)
        except Exception as error:  # nobody else would notice that the door is shut
            self.failure = error
            with self._ledger.changed:
                self._ledger.changed.notify_all()
        finally:
            if self._watch:
                self._watch.rest()  # a failure that is stored ends with its own line
            self._listener.close()

    def _handle_round(self, letters: list[Letter]) -> list[Letter]:
        """Answer `letters` once they are on disk; returns what came, and was read, while the disk was busy."""
        following: list[Letter] = []

        def collect(is_over: Callable[[], bool]) -> None:
            following.extend(self._intake.collect(0, is_over=is_over))

        began = time.monotonic()
        with self._ledger.transaction(while_committing=collect):
            replies = [reply for letter in letters if (reply := self._handle(letter))]
            self._attendance.mind_the_silent()
        if any(letter.group for letter in letters):
            self._observe_commit(time.monotonic() - began)
        for reply in replies:
            self._send(reply)
        for letter in letters:
            self._listener.settle(letter.arrival)
        return following

    def _send(self, frames: list[Buffer]) -> None:
        try:
            self._listener.send(frames)
        except zmq.ZMQError:
            log.debug("a reply to %s was not delivered: it will ask again", bytes(frames[0]).decode(errors="replace"))

    def _handle(self, letter: Letter) -> list[Buffer] | None:
        """The reply; None to a peer that is shown out."""
        arrival, message = letter.arrival, letter.message
        try:
            if isinstance(message, WireError):
                raise message
            reply, request_id = self._answer(letter, message), message.request_id
        except ProtocolMismatch as error:
            self._listener.refuse("protocol", str(error))
            reply, request_id = Refusal(reason=str(error)[:500], is_final=True), 0
        except WireError as error:
            self._listener.refuse("malformed", str(error))
            self._listener.expel(
                arrival.connection, Closing.MALFORMED, f"{arrival.key_name or 'it'} sent what no peer sends"
            )
            return None
        except NotYourName as error:
            self._listener.refuse("identity", str(error))
            self._listener.expel(arrival.connection, Closing.IDENTITY, str(error))
            return None
        if not isinstance(reply, Refusal):
            self._listener.admit(arrival.connection)
        header = reply.model_copy(
            update={"run_id": self._ledger.run_id, "incarnation": self._ledger.incarnation, "request_id": request_id}
        )
        return [arrival.routing_id, *encode(header)]

    def _answer(self, letter: Letter, message: Message) -> Message:
        """Raises WireError or NotYourName where the sender is to be shown out."""
        arrival = letter.arrival
        if not arrival.connection.is_admitted and self._listener.is_full:
            self._listener.refuse("full", "network.max_connections peers are served")
            return Refusal(reason="the learner serves network.max_connections peers already", is_final=False)
        if isinstance(message, Hello):
            return self._reception.welcome(arrival, message)
        peer = self.peers.get(arrival.routing_id)
        if peer:
            check_name(arrival, peer.peer_id)
        if peer is None or message.incarnation != self._ledger.incarnation or message.run_id != self._ledger.run_id:
            return Refusal(reason="unknown peer: say hello first", is_final=False, wants_hello=True)
        peer.last_heard = time.monotonic()
        peer.connection = arrival.connection
        match message:
            case GroupHeader() if not self.grants_leases:
                return Refusal(reason="the learner replays its last steps", is_final=False)
            case WorkRequest():
                return self._work(peer, message)
            case GroupHeader() | LeaseFailure():
                return self._take(peer, message, letter)
            case EvaluationResult() if peer.role is not Role.EVALUATOR or not message.adds_up:
                raise WireError("got an evaluation that no evaluator makes")
            case EvaluationResult():
                return Receipt(outcome=self._on_evaluation(message))
            case Goodbye():
                return self._part(peer, message)
            case _:
                raise WireError(f"got {type(message).__name__}, expected a request of an actor or evaluator")

    def _work(self, peer: Peer, request: WorkRequest) -> Message:
        self.peers.heard(peer, request)
        if peer.role is Role.EVALUATOR:
            return Work(newest=self._newest(), evaluation=self._evaluation(), is_finished=self.is_run_finished)
        if request.held:
            self._ledger.reclaim(request.held, peer.session)
        newest = self._newest()
        leases: tuple[Lease, ...] = ()
        if request.serving and self.grants_leases and not self.is_run_finished and self._is_published(request.serving):
            share = self._ledger.share(self.peers.num_serving)
            granted = self._ledger.lease(
                peer.peer_id,
                peer.session,
                capacity=min(request.capacity, max(share - len(request.held), 0)),
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

    def _take(self, peer: Peer, result: GroupHeader | LeaseFailure, letter: Letter) -> Message:
        """What became of a lease, from whom it was issued to."""
        standing = self._ledger.standing(result.lease_id)
        if standing is None or standing.actor_id != peer.peer_id:
            reason = f"lease {result.lease_id} was not issued to {peer.peer_id}"
            self._listener.refuse("lease", reason)
            return Receipt(outcome=Outcome.REFUSED, reason=reason)
        if isinstance(result, LeaseFailure):
            return self._fail(peer, result)
        if standing.state != "leased":  # it may be of a history that was left behind
            reason = self._ledger.note_late(result.lease_id, standing)
            return Receipt(outcome=Outcome.REDELIVERED, reason=reason)
        return self._commit(peer, result, letter)

    def _commit(self, peer: Peer, header: GroupHeader, letter: Letter) -> Message:
        arrays = letter.group
        assert arrays, "it is read with its header"
        if isinstance(arrays, WireError):
            self._ledger.expire_lease(header.lease_id)
            return self._refuse_group(peer, arrays)
        peer.num_refused_groups = 0
        peer.failed_groups.clear()
        sample = Sample(
            min_version=arrays.min_version,
            num_trajectories=len(header.trajectories),
            num_answer_tokens=arrays.num_sampled,
            reward_sum=arrays.reward_sum,
            sampling_s=header.sampling_s,
        )
        drop = self._judge(arrays.group()) if self._judge else None
        outcome, reason = self._ledger.commit(header.lease_id, to_blob(letter.arrival.frames), sample, drop=drop)
        return Receipt(outcome=outcome, reason=reason)

    def _group_limits(self) -> GroupLimits:
        """After a restart groups come back before a version is announced: they are as old as the steps on record."""
        newest = self._newest()
        max_version = newest.step if newest else self._ledger.history.num_batches()
        return GroupLimits(self._vocab_size, self._terms.group_size, max_version, self._door.max_message_bytes)

    def _refuse_group(self, peer: Peer, error: WireError) -> Message:
        self._listener.refuse("group", f"{peer.peer_id}: {error}")
        peer.num_refused_groups += 1
        if peer.num_refused_groups < MAX_REFUSED_GROUPS:
            return Receipt(outcome=Outcome.REFUSED, reason=str(error)[:500])
        return self._send_away(peer, f"{MAX_REFUSED_GROUPS} groups in a row were refused, the last for {error}")

    def _fail(self, peer: Peer, failure: LeaseFailure) -> Message:
        """Take a lease back. A peer that fails on everything is at fault itself, and would poison every prompt."""
        self._listener.say("lease failure", f"{peer.peer_id} failed on lease {failure.lease_id}: {failure.reason}")
        self._ledger.expire_lease(failure.lease_id)
        peer.failed_groups.add(failure.lease_id.partition(".")[0])
        if len(peer.failed_groups) < MAX_FAILED_GROUPS:
            return Receipt(outcome=Outcome.COMMITTED)
        return self._send_away(peer, f"{MAX_FAILED_GROUPS} prompts in a row failed, the last for {failure.reason}")

    def _send_away(self, peer: Peer, why: str) -> Message:
        self.peers.leave(peer)
        self._ledger.expire(peer.session)
        reason = f"{peer.peer_id}: {why}"[:500]
        self._listener.say("sent away", f"sent away {reason}")
        return Refusal(reason=reason, is_final=True)

    def _part(self, peer: Peer, goodbye: Goodbye) -> Message:
        self.peers.leave(peer)
        self._ledger.expire(peer.session)
        log.info("%s left: %s", peer.peer_id, goodbye.reason or "no reason given")
        return Receipt(outcome=Outcome.COMMITTED)
