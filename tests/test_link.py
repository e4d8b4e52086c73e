"""The actor's side of the wire: what a link sends again and what not, how long it waits, and what it says meanwhile."""

import asyncio
import itertools
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio

from actors.engines.simulated import SimulatedEngine
from actors.fitter import Fitter
from actors.link import LearnerLink
from common.config.schema import Actor, Network
from common.errors import OperatorError, WaitTimeout
from common.keys.folder import KeyFolder
from common.version import Version
from common.weights.server import WeightServer
from common.wire.codec import decode, encode
from common.wire.messages import Goodbye, Hello, Message, Outcome, Receipt, Refusal, Welcome, Work, WorkRequest
from common.wire.ports import free_ports
from common.wire.sockets import bind, open_socket
from tests import zmtp
from tests.chaos.proxy import CALM, Proxy, Weather
from tests.test_inbox import Learner, hello, start, work_request
from tests.test_weights import LIMITS, snapshot_of, write_bytes

__all__ = ["start"]

PIECE = [bytes(150_000)]
"""The frames of a group, as far as the link is concerned."""


class HandLearner:
    """A learner of one socket that answers as the test says, within the test's event loop."""

    def __init__(self, port: int | None = None) -> None:
        self.heard: list[Message] = []
        self.replies: Callable[[Message], Message | None] = ordinary_reply
        self._context: zmq.asyncio.Context = zmq.asyncio.Context()
        self._socket: Any = open_socket(self._context, zmq.ROUTER, LIMITS)
        self.port = port or free_ports(1, "127.0.0.1")[0]  # to which it comes back, while peers dial it
        bind(self._socket, "127.0.0.1", self.port, "actors")
        self._task = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        while True:
            peer, *frames = await self._socket.recv_multipart()
            message = decode(frames, max_bytes=1 << 20).message
            self.heard.append(message)
            if reply := self.replies(message):
                context = {"run_id": "run", "incarnation": 1, "request_id": message.request_id}
                await self._socket.send_multipart([peer, *encode(reply.model_copy(update=context))])

    def count(self, kind: type[Message]) -> int:
        return sum(isinstance(message, kind) for message in self.heard)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._context.destroy(linger=0)


def ordinary_reply(message: Message) -> Message:
    if isinstance(message, Hello):
        return Welcome(weights_port=1, announcements_port=1, newest=None)
    return Work(newest=None) if isinstance(message, WorkRequest) else Receipt(outcome=Outcome.COMMITTED)


def replay(message: Message) -> Message:
    """Of a learner that takes no results yet."""
    if isinstance(message, Goodbye):
        return Refusal(reason="the learner replays", is_final=False)
    return ordinary_reply(message)


@asynccontextmanager
async def linked(**network: Any) -> AsyncIterator[tuple[HandLearner, LearnerLink]]:
    learner = HandLearner()
    link = LearnerLink(Network(port=learner.port, **network), hello("a", "a-1"))
    try:
        async with asyncio.timeout(30):
            yield learner, link
    finally:
        await link.close()
        await learner.close()


async def ask_for_work(link: LearnerLink) -> Work:
    return await link.ask(work_request(None, capacity=0), Work, phase="work")


async def send_group(link: LearnerLink) -> Receipt:
    """Any message will do."""
    return await link.ask(Goodbye(), Receipt, PIECE, phase="a receipt")


