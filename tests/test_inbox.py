"""The inbox over real sockets: who is let in, what is on disk before a receipt leaves, and what outlives a restart."""

import asyncio
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq

from actors.link import LearnerLink
from common.config.schema import Network
from common.errors import OperatorError, WaitTimeout
from common.keys.allowed import ServerKeys
from common.keys.folder import PeerKeys
from common.trajectory import NOT_SAMPLED, Trajectory, TrajectoryGroup
from common.version import Version
from common.wire.codec import Buffer, decode, encode
from common.wire.connections import Bounds
from common.wire.groups import from_blob, group_frames, group_header
from common.wire.listener import Listener
from common.wire.messages import (
    PROTOCOL,
    ActorState,
    AnyMessage,
    ChunkRequest,
    EvaluationResult,
    Goodbye,
    Hello,
    Lease,
    LeaseFailure,
    Message,
    Outcome,
    Receipt,
    Refusal,
    Role,
    TaskScore,
    Welcome,
    Work,
    WorkRequest,
)
from common.wire.ports import free_ports
from common.wire.sockets import SocketLimits, open_socket
from learner.inbox import Inbox, LeaseTerms
from learner.ledger.account import GroupCounts
from learner.ledger.history import Composition
from learner.ledger.ledger import Ledger
from learner.reception import Door
from tests.runs import files_of_at_most

MAX_BYTES = 1 << 20
SILENCE_S = 1.0
LIMITS = SocketLimits(heartbeat_s=0.5, silence_s=2.0, max_frame_bytes=MAX_BYTES)
WAIT_MS = 10_000


