"""A TCP proxy between actors and learner, whose faults are switched while it runs.

The learner binds 127.0.0.1; the proxy listens on the same ports of another loopback address, which far actors take for
the learner's. A fault concerns every connection through that address, and those to come.
"""

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

CHUNK_BYTES = 1 << 16
TICK_S = 0.05
"""How soon a switched fault is seen by a connection that moves nothing."""


@dataclass(frozen=True)
class Weather:
    """What befalls the bytes on their way."""

    is_black_hole: bool = False
    """Connections stay, nothing moves, and nobody new is let in."""
    delay_s: tuple[float, float] = (0.0, 0.0)
    """Of each chunk, drawn between the two."""
    bytes_per_s: float = 0.0
    """Of each direction of a connection; 0 does not throttle."""
    cut_probability: float = 0.0
    """That a chunk is cut short and its connection closed."""
    reset_probability: float = 0.0
    """That a connection is reset instead of passing a chunk on: the userspace stand-in for heavy packet loss."""


CALM = Weather()


class Proxy:
    """One listening address; runs an event loop in a thread of its own."""

    def __init__(self, *, host: str, target_host: str, ports: Sequence[int], seed: int = 0) -> None:
        """Raises OSError where an address is taken."""
        self._target_host = target_host
        self._random = random.Random(seed)
        self._weather = CALM
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_connections = self.num_broken = 0
        """Connections accepted; of those, broken by a fault."""
        self.num_hit = 0
        """Chunks that were delayed, throttled, cut or reset."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy {host}", daemon=True)
        self._thread.start()
        self._servers = [self._call(self._listen(host, port)) for port in ports]

    @property
    def num_open(self) -> int:
        """Connections that are up, both ends counted."""
        return len(self._writers)

    def change(self, weather: Weather) -> None:
        """From now on, for connections that exist and for those to come."""
        self._weather = weather

    def reset_all(self) -> int:
        """Reset every connection (RST, nothing in flight is delivered); returns how many."""
        return self._call(self._reset_all())

    def close(self) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=10)

    async def _listen(self, host: str, port: int) -> asyncio.Server:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task
            self._tasks.add(task)
            try:
                await self._serve(reader, writer, port)
            finally:
                self._tasks.discard(task)

        return await asyncio.start_server(serve, host, port, limit=CHUNK_BYTES)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
        self.num_connections += 1
        self._writers.add(writer)
        there: asyncio.StreamWriter | None = None
        try:
            while self._weather.is_black_hole:
                await asyncio.sleep(TICK_S)
            back, there = await asyncio.open_connection(self._target_host, port, limit=CHUNK_BYTES)
            self._writers.add(there)
            pumps = [asyncio.create_task(self._pump(reader, there)), asyncio.create_task(self._pump(back, writer))]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            pass  # the learner is away: whoever connects sees what it would see of the learner itself
        finally:
            for one in (writer, there):
                if one:
                    self._writers.discard(one)
                    one.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while chunk := await reader.read(CHUNK_BYTES):
                if not await self._pass_on(chunk, writer):
                    self.num_broken += 1
                    return

    async def _pass_on(self, chunk: bytes, writer: asyncio.StreamWriter) -> bool:
        """False where the connection is to end."""
        weather = self._weather
        if weather.delay_s[1]:
            await asyncio.sleep(self._random.uniform(*weather.delay_s))
        was_delayed = weather.delay_s[1] > 0
        while self._weather.is_black_hole:
            await asyncio.sleep(TICK_S)
        weather = self._weather
        self.num_hit += was_delayed or weather.bytes_per_s > 0
        if self._random.random() < weather.reset_probability:
            self.num_hit += 1
            _reset(writer)
            return False
        if self._random.random() < weather.cut_probability:
            self.num_hit += 1
            writer.write(chunk[: self._random.randrange(len(chunk))])
            await writer.drain()
            return False
        writer.write(chunk)
        await writer.drain()
        if weather.bytes_per_s:
            await asyncio.sleep(len(chunk) / weather.bytes_per_s)
        return True

    async def _reset_all(self) -> int:
        writers = list(self._writers)
        for writer in writers:
            _reset(writer)
        self.num_broken += len(writers)
        return len(writers)

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _reset(writer: asyncio.StreamWriter) -> None:
    found = writer.get_extra_info("socket")
    if found is not None:
        with suppress(OSError):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
