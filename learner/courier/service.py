"""The courier's work: engines ask for the newest version, and each in its turn gets the tensors over its own group.

Consumes offers of the learner's and requests of engines; waits for the engine whose turn it is, START_S until that is
ready and `timeout_s` for all of its turn. Whoever hangs a group takes the whole process with it: a stuck transfer can
not be called off otherwise. The learner starts another; everybody else's groups are made anew.
"""

import json
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import zmq
from safetensors import SafetensorError

from common.keys.allowed import ServerKeys
from common.weights.gloo import GlooSender
from common.weights.transports import Sender
from common.wire.codec import Buffer, WireError, decode, encode
from common.wire.connections import Bounds, Closing, Connection
from common.wire.listener import Arrival, Listener
from common.wire.messages import TransferReply, TransferRequest, TransferStart
from common.wire.sockets import SocketLimits
from learner.courier.parcel import Parcel
from learner.courier.settings import CourierOffer, CourierSettings

log = logging.getLogger(__name__)

START_S = 10.0
"""Longest time from an engine's turn to its being ready."""
MAX_REQUEST_BYTES = 64 << 10
MAX_WAITING_BYTES = 1 << 20
READ_BYTES = 1 << 16


@dataclass(frozen=True)
class Caller:
    """An engine that asked."""

    routing_id: bytes
    connection: Connection
    request: TransferRequest

    @property
    def name(self) -> str:
        return self.routing_id.decode(errors="replace")