class Learner:
    """Ledger and inbox of a learner whose policy is at version 0, in this process."""

    def __init__(
        self,
        folder: Path,
        *,
        port: int | None = None,
        lease_s: float = 60.0,
        seed: int = 0,
        max_connections: int = 99,
        keys: Path | None = None,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.ledger = Ledger(folder / "ledger.sqlite", groups_per_step=4, max_staleness=0)
        self.newest: Version | None = Version(
            run_id=self.ledger.run_id, incarnation=self.ledger.incarnation, step=0, hash="ab" * 16
        )
        self.evaluations: list[EvaluationResult] = []
        self._context: zmq.Context[Any] = zmq.Context()
        self.keys = ServerKeys(self._context, str(keys)) if keys else None
        port = port or free_ports(1, "127.0.0.1")[0]  # to which it comes back, while peers dial it
        self.listener = Listener(
            self._context, zmq.ROUTER, host="127.0.0.1", port=port, purpose="actors", limits=LIMITS,
            bounds=Bounds(max_connections, 4 * MAX_BYTES), keys=self.keys,
        )  # fmt: skip
        self.port = self.listener.port
        self.inbox = Inbox(
            self.listener,
            self.ledger,
            door=Door("agreed", 1111, 2222, MAX_BYTES, max_round_bytes=4 * MAX_BYTES, silence_s=silence_s),
            terms=LeaseTerms(group_size=2, temperature=1.0, max_tokens=8, seed=seed, lease_s=lease_s),
            vocab_size=100,
            newest=lambda: self.newest,
            is_published=lambda version: version == self.newest,
            evaluation=lambda: self.newest,
            on_evaluation=self._note,
        )
        self.inbox.grants_leases = True
        self.inbox.start()

    def _note(self, result: EvaluationResult) -> Outcome:
        self.evaluations.append(result)
        return Outcome.COMMITTED

    def close(self) -> None:
        """Returns when the port is free."""
        self.inbox.close()
        if self.keys:
            self.keys.close()
        self._context.term()
        self.ledger.close()


class Peer:
    """An actor written out by hand: a DEALER, and what it would say."""

    def __init__(self, learner: Learner, name: str, process: int, keys: PeerKeys | None = None) -> None:
        self.name, self.session, self.learner = name, f"{name}-{process}", learner
        self._context: zmq.Context[Any] = zmq.Context()
        self.socket = open_socket(self._context, zmq.DEALER, LIMITS, keys)
        self.socket.setsockopt(zmq.ROUTING_ID, hello(name, self.session).routing_id)
        self.socket.connect(f"tcp://127.0.0.1:{learner.port}")

    def close(self) -> None:
        self._context.destroy(linger=0)

    def receive(self) -> AnyMessage:
        assert self.socket.poll(WAIT_MS), "no reply"
        return decode(self.socket.recv_multipart(), max_bytes=MAX_BYTES).message

    def send(self, message: Message, frames: Sequence[Buffer] = ()) -> None:
        ledger = self.learner.ledger
        context = {"run_id": ledger.run_id, "incarnation": ledger.incarnation}
        self.socket.send_multipart(encode(message.model_copy(update=context), frames))

    def ask(self, message: Message, frames: Sequence[Buffer] = ()) -> AnyMessage:
        self.send(message, frames)
        return self.receive()

    def join(self, **changes: Any) -> AnyMessage:
        return self.ask(hello(self.name, self.session).model_copy(update=changes))

    def work(self, *, capacity: int = 0, held: Sequence[Lease] = ()) -> tuple[Lease, ...]:
        reply = self.ask(work_request(self.learner.newest, capacity=capacity, held=held))
        assert isinstance(reply, Work), reply
        return reply.leases

    def deliver(self, lease: Lease, seed: int = 0, *, version: int = 0) -> Receipt:
        group = make_group(lease.lease_id, seed, version=version)
        reply = self.ask(group_header(group), group_frames(group))
        assert isinstance(reply, Receipt), reply
        return reply


def hello(name: str, session: str) -> Hello:
    return Hello(peer_id=name, session=session, role=Role.ACTOR, engine="simulated", config_hash="agreed")


def work_request(serving: Version | None, *, capacity: int, held: Sequence[Lease] = ()) -> WorkRequest:
    lease_ids = tuple(lease.lease_id for lease in held)
    return WorkRequest(state=ActorState.SERVING, capacity=capacity, serving=serving, held=lease_ids)


def make_group(lease_id: str, seed: int = 0, *, num_answer_tokens: int = 3, version: int = 0) -> TrajectoryGroup:
    """Two answers to a prompt of two tokens."""
    tokens = np.random.default_rng(seed).integers(0, 100, 2 + num_answer_tokens).astype(np.int32)
    sampled = np.array([False] * 2 + [True] * num_answer_tokens)
    logprobs, mask = np.where(sampled, -0.5, 0).astype(np.float32), sampled.astype(np.float32)
    versions = np.where(sampled, version, NOT_SAMPLED).astype(np.int32)
    trajectory = Trajectory(tokens, logprobs, mask, versions, reward=1.0, is_truncated=False)
    return TrajectoryGroup(lease_id, 2, (trajectory, trajectory))


def result_for(version: Version) -> EvaluationResult:
    return EvaluationResult(version=version, scores=(score_of("sums", num_correct=1),))


def score_of(task: str, *, num_correct: int) -> TaskScore:
    """Of two problems, two answers each."""
    return TaskScore(
        task=task, num_problems=2, samples_per_problem=2, num_correct=num_correct, num_unparsed=0, num_truncated=0,
        confidence_95=(0.0, 1.0), pass_at_k={"1": 0.25, "2": 0.5}, mean_score=0.5, mean_answer_tokens=3.0,
        wall_s=0.1,
    )  # fmt: skip


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Learner]]:
    """Starts the learner of the test, again and again."""
    started: list[Learner] = []

    def start_(**options: Any) -> Learner:
        started.append(Learner(tmp_path, **options))
        return started[-1]

    yield start_
    for learner in started:
        learner.close()


@pytest.fixture
def meet() -> Iterator[Callable[..., Peer]]:
    """Makes peers that are closed after the test."""
    met: list[Peer] = []

    def meet_(learner: Learner, name: str = "a", process: int = 1, keys: PeerKeys | None = None) -> Peer:
        met.append(Peer(learner, name, process, keys))
        return met[-1]

    yield meet_
    for peer in met:
        peer.close()


