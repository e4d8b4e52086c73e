"""Senders of groups, each a process that keeps a window of them under way, and counts what was acknowledged."""

import http.client
import itertools
import multiprocessing
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import msgpack
import zmq

from common.version import Version
from common.wire.codec import decode, encode
from common.wire.messages import ActorState, Hello, Receipt, Role, Welcome, Work, WorkRequest
from common.wire.sockets import SocketLimits, open_socket
from tests.bench.cargo import Cargo, Form, make_cargo

LEASES = 64
"""Asked for at a time."""
ANSWER_S = 30.0
READY_S = 60.0
LIMITS = SocketLimits(heartbeat_s=1.0, silence_s=4.0, max_frame_bytes=1 << 20)


@dataclass(frozen=True)
class Order:
    """What one sender is to do."""

    port: int
    number: int
    window: int
    """Groups sent and not acknowledged."""
    starts_at: float
    """By time.monotonic, which all processes of a machine share."""
    warm_s: float
    seconds: float

    @property
    def name(self) -> str:
        return f"sender-{self.number}"


class Count:
    """Acknowledgements within the measured time."""

    def __init__(self, order: Order) -> None:
        self._from_s = order.starts_at + order.warm_s
        self._until_s = self._from_s + order.seconds
        self.number = 0

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self._until_s

    def note(self, number: int = 1) -> None:
        if self._from_s <= time.monotonic() <= self._until_s:
            self.number += number


class Actor:
    """One identity at our own door, as actors/link.py and actors/worker.py speak."""

    def __init__(self, context: "zmq.Context[Any]", port: int, name: str) -> None:
        self.hello = Hello(
            peer_id=name, session=f"{name}-1", role=Role.ACTOR, engine="simulated", config_hash="agreed"
        )  # fmt: skip
        self.socket: Any = open_socket(context, zmq.DEALER, LIMITS)
        self.socket.setsockopt(zmq.ROUTING_ID, self.hello.routing_id)
        self.socket.connect(f"tcp://127.0.0.1:{port}")
        self.version: Version | None = None
        self.leases: list[str] = []
        self.held: dict[str, None] = {}
        """Not acknowledged yet, the leases among them."""
        self.under_way: dict[int, str] = {}
        self.num_acknowledged = 0
        self.is_asking = False
        self._ids = itertools.count(1)

    def greet(self) -> None:
        self.socket.send_multipart(encode(self.hello))

    def ask(self, capacity: int) -> None:
        assert self.version
        request = WorkRequest(
            state=ActorState.SERVING, capacity=capacity, serving=self.version, held=tuple(self.held)
        )  # fmt: skip
        self.is_asking = True
        self.socket.send_multipart(encode(request.stamped(self.version)))

    def deliver(self, cargo: Cargo) -> None:
        """A group for the oldest lease."""
        assert self.version
        lease_id, number = self.leases.pop(0), next(self._ids)
        self.under_way[number] = lease_id
        envelope = {"run_id": self.version.run_id, "incarnation": self.version.incarnation}
        self.socket.send_multipart(cargo.message(lease_id, number, **envelope), copy=False)

    def hear(self) -> None:
        """Take in the next reply, which must be there."""
        frames = self.socket.recv_multipart()
        fields = msgpack.unpackb(frames[0])
        if fields["kind"] == "receipt":
            assert fields["outcome"] == "committed", fields
            del self.held[self.under_way.pop(fields["request_id"])]
            self.num_acknowledged += 1
            return
        match decode(frames, max_bytes=1 << 20).message:
            case Welcome() as welcome:
                self.version = welcome.newest
            case Work() as work:
                self.is_asking = False
                fresh = [lease.lease_id for lease in work.leases if lease.lease_id not in self.held]
                self.leases += fresh
                self.held |= dict.fromkeys(fresh)
            case Receipt() | _ as other:
                raise AssertionError(f"got {other}")


def send_ours(order: Order) -> int:
    """One actor that never lacks a lease."""
    actor, cargo, count = Actor(zmq.Context.instance(), order.port, order.name), make_cargo(order.number), Count(order)
    cargos = itertools.cycle(cargo)
    actor.greet()
    _hear(actor)
    actor.ask(LEASES)
    _hear(actor)
    time.sleep(max(order.starts_at - time.monotonic(), 0))
    while not count.is_over:
        while actor.leases and len(actor.under_way) < order.window:
            actor.deliver(next(cargos))
        if len(actor.leases) < LEASES and not actor.is_asking:
            actor.ask(LEASES)
        before = actor.num_acknowledged
        _hear(actor)
        while actor.socket.poll(0):
            actor.hear()
        count.note(actor.num_acknowledged - before)
    return count.number


