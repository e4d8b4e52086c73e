"""Weights that actors pass on to one another, over real sockets: the learner sends little, and nobody needs trust."""

import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from common.config.load import resolve_config
from common.errors import OperatorError
from common.keys.allowed import ServerKeys
from common.keys.folder import KeyFolder, PeerKeys
from common.keys.pool import check_pool
from common.weights.client import WeightClient
from common.weights.deltas import make_delta
from common.weights.fan_out import MAX_MEMBERS, MAX_TREES, ROOT, FanOut
from common.weights.relay import Relay
from common.weights.server import WeightServer
from common.weights.snapshot import Snapshot, is_whole
from common.wire.codec import encode
from common.wire.messages import ManifestRequest
from common.wire.sockets import SocketLimits, open_socket
from tests.test_weights import CHUNK_BYTES, SIZE, snapshot_of, write_bytes

LIMITS = SocketLimits(heartbeat_s=0.5, silence_s=2.0, max_frame_bytes=8 << 20)
WIDTH = 2
PATIENCE_S = 30.0
"""With a relay that does not get on, and with requests that have no reply: longer than any stall of a busy machine."""


class Actor:
    """A client that passes on what it fetched, and the file that it holds."""

    def __init__(
        self, context: "zmq.Context[Any]", port: int, folder: Path, *, patience_s: float = PATIENCE_S,
        keys: PeerKeys | None = None,
    ) -> None:  # fmt: skip
        self.relay = Relay(context, host="127.0.0.1", limits=LIMITS, timeout_s=patience_s, keys=keys)
        self.client = WeightClient(
            context, f"tcp://127.0.0.1:{port}", folder, limits=LIMITS, credit=3, timeout_s=2 * PATIENCE_S,
            retry_s=PATIENCE_S, keys=keys, relay=self.relay,
        )  # fmt: skip
        self.held: Snapshot | None = None

    def fetch(self, snapshot: Snapshot) -> None:
        before, self.held = self.held, self.client.fetch(snapshot.version, base=self.held)
        if before and before.path != self.held.path:
            before.path.unlink(missing_ok=True)
        assert self.held.path.read_bytes() == snapshot.path.read_bytes()
        assert is_whole(self.held)

    def close(self) -> None:
        self.client.close()
        self.relay.close()


class Fleet:
    """A learner's weight server that publishes versions which differ a little, and actors."""

    def __init__(self, folder: Path, *, width: int = WIDTH) -> None:
        self.folder = folder
        self.context: zmq.Context[Any] = zmq.Context()
        self.server = WeightServer(self.context, host="127.0.0.1", port=0, limits=LIMITS, relay_width=width)
        self.actors: list[Actor] = []
        self.published: list[Snapshot] = []

    def join(self, count: int = 1, *, patience_s: float = PATIENCE_S) -> list[Actor]:
        folders = [self.folder / f"actor-{len(self.actors) + n}" for n in range(count)]
        joined = [Actor(self.context, self.server.port, folder, patience_s=patience_s) for folder in folders]
        self.actors += joined
        return joined

    def publish(self) -> Snapshot:
        step = len(self.published)
        path = self.folder / f"{step:08d}.safetensors"
        if step == 0:
            write_bytes(path, 0)
        else:
            numbers, words = np.random.default_rng(step), np.fromfile(self.published[-1].path, dtype="<u2")
            words[numbers.choice(len(words), 500, replace=False)] += 1
            words[: CHUNK_BYTES // 2] = numbers.integers(0, 1 << 16, CHUNK_BYTES // 2)  # this chunk comes whole
            words.tofile(path)
        self.published.append(snapshot_of(path, step=step))
        delta = make_delta(self.published[-2], self.published[-1]) if step else None
        self.server.publish(self.published[-1], pin=True, delta=delta)
        return self.published[-1]

    def bytes_sent_to_all(self, snapshot: Snapshot) -> int:
        """By the learner, where all actors fetch at once."""
        before = self.server.sent_bytes
        with ThreadPoolExecutor(len(self.actors)) as pool:
            list(pool.map(lambda actor: actor.fetch(snapshot), self.actors))
        return self.server.sent_bytes - before

    def close(self) -> None:
        for actor in self.actors:
            actor.close()
        self.server.close()
        self.context.destroy(linger=0)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path)
    yield made
    made.close()