def wait_until(is_reached: Callable[[], bool], *, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_reached():
        assert time.monotonic() < deadline, f"not reached within {timeout_s} s"
        time.sleep(0.01)


def audit(folder: Path, query: str) -> list[tuple[Any, ...]]:
    """What another process sees: only what is committed."""
    with closing(sqlite3.connect(folder / "ledger.sqlite")) as db:
        return db.execute(query).fetchall()


def test_a_peer_that_agrees_is_welcomed_and_given_work(
    start: Callable[..., Learner], meet: Callable[..., Peer]
) -> None:
    learner = start()
    peer = meet(learner)
    welcome = peer.join(request_id=77)
    assert isinstance(welcome, Welcome)
    assert (welcome.weights_port, welcome.announcements_port, welcome.newest) == (1111, 2222, learner.newest)
    assert (welcome.request_id, welcome.run_id, welcome.incarnation) == (77, learner.ledger.run_id, 1)
    leases = peer.work(capacity=9)
    assert [(lease.prompt_index, lease.group_size, lease.max_tokens) for lease in leases] == [
        (index, 2, 8) for index in range(4)
    ]
    assert [lease.seed for lease in leases] == [2, 4, 6, 8]


def test_an_actor_that_holds_its_share_leaves_the_rest_to_others(
    start: Callable[..., Learner], meet: Callable[..., Peer]
) -> None:
    learner = start()
    first, second = meet(learner, "a"), meet(learner, "b")
    first.join()
    second.join()
    assert second.work() == ()
    held = first.work(capacity=9)
    assert len(held) == 2  # of four places, as two serve
    assert first.work(capacity=9, held=held) == ()
    assert len(second.work(capacity=9)) == 2


def test_another_configuration_is_refused_in_one_line_for_good(
    start: Callable[..., Learner], meet: Callable[..., Peer]
) -> None:
    peer = meet(start())
    refusal = peer.join(config_hash="another")
    assert isinstance(refusal, Refusal)
    assert refusal.is_final
    assert refusal.reason.startswith("configuration: a has hash another, expected agreed: give it the learner's ")
    assert "\n" not in refusal.reason
    assert isinstance(peer.ask(work_request(None, capacity=1)), Refusal)


def test_another_protocol_is_refused_for_good(start: Callable[..., Learner], meet: Callable[..., Peer]) -> None:
    peer = meet(start())
    newer = hello("a", "a-1").model_dump(mode="json") | {"protocol": PROTOCOL + 1, "mood": "new"}
    peer.socket.send_multipart([msgpack.packb(newer)])
    refusal = peer.receive()
    assert isinstance(refusal, Refusal)
    assert refusal.is_final
    assert refusal.reason == f"protocol: got {PROTOCOL + 1}, expected {PROTOCOL} (update the older side)"


def test_garbage_costs_the_sender_its_connection_and_stops_nobody(
    start: Callable[..., Learner], meet: Callable[..., Peer]
) -> None:
    learner = start()
    peer = meet(learner)
    assert isinstance(peer.join(), Welcome)
    (lease,) = peer.work(capacity=1)
    deep = b"\x82\xa8protocol" + bytes([PROTOCOL]) + b"\xa4kind" + b"\x91" * 1000 + b"\xc0"
    garbage = [[b""], [b"\xff" * 500], [deep], [b"x"] * 30, [b"\xdf\xff\xff\xff\xff"], [bytes(MAX_BYTES), b"x"]]
    for number, frames in enumerate(garbage):
        vandal = meet(learner, "vandal", number)
        assert isinstance(vandal.join(), Welcome)
        vandal.socket.send_multipart(frames)
        wait_until(lambda: learner.listener.closings["malformed"] == number + 1)  # noqa: B023
    vandal = meet(learner, "vandal", 99)
    vandal.join()
    vandal.send(ChunkRequest(version=learner.newest, index=0))
    wait_until(lambda: learner.listener.closings["malformed"] == len(garbage) + 1)
    assert peer.deliver(lease).outcome is Outcome.COMMITTED
    assert learner.inbox.refusals == {"malformed": len(garbage) + 1}
    assert learner.inbox.failure is None


def test_a_frame_above_the_limit_costs_the_sender_its_connection_and_nobody_else_anything(
    start: Callable[..., Learner], meet: Callable[..., Peer]
) -> None:
    learner = start()
    vandal, peer = meet(learner, "vandal"), meet(learner)
    vandal.socket.send_multipart([bytes(MAX_BYTES + 1)])
    assert isinstance(peer.join(), Welcome)
    assert len(peer.work(capacity=1)) == 1
    assert learner.inbox.received_bytes < MAX_BYTES


def test_what_has_a_receipt_is_on_disk(
    start: Callable[..., Learner], meet: Callable[..., Peer], tmp_path: Path
) -> None:
    learner = start()
    peer = meet(learner)
    peer.join()
    (lease,) = peer.work(capacity=1)
    assert peer.deliver(lease, seed=3).outcome is Outcome.COMMITTED
    query = "SELECT lease_id, actor_id, state, min_version, num_trajectories FROM audit_groups"
    assert audit(tmp_path, query) == [(lease.lease_id, "a", "committed", 0, 2)]
    group = from_blob(learner.ledger.history.bodies([1])[0])
    assert group.lease_id == lease.lease_id
    assert np.array_equal(group.trajectories[1].tokens, make_group("", seed=3).trajectories[1].tokens)


def test_no_receipt_leaves_while_the_commit_cannot_be_made(
    start: Callable[..., Learner], meet: Callable[..., Peer], tmp_path: Path
) -> None:
    peer = meet(start())
    peer.join()
    (lease,) = peer.work(capacity=1)
    group = make_group(lease.lease_id)
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        peer.send(group_header(group), group_frames(group))
        assert not peer.socket.poll(500)
        other.execute("ROLLBACK")
    receipt = peer.receive()
    assert isinstance(receipt, Receipt)
    assert receipt.outcome is Outcome.COMMITTED


def test_a_group_sent_again_makes_no_second_row(
    start: Callable[..., Learner], meet: Callable[..., Peer], tmp_path: Path
) -> None:
    learner = start()
    peer = meet(learner)
    peer.join()
    (lease,) = peer.work(capacity=1)
    group = make_group(lease.lease_id)
    for _ in range(3):
        peer.send(group_header(group), group_frames(group))
    receipts = [peer.receive() for _ in range(3)]
    outcomes = [receipt.outcome for receipt in receipts if isinstance(receipt, Receipt)]
    assert outcomes == [Outcome.COMMITTED, Outcome.REDELIVERED, Outcome.REDELIVERED]
    assert audit(tmp_path, "SELECT count(*) FROM bodies") == [(1,)]
    assert learner.ledger.account.counts() == GroupCounts(committed=1)
    assert learner.ledger.account.sampled().answer_tokens == 3.0


def test_a_group_that_breaks_the_rules_is_refused_and_its_prompt_goes_out_again(
    start: Callable[..., Learner], meet: Callable[..., Peer]
) -> None:
    learner = start()
    peer = meet(learner)
    peer.join()
    (lease,) = peer.work(capacity=1)
    group = make_group(lease.lease_id)
    group.trajectories[0].logprobs[3] = np.nan
    receipt = peer.ask(group_header(group), group_frames(group))
    assert isinstance(receipt, Receipt)
    assert receipt.outcome is Outcome.REFUSED
    assert "trajectory.logprobs" in receipt.reason
    (again,) = peer.work(capacity=1, held=[lease])
    assert (again.prompt_index, again.lease_id == lease.lease_id) == (lease.prompt_index, False)
    assert learner.inbox.refusals == {"group": 1}


def test_a_failed_lease_stays_given_back_though_the_actor_still_names_it(
    start: Callable[..., Learner], meet: Callable[..., Peer]
) -> None:
    learner = start()
    peer = meet(learner)
    peer.join()
    (lease,) = peer.work(capacity=1)
    assert isinstance(peer.ask(LeaseFailure(lease_id=lease.lease_id, reason="no")), Receipt)
    assert peer.work(capacity=0, held=[lease]) == ()
    (again,) = peer.work(capacity=1)
    assert (again.prompt_index, again.lease_id == lease.lease_id) == (lease.prompt_index, False)


def test_the_lease_of_one_actor_is_of_no_use_to_another(
    start: Callable[..., Learner], meet: Callable[..., Peer]
) -> None:
    learner = start()
    owner, thief = meet(learner, "owner"), meet(learner, "thief")
    owner.join()
    thief.join()
    (lease,) = owner.work(capacity=1)
    receipt = thief.deliver(lease)
    assert receipt.outcome is Outcome.REFUSED
    assert receipt.reason == f"lease {lease.lease_id} was not issued to thief"
    thief.ask(LeaseFailure(lease_id=lease.lease_id, reason="sabotage"))
    assert thief.work(capacity=4, held=[lease])[0].prompt_index == 1
    assert owner.deliver(lease).outcome is Outcome.COMMITTED


def test_an_unknown_peer_is_told_to_say_hello(start: Callable[..., Learner], meet: Callable[..., Peer]) -> None:
    learner = start()
    peer = meet(learner)
    for message in (work_request(learner.newest, capacity=1), Goodbye(), LeaseFailure(lease_id="1.a", reason="")):
        refusal = peer.ask(message)
        assert isinstance(refusal, Refusal)
        assert (refusal.reason, refusal.is_final) == ("unknown peer: say hello first", False)
    peer.join()
    for run_id, incarnation in ((learner.ledger.run_id, 99), ("another", 1)):
        peer.socket.send_multipart(encode(Goodbye(run_id=run_id, incarnation=incarnation)))
        assert isinstance(peer.receive(), Refusal)


def test_a_learner_that_replays_neither_grants_leases_nor_takes_results(
    start: Callable[..., Learner], meet: Callable[..., Peer]
) -> None:
    learner = start()
    peer = meet(learner)
    peer.join()
    (lease,) = peer.work(capacity=1)
    group = make_group(lease.lease_id)
    learner.inbox.grants_leases = False
    assert peer.work(capacity=2, held=[lease]) == ()
    refusal = peer.ask(group_header(group), group_frames(group))
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, refusal.is_final) == ("the learner replays its last steps", False)
    learner.inbox.grants_leases = True
    assert peer.deliver(lease).outcome is Outcome.COMMITTED


