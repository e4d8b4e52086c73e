"""Hostile peers against a living learner: fuzzed messages and connections that are up to no good.

Most speak ZMTP by hand, so that they can also speak it wrongly; those with a wrong key go through libzmq. Run as a
module it takes host and ports of a learner and prints, again and again, what it sent so far as JSON.
"""

import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
import zmq

from tests.chaos.payloads import Payloads
from tests.chaos.thief import Thief

SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
MESSAGES_PER_CONNECTION = 400
MESSAGES_PER_THIEF = 50
THEFTS = 0.3
"""Share of the rounds of messages that are a thief's."""
SOCKET_TIMEOUT_S = 5.0
HELD = 60
"""Connections that are held open at a time: half-finished messages, slow lorises, silence."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Target:
    """Where a learner listens."""

    host: str
    ports: tuple[int, ...]
    """Front door, weights, announcements."""
    keys: Path | None = None
    """Folder of CURVE keys, for hostile peers who have one; without it they fuzz through plain connections."""
    key_name: str = ""
    config: Path | None = None
    """The run's own, for thieves; without it there are none."""


class Hostile:
    """All that can be done to a learner from outside; counts what it did."""

    def __init__(self, target: Target, *, seed: int = 0) -> None:
        self._target = target
        self._chance = random.Random(seed)
        self._payloads = Payloads(self._chance)
        self.thief = Thief(self._chance, target.config) if target.config else None
        self._context = zmq.Context()
        self._held: list[socket.socket] = []
        self.connections = Counter[str]()
        """By what they tried."""
        self.num_messages = 0
        self.num_refused = 0
        """Connections that the learner would not take, or closed before we were done."""

    def attack(self, *, num_messages: int, num_connections: int, until: Callable[[], bool] = lambda: False) -> None:
        """Messages and connections in turn, until both numbers are reached or `until` says so."""
        kinds = [self._garbage, self._no_key, self._wrong_key, self._amplify, self._slow_loris, self._half_finished,
                 self._subscribe_to_much, self._hang_up, self._silence]  # fmt: skip
        sent_at_start, count = self.num_messages, 0
        while not until() and (count < num_connections or self.num_messages - sent_at_start < num_messages):
            if count < num_connections:
                kind = kinds[count % len(kinds)]
                count += 1
                self.connections[kind.__name__.strip("_")] += 1
                self._try(kind)
            left = num_messages - (self.num_messages - sent_at_start)
            share = -(-left // max(num_connections - count, 1)) if count < num_connections else MESSAGES_PER_CONNECTION
            if left > 0:
                self._try(partial(self._fuzz, min(share, left, MESSAGES_PER_CONNECTION)))

    def close(self) -> None:
        for held in self._held:
            held.close()
        self._context.destroy(linger=0)

    def _try(self, attempt: Callable[[], None]) -> None:
        try:
            attempt()
        except (OSError, zmq.ZMQError):
            self.num_refused += 1

    # Messages

    def _fuzz(self, count: int) -> None:
        if self.thief and self._chance.random() < THEFTS:
            self._steal(self.thief, min(count, MESSAGES_PER_THIEF))
            return
        if self._target.keys:
            self._fuzz_with_key(count)
            return
        with self._greeted() as connection:
            connection.sendall(b"".join(_frame(self._payloads.draw()) for _ in range(count)))
            self.num_messages += count
            _drain(connection)

    def _fuzz_with_key(self, count: int) -> None:
        """As a peer with an allowed key; it is sent away now and then, which libzmq answers with a new connection."""
        with self._keyed_dealer() as dealer:
            dealer.connect(f"tcp://{self._target.host}:{self._chance.choice(self._target.ports[:2])}")
            for _ in range(count):
                dealer.send_multipart(self._payloads.draw())
                self.num_messages += 1
                while dealer.poll(0):
                    dealer.recv_multipart()

    def _steal(self, thief: Thief, count: int) -> None:
        name = f"{self._target.key_name or 'thief'}.{self._chance.randrange(1 << 20)}"
        with self._keyed_dealer() as dealer:
            address = f"tcp://{self._target.host}:{self._target.ports[0]}"
            self.num_messages += thief.rob(dealer, address, name, count=count)

    def _keyed_dealer(self) -> "zmq.Socket[Any]":
        """With the stolen key, where the learner asks for keys."""
        dealer = self._context.socket(zmq.DEALER)
        if keys := self._target.keys:
            dealer.curve_serverkey = (keys / "learner.public").read_bytes().strip()
            dealer.curve_publickey = (keys / f"{self._target.key_name}.public").read_bytes().strip()
            dealer.curve_secretkey = (keys / f"{self._target.key_name}.secret").read_bytes().strip()
        dealer.linger, dealer.sndtimeo, dealer.reconnect_ivl = 200, 1000, 10
        return dealer

    # Connections

    def _garbage(self) -> None:
        with self._connect() as connection:
            connection.sendall(self._chance.randbytes(self._chance.choice((1, 10, 64, 5000))))

    def _no_key(self) -> None:
        """The NULL mechanism, all by the book, then a hello."""
        with self._greeted() as connection:
            connection.sendall(_frame(self._payloads.draw()))
            _drain(connection)

    def _wrong_key(self) -> None:
        """A key that nobody allowed, to a server key that may not be there at all."""
        with self._context.socket(zmq.DEALER) as dealer:
            public, secret = zmq.curve_keypair()
            keys = self._target.keys
            dealer.curve_serverkey = (keys / "learner.public").read_bytes().strip() if keys else public
            dealer.curve_publickey, dealer.curve_secretkey = public, secret
            dealer.linger = 0
            dealer.connect(f"tcp://{self._target.host}:{self._chance.choice(self._target.ports)}")
            dealer.send(b"hello", zmq.NOBLOCK)
            dealer.poll(5)

    def _amplify(self) -> None:
        """Few bytes that name many: frames of 2^62 bytes, commands and metadata of 2^31."""
        with self._greeted() as connection:
            claim = self._chance.choice(((1 << 62), (1 << 31), (1 << 28)))
            flags = self._chance.choice((0x02, 0x03, 0x06))
            connection.sendall(bytes([flags]) + struct.pack(">Q", claim) + b"x" * 1000)
            _drain(connection)

    def _slow_loris(self) -> None:
        """A greeting, one byte at each round of attacks."""
        self._hold(self._connect())
        for number, held in enumerate(list(self._held)):
            with suppress(OSError):
                held.send((SIGNATURE + b"\x03\x00NULL")[number % 16 : number % 16 + 1])

    def _half_finished(self) -> None:
        """A first frame that promises more, which never comes; or half of a frame."""
        connection = self._greeted()
        whole = _frame([b"x" * 100, b"y"])
        connection.sendall(whole[: self._chance.choice((50, 102, 103))])
        self._hold(connection)

    def _subscribe_to_much(self) -> None:
        """A subscriber with a thousand long topics, on the port of announcements."""
        with self._greeted(port=self._target.ports[-1], kind=b"SUB") as connection:
            topics = [b"\x01" + self._chance.randbytes(100) for _ in range(1000)]
            connection.sendall(b"".join(_frame([topic]) for topic in topics))
            _drain(connection)

    def _hang_up(self) -> None:
        """Reset in the middle of a greeting."""
        with self._connect() as connection:
            connection.sendall(SIGNATURE)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _silence(self) -> None:
        self._hold(self._connect())

    # What they have in common

    def _connect(self, port: int = 0) -> socket.socket:
        address = (self._target.host, port or self._chance.choice(self._target.ports))
        return socket.create_connection(address, timeout=SOCKET_TIMEOUT_S)

    def _greeted(self, port: int = 0, kind: bytes = b"DEALER") -> socket.socket:
        """A connection that has said a ZMTP greeting and who it is."""
        connection = self._connect(port or self._chance.choice(self._target.ports[:2]))
        name = b"hostile-%d" % self._chance.randrange(10_000)
        ready = b"\x05READY" + _property(b"Socket-Type", kind) + _property(b"Identity", name)
        greeting = SIGNATURE + b"\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
        connection.sendall(greeting + bytes([0x04, len(ready)]) + ready)
        return connection

    def _hold(self, connection: socket.socket) -> None:
        self._held.append(connection)
        while len(self._held) > HELD:
            self._held.pop(0).close()


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + struct.pack(">I", len(value)) + value


def _frame(frames: list[bytes]) -> bytes:
    """A multipart message as ZMTP writes it."""
    parts: list[bytes] = []
    for number, frame in enumerate(frames):
        flags = number < len(frames) - 1
        is_long = len(frame) > 255
        parts += [struct.pack(">BQ", flags | 2, len(frame)) if is_long else bytes([flags, len(frame)]), frame]
    return b"".join(parts)


def _drain(connection: socket.socket) -> None:
    """Say that no more comes and read to the end: the learner has then taken, or thrown away, all that was sent."""
    connection.shutdown(socket.SHUT_WR)
    deadline = time.monotonic() + SOCKET_TIMEOUT_S
    while time.monotonic() < deadline and connection.recv(1 << 16):
        pass


@app.command()
def hostile(
    host: str,
    ports: Annotated[list[int], typer.Argument(help="Front door, weights, announcements.")],
    num_messages: int = 100_000,
    num_connections: int = 1_000,
    seed: int = 0,
    keys: Annotated[Path | None, typer.Option(help="Folder of CURVE keys.")] = None,
    key_name: Annotated[str, typer.Option(help="Whose key the fuzzing peers have stolen.")] = "",
    minutes: float = 60.0,
    config: Annotated[Path | None, typer.Option(help="Of the run, for peers that are let in.")] = None,
) -> None:
    """Attack a learner, as far as the numbers or the minutes go."""
    attacker, started = Hostile(Target(host, tuple(ports), keys, key_name, config), seed=seed), time.monotonic()

    def is_over() -> bool:
        """libzmq aborts the process of a peer that is cut off at a bad moment, so the report is written as we go."""
        report = {
            "messages": attacker.num_messages, "connections": dict(attacker.connections),
            "refused": attacker.num_refused, "wall_s": round(time.monotonic() - started, 1),
            **(attacker.thief.counts if attacker.thief else {}),
        }  # fmt: skip
        print(json.dumps(report), flush=True)
        return time.monotonic() - started > minutes * 60

    attacker.attack(num_messages=num_messages, num_connections=num_connections, until=is_over)
    is_over()
    attacker.close()


if __name__ == "__main__":
    app()
