"""The direct way for weights: asks the learner's courier for a version, and has the engine receive it.

Waits for the courier, `transfer_timeout_s` for its turn and as long for the tensors. Whatever fails is said, and leaves
the version to be fetched over ZeroMQ; after several failures in a row it is not tried again.
"""

import itertools
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import zmq
import zmq.asyncio
from pydantic import TypeAdapter

from actors.engine import EngineDead
from common.config.schema import Network
from common.config.weights import Weights
from common.errors import OperatorError
from common.keys.folder import PeerKeys
from common.version import Version
from common.wait import wait_for
from common.weights.policy import Shape
from common.weights.transports import Outline
from common.wire.codec import Envelope, WireError, decode, encode
from common.wire.messages import Message, TransferReply, TransferRequest, TransferStart
from common.wire.sockets import SocketLimits, open_socket

log = logging.getLogger(__name__)

MAX_FAILURES_IN_A_ROW = 3
COURIER = "the learner's courier"
OUTLINES: TypeAdapter[list[Outline]] = TypeAdapter(list[Outline])


class TransferRefused(Exception):
    """The courier hands another version over by now."""


@dataclass(frozen=True)
class Transfer:
    """A version that the courier is about to send."""

    reply: TransferReply
    outlines: list[Outline]
    limit_s: float

    @property
    def version(self) -> Version:
        return self.reply.version

    @property
    def shapes(self) -> dict[str, Shape]:
        return {outline.name: outline.shape for outline in self.outlines}

    def order(self, num_workers: int) -> dict[str, Any]:
        """What the engine's workers are told; see actors.engines.vllm_transfer."""
        return {
            "transport": self.reply.transport,
            "invitation": self.reply.invitation,
            "num_workers": num_workers,
            "outlines": [list(asdict(outline).values()) for outline in self.outlines],
            "fingerprint": self.reply.fingerprint,
            "limit_s": self.limit_s,
        }


@runtime_checkable
class ReceivingEngine(Protocol):
    """An engine that can be sent tensors."""

    @property
    def num_workers(self) -> int: ...

    async def receive(self, transfer: Transfer, *, begin: Callable[[], Awaitable[None]]) -> None: ...


class TransferClient:
    """One engine's."""

    def __init__(
        self, engine: ReceivingEngine, network: Network, weights: Weights, *, name: str, limits: SocketLimits,
        keys: PeerKeys | None,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._host = network.host
        self._transport = weights.transport
        self._timeout_s = weights.transfer_timeout_s
        self._name = f"{name}/{secrets.token_hex(4)}".encode()
        self._limits = limits
        self._keys = keys
        self._socket: Any = None
        self._port = 0
        self._is_member = False
        self._request_ids = itertools.count(1)
        self._failures = 0
        """In a row."""
        self.num_received = 0
        """Versions."""

    async def bring(self, version: Version, port: int) -> bool:
        """Whether the engine serves `version` now, which came from the courier that listens at `port` (0: there is
        none)."""
        if self._failures == MAX_FAILURES_IN_A_ROW:
            return False
        try:
            if not port:
                raise OperatorError(f'weights.transport: got "zmq" of the learner\'s, expected "{self._transport}"')
            self._connect(port)
            turn = f"its turn for {version}"
            transfer = await wait_for(self._ask(version), turn, whom=COURIER, limit_s=self._timeout_s)
            await self._engine.receive(transfer, begin=lambda: self._send(TransferStart(version=version)))
        except TransferRefused as refused:
            log.info("%s is not handed over (%s): fetching it", version, refused)
            return False
        except EngineDead:
            raise
        except Exception as error:
            self._fail(version, error)
            return False
        self._failures, self._is_member = 0, True
        self.num_received += 1
        return True

    def close(self) -> None:
        if self._socket:
            self._socket.close()
            self._socket = None

    def _fail(self, version: Version, error: Exception) -> None:
        self.close()  # the courier forgets the group
        self._is_member = False
        self._failures += 1
        last = self._failures == MAX_FAILURES_IN_A_ROW
        log.warning(
            "%s did not come by %s: %s: fetching it%s", version, self._transport, " ".join(str(error).split())[:300],
            f", and all that follow, after {self._failures} failures in a row" if last else "",
        )  # fmt: skip

    def _connect(self, port: int) -> None:
        if self._socket and port == self._port:
            return
        self.close()
        self._port, self._is_member = port, False
        self._socket = open_socket(zmq.asyncio.Context.instance(), zmq.DEALER, self._limits, self._keys)
        self._socket.setsockopt(zmq.IDENTITY, self._name)
        self._socket.connect(f"tcp://{self._host}:{port}")

    async def _ask(self, version: Version) -> Transfer:
        number = next(self._request_ids)
        request = TransferRequest(
            request_id=number, version=version, num_workers=self._engine.num_workers, is_member=self._is_member
        )
        await self._send(request)
        while True:
            envelope = _decoded(await self._socket.recv_multipart(), self._limits.max_frame_bytes)
            if envelope and isinstance(reply := envelope.message, TransferReply) and reply.request_id == number:
                break
        if reply.reason or reply.version.hash != version.hash:
            raise TransferRefused(reply.reason or str(reply.version))
        if reply.transport != self._transport:
            raise OperatorError(
                f'weights.transport: got "{reply.transport}" of the learner\'s, expected "{self._transport}"'
            )
        outlines = OUTLINES.validate_json(bytes(envelope.frames[0]))
        return Transfer(reply.model_copy(update={"version": version}), outlines, self._timeout_s)

    async def _send(self, message: Message) -> None:
        await self._socket.send_multipart(encode(message))


def _decoded(frames: list[bytes], max_bytes: int) -> Envelope | None:
    try:
        return decode(frames, max_bytes=max_bytes)
    except WireError as error:
        log.warning("a reply of %s was refused: %s", COURIER, error)
        return None