def test_leases_go_only_to_those_who_serve_published_weights(
    start: Callable[..., Learner], meet: Callable[..., Peer]
) -> None:
    learner = start()
    peer = meet(learner)
    peer.join()
    foreign = learner.newest.model_copy(update={"run_id": "another"})
    unborn = learner.newest.model_copy(update={"step": 1})
    for serving in (None, foreign, unborn):
        work = peer.ask(work_request(serving, capacity=4))
        assert isinstance(work, Work)
        assert (work.leases, work.newest) == ((), learner.newest)
    learner.inbox.is_run_finished = True
    work = peer.ask(work_request(learner.newest, capacity=4))
    assert isinstance(work, Work)
    assert (work.leases, work.is_finished) == ((), True)


def test_the_leases_of_a_silent_actor_go_to_another_and_it_may_come_back(
    start: Callable[..., Learner], meet: Callable[..., Peer]
) -> None:
    learner = start()
    silent, busy = meet(learner, "silent"), meet(learner, "busy")
    silent.join()
    busy.join()
    leases = silent.work(capacity=4)
    assert len(leases) == 4
    inherited: tuple[Lease, ...] = ()
    deadline = time.monotonic() + 30
    learner.inbox._attendance._lease_s = 0.6
    while not inherited and time.monotonic() < deadline:
        inherited = busy.work(capacity=3)
    learner.inbox._attendance._lease_s = 60.0  # nobody else is to fall silent, however slow this machine
    assert [lease.prompt_index for lease in inherited] == [0, 1, 2]
    assert busy.deliver(inherited[0]).outcome is Outcome.COMMITTED
    assert isinstance(silent.ask(work_request(learner.newest, capacity=4)), Refusal)
    silent.join()
    assert silent.work(capacity=4, held=leases) == ()
    assert [silent.deliver(lease).outcome for lease in leases] == [
        Outcome.REDELIVERED, Outcome.COMMITTED, Outcome.COMMITTED, Outcome.COMMITTED,
    ]  # fmt: skip
    assert busy.deliver(inherited[1]).outcome is Outcome.REDELIVERED
    assert learner.ledger.account.counts() == GroupCounts(committed=4)


