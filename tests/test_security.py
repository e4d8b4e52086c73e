"""Strangers, vandals and greedy peers at real sockets: they get nothing, cost little, and disturb nobody."""

import asyncio
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest
import zmq

from actors.link import LearnerLink
from common.config.schema import Network
from common.errors import OperatorError
from common.keys.allowed import ServerKeys
from common.keys.folder import KeyFolder, KeyPair, PeerKeys, peer_keys
from common.version import Version
from common.weights import chunk_server
from common.weights.client import WeightClient
from common.weights.server import WeightServer
from common.wire.codec import encode
from common.wire.connections import MAX_NEWCOMERS
from common.wire.listener import pause_after
from common.wire.messages import (
    ChunkRequest,
    Goodbye,
    GroupHeader,
    Outcome,
    Receipt,
    TrajectoryHeader,
    Welcome,
    Work,
)
from common.wire.sockets import open_socket
from tests import zmtp
from tests.test_inbox import LIMITS, MAX_BYTES, Learner, Peer, hello, meet, start, wait_until, work_request
from tests.test_weights import CHUNK_BYTES, SIZE, publish, snapshot_of, write_bytes

__all__ = ["meet", "start"]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Pairs of a learner and four peers; all but the stranger are allowed."""
    folder = KeyFolder(tmp_path / "keys")
    for name in ("learner", "a", "b", "pool", "stranger"):
        folder.create(name)
        if name not in ("learner", "stranger"):
            folder.allow(name, folder.public(name))
    return folder.path


def of(keys: Path, name: str) -> PeerKeys:
    found = peer_keys(str(keys), name)
    assert found
    return found


def is_deaf(peer: Peer) -> bool:
    """Whether a hello stays without an answer; to a socket that was refused it cannot even be sent."""
    with suppress(zmq.Again):
        peer.socket.send_multipart(encode(hello(peer.name, peer.session)), flags=zmq.NOBLOCK)
    return not peer.socket.poll(500)


def test_a_peer_with_an_allowed_key_is_served_and_all_others_get_nothing(
    start: Callable[..., Learner], meet: Callable[..., Peer], keys: Path
) -> None:
    learner = start(keys=keys)
    friend = meet(learner, "a", keys=of(keys, "a"))
    assert isinstance(friend.join(), Welcome)
    own = of(keys, "a")
    forged = PeerKeys(KeyPair(own.pair.public, of(keys, "b").pair.secret), own.learner)
    misled = PeerKeys(own.pair, of(keys, "b").pair.public)
    for number, wrong in enumerate((of(keys, "stranger"), None, forged, misled)):
        assert is_deaf(meet(learner, "a", 10 + number, keys=wrong))
    wait_until(lambda: learner.listener.closings["authentication"] >= 1)
    wait_until(lambda: learner.listener.closings["handshake"] >= 3)
    assert learner.listener.refusals == {}
    (lease,) = friend.work(capacity=1)
    assert friend.deliver(lease).outcome is Outcome.COMMITTED


def test_the_log_names_the_address_of_whoever_has_no_allowed_key(
    start: Callable[..., Learner], meet: Callable[..., Peer], keys: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("common.wire.listener.SAY_S", 0.0)
    learner = start(keys=keys)
    line = "closed a connection from 127.0.0.1: its key is not allowed (see chord-keys list)"
    for number in range(10):  # one that has gone before the guard could look at it has no address any more
        assert is_deaf(meet(learner, "stranger", number, keys=of(keys, "stranger")))
        if line in caplog.text:
            return
    raise AssertionError(caplog.text)


def test_a_peer_with_keys_says_nothing_to_a_learner_without(
    start: Callable[..., Learner], meet: Callable[..., Peer], keys: Path
) -> None:
    learner = start()
    assert is_deaf(meet(learner, "a", keys=of(keys, "a")))
    assert learner.inbox.received_bytes == 0


def test_a_key_speaks_for_its_own_name_and_those_below_it_only(
    start: Callable[..., Learner], meet: Callable[..., Peer], keys: Path
) -> None:
    learner = start(keys=keys)
    pool = [meet(learner, f"pool.{i}", keys=of(keys, "pool")) for i in range(3)]
    assert all(isinstance(peer.join(), Welcome) for peer in [*pool, meet(learner, "pool", keys=of(keys, "pool"))])
    for number, name in enumerate(("b", "pool.0", "a-1", "ab", "learner")):
        assert is_deaf(meet(learner, name, 10 + number, keys=of(keys, "a")))
        wait_until(lambda: learner.listener.closings["identity"] > number)  # noqa: B023
    thief = meet(learner, "pool.0", 1, keys=of(keys, "a"))  # the very routing id of an actor that was welcomed
    thief.send(Goodbye())
    wait_until(lambda: learner.listener.closings["identity"] > 5)
    assert {peer.peer_id for peer in learner.inbox.peers.all()} == {"pool", "pool.0", "pool.1", "pool.2"}


def test_keys_are_allowed_and_revoked_while_the_learner_runs(
    start: Callable[..., Learner], meet: Callable[..., Peer], keys: Path
) -> None:
    learner = start(keys=keys)
    folder = KeyFolder(keys)
    revoked, newcomer = (meet(learner, name, keys=of(keys, name)) for name in ("a", "stranger"))
    revoked.join()
    assert len(revoked.work(capacity=2)) == 2
    assert is_deaf(newcomer)
    folder.allow("stranger", folder.public("stranger"))
    wait_until(lambda: learner.keys.allowed.name_of(folder.public("stranger")) is not None)  # pyright: ignore
    newcomer = meet(learner, "stranger", 2, keys=of(keys, "stranger"))
    assert isinstance(newcomer.join(), Welcome)
    folder.revoke("a")
    wait_until(lambda: learner.listener.closings["revoked"] == 1)
    wait_until(lambda: learner.listener.closings["authentication"] > 1)
    assert not revoked.socket.poll(200)
    assert len(newcomer.work(capacity=1)) == 1


def test_a_link_whose_key_is_not_allowed_or_no_longer_ends_with_one_line(
    start: Callable[..., Learner], keys: Path
) -> None:
    learner, folder = start(keys=keys), KeyFolder(keys)

    async def come_in(name: str) -> None:
        network = Network(port=learner.port, keys=str(keys))  # pyright: ignore
        link = LearnerLink(network, hello(name, "s"))
        try:
            await link.ask(work_request(learner.newest, capacity=1), Work, phase="work")
            folder.revoke(name)
            async with asyncio.timeout(10):
                while True:
                    await link.ask(work_request(learner.newest, capacity=0), Work, phase="work")
        finally:
            await link.close()

    for name in ("stranger", "a"):
        expected = (
            rf"^network.keys: the learner at tcp://127.0.0.1:{learner.port} does not allow the key {name}, "
            r"expected it among those that it allows \(chord-keys allow\)$"
        )
        with pytest.raises(OperatorError, match=expected):
            asyncio.run(come_in(name))


def test_a_link_names_a_learner_that_is_no_longer_heard_within_five_seconds(
    start: Callable[..., Learner], caplog: pytest.LogCaptureFixture
) -> None:
    learner = start()

    async def lose_the_learner() -> None:
        network = Network(port=learner.port, silence_s=1.0, heartbeat_s=0.5)  # pyright: ignore
        link = LearnerLink(network, hello("a", "a-1"))
        try:
            await link.ask(work_request(learner.newest, capacity=0), Work, phase="work")
            with learner.ledger.transaction():  # the inbox can commit nothing, so it answers nobody
                asking = asyncio.create_task(link.ask(work_request(None, capacity=0), Work, phase="work"))
                async with asyncio.timeout(60):
                    while "silence of " not in caplog.text:
                        await asyncio.sleep(0.02)
            await asking
        finally:
            await link.close()

    asyncio.run(lose_the_learner())
    assert re.search(rf"learner at tcp://127\.0\.0\.1:{learner.port}: silence of [1-4]\.\d s", caplog.text)


def test_a_link_keeps_to_half_of_what_may_be_unacknowledged(start: Callable[..., Learner]) -> None:
    learner = start()

    async def send_much() -> None:
        network = Network(port=learner.port, max_message_bytes=400_000, max_unacknowledged_bytes=400_000)  # pyright: ignore
        link = LearnerLink(network, hello("a", "a-1"))
        seen: set[int] = set()
        rows = (TrajectoryHeader(num_tokens=6_250, reward=0.0, is_truncated=False),) * 2
        header, frames = GroupHeader(lease_id="1.none", num_prompt_tokens=1, trajectories=rows), [bytes(25_000)] * 4
        try:
            asking = [asyncio.create_task(link.ask(header, Receipt, frames, phase="a receipt")) for _ in range(7)]
            async with asyncio.timeout(20):
                while not all(task.done() for task in asking):
                    await asyncio.sleep(0)
                    seen.add(link._num_sent_bytes)
            assert [task.result().outcome for task in asking] == [Outcome.REFUSED] * 7
        finally:
            await link.close()
        assert max(seen) == 200_000

    asyncio.run(send_much())


def test_a_guard_looks_less_often_where_a_look_takes_longer_within_limits() -> None:
    assert [round(pause_after(look_s), 6) for look_s in (0.0, 0.001, 0.002, 0.004, 1.0)] == [0.05, 0.05, 0.1, 0.2, 0.2]


@pytest.mark.parametrize("has_keys", [False, True], ids=["open", "keyed"])
def test_newcomers_that_stay_give_way_to_newer_ones(
    start: Callable[..., Learner], meet: Callable[..., Peer], keys: Path, has_keys: bool
) -> None:
    learner = start(keys=keys if has_keys else None)
    friend = meet(learner, "a", keys=of(keys, "a") if has_keys else None)
    friend.join()
    with ExitStack() as stack:
        openings = (b"", b"GET / HTTP/1.1\r\n\r\n", zmtp.GREETING[:20], zmtp.GREETING, zmtp.CURVE_GREETING)
        for number in range(3 * MAX_NEWCOMERS):
            raw = stack.enter_context(socket.create_connection(("127.0.0.1", learner.port)))
            raw.sendall(openings[number % len(openings)])
        wait_until(lambda: learner.listener.num_connections <= MAX_NEWCOMERS + 1)
        wait_until(lambda: sum(learner.listener.closings.values()) > MAX_NEWCOMERS)
        (lease,) = friend.work(capacity=1)
        assert friend.deliver(lease).outcome is Outcome.COMMITTED
        late = meet(learner, "b", keys=of(keys, "b") if has_keys else None)
        assert isinstance(late.join(), Welcome)
    assert {"crowded", "handshake"} & set(learner.listener.closings)


def send_until_closed(raw: socket.socket, piece: bytes, *, limit_bytes: int) -> bool:
    """Whether the other side hangs up before it has taken `limit_bytes`."""
    raw.settimeout(10)
    try:
        for _ in range(limit_bytes // len(piece)):
            raw.sendall(piece)
    except OSError:
        return True
    return zmtp.is_closed(raw, timeout_s=5)


@pytest.mark.parametrize("piece", [zmtp.frame(bytes(1000), more=True) * 50, zmtp.frame(b"", more=True) * 5000])
def test_a_message_that_never_ends_is_cut_off(
    start: Callable[..., Learner], meet: Callable[..., Peer], piece: bytes
) -> None:
    learner, friend = start(), None
    friend = meet(learner)
    friend.join()
    with closing(zmtp.connect(learner.port)) as raw:
        assert send_until_closed(raw, piece, limit_bytes=1 << 30)
    assert learner.listener.closings["unacknowledged"] == 1
    assert len(friend.work(capacity=1)) == 1


def test_an_admitted_peer_may_have_so_much_under_way_and_no_more(
    start: Callable[..., Learner], meet: Callable[..., Peer]
) -> None:
    learner = start()
    friend = meet(learner)
    friend.join()
    greeting = hello("greedy", "1")
    with closing(zmtp.connect(learner.port, routing_id=greeting.routing_id)) as raw:
        raw.sendall(zmtp.frame(bytes(encode(greeting)[0])))
        wait_until(lambda: any(peer.peer_id == "greedy" for peer in learner.inbox.peers.all()))
        half = zmtp.frame(bytes(MAX_BYTES // 2), more=True)
        raw.sendall(half * 4)
        assert not zmtp.is_closed(raw, timeout_s=0.3)
        raw.settimeout(None)
        assert send_until_closed(raw, half, limit_bytes=1 << 30)
    assert learner.listener.closings == {"unacknowledged": 1}
    assert len(friend.work(capacity=1)) == 1


def test_a_message_that_is_still_coming_counts_as_being_heard(
    start: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learner.peers.COUNT_S", 0.1)
    learner, greeting = start(), hello("slow", "1")
    with closing(zmtp.connect(learner.port, routing_id=greeting.routing_id)) as raw:
        raw.sendall(zmtp.frame(bytes(encode(greeting)[0])))
        wait_until(lambda: learner.inbox.peers.all() != [])
        (peer,) = learner.inbox.peers.all()
        greeted_at = peer.last_heard
        raw.sendall(zmtp.frame_head(MAX_BYTES - 1))

        def is_heard_while_bytes_come() -> bool:
            raw.sendall(bytes(1000))
            peer.note_bytes()
            return peer.last_heard > greeted_at + 0.3

        def is_silent() -> bool:
            peer.note_bytes()
            return peer.silence_s > 0.5

        wait_until(is_heard_while_bytes_come)
        wait_until(is_silent)


def test_a_peer_that_floods_while_the_learner_is_busy_loses_its_connection(
    start: Callable[..., Learner], meet: Callable[..., Peer]
) -> None:
    learner = start()
    friend, flood = meet(learner), meet(learner, "flood")
    friend.join()
    flood.join()
    with learner.ledger.transaction():  # the inbox can commit nothing
        for _ in range(40):
            flood.socket.send_multipart([bytes(MAX_BYTES // 2)], flags=zmq.NOBLOCK)
        wait_until(lambda: learner.listener.closings["unacknowledged"] >= 1)
    assert isinstance(friend.ask(work_request(learner.newest, capacity=1)), Work)


class Weights:
    """A weight server with keys, and clients to it."""

    def __init__(self, folder: Path, keys: Path) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.folder, self.keys = folder, keys
        self.server_keys = ServerKeys(self.context, str(keys))
        self.server = WeightServer(
            self.context, host="127.0.0.1", port=0, limits=LIMITS, max_connections=3, keys=self.server_keys
        )

    def connect(self, name: str, *, timeout_s: float = 20.0) -> WeightClient:
        address = f"tcp://127.0.0.1:{self.server.port}"
        return WeightClient(
            self.context, address, self.folder / f"client-{name}", limits=LIMITS, credit=3, timeout_s=timeout_s,
            retry_s=0.3, keys=of(self.keys, name),
        )  # fmt: skip

    def subscribe(self, name: str) -> Any:
        listener = open_socket(self.context, zmq.SUB, LIMITS, of(self.keys, name))
        listener.setsockopt(zmq.SUBSCRIBE, b"")
        listener.connect(f"tcp://127.0.0.1:{self.server.announcements_port}")
        return listener


@pytest.fixture
def weights(tmp_path: Path, keys: Path) -> Iterator[Weights]:
    made = Weights(tmp_path, keys)
    yield made
    made.server.close()
    made.server_keys.close()
    made.context.destroy(linger=0)


def test_weights_and_announcements_are_for_allowed_keys_only(weights: Weights, tmp_path: Path) -> None:
    ours, theirs = weights.subscribe("a"), weights.subscribe("stranger")
    steps = iter(range(1000))
    newest = publish(weights.server, tmp_path, next(steps))
    while not ours.poll(50):
        newest = publish(weights.server, tmp_path, next(steps))
    assert not theirs.poll(100)
    client = weights.connect("a")
    assert client.fetch(newest.version).path.read_bytes() == newest.path.read_bytes()
    stranger = weights.connect("stranger", timeout_s=0.6)
    with pytest.raises(Exception, match="waited 1 s for the manifest"):
        stranger.fetch(newest.version)
    assert weights.server.sent_bytes == len(newest.path.read_bytes())
    KeyFolder(weights.keys).revoke("a")
    wait_until(lambda: weights.server.announcements.closings["revoked"] == 1)
    wait_until(lambda: weights.server.requests.closings["revoked"] == 1)
    while ours.poll(0):
        ours.recv_multipart()
    publish(weights.server, tmp_path, next(steps))
    assert not ours.poll(300)
    for one in (client, stranger, ours, theirs):
        one.close()


def test_a_subscriber_that_asks_for_anything_special_is_shown_out(weights: Weights) -> None:
    odd = open_socket(weights.context, zmq.SUB, LIMITS, of(weights.keys, "a"))
    odd.setsockopt(zmq.SUBSCRIBE, b"special")
    odd.connect(f"tcp://127.0.0.1:{weights.server.announcements_port}")
    wait_until(lambda: weights.server.announcements.closings["malformed"] >= 1)
    odd.close()


def test_who_asks_for_chunks_and_does_not_take_them_holds_up_nobody_for_long(
    weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_server, "MAX_UNSENT_BYTES", 4 * CHUNK_BYTES)
    monkeypatch.setattr(chunk_server, "STALL_S", 0.3)
    snapshot = snapshot_of(write_bytes(tmp_path / "weights", 0), step=5)
    weights.server.publish(snapshot, pin=False)
    greedy = weights.context.socket(zmq.DEALER)
    keys = of(weights.keys, "b")
    greedy.setsockopt(zmq.CURVE_SERVERKEY, keys.learner)
    greedy.setsockopt(zmq.CURVE_PUBLICKEY, keys.pair.public)
    greedy.setsockopt(zmq.CURVE_SECRETKEY, keys.pair.secret)
    greedy.setsockopt(zmq.RCVHWM, 1)
    greedy.setsockopt(zmq.RCVBUF, 4096)
    greedy.connect(f"tcp://127.0.0.1:{weights.server.port}")
    for _ in range(40):
        for index in range(20):
            greedy.send_multipart(encode(ChunkRequest(version=snapshot.version, index=index)))
    client = weights.connect("a")
    assert client.fetch(snapshot.version).path.read_bytes() == snapshot.path.read_bytes()
    assert client.received_bytes == SIZE
    wait_until(lambda: weights.server.requests.closings["stalled"] >= 1)
    client.close()
    greedy.close(linger=0)


def test_a_version_that_nobody_has_is_answered_not_punished(weights: Weights) -> None:
    client = weights.connect("a")
    version = Version(run_id="run", incarnation=1, step=9, hash="ab" * 16)
    with pytest.raises(Exception, match="version 9"):
        client.fetch(version)
    assert not weights.server.requests.closings
    client.close()
