"""The actor's link to the learner: a request is sent again until it is answered, across reconnects and restarts.

Consumes replies; waits for the learner, `learner_timeout_s` at most; is unblocked by a reply to the request's id.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeVar

import zmq
import zmq.asyncio

from common.config.schema import Network
from common.errors import OperatorError, WaitTimeout
from common.wire.codec import Buffer, ProtocolMismatch, WireError, decode, encode
from common.wire.messages import Hello, Message, Refusal, Welcome
from common.wire.sockets import SocketLimits, open_socket

log = logging.getLogger(__name__)

RETRY_S = 0.2
"""Between a refusal that is not final and the next attempt."""

Reply = TypeVar("Reply", bound=Message)


class LearnerLink:
    """Owns the DEALER socket. `ask` may be called concurrently."""

    def __init__(self, network: Network, hello: Hello) -> None:
        self._network = network
        self._hello = hello
        self.address = f"tcp://{network.host}:{network.port}"
        limits = SocketLimits(network.heartbeat_s, network.silence_s, network.max_message_bytes)
        self._socket: Any = open_socket(zmq.asyncio.Context.instance(), zmq.DEALER, limits)
        self._socket.setsockopt(zmq.ROUTING_ID, hello.peer_id.encode())
        self._socket.connect(self.address)
        self._ids = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Message]] = {}
        self._greeting = asyncio.Lock()
        self.welcome: Welcome | None = None
        """The learner's last welcome; None until the first, and after it was restarted until it has greeted again."""
        self._reader = asyncio.create_task(self._read(), name="link-reader")

    async def ask(self, message: Message, expected: type[Reply], frames: Sequence[Buffer] = (), *, phase: str) -> Reply:
        """Send until answered. Raises OperatorError on a final refusal, WaitTimeout naming `phase` on silence."""
        started = heard = time.monotonic()
        while True:
            if self.welcome is None and not isinstance(message, Hello):
                await self._greet()
            reply = await self._send_until_answered(message, frames, heard, phase)
            if isinstance(reply, expected):
                return reply
            if isinstance(reply, Refusal) and reply.is_final:
                raise OperatorError(reply.reason)
            heard = time.monotonic()
            log.info(
                "%s after %.0f s: the learner says %s", phase, heard - started, getattr(reply, "reason", reply.kind)
            )
            self.welcome = None
            await asyncio.sleep(RETRY_S)

    async def _greet(self) -> None:
        async with self._greeting:
            if self.welcome is None:
                self.welcome = await self.ask(self._hello, Welcome, phase="a welcome")

    async def _send_until_answered(
        self, message: Message, frames: Sequence[Buffer], since: float, phase: str
    ) -> Message:
        """Send every `request_timeout_s` under one id, so that a late reply counts too. Raises WaitTimeout."""
        request_id = next(self._ids)
        context = {"request_id": request_id}
        if self.welcome:
            context |= {"run_id": self.welcome.run_id, "incarnation": self.welcome.incarnation}
        encoded = encode(message.model_copy(update=context), frames)
        reply: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._pending[request_id] = reply
        try:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._network.request_timeout_s):
                        await self._socket.send_multipart(encoded)
                        return await asyncio.shield(reply)
                waited = time.monotonic() - since
                if waited > self._network.learner_timeout_s:
                    raise WaitTimeout(
                        f"waited {waited:.0f} s for {phase} from learner at {self.address}, expected an answer"
                    )
                log.warning("waiting %.0f s for %s from learner at %s", waited, phase, self.address)
        finally:
            del self._pending[request_id]

    async def _read(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
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
        waiting = list(self._pending.values()) if is_for_all else [self._pending.get(message.request_id)]
        for future in waiting:
            if future and not future.done():
                future.set_result(message)

    async def close(self) -> None:
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        self._socket.close()