def test_a_new_process_gets_the_name_and_prompts_of_a_killed_one_at_once(
    start: Callable[..., Learner], meet: Callable[..., Peer]
) -> None:
    learner = start()
    earlier = meet(learner)
    earlier.join()
    assert len(earlier.work(capacity=4)) == 4
    earlier.close()
    wait_until(lambda: learner.listener.num_connections == 0)
    later = meet(learner, process=2)
    assert isinstance(later.join(), Welcome)
    assert [lease.prompt_index for lease in later.work(capacity=4)] == [0, 1, 2, 3]


def test_a_new_process_gets_the_name_of_one_that_fell_silent(
    start: Callable[..., Learner], meet: Callable[..., Peer]
) -> None:
    learner = start(silence_s=3.0)
    earlier, later = meet(learner), meet(learner, process=2)
    earlier.join()
    assert len(earlier.work(capacity=4)) == 4
    refusal = later.join()
    assert isinstance(refusal, Refusal)
    assert not refusal.is_final
    assert re.fullmatch(r"a was heard [0-2]\.\d s ago from another process: not yet", refusal.reason)
    wait_until(lambda: isinstance(later.join(), Welcome))
    assert [lease.prompt_index for lease in later.work(capacity=4)] == [0, 1, 2, 3]
    assert isinstance(earlier.ask(work_request(learner.newest, capacity=4)), Refusal)


