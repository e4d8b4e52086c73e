"""The actor's link to the learner: a request is sent again until it is answered, across reconnects and restarts.

Consumes replies; waits for the learner, `learner_timeout_s` at most; is unblocked by a reply to the request's id, or by
the loss of the connection, after which it greets again before it sends anything else.
"""

import asyncio
import itertools
import logging
import struct
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import zmq
import zmq.asyncio

from common.config.schema import Network
from common.errors import OperatorError
from common.keys.folder import key_name_of, peer_keys
from common.wait import Wait
from common.wire.codec import MAX_HEADER_BYTES, Buffer, ProtocolMismatch, WireError, decode, encode
from common.wire.messages import Hello, Message, Refusal, Welcome
from common.wire.sockets import SocketLimits, open_socket

log = logging.getLogger(__name__)

RETRY_S = 0.2
"""Between a refusal that is not final and the next attempt."""
POLL_S = 0.1
LOST = Refusal(reason="the connection was lost", is_final=False)
"""What everybody who waits is told when libzmq has lost the connection."""
EVENTS = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH

Reply = TypeVar("Reply", bound=Message)


@dataclass(eq=False)
class Question:
    """A message that waits for its answer."""

    answer: "asyncio.Future[Message]"
    asked_at: float = field(default_factory=time.monotonic)


