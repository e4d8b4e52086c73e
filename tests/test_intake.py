"""The intake: rounds are bounded, and faults wait for their turn."""

from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from common.wire.codec import WireError, encode
from common.wire.connections import Bounds
from common.wire.groups import GroupArrays, GroupLimits, group_frames, group_header
from common.wire.listener import FRAME_BYTES, Listener
from common.wire.messages import GroupHeader, Hello
from common.wire.sockets import open_socket
from learner.intake import MAX_ROUND, Intake, Letter
from tests.test_inbox import LIMITS, MAX_BYTES, WAIT_MS, hello, make_group, wait_until


class Door:
    """A listening socket, its intake, and one peer."""

    def __init__(self, *, max_round_bytes: int) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.listener = Listener(
            self.context, zmq.ROUTER, host="127.0.0.1", port=0, purpose="actors", limits=LIMITS,
            bounds=Bounds(9, 4 * MAX_BYTES),
        )  # fmt: skip
        self.intake = Intake(
            self.listener, max_message_bytes=MAX_BYTES, max_round_bytes=max_round_bytes,
            limits=lambda: GroupLimits(vocab_size=100, group_size=2, max_version=0),
        )  # fmt: skip
        self.peer = open_socket(self.context, zmq.DEALER, LIMITS)
        self.peer.connect(f"tcp://127.0.0.1:{self.listener.port}")

    def collect(self, count: int) -> list[Letter]:
        """`count` letters, in as many rounds as it takes."""
        found: list[Letter] = []
        wait_until(lambda: len(found) >= count or bool(found.extend(self.intake.collect(100))))
        return found

    def close(self) -> None:
        self.listener.close()
        self.context.destroy(linger=0)


@pytest.fixture
def doors() -> Iterator[list[Door]]:
    made: list[Door] = []
    yield made
    for door in made:
        door.close()


def test_messages_are_read_in_order_and_each_fault_stays_with_its_message(doors: list[Door]) -> None:
    doors.append(door := Door(max_round_bytes=MAX_BYTES))
    good, header = make_group("1.a"), group_header(make_group("1.b"))
    tokens, *others = group_frames(make_group("1.b"))
    for frames in (
        encode(hello("a", "a-1")),
        [b"nonsense"],
        encode(group_header(good), group_frames(good)),
        encode(header, [bytes(tokens)[:-4] + b"\xff" * 4, *others]),
    ):
        door.peer.send_multipart(frames)
    greeting, nonsense, group, bad_group = door.collect(4)
    assert isinstance(greeting.message, Hello)
    assert greeting.group is None
    assert isinstance(nonsense.message, WireError)
    assert isinstance(group.message, GroupHeader)
    assert isinstance(group.group, GroupArrays)
    assert (group.group.header.lease_id, len(group.group.tokens)) == ("1.a", 6)
    assert isinstance(bad_group.message, GroupHeader)
    assert isinstance(bad_group.group, WireError)
    assert "trajectory.tokens" in str(bad_group.group)


def test_a_round_has_a_bounded_number_of_messages_and_of_bytes(doors: list[Door]) -> None:
    doors.append(door := Door(max_round_bytes=2 * MAX_BYTES))
    for _ in range(MAX_ROUND + 44):
        door.peer.send(b"x")
    wait_until(lambda: door.listener.socket.get(zmq.EVENTS) & zmq.POLLIN != 0)
    rounds = [len(door.intake.collect(WAIT_MS))]
    while sum(rounds) < MAX_ROUND + 44:
        rounds.append(len(door.intake.collect(WAIT_MS)))
    assert max(rounds) <= MAX_ROUND
    assert door.intake.received_bytes == (MAX_ROUND + 44) * (1 + 5 + 2 * FRAME_BYTES)

    doors.append(narrow := Door(max_round_bytes=100))
    for _ in range(3):
        narrow.peer.send(bytes(1000))
    assert [len(narrow.intake.collect(WAIT_MS)) for _ in range(3)] == [1, 1, 1]


def test_a_round_that_is_over_takes_nothing_more(doors: list[Door]) -> None:
    doors.append(door := Door(max_round_bytes=MAX_BYTES))
    door.peer.send(b"x")
    assert door.listener.poll(WAIT_MS)
    assert door.intake.collect(0, is_over=lambda: True) == []
    assert len(door.intake.collect(0)) == 1