def test_a_second_live_process_of_the_same_name_is_sent_away_and_takes_nothing(
    start: Callable[..., Learner], meet: Callable[..., Peer]
) -> None:
    learner = start()
    first, second = meet(learner), meet(learner, process=2)
    first.join()
    leases = first.work(capacity=4)
    replies: list[AnyMessage] = []

    def is_sent_away() -> bool:
        assert first.work(capacity=0, held=leases) == ()
        replies.append(second.join())
        return isinstance(replies[-1], Refusal) and replies[-1].is_final

    wait_until(is_sent_away)
    assert all(isinstance(reply, Refusal) for reply in replies)
    assert "expected a --name of its own" in replies[-1].reason  # pyright: ignore
    assert [first.deliver(lease).outcome for lease in leases] == [Outcome.COMMITTED] * 4


def test_a_peer_that_is_not_heard_is_gone_until_its_next_request(
    start: Callable[..., Learner], meet: Callable[..., Peer], caplog: pytest.LogCaptureFixture
) -> None:
    learner = start()
    peer = meet(learner)
    peer.join()
    (lease,) = peer.work(capacity=1)
    (known,) = learner.inbox.peers.all()
    assert known.state is ActorState.SERVING
    wait_until(lambda: "a is gone" in caplog.text)
    assert known.state is ActorState.GONE
    said = re.search(r"a is gone: silence of (\S+) s, .* its leases are issued again in (\d+) s", caplog.text)
    assert said
    assert float(said[1]) >= SILENCE_S
    assert float(said[1]) + int(said[2]) == pytest.approx(60.0, abs=0.6)  # both are rounded
    assert peer.work(capacity=0, held=[lease]) == ()
    assert known.state is ActorState.SERVING


def test_a_peer_whose_groups_are_refused_again_and_again_is_sent_away(
    start: Callable[..., Learner], meet: Callable[..., Peer]
) -> None:
    learner = start()
    peer = meet(learner)
    peer.join()
    leases = peer.work(capacity=4)

    def deliver_nonsense(lease: Lease) -> AnyMessage:
        group = make_group(lease.lease_id)
        group.trajectories[0].logprobs[3] = np.nan
        return peer.ask(group_header(group), group_frames(group))

    for lease in leases[:2]:
        assert isinstance(deliver_nonsense(lease), Receipt)
    last = deliver_nonsense(leases[2])
    assert isinstance(last, Refusal)
    assert last.is_final
    assert last.reason.startswith("a: 3 groups in a row were refused, the last for trajectory.logprobs")
    assert learner.inbox.peers.all() == []
    successor = meet(learner, "c")
    successor.join()
    assert [lease.prompt_index for lease in successor.work(capacity=4)] == [0, 1, 2, 3]


def test_one_more_than_the_connection_limit_is_told_to_wait(
    start: Callable[..., Learner], meet: Callable[..., Peer]
) -> None:
    learner = start(max_connections=2)
    first, second, third = (meet(learner, name) for name in "abc")
    assert isinstance(first.join(), Welcome)
    assert isinstance(second.join(), Welcome)
    refusal = third.join()
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, refusal.is_final) == ("the learner serves network.max_connections peers already", False)
    second.close()
    wait_until(lambda: isinstance(third.join(), Welcome))
    assert len(first.work(capacity=1)) == 1


def test_an_actor_that_says_goodbye_leaves_its_prompts(
    start: Callable[..., Learner], meet: Callable[..., Peer]
) -> None:
    learner = start()
    leaving, staying = meet(learner, "leaving"), meet(learner, "staying")
    leaving.join()
    staying.join()
    leaving.work(capacity=4)
    assert staying.work(capacity=4) == ()
    assert isinstance(leaving.ask(Goodbye(reason="enough")), Receipt)
    assert len(staying.work(capacity=4)) == 4
    assert [peer.peer_id for peer in learner.inbox.peers.all()] == ["staying"]