class LearnerLink:
    """Owns the DEALER socket. `ask` may be called concurrently."""

    def __init__(self, network: Network, hello: Hello) -> None:
        """Raises OperatorError where network.keys holds no key that speaks for the peer."""
        self._network = network
        self._hello = hello
        self.address = f"tcp://{network.host}:{network.port}"
        keys = peer_keys(network.keys, hello.peer_id)
        limits = SocketLimits(network.heartbeat_s, network.silence_s, 2 * MAX_HEADER_BYTES)
        self._socket: Any = open_socket(zmq.asyncio.Context.instance(), zmq.DEALER, limits, keys)
        self._socket.setsockopt(zmq.ROUTING_ID, hello.routing_id)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a connection that may never be
        self._monitor: Any = self._socket.get_monitor_socket(EVENTS)
        self._socket.connect(self.address)
        self._ids = itertools.count(1)
        self._pending: dict[int, Question] = {}
        self._greeting = asyncio.Lock()
        self._num_sent_bytes = 0
        self._has_room = asyncio.Event()
        self._heard_at = time.monotonic()
        self._is_silent = False
        self._end: Refusal | None = None
        """The final refusal of our key: libzmq does not connect again after it."""
        self.welcome: Welcome | None = None
        """The learner's last welcome; None until the first, and after it was lost until it has greeted again."""
        self._tasks = [
            asyncio.create_task(self._read(), name="link-reader"),
            asyncio.create_task(self._watch_connection(), name="link-monitor"),
            asyncio.create_task(self._watch_silence(), name="link-silence"),
        ]

    async def ask(self, message: Message, expected: type[Reply], frames: Sequence[Buffer] = (), *, phase: str) -> Reply:
        """Send until answered. Raises OperatorError on a final refusal, WaitTimeout naming `phase` on silence."""
        wait = Wait(f"learner at {self.address}", limit_s=self._network.learner_timeout_s)
        is_refused = False
        async with self._room_for(sum(len(frame) for frame in frames), phase):
            while True:
                if self.welcome is None and not isinstance(message, Hello):
                    await self._greet()
                reply = await self._send_until_answered(message, frames, wait, phase)
                if isinstance(reply, expected):
                    return reply
                if isinstance(reply, Refusal) and reply.is_final:
                    raise OperatorError(reply.reason)
                if reply is LOST:
                    wait.check(phase)
                else:
                    wait.progress()
                if not is_refused:
                    log.info("%s: %s: asking again", phase, getattr(reply, "reason", type(reply).__name__))
                is_refused = True
                if not isinstance(reply, Refusal) or reply.wants_hello:
                    self.welcome = None
                await asyncio.sleep(RETRY_S)

    async def _greet(self) -> None:
        async with self._greeting:
            if self.welcome is None:
                self.welcome = await self.ask(self._hello, Welcome, phase="a welcome")

    @asynccontextmanager
    async def _room_for(self, num_bytes: int, phase: str) -> AsyncIterator[None]:
        """Keep what was sent and not answered to half of what the learner bears, so that it may be sent twice."""
        if num_bytes + MAX_HEADER_BYTES > self._network.max_message_bytes and num_bytes:
            raise OperatorError(
                f"network.max_message_bytes: {phase}: got {num_bytes} bytes to send, expected at most "
                f"{self._network.max_message_bytes - MAX_HEADER_BYTES}"
            )
        limit = self._network.max_unacknowledged_bytes // 2
        while num_bytes and self._num_sent_bytes and self._num_sent_bytes + num_bytes > limit:
            self._has_room.clear()
            await self._has_room.wait()
        self._num_sent_bytes += num_bytes
        try:
            yield
        finally:
            self._num_sent_bytes -= num_bytes
            self._has_room.set()

    async def _send_until_answered(self, message: Message, frames: Sequence[Buffer], wait: Wait, phase: str) -> Message:
        """Send every `request_timeout_s` under one id, so that a late reply counts too. Raises WaitTimeout."""
        request_id = next(self._ids)
        context = {"request_id": request_id}
        if self.welcome:
            context |= {"run_id": self.welcome.run_id, "incarnation": self.welcome.incarnation}
        encoded = encode(message.model_copy(update=context), frames)
        self._pending[request_id] = question = Question(asyncio.get_running_loop().create_future())
        if self._end:
            question.answer.set_result(self._end)
        sent_at = float("-inf")
        try:
            while True:
                if time.monotonic() - sent_at > self._network.request_timeout_s:
                    with suppress(zmq.Again):  # there is no connection: tried again soon
                        await self._socket.send_multipart(encoded, flags=zmq.NOBLOCK)
                        sent_at = time.monotonic()
                await asyncio.wait([question.answer], timeout=POLL_S)
                if question.answer.done():
                    return question.answer.result()
                wait.check(phase)
        finally:
            del self._pending[request_id]

    async def _read(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            self._heard_at = time.monotonic()
            try:
                message = decode(frames, max_bytes=self._network.max_message_bytes).message
            except ProtocolMismatch as error:
                message = Refusal(reason=str(error), is_final=True)
            except WireError as error:
                log.warning("a message of the learner was refused: %s", error)
                continue
            self._resolve(message)

    def _resolve(self, message: Message) -> None:
        """Hand a reply to who asked; a final refusal without an id is for everyone who waits."""
        is_for_all = isinstance(message, Refusal) and message.is_final and message.request_id == 0
        questions = list(self._pending.values()) if is_for_all else [self._pending.get(message.request_id)]
        for question in questions:
            if question and not question.answer.done():
                question.answer.set_result(message)

    async def _watch_connection(self) -> None:
        """On a lost connection let everyone greet and send again: what was under way may not have arrived."""
        while True:
            (event,) = struct.unpack_from("=h", (await self._monitor.recv_multipart())[0])
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._end = Refusal(
                    reason=f"network.keys: the learner at {self.address} does not allow the key "
                    f"{key_name_of(self._hello.peer_id)}, expected it among those that it allows (chord-keys allow)",
                    is_final=True,
                )
            self.welcome = None
            for question in self._pending.values():
                if not question.answer.done():
                    question.answer.set_result(self._end or LOST)

    async def _watch_silence(self) -> None:
        """Say once that the learner is silent, and once that it is back."""
        while True:
            await asyncio.sleep(POLL_S)
            now = time.monotonic()
            oldest = min((question.asked_at for question in self._pending.values()), default=now)
            silence_s = now - self._heard_at if now - oldest > self._network.silence_s / 2 else 0.0
            if not self._is_silent and silence_s > self._network.silence_s:
                self._is_silent = True
                log.warning(
                    "learner at %s: silence of %.1f s, expected an answer: asking on for %.0f s",
                    self.address, silence_s, self._network.learner_timeout_s,
                )  # fmt: skip
            elif self._is_silent and self._heard_at >= oldest:
                self._is_silent = False
                log.info("learner at %s: heard again", self.address)

    async def close(self) -> None:
        self._socket.disable_monitor()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._monitor.close()
        self._socket.close()