async def until(is_reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_reached():
            await asyncio.sleep(0.02)


def test_a_large_message_is_sent_again_only_where_its_reply_is_known_to_be_lost() -> None:
    async def run() -> None:
        async with linked(request_timeout_s=0.2) as (learner, link):
            await ask_for_work(link)
            learner.replies = lambda _: None
            small = asyncio.create_task(ask_for_work(link))
            large = asyncio.create_task(send_group(link))
            await until(lambda: learner.count(WorkRequest) >= 5)
            assert learner.count(Goodbye) == 1  # it may still be on its way, or be handled
            learner.replies = lambda message: None if isinstance(message, Goodbye) else ordinary_reply(message)
            await small
            await ask_for_work(link)  # sent later, and answered: nothing will come any more
            await until(lambda: learner.count(Goodbye) == 2)
            learner.replies = ordinary_reply
            await ask_for_work(link)
            assert (await large).outcome is Outcome.COMMITTED
            assert learner.count(Goodbye) == 3

    asyncio.run(run())


def test_a_large_message_is_sent_again_after_its_connection_was_lost() -> None:
    async def run() -> None:
        async with linked() as (learner, link):
            await ask_for_work(link)
            learner.replies = lambda _: None
            large = asyncio.create_task(send_group(link))
            await until(lambda: learner.count(Goodbye) == 1)
            await learner.close()
            restarted = HandLearner(learner.port)
            assert (await large).outcome is Outcome.COMMITTED
            assert [type(message) for message in restarted.heard] == [Hello, Goodbye]
            await restarted.close()

    asyncio.run(run())


def test_a_group_outlives_a_long_replay_is_sent_ever_more_rarely_and_the_reason_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.wait.REPORT_S", 0.75)

    async def run() -> None:
        async with linked(learner_timeout_s=2.0, max_message_bytes=450_000, max_unacknowledged_bytes=450_000) as (
            learner,
            link,
        ):
            learner.replies = replay
            groups = [asyncio.create_task(send_group(link)) for _ in range(2)]  # there is room for one
            while caplog.text.count("refused so far") < 2:
                await ask_for_work(link)
                await asyncio.sleep(0.02)
            assert not any(group.done() for group in groups)
            assert learner.count(Goodbye) < 8
            learner.replies = ordinary_reply
            while not all(group.done() for group in groups):
                await ask_for_work(link)
                await asyncio.sleep(0.02)
            assert [(await group).outcome for group in groups] == [Outcome.COMMITTED] * 2

    asyncio.run(run())
    assert "s for a receipt (refused so far: the learner replays) from learner at" in caplog.text
    assert "s for room to send before a receipt from learner at" in caplog.text


def test_a_small_request_that_is_only_ever_refused_ends_with_the_reason() -> None:
    async def run() -> None:
        async with linked(learner_timeout_s=2.0) as (learner, link):
            learner.replies = replay
            with pytest.raises(WaitTimeout, match=r"a goodbye \(refused so far: the learner replays\) from learner at"):
                await link.ask(Goodbye(), Receipt, phase="a goodbye")

    asyncio.run(run())


def test_room_to_send_is_waited_for_no_longer_than_a_silent_learner() -> None:
    async def run() -> None:
        async with linked(learner_timeout_s=2.0, max_message_bytes=450_000, max_unacknowledged_bytes=450_000) as (
            learner,
            link,
        ):
            await ask_for_work(link)
            learner.replies = lambda _: None
            outcomes = await asyncio.gather(*(send_group(link) for _ in range(2)), return_exceptions=True)
            assert all(isinstance(outcome, WaitTimeout) for outcome in outcomes), outcomes

    asyncio.run(run())


def test_all_who_wait_for_a_greeting_wait_for_the_same_one() -> None:
    async def run() -> None:
        async with linked(learner_timeout_s=2.0) as (learner, link):
            learner.replies = lambda _: None
            async with asyncio.timeout(15):
                asked = (ask_for_work(link) for _ in range(20))
                outcomes = await asyncio.gather(*asked, return_exceptions=True)
            assert all("a welcome" in str(outcome) for outcome in outcomes), outcomes
            assert learner.count(Hello) == 1

    asyncio.run(run())


def test_a_link_says_that_its_learner_fell_into_a_black_hole_and_goes_on_when_it_is_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def run() -> None:
        learner = HandLearner()
        proxy = Proxy(host="127.0.0.3", target_host="127.0.0.1", ports=[learner.port])
        network = Network(host="127.0.0.3", port=learner.port, request_timeout_s=1.0)  # pyright: ignore
        link = LearnerLink(network, hello("a", "a-1"))
        try:
            await ask_for_work(link)
            proxy.change(Weather(is_black_hole=True))
            asking = asyncio.create_task(ask_for_work(link))
            async with asyncio.timeout(20):
                while not re.search(r"silence of [3-9]\.", caplog.text):
                    await asyncio.sleep(0.02)
            proxy.change(CALM)
            async with asyncio.timeout(20):
                await asking
        finally:
            await link.close()
            await learner.close()
            proxy.close()

    asyncio.run(run())


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Pairs of a learner and of the allowed peer a."""
    folder = KeyFolder(tmp_path / "keys")
    for name in ("learner", "a"):
        folder.create(name)
    folder.allow("a", folder.public("a"))
    return folder.path


@pytest.mark.parametrize("is_learner_keyed", [False, True])
def test_keys_on_one_side_only_end_a_link_with_one_line(
    start: Callable[..., Learner], keys: Path, is_learner_keyed: bool
) -> None:
    learner = start(keys=keys if is_learner_keyed else None)
    expected = "serves with keys, got none here" if is_learner_keyed else f"serves without keys, got {keys} here"

    async def run() -> None:
        network = Network(port=learner.port, keys="" if is_learner_keyed else str(keys))  # pyright: ignore
        link = LearnerLink(network, hello("a", "a-1"))
        try:
            async with asyncio.timeout(10):
                with pytest.raises(OperatorError, match=rf"^network.keys: the learner at .* {expected}, "):
                    await ask_for_work(link)
        finally:
            await link.close()

    asyncio.run(run())


def test_a_wrong_key_of_the_learner_is_suspected_in_one_line(
    start: Callable[..., Learner], keys: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learner = start(keys=keys)
    others = KeyFolder(tmp_path / "others")
    for name in ("learner", "a"):
        others.create(name)

    async def run() -> None:
        network = Network(port=learner.port, keys=str(others.path), learner_timeout_s=3.0)  # pyright: ignore
        link = LearnerLink(network, hello("a", "a-1"))
        try:
            with pytest.raises(WaitTimeout):
                await ask_for_work(link)
        finally:
            await link.close()

    asyncio.run(run())
    assert caplog.text.count("others/learner.public may not be its key") == 1


@pytest.mark.parametrize(
    "words",
    [b"HTTP/1.1 400 Bad Request\r\n" * 9, zmtp.GREETING + bytes(99), zmtp.CURVE_GREETING],
    ids=["HTTP", "broken", "keyed"],
)
def test_another_program_at_the_learners_port_is_outlived(words: bytes) -> None:
    async def run() -> None:
        has_met = asyncio.Event()

        async def babble(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(words)
            await writer.drain()
            writer.close()
            server.close()
            has_met.set()

        (port,) = free_ports(1, "127.0.0.1")
        server = await asyncio.start_server(babble, "127.0.0.1", port)
        link = LearnerLink(Network(port=port), hello("a", "a-1"))  # pyright: ignore
        try:
            async with asyncio.timeout(20):
                asking = asyncio.create_task(ask_for_work(link))
                await has_met.wait()
                await server.wait_closed()
                learner = HandLearner(port)
                await asking
                await learner.close()
        finally:
            await link.close()

    asyncio.run(run())


def test_a_fitter_takes_the_first_weights_of_a_new_run_though_they_are_those_of_the_old_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    context: zmq.Context[Any] = zmq.Context()
    server = WeightServer(context, host="127.0.0.1", port=0, limits=LIMITS)
    old = snapshot_of(write_bytes(tmp_path / "weights", 0), step=0)
    server.publish(old, pin=True)
    engine = SimulatedEngine(actor=Actor(engine="simulated"), vocab_size=10, end_tokens=frozenset({1}))  # pyright: ignore
    whereabouts: list[Welcome | None] = [None]
    num_asked = itertools.count()
    network = Network(port=1, request_timeout_s=0.5)  # pyright: ignore

    def welcome() -> Welcome | None:
        next(num_asked)
        return whereabouts[0]

    async def outlive_a_run() -> Version | None:
        fitter = Fitter(engine, network, tmp_path / "fetched", name="a", in_flight=True, welcome=welcome)
        following = asyncio.create_task(fitter.follow())
        try:
            async with asyncio.timeout(20):
                fitter.want(old.version)
                while next(num_asked) < 80:  # the fetch was tried several times
                    await asyncio.sleep(0.02)
                whereabouts[0] = Welcome(
                    weights_port=server.port, announcements_port=server.announcements_port, newest=old.version
                )
                new = old.version.model_copy(update={"run_id": "another"})
                for version in (old.version, new):
                    fitter.want(version)
                    while engine.version != version:
                        await asyncio.sleep(0.02)
        finally:
            following.cancel()
            await fitter.close()
        return engine.version

    try:
        assert asyncio.run(outlive_a_run()) == old.version.model_copy(update={"run_id": "another"})
    finally:
        server.close()
        context.destroy(linger=0)
    assert caplog.text.count("not to be had") == 1