def test_an_evaluator_is_told_what_to_evaluate_and_gets_no_leases(
    start: Callable[..., Learner], meet: Callable[..., Peer]
) -> None:
    learner = start()
    peer = meet(learner, "judge")
    peer.join(role=Role.EVALUATOR)
    work = peer.ask(work_request(learner.newest, capacity=4))
    assert isinstance(work, Work)
    assert (work.leases, work.evaluation) == ((), learner.newest)
    assert isinstance(peer.ask(result_for(learner.newest)), Receipt)
    assert [(one.version, one.scores[0].num_correct) for one in learner.evaluations] == [(learner.newest, 1)]


@pytest.mark.parametrize("seed", [2**32 - 1, 2**63])
def test_any_seed_of_the_run_gives_leases(start: Callable[..., Learner], meet: Callable[..., Peer], seed: int) -> None:
    peer = meet(start(seed=seed))
    peer.join()
    assert len({lease.seed for lease in peer.work(capacity=4)}) == 4


def test_a_full_disk_closes_the_door_and_tells_the_train_loop(
    start: Callable[..., Learner], meet: Callable[..., Peer]
) -> None:
    learner = start()
    peer = meet(learner)
    peer.join()
    (lease,) = peer.work(capacity=1)
    group = make_group(lease.lease_id, num_answer_tokens=25_000)
    with files_of_at_most(256 << 10):
        peer.send(group_header(group), group_frames(group))
        failure = wait_for_failure(learner)
    assert isinstance(failure, OperatorError)
    assert "File too large, expected free disk space" in str(failure)
    assert not peer.socket.poll(0)
    assert learner.ledger.account.counts() == GroupCounts(leased=1)


def test_nothing_ends_the_inbox_unnoticed(start: Callable[..., Learner], meet: Callable[..., Peer]) -> None:
    learner = start()
    peer = meet(learner)
    peer.join(role=Role.EVALUATOR)
    del learner.evaluations
    peer.send(result_for(learner.newest))
    assert isinstance(wait_for_failure(learner), AttributeError)


def wait_for_failure(learner: Learner) -> Exception | None:
    with learner.ledger.changed:
        learner.ledger.changed.wait_for(lambda: learner.inbox.failure, timeout=10)
    return learner.inbox.failure


def link_to(port: int, *, config_hash: str = "agreed", patience_s: float = 20.0) -> LearnerLink:
    network = Network(port=port, request_timeout_s=0.5, learner_timeout_s=patience_s)  # pyright: ignore
    return LearnerLink(network, hello("a", "a-1").model_copy(update={"config_hash": config_hash}))


def test_a_link_finds_the_restarted_learner_by_itself(start: Callable[..., Learner], tmp_path: Path) -> None:
    async def live_through_a_restart() -> None:
        learner = start()
        link = link_to(learner.port)
        try:
            request = work_request(learner.newest, capacity=2)
            work = await link.ask(request, Work, phase="work")
            one, two = (make_group(lease.lease_id) for lease in work.leases)
            assert link.welcome
            assert link.welcome.incarnation == 1
            learner.close()
            waiting = [
                asyncio.create_task(link.ask(group_header(group), Receipt, group_frames(group), phase="a receipt"))
                for group in (one, two)
            ]
            done, _ = await asyncio.wait(waiting, timeout=0.7)
            assert not done
            restarted = start(port=learner.port)
            receipts = await asyncio.gather(*waiting)
            assert [receipt.outcome for receipt in receipts] == [Outcome.COMMITTED] * 2
            assert link.welcome
            assert link.welcome.incarnation == restarted.ledger.incarnation == 2
            work = await link.ask(work_request(restarted.newest, capacity=9), Work, phase="work")
            assert [lease.prompt_index for lease in work.leases] == [2, 3]
        finally:
            await link.close()

    asyncio.run(live_through_a_restart())
    assert audit(tmp_path, "SELECT group_id, state FROM audit_groups ORDER BY group_id")[:2] == [
        (1, "committed"),
        (2, "committed"),
    ]


def test_leases_that_an_actor_works_on_survive_a_restart(start: Callable[..., Learner]) -> None:
    async def live_through_a_restart() -> None:
        learner = start()
        link = link_to(learner.port)
        try:
            leases = (await link.ask(work_request(learner.newest, capacity=3), Work, phase="work")).leases
            learner.close()
            restarted = start(port=learner.port)
            request = work_request(restarted.newest, capacity=9, held=leases[:2])
            work = await link.ask(request, Work, phase="work")
            assert [lease.prompt_index for lease in work.leases] == [2, 3]
            assert work.leases[0].lease_id != leases[2].lease_id
        finally:
            await link.close()

    asyncio.run(live_through_a_restart())


