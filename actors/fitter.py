"""The fitter: keeps the engine on the newest announced weights.

Consumes announcements and the versions that work replies mention; waits for chunks (the weight client's limit);
produces loads. An engine is given only files whose hash is the one announced for their version.
"""

import asyncio
import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from actors.engine import Engine
from actors.transfer import ReceivingEngine, TransferClient
from common.config.schema import Network
from common.config.weights import Weights
from common.errors import OperatorError
from common.keys.folder import peer_keys
from common.version import Version
from common.weights.client import FetchCancelled, VersionGone, WeightClient
from common.weights.relay import Relay
from common.weights.snapshot import Snapshot
from common.wire.codec import WireError, decode
from common.wire.messages import Announcement, Welcome
from common.wire.sockets import SocketLimits, address_towards, open_socket

log = logging.getLogger(__name__)

MAX_ANNOUNCEMENT_BYTES = 64 << 10
RETRY_S = 0.2
"""Between a fetch that came to nothing and the next."""
SAY_S = 5.0
"""Between two lines about a version that is not to be had."""


class Fitter:
    """Owns the SUB socket and a thread for fetching."""

    def __init__(
        self,
        engine: Engine,
        network: Network,
        folder: Path,
        *,
        name: str,
        in_flight: bool,
        welcome: Callable[[], Welcome | None],
        weights: Weights | None = None,
    ) -> None:
        """`name` is the peer's; `welcome` tells where the learner's weights are now; None while it is not known.

        `weights`: how they come; None: from the learner alone, as for an evaluator, which is to have older ones too.
        """
        self._weights = weights
        self._welcome = welcome
        self._engine = engine
        self._network = network
        self._folder = folder
        self._in_flight = in_flight
        self.on_loaded: Callable[[], None] = lambda: None
        """Called after every load."""
        self._keys = peer_keys(network.keys, name)
        self._limits = SocketLimits(network.heartbeat_s, network.silence_s, network.max_message_bytes)
        self._transfers = self._make_transfers(name)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fetch")
        self._client: WeightClient | None = None
        self._relay: Relay | None = None
        self._address = ""
        self._held: Snapshot | None = None
        """The last one fetched: of the next, what differs is enough."""
        self._wanted: Version | None = None
        self._said: tuple[Version | None, float] = None, 0.0
        """Which version was said not to be had, and when."""
        self._has_news = asyncio.Event()
        self._is_closing = False
        self._earlier_bytes = 0
        """What earlier clients received."""
        self.received_bytes = 0
        self.fetch_s = self.load_s = 0.0
        """Duration of the last fetch and of the last load."""

    def want(self, version: Version | None) -> None:
        """Note the newest version; within a run the order of versions is incarnation, then step.

        Of two of one step the later word counts: the one may take the other's place (`Conductor._hand_over`).
        """
        wanted = self._wanted
        if version is None or version == wanted:
            return
        is_other_run = wanted is None or wanted.run_id != version.run_id
        if is_other_run or (version.incarnation, version.step) >= (wanted.incarnation, wanted.step):
            self._wanted = version
            self._has_news.set()

    async def follow(self) -> None:
        """Fit every newest version until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._listen())
                tasks.create_task(self._fit_newest())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def fit(self, version: Version) -> None:
        """Fetch `version` and load it. Raises VersionGone where it is no longer kept, WaitTimeout on silence."""
        serving = self._engine.version
        if serving and (serving.run_id, serving.step, serving.hash) == (version.run_id, version.step, version.hash):
            return
        # After a deliberate rewind versions fall; within one answer they never may.
        is_rewind = serving is not None and version.step < serving.step
        asked, welcome = time.monotonic(), self._welcome()
        started, self.fetch_s = asked, 0.0
        is_there = (
            self._transfers is not None
            and welcome is not None
            and not is_rewind
            and await self._transfers.bring(version, welcome.courier_port)
        )
        if not is_there:
            snapshot = await self._fetch(version)
            started = time.monotonic()
            self.fetch_s = started - asked
            await self._engine.load(snapshot, in_flight=self._in_flight and not is_rewind)
            for old in self._folder.glob("*.safetensors"):
                if old != snapshot.path:
                    old.unlink()
        self.load_s = time.monotonic() - started
        log.info("serving %s (load %.2f s)", version, self.load_s)
        self.on_loaded()

    def _make_transfers(self, name: str) -> TransferClient | None:
        """Raises OperatorError where the engine takes files only."""
        if not (self._weights and self._weights.is_direct):
            return None
        if not isinstance(self._engine, ReceivingEngine):
            raise OperatorError(
                f'weights.transport: got "{self._weights.transport}" with the {self._engine.name} engine, expected '
                'vllm, or "zmq"'
            )
        if self._weights.transport == "nccl":
            from common.weights.nccl import check_gpu

            check_gpu()
        return TransferClient(
            self._engine, self._network, self._weights, name=name, limits=self._limits, keys=self._keys
        )

    async def close(self) -> None:
        self._is_closing = True
        if self._transfers:
            self._transfers.close()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close_sockets)
        self._thread.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _fit_newest(self) -> None:
        while True:
            await self._has_news.wait()
            self._has_news.clear()
            wanted = self._wanted
            try:
                if wanted:
                    await self.fit(wanted)
            except (VersionGone, FetchCancelled):
                self._say_missing(wanted)
                await asyncio.sleep(RETRY_S)
                self._has_news.set()

    def _say_missing(self, wanted: Version | None) -> None:
        now = time.monotonic()
        if self._said[0] != wanted or now - self._said[1] > SAY_S:
            log.info("%s is not to be had where it was asked for: asking again", wanted)
            self._said = wanted, now

    async def _fetch(self, version: Version) -> Snapshot:
        welcome = self._welcome()
        if welcome is None:
            raise FetchCancelled
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._fetch_in_thread, version, welcome.weights_port)

    def _fetch_in_thread(self, version: Version, port: int) -> Snapshot:
        address = f"tcp://{self._network.host}:{port}"
        if self._client is None or self._address != address:
            self._close_client()
            self._address = address
            if self._relay is None and self._weights and self._weights.relay:
                self._relay = self._open_relay(self._weights)
            self._client = WeightClient(
                zmq.Context.instance(),
                address,
                self._folder,
                limits=self._limits,
                credit=self._network.chunk_credit,
                timeout_s=self._network.learner_timeout_s,
                retry_s=self._network.request_timeout_s,
                keys=self._keys,
                relay=self._relay,
            )
        self._held = self._client.fetch(version, lambda: self._is_wanted(port), base=self._held)
        self.received_bytes = self._earlier_bytes + self._client.received_bytes
        return self._held

    def _open_relay(self, weights: Weights) -> Relay:
        host = address_towards(self._network.host)
        relay = Relay(
            zmq.Context.instance(), host=host, limits=self._limits, timeout_s=weights.relay_timeout_s, keys=self._keys
        )
        log.info("passing versions on to other actors: tcp://%s:%d", host, relay.port)
        return relay

    def _is_wanted(self, port: int) -> bool:
        """Whether to go on fetching from `port`: a restarted learner serves on another one."""
        now = self._welcome()
        return not self._is_closing and (now is None or now.weights_port == port)

    def _close_sockets(self) -> None:
        self._close_client()
        if self._relay:
            self._relay.close()

    def _close_client(self) -> None:
        if self._client:
            self._earlier_bytes += self._client.received_bytes
            self._client.close()
            self._client = None

    async def _listen(self) -> None:
        """Follow announcements; the learner may come back on another port."""
        port, socket = 0, None
        try:
            while True:
                now = self._welcome()
                if now and now.announcements_port != port:
                    if socket:
                        socket.close()
                    port, socket = now.announcements_port, self._subscribe(now.announcements_port)
                if socket is None or not await socket.poll(500):
                    await asyncio.sleep(0.05)
                    continue
                self._hear(await socket.recv_multipart())
        finally:
            if socket:
                socket.close()

    def _subscribe(self, port: int) -> Any:
        limits = replace(self._limits, max_frame_bytes=MAX_ANNOUNCEMENT_BYTES)
        socket = open_socket(zmq.asyncio.Context.instance(), zmq.SUB, limits, self._keys)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.connect(f"tcp://{self._network.host}:{port}")
        return socket

    def _hear(self, frames: list[bytes]) -> None:
        try:
            message = decode(frames, max_bytes=MAX_ANNOUNCEMENT_BYTES).message
        except WireError as error:
            log.warning("an announcement was refused: %s", error)
            return
        if isinstance(message, Announcement):
            self.want(message.version)