def test_the_learner_sends_a_version_to_a_few_of_sixteen_actors_and_all_have_it(fleet: Fleet) -> None:
    fleet.join(16)
    first, second, third = (fleet.bytes_sent_to_all(fleet.publish()) for _ in range(3))
    assert first == WIDTH * SIZE
    delta = make_delta(*fleet.published[:2])
    assert delta
    delta.file.close()
    assert second < WIDTH * 1.1 * delta.num_bytes < SIZE
    assert third < WIDTH * 1.1 * delta.num_bytes


def test_without_relays_the_learner_sends_a_version_to_each(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, width=0)
    fleet.join(4)
    try:
        assert fleet.bytes_sent_to_all(fleet.publish()) == 4 * SIZE
    finally:
        fleet.close()


def test_an_actor_that_holds_no_version_gets_all_of_it_from_one_that_came_by_deltas(fleet: Fleet) -> None:
    early = fleet.join(WIDTH)
    for _ in range(2):
        fleet.bytes_sent_to_all(fleet.publish())
    before = fleet.server.sent_bytes
    (late,) = fleet.join()
    late.fetch(fleet.published[-1])
    assert fleet.server.sent_bytes == before
    assert sum(actor.relay.sent_bytes for actor in early) == SIZE


def test_a_relay_that_has_gone_costs_its_children_a_time_limit(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    parents = fleet.join(WIDTH)
    version = fleet.publish()
    for parent in parents:
        parent.fetch(version)
        parent.relay.close()
    (child,) = fleet.join(patience_s=0.6)
    started = time.monotonic()
    child.fetch(version)
    assert 0.6 < time.monotonic() - started < PATIENCE_S
    assert f"does not pass {version.version} on (waited" in caplog.text
    assert f"127.0.0.1:{parents[0].relay.port}" in caplog.text


def test_a_relay_that_still_fetches_is_waited_for_as_long_as_it_gets_on(fleet: Fleet) -> None:
    parents, patience_s = fleet.join(WIDTH), 2.0
    (child,) = fleet.join(patience_s=patience_s)
    version = fleet.publish()
    for parent in parents:
        ask(fleet, parent, version)
        parent.relay.expect(version.version)
    fetching = threading.Thread(target=child.fetch, args=(version,))
    fetching.start()
    before = fleet.server.sent_bytes
    for _ in range(25):  # longer than its patience, altogether
        time.sleep(patience_s / 20)
        parents[0].relay.note_progress()
    held = fleet.folder / "held"
    shutil.copyfile(version.path, held)
    parents[0].relay.pass_on(Snapshot(held, version.manifest), None)
    fetching.join(timeout=PATIENCE_S)
    assert child.held
    assert child.client.received_bytes == SIZE
    assert fleet.server.sent_bytes == before


def ask(fleet: Fleet, actor: Actor, version: Snapshot) -> None:
    """Take a place in the tree."""
    with open_socket(fleet.context, zmq.DEALER, LIMITS) as socket:
        socket.connect(f"tcp://127.0.0.1:{fleet.server.port}")
        socket.send_multipart(encode(ManifestRequest(version=version.version, relay_port=actor.relay.port)))
        assert socket.poll(5000)
        socket.recv_multipart()


@pytest.mark.parametrize("has_base", [False, True])
def test_a_relay_that_serves_something_else_is_found_out_and_the_learner_asked(
    fleet: Fleet, caplog: pytest.LogCaptureFixture, has_base: bool
) -> None:
    parents, (child,) = fleet.join(WIDTH), fleet.join()
    first = fleet.publish()
    if has_base:
        fleet.bytes_sent_to_all(first)
    version = fleet.publish()
    for parent in parents:
        parent.fetch(version)
        assert parent.held
        parent.relay.expect(first.version)  # so that nothing of it is served but the file below, and no delta
        forged = fleet.folder / "forged"
        write_bytes(forged, 99)
        parent.relay.pass_on(Snapshot(forged, version.manifest), None)
    child.fetch(version)
    assert "with another hash than the version's" in caplog.text


def test_a_wrong_delta_of_a_relay_spoils_one_chunk_which_comes_whole(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    parents, (child,) = fleet.join(WIDTH), fleet.join()
    first = fleet.publish()
    fleet.bytes_sent_to_all(first)
    version = fleet.publish()
    for parent in parents:
        parent.fetch(version)
        delta = parent.relay._deltas._kept[-1]
        os.pwrite(delta.file.fileno(), b"\x07", delta.offsets[5])  # no such coding
    before = fleet.server.sent_bytes
    child.fetch(version)
    assert "with another hash than the version's" in caplog.text
    assert fleet.server.sent_bytes - before < 3 * CHUNK_BYTES


def test_nothing_is_served_of_a_file_that_becomes_the_next_version(fleet: Fleet) -> None:
    parents, version = fleet.join(WIDTH), fleet.publish()
    for parent in parents:
        parent.fetch(version)
        parent.relay.expect(version.version)  # as if the next one were on its way
    (child,) = fleet.join(patience_s=0.6)
    child.fetch(version)
    assert [parent.relay.sent_bytes for parent in parents] == [0, 0]


def test_a_tree_has_no_more_than_width_children_for_each_and_asking_again_leads_to_the_root() -> None:
    tree, children = FanOut(WIDTH), dict[str, list[str]]()
    for number in range(40):
        address = f"10.0.0.{number}:1"
        children.setdefault(tree.place(address, version_hash="a", key_name=None), []).append(address)
    assert {len(found) for found in children.values()} == {WIDTH}
    assert children[ROOT] == ["10.0.0.0:1", "10.0.0.1:1"]
    assert tree.place("10.0.0.30:1", version_hash="a", key_name=None) == ROOT
    assert tree.place("10.0.0.30:1", version_hash="b", key_name=None) == ROOT, "another version, another tree"


def test_trees_are_bounded_whoever_asks() -> None:
    tree = FanOut(1)
    for number in range(MAX_MEMBERS + 10):
        tree.place(f"10.0.0.1:{number}", version_hash="a", key_name=None)
    assert len(tree._trees["a"].members) == MAX_MEMBERS
    for number in range(10):
        tree.place("10.0.0.1:1", version_hash=str(number), key_name=None)
    assert len(tree._trees) == MAX_TREES


class KeyedFleet:
    """A learner with keys that serves one actor itself, and actors, each in a context of its own, as a process is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys = KeyFolder(folder / "keys")
        for name in ("learner", "pool", "other"):
            self.keys.create(name)
            if name != "learner":
                self.keys.allow(name, self.keys.public(name))
        self.contexts: list[zmq.Context[Any]] = [zmq.Context()]
        self.server_keys = ServerKeys(self.contexts[0], str(self.keys.path))
        self.server = WeightServer(
            self.contexts[0], host="127.0.0.1", port=0, limits=LIMITS, relay_width=1, keys=self.server_keys
        )
        self.actors: list[Actor] = []

    def join(self, key_name: str) -> Actor:
        self.contexts.append(zmq.Context())
        keys = PeerKeys(self.keys.pair(key_name), self.keys.public("learner"))
        folder = self.folder / f"actor-{len(self.actors)}"
        self.actors.append(Actor(self.contexts[-1], self.server.port, folder, keys=keys))
        return self.actors[-1]

    def close(self) -> None:
        for actor in self.actors:
            actor.close()
        self.server.close()
        self.server_keys.close()
        for context in self.contexts:
            context.destroy(linger=0)


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[KeyedFleet]:
    made = KeyedFleet(tmp_path)
    yield made
    made.close()


def test_actors_that_share_a_key_pass_on_to_each_other_and_to_nobody_else(keyed: KeyedFleet) -> None:
    version = snapshot_of(write_bytes(keyed.folder / "weights", 0), step=1)
    keyed.server.publish(version, pin=True)
    parent, child, stranger = keyed.join("pool"), keyed.join("pool"), keyed.join("other")
    for actor in (parent, child, stranger):
        actor.fetch(version)
    assert parent.relay.sent_bytes == SIZE
    assert child.relay.sent_bytes == 0
    assert keyed.server.sent_bytes == 2 * SIZE, "the root serves the one that has no other of its own key"
    with stranger.relay.connect(f"127.0.0.1:{parent.relay.port}") as socket:
        socket.send_multipart(encode(ManifestRequest(version=version.version)))
        assert not socket.poll(1000)


def test_passing_on_with_a_key_of_ones_own_is_refused_in_one_line() -> None:
    check_pool("pool.actor-1")
    with pytest.raises(OperatorError, match=r"weights\.relay: got the key of actor-0 alone, expected one that a pool"):
        check_pool("actor-0")


def test_passing_on_is_off_unless_asked_for() -> None:
    assert resolve_config(None).config.weights.relay == 0