def test_a_link_that_is_refused_for_good_says_why(start: Callable[..., Learner]) -> None:
    async def be_refused(port: int) -> None:
        link = link_to(port, config_hash="another")
        try:
            with pytest.raises(OperatorError, match=r"configuration: a has hash another, expected agreed"):
                await link.ask(work_request(None, capacity=1), Work, phase="work")
        finally:
            await link.close()

    asyncio.run(be_refused(start().port))


def test_a_link_without_a_learner_names_whom_and_what_it_waited_for(start: Callable[..., Learner]) -> None:
    async def wait_in_vain(port: int) -> None:
        link = link_to(port, patience_s=0.6)
        try:
            with pytest.raises(WaitTimeout, match=rf"waited \d s for a welcome from learner at tcp://127.0.0.1:{port}"):
                await link.ask(work_request(None, capacity=1), Work, phase="work")
        finally:
            await link.close()

    learner = start()
    learner.close()
    asyncio.run(wait_in_vain(learner.port))


def test_a_group_that_comes_back_before_a_version_is_announced_is_taken_and_one_of_the_future_is_not(
    start: Callable[..., Learner], meet: Callable[..., Peer]
) -> None:
    learner = start()
    peer = meet(learner)
    peer.join()
    first, second = peer.work(capacity=2)
    for step in range(5):
        learner.ledger.commit_batch(Composition(step, (), (), 0))
    learner.newest = None  # as after a restart, while version 5 is still written
    assert peer.deliver(first, version=5).outcome is Outcome.COMMITTED
    refused = peer.deliver(second, version=6)
    assert refused.outcome is Outcome.REFUSED
    assert "versions" in refused.reason


def test_results_of_a_history_that_was_left_behind_are_late_not_hostile(
    start: Callable[..., Learner], meet: Callable[..., Peer]
) -> None:
    learner = start()
    peer = meet(learner)
    peer.join()
    leases = peer.work(capacity=4)
    learner.ledger.rewind(0)
    for lease in leases:
        group = make_group(lease.lease_id)
        later = [replace(t, versions=np.where(t.versions >= 0, 5, -1).astype(np.int32)) for t in group.trajectories]
        group = replace(group, trajectories=tuple(later))
        receipt = peer.ask(group_header(group), group_frames(group))
        assert isinstance(receipt, Receipt)
        assert receipt.outcome is Outcome.REDELIVERED
    assert len(peer.work(capacity=4)) == 4


def test_a_peer_that_fails_on_everything_is_sent_away_before_it_poisons_the_prompts(
    start: Callable[..., Learner], meet: Callable[..., Peer]
) -> None:
    learner = start()
    peer = meet(learner)
    peer.join()
    failed: list[str] = []
    while True:
        leases = peer.work(capacity=4)
        reply: AnyMessage = Receipt(outcome=Outcome.COMMITTED)
        for lease in leases:
            failed.append(lease.lease_id.partition(".")[0])
            reply = peer.ask(LeaseFailure(lease_id=lease.lease_id, reason="no data"))
            if isinstance(reply, Refusal):
                break
        if isinstance(reply, Refusal):
            break
        assert len(failed) < 100
    assert reply.is_final
    assert "prompts in a row failed, the last for no data" in reply.reason
    assert learner.ledger.account.counts().dropped <= 4


def test_only_an_evaluator_evaluates(start: Callable[..., Learner], meet: Callable[..., Peer]) -> None:
    learner = start()
    peer = meet(learner)
    peer.join()
    peer.send(result_for(learner.newest))
    wait_until(lambda: learner.inbox.refusals["malformed"] == 1)
    assert learner.evaluations == []


@pytest.mark.parametrize(
    "scores",
    [
        (score_of("sums", num_correct=5),),  # of four answers
        (score_of("sums", num_correct=1), score_of("sums", num_correct=2)),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(
    scores: tuple[TaskScore, ...], start: Callable[..., Learner], meet: Callable[..., Peer]
) -> None:
    learner = start()
    peer = meet(learner)
    peer.join(role=Role.EVALUATOR)
    peer.send(EvaluationResult(version=learner.newest, scores=scores))
    wait_until(lambda: learner.inbox.refusals["malformed"] == 1)
    assert learner.evaluations == []