class Service:
    """One thread's; another one watches its turns."""

    def __init__(self, settings: CourierSettings, offers: int) -> None:
        """`offers`: descriptor that lines come in by."""
        self._settings = settings
        self._offers = offers
        self._unread = b""
        context = zmq.Context.instance()
        self._keys = ServerKeys(context, settings.keys, allowed=settings.allowed_keys) if settings.keys else None
        self._listener = Listener(
            context,
            zmq.ROUTER,
            host=settings.host,
            port=settings.port,
            purpose="direct weights",
            limits=SocketLimits(settings.heartbeat_s, settings.silence_s, MAX_REQUEST_BYTES),
            bounds=Bounds(settings.max_connections, MAX_WAITING_BYTES),
            keys=self._keys,
        )
        self._parcel: Parcel | None = None
        self._groups: dict[bytes, tuple[Connection, Sender]] = {}
        self._waiting: deque[Caller] = deque()
        self._ready = b""
        """Who said last that it is ready."""
        self._turn_of, self._turn_ends = "", float("inf")
        threading.Thread(target=self._watch, name="turns", daemon=True).start()

    def run(self) -> None:
        """Until there are no more offers."""
        poller = zmq.Poller()
        for source in (self._listener.socket, self._offers):
            poller.register(source, zmq.POLLIN)
        while True:
            poller.poll(0 if self._waiting else 1000)
            self._receive(0)
            # After the requests: whoever asks for a version asks for one that was offered before.
            while select.select([self._offers], [], [], 0)[0]:
                if not self._read_offers():
                    return
            self._forget_those_gone()
            if self._waiting:
                self._serve(self._waiting.popleft())

    def close(self) -> None:
        self._listener.close()
        if self._keys:
            self._keys.close()

    def _read_offers(self) -> bool:
        """Make the newest one the parcel; False at the end."""
        data = os.read(self._offers, READ_BYTES)
        *lines, self._unread = (self._unread + data).split(b"\n")
        if lines:
            offer = CourierOffer.model_validate_json(lines[-1])
            if self._parcel:
                self._parcel.close()
                self._parcel = None
            started = time.monotonic()
            try:
                self._parcel = Parcel(Path(offer.path), offer.version)
                log.info("%s is ready to be handed over (%.2f s)", offer.version, time.monotonic() - started)
            except (OSError, SafetensorError) as error:  # the learner was faster: the next one is on its way
                log.warning("%s cannot be handed over: %s", offer.version, error)
        return bool(data)

    def _receive(self, timeout_ms: int) -> None:
        """Take in what has come."""
        while self._listener.poll(timeout_ms) and (arrival := self._listener.receive()):
            self._note(arrival)
            self._listener.settle(arrival)
            timeout_ms = 0

    def _note(self, arrival: Arrival) -> None:
        try:
            message = decode(arrival.frames, max_bytes=MAX_REQUEST_BYTES).message
            if not isinstance(message, TransferRequest | TransferStart):
                raise WireError(f"got {type(message).__name__}, expected a request for a transfer")
        except WireError as error:
            self._listener.refuse("malformed", str(error))
            self._listener.expel(arrival.connection, Closing.MALFORMED, "it sent what no peer sends")
            return
        self._listener.admit(arrival.connection)
        if isinstance(message, TransferStart):
            self._ready = arrival.routing_id
            return
        others = [one for one in self._waiting if one.routing_id != arrival.routing_id]
        self._waiting = deque([*others, Caller(arrival.routing_id, arrival.connection, message)])

    def _forget_those_gone(self) -> None:
        for routing_id in [known for known, (connection, _) in self._groups.items() if not connection.is_open]:
            self._leave(routing_id)
        self._waiting = deque(one for one in self._waiting if one.connection.is_open)

    def _leave(self, routing_id: bytes) -> None:
        if found := self._groups.pop(routing_id, None):
            found[1].close()

    def _serve(self, caller: Caller) -> None:
        parcel, version = self._parcel, caller.request.version
        if parcel is None or parcel.version.hash != version.hash:
            self._reply(caller, TransferReply(version=version, reason=f"the newest is {parcel and parcel.version}"))
            return
        try:
            self._hand_over(caller, parcel)
        except Exception as error:
            log.warning("%s did not get %s: %s", caller.name, version, error)
            self._leave(caller.routing_id)
            self._listener.expel(caller.connection, Closing.STALLED, "a transfer to it failed")

    def _hand_over(self, caller: Caller, parcel: Parcel) -> None:
        request, invitation = caller.request, ""
        if not request.is_member or caller.routing_id not in self._groups:
            self._leave(caller.routing_id)
            sender = self._make_sender()
            invitation = sender.invite()
            self._groups[caller.routing_id] = caller.connection, sender
        _, sender = self._groups[caller.routing_id]
        reply = TransferReply(
            version=parcel.version, transport=self._settings.transport, invitation=invitation,
            fingerprint=parcel.fingerprint,
        )  # fmt: skip
        self._ready = b""
        self._reply(caller, reply, [json.dumps([asdict(outline) for outline in parcel.outlines]).encode()])
        self._await_start(caller)
        started = time.monotonic()
        with self._turn(caller.name):
            if invitation:
                sender.open(num_receivers=request.num_workers)
            sender.send(parcel.tensors())
        log.info("handed %s over to %s (%.2f s)", parcel.version, caller.name, time.monotonic() - started)

    def _make_sender(self) -> Sender:
        if self._settings.transport == "gloo":
            return GlooSender(host=self._settings.host, timeout_s=self._settings.timeout_s)
        from common.weights.nccl import NcclSender

        return NcclSender(device=self._settings.device)

    def _await_start(self, caller: Caller) -> None:
        deadline = time.monotonic() + START_S
        while self._ready != caller.routing_id:
            if not caller.connection.is_open:
                raise ConnectionError("it has gone")
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {START_S:.0f} s for it to be ready")
            self._receive(50)

    def _reply(self, caller: Caller, reply: TransferReply, frames: Sequence[Buffer] = ()) -> None:
        reply = reply.model_copy(update={"request_id": caller.request.request_id}).stamped(reply.version)
        with suppress(zmq.ZMQError):  # it has gone
            self._listener.send([caller.routing_id, *encode(reply, frames)])

    @contextmanager
    def _turn(self, name: str) -> Generator[None]:
        self._turn_of, self._turn_ends = name, time.monotonic() + self._settings.timeout_s
        try:
            yield
        finally:
            self._turn_ends = float("inf")

    def _watch(self) -> None:
        """End the process where a turn lasts too long: a group's calls know no other way out."""
        while time.monotonic() < self._turn_ends:
            time.sleep(min(0.5, self._settings.timeout_s / 4))
        log.error(
            "waited %.0f s for %s to receive a version, weights.transfer_timeout_s: ending, so that the learner starts "
            "another courier", self._settings.timeout_s, self._turn_of,
        )  # fmt: skip
        os._exit(1)