def _hear(actor: Actor) -> None:
    assert actor.socket.poll(ANSWER_S * 1000), f"no answer within {ANSWER_S} s"
    actor.hear()


def send_bare(order: Order) -> int:
    socket: Any = zmq.Context.instance().socket(zmq.DEALER)
    socket.connect(f"tcp://127.0.0.1:{order.port}")
    cargos, count, under_way = itertools.cycle(make_cargo(order.number)), Count(order), 0
    time.sleep(max(order.starts_at - time.monotonic(), 0))
    for number in itertools.count(1):
        while under_way < order.window:
            socket.send_multipart(next(cargos).message(f"{number}.{order.name}", number), copy=False)
            under_way += 1
        assert socket.poll(ANSWER_S * 1000), f"no answer within {ANSWER_S} s"
        while socket.poll(0):
            socket.recv()
            under_way -= 1
            count.note()
        if count.is_over:
            break
    return count.number


def send_redis(order: Order, *, form: Form) -> int:
    """XADD with a sliding window over one connection: the server never waits for us."""
    import redis

    connection = redis.Redis(port=order.port).connection_pool.get_connection()
    cargos, count, under_way = itertools.cycle(make_cargo(order.number)), Count(order), 0
    names = ("header", "tokens", "logprobs", "mask", "versions")
    time.sleep(max(order.starts_at - time.monotonic(), 0))
    for number in itertools.count(1):
        if under_way < order.window:
            frames = next(cargos).message(f"{number}.{order.name}", number, form=form)
            fields = [part for pair in zip(names, frames, strict=True) for part in pair]
            connection.send_command("XADD", "groups", "MAXLEN", "~", 2000, "*", *fields)
            under_way += 1
            continue
        while under_way and (under_way == order.window or connection.can_read()):
            connection.read_response()
            under_way -= 1
            count.note()
        if count.is_over:
            break
    return count.number


def send_http(order: Order, *, form: Form) -> int:
    """A connection for each group under way."""
    cargo = make_cargo(order.number)
    counts = [Count(order) for _ in range(order.window)]

    def send(place: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", order.port, timeout=ANSWER_S)
        time.sleep(max(order.starts_at - time.monotonic(), 0))
        for number in itertools.count():
            body = cargo[number % len(cargo)].json(f"{number}.{order.name}.{place}", form)
            connection.request("POST", "/groups", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            assert answer.read() == b"ok", answer.status
            counts[place].note()
            if counts[place].is_over:
                break

    threads = [threading.Thread(target=send, args=(place,)) for place in range(order.window)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(count.number for count in counts)


def send_all(
    sender: Callable[[Order], int], port: int, *, num_senders: int, window: int, warm_s: float, seconds: float
) -> float:
    """Groups acknowledged per second, of `num_senders` processes together."""
    with crew(sender, num_senders) as links:
        starts_at = time.monotonic() + 1.0
        for number, link in enumerate(links):
            link.send(Order(port, number, window, starts_at, warm_s, seconds))
        return sum(answers(links, limit_s=warm_s + seconds + READY_S)) / seconds


@contextmanager
def crew(work: Callable[[Any], Any], size: int) -> Generator[list[Connection]]:
    """Processes that are ready; each takes one order, and answers with what `work` returns."""
    context = multiprocessing.get_context("spawn")
    links: list[Connection] = []
    processes: list[Any] = []
    try:
        for _ in range(size):
            here, there = context.Pipe()
            processes.append(context.Process(target=_serve, args=(work, there), daemon=True))
            processes[-1].start()
            links.append(here)
        answers(links, limit_s=READY_S)
        yield links
    finally:
        for process in processes:
            process.kill()
            process.join()


def answers(links: list[Connection], *, limit_s: float) -> list[Any]:
    found: list[Any] = []
    for number, link in enumerate(links):
        assert link.poll(limit_s), f"sender {number}: no answer within {limit_s} s"
        found.append(link.recv())
    return found


def _serve(work: Callable[[Any], Any], link: Connection) -> None:
    make_cargo(0, pool=1)
    link.send("ready")
    link.send(work(link.recv()))
