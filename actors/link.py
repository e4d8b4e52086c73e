"""The actor's link to the learner: a request is asked until it is answered, across reconnects and restarts.

The learner answers each connection in order: what was sent before an answered request and has no reply of its own has
lost it, and only then, or with the connection, is a large message sent again. Consumes replies; waits for the learner,
`learner_timeout_s` at most; is unblocked by a reply to the request's id, or by the loss of the connection, after which
it greets again before it sends anything else.
"""

import asyncio
import errno
import itertools
import logging
import math
import struct
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
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
"""Between a refusal that is not final and the next attempt; it doubles where the message is large."""
MAX_RETRY_S = 5.0
POLL_S = 0.1
LOST = Refusal(reason="the connection was lost", is_final=False)
"""What everybody who waits is told when libzmq has lost the connection."""
EVENTS = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
NUM_MISMATCHES = 2
"""Connections in a row whose other end has keys where we have none, or the reverse; then it is the learner."""
NUM_HANG_UPS = 3
"""Handshakes in a row that the other end broke off; then it is said what may be wrong."""

Reply = TypeVar("Reply", bound=Message)


@dataclass(eq=False)
class Question:
    """A message that waits for its answer."""

    answer: "asyncio.Future[Message]"
    sent_at: float = float("-inf")
    first_turn: int = 0
    """Place of its first sending among all that the link has sent; 0 before."""
    last_turn: int = 0
    is_overtaken: bool = False
    """Whether the learner has answered something that was sent later."""

    def note_sending(self, turn: int) -> None:
        self.sent_at = time.monotonic()
        self.first_turn, self.last_turn = self.first_turn or turn, turn
        self.is_overtaken = False


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
        self._ids, self._turns = itertools.count(1), itertools.count(1)
        self._pending: dict[int, Question] = {}
        self._waits: set[Wait] = set()
        """Of those who wait for the learner now."""
        self._greeting: asyncio.Task[None] | None = None
        self._num_sent_bytes = 0
        self._has_room = asyncio.Event()
        self._heard_at = time.monotonic()
        self._silence_told_at: float | None = None
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
        """Ask until answered; a message with frames is worth any number of refusals that are not final.

        Raises OperatorError on a final refusal, WaitTimeout naming `phase` on silence, or on nothing but refusals.
        """
        wait = self._wait()
        refused: Wait | None = None
        has_said, pause_s = False, RETRY_S
        async with self._room_for(sum(len(frame) for frame in frames), phase):
            while True:
                reply = await self._attempt(message, frames, wait, phase)
                if isinstance(reply, expected):
                    return reply
                if isinstance(reply, Refusal) and reply.is_final:
                    raise OperatorError(reply.reason)
                reason = getattr(reply, "reason", type(reply).__name__)
                if not has_said:
                    log.info("%s: %s: asking again", phase, reason)
                    has_said = True
                if reply is LOST:
                    refused = None
                    wait.check(phase)
                else:
                    wait.progress()
                    refused = refused or self._wait(is_endless=bool(frames))
                    refused.check(f"{phase} (refused so far: {reason})")
                is_stranger = reply is not LOST and (not isinstance(reply, Refusal) or reply.wants_hello)
                if is_stranger:
                    self.welcome = None
                if reply is LOST or is_stranger or not frames:
                    pause_s = RETRY_S
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_RETRY_S)

    def _wait(self, *, is_endless: bool = False) -> Wait:
        limit_s = math.inf if is_endless else self._network.learner_timeout_s
        return Wait(f"learner at {self.address}", limit_s=limit_s)

    async def _attempt(self, message: Message, frames: Sequence[Buffer], wait: Wait, phase: str) -> Message:
        """One answer, LOST among them."""
        self._waits.add(wait)
        try:
            while self.welcome is None and not isinstance(message, Hello):
                await self._greet()
            return await self._send_until_answered(message, frames, wait, phase)
        finally:
            self._waits.discard(wait)

    async def _greet(self) -> None:
        """One greeting for all who need it."""
        if self._greeting is None or self._greeting.done():
            self._greeting = asyncio.create_task(self._say_hello(), name="link-greeting")
        await asyncio.shield(self._greeting)

    async def _say_hello(self) -> None:
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
        wait, words = self._wait(), self._wait(is_endless=True)
        while num_bytes and self._num_sent_bytes and self._num_sent_bytes + num_bytes > limit:
            self._has_room.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._has_room.wait()
            if wait.waited_s > time.monotonic() - self._heard_at:
                wait.progress()  # it answers, if only that it takes nothing yet
                words.check(f"room to send before {phase}")
            else:
                wait.check(f"room to send before {phase}")
        self._num_sent_bytes += num_bytes
        try:
            yield
        finally:
            self._num_sent_bytes -= num_bytes
            self._has_room.set()

    async def _send_until_answered(self, message: Message, frames: Sequence[Buffer], wait: Wait, phase: str) -> Message:
        """Send again under the same id where the answer is overdue, so that a late one counts. Raises WaitTimeout."""
        request_id = next(self._ids)
        context = {"request_id": request_id}
        if self.welcome:
            context |= {"run_id": self.welcome.run_id, "incarnation": self.welcome.incarnation}
        encoded = encode(message.model_copy(update=context), frames)
        self._pending[request_id] = question = Question(asyncio.get_running_loop().create_future())
        if self._end:
            question.answer.set_result(self._end)
        try:
            while True:
                is_late = time.monotonic() - question.sent_at > self._network.request_timeout_s
                if question.last_turn == 0 or (question.is_overtaken if frames else is_late):
                    with suppress(zmq.Again):  # there is no connection: tried again soon
                        await self._socket.send_multipart(encoded, flags=zmq.NOBLOCK)
                        question.note_sending(next(self._turns))
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
            if question:
                self._note_overtaken(question)
            if question and not question.answer.done():
                question.answer.set_result(message)

    def _note_overtaken(self, answered: Question) -> None:
        """It may be the answer to the first sending, so that alone counts."""
        for question in self._pending.values():
            if question.last_turn < answered.first_turn:
                question.is_overtaken = True

    async def _watch_connection(self) -> None:
        """On a lost connection let everyone greet and send again: what was under way may not have arrived."""
        num_mismatches = num_hang_ups = 0
        while True:
            event, value = struct.unpack("=hi", (await self._monitor.recv_multipart())[0])
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                num_mismatches = num_hang_ups = 0
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._lose(
                    f"network.keys: the learner at {self.address} does not allow the key "
                    f"{key_name_of(self._hello.peer_id)}, expected it among those that it allows (chord-keys allow)"
                )
            elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                num_mismatches += value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
                if num_mismatches >= NUM_MISMATCHES:
                    self._lose(self._describe_mismatch())
                else:
                    await self._connect_again()
            elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                num_hang_ups += value in (errno.EPIPE, errno.ECONNRESET)
                if num_hang_ups == NUM_HANG_UPS and self._network.keys:
                    log.warning(
                        "learner at %s: it ends each connection before a word: %s/learner.public may not be its key",
                        self.address, self._network.keys,
                    )  # fmt: skip
            else:
                self._lose()

    def _lose(self, final_reason: str = "") -> None:
        """The connection is gone; with a reason for good."""
        if final_reason:
            self._end = Refusal(reason=final_reason, is_final=True)
        self.welcome = None
        for question in self._pending.values():
            if not question.answer.done():
                question.answer.set_result(self._end or LOST)

    def _describe_mismatch(self) -> str:
        if self._network.keys:
            return (
                f"network.keys: the learner at {self.address} serves without keys, got {self._network.keys} here, "
                "expected the same on both sides"
            )
        return (
            f"network.keys: the learner at {self.address} serves with keys, got none here, expected a folder with the "
            "key of this peer (see chord-keys)"
        )

    async def _connect_again(self) -> None:
        """libzmq does not by itself after what is not its protocol, but another program may have had the port."""
        await asyncio.sleep(RETRY_S)
        with suppress(zmq.ZMQError):  # it may have let go of the address already
            self._socket.disconnect(self.address)
        self._socket.connect(self.address)

    async def _watch_silence(self) -> None:
        """Say once that the learner is silent, and once that it is back."""
        while True:
            await asyncio.sleep(POLL_S)
            silence_s = time.monotonic() - self._heard_at
            waited_s = max((wait.waited_s for wait in self._waits), default=0.0)
            if self._silence_told_at is not None:
                if self._heard_at > self._silence_told_at:
                    self._silence_told_at = None
                    log.info("learner at %s: heard again", self.address)
            elif silence_s > self._network.silence_s and waited_s > self._network.silence_s / 2:
                self._silence_told_at = time.monotonic()
                log.warning(
                    "learner at %s: silence of %.1f s, expected an answer: asking on for %.0f s",
                    self.address, silence_s, self._network.learner_timeout_s,
                )  # fmt: skip

    async def close(self) -> None:
        self._socket.disable_monitor()
        tasks = [*self._tasks, self._greeting] if self._greeting else self._tasks
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._monitor.close()
        self._socket.close()
