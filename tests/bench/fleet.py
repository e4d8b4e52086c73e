"""A fleet of simulated actors: many identities in few processes, each asking for work and delivering at a set pace."""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import zmq

from tests.bench.cargo import Cargo, make_cargo
from tests.bench.doors import Gauge, OpenDoor
from tests.bench.senders import Actor, answers, crew

MAX_PROCESSES = 20
ASK_S = 1.0
"""An actor asks at least so often, with or without room."""
STOCK_S = 2.0
"""An actor keeps leases for what it delivers within this time, and one more."""
MAX_STOCK = 512
JOIN_S = 20.0
"""From the order to the first delivery: everybody has been welcomed by then."""
SETTLE_S = 3.0
"""From the first delivery to the measured time."""


@dataclass(frozen=True)
class FleetOrder:
    """What one process of a fleet is to do."""

    port: int
    first: int
    """Number of its first identity."""
    count: int
    groups_per_s: float
    """Of each identity; 0: it only asks."""
    starts_at: float
    """Of the first delivery; all times by time.monotonic."""
    counts_from: float
    ends_at: float


@dataclass(frozen=True)
class Load:
    """What a fleet laid upon the learner in the measured time."""

    num_actors: int
    num_groups: int
    seconds: float
    before: Gauge
    after: Gauge

    @property
    def cpu_s(self) -> float:
        """Of the learner."""
        return self.after.cpu_s - self.before.cpu_s


class Member:
    """One identity, and when it is to do what."""

    def __init__(self, actor: Actor, order: FleetOrder, place: int) -> None:
        self.actor = actor
        rate, share = order.groups_per_s, place / order.count
        self._interval_s = 1 / rate if rate else math.inf
        self._stock = min(math.ceil(STOCK_S * rate) + 1, MAX_STOCK) if rate else 0
        self._asks_at = time.monotonic() + ASK_S * share
        self._delivers_at = order.starts_at + share / rate if rate else math.inf

    def act(self, cargos: Iterator[Cargo]) -> None:
        now, actor = time.monotonic(), self.actor
        while self._delivers_at <= now and actor.leases:
            actor.deliver(next(cargos))
            self._delivers_at += self._interval_s
        lacks = self._stock - len(actor.leases)
        if not actor.is_asking and (self._asks_at <= now or lacks > self._stock / 2):
            actor.ask(lacks)
            self._asks_at = now + ASK_S


def live(order: FleetOrder) -> int:
    """Run some identities; returns the groups acknowledged in the measured time."""
    context: zmq.Context[Any] = zmq.Context()
    poller, cargos = zmq.Poller(), itertools.cycle(make_cargo(order.first))
    actors = [Actor(context, order.port, f"actor-{order.first + place}") for place in range(order.count)]
    by_socket = {actor.socket: actor for actor in actors}
    for actor in actors:
        poller.register(actor.socket, zmq.POLLIN)
        actor.greet()
    while not all(actor.version for actor in actors):
        assert time.monotonic() < order.starts_at, f"not everybody was welcomed within {JOIN_S} s"
        for socket, _ in poller.poll(100):
            by_socket[socket].hear()
    members = [Member(actor, order, place) for place, actor in enumerate(actors)]
    num_before: int | None = None
    while (now := time.monotonic()) < order.ends_at:
        if num_before is None and now >= order.counts_from:
            num_before = sum(actor.num_acknowledged for actor in actors)
        for member in members:
            member.act(cargos)
        for socket, _ in poller.poll(5):
            by_socket[socket].hear()
    return sum(actor.num_acknowledged for actor in actors) - (num_before or 0)


def sail(door: OpenDoor, num_actors: int, *, groups_per_s: float, seconds: float) -> Load:
    """Lay `num_actors` identities, which deliver `groups_per_s` all together, upon a front door."""
    num_processes = min(num_actors, MAX_PROCESSES)
    ends = [num_actors * number // num_processes for number in range(num_processes + 1)]
    with crew(live, num_processes) as links:
        starts_at = time.monotonic() + JOIN_S
        counts_from = starts_at + SETTLE_S
        for link, first, end in zip(links, ends, ends[1:], strict=False):
            rate = groups_per_s / num_actors
            link.send(FleetOrder(door.port, first, end - first, rate, starts_at, counts_from, counts_from + seconds))
        time.sleep(counts_from - time.monotonic())
        before = door.gauge()
        time.sleep(seconds)
        after = door.gauge()
        return Load(num_actors, sum(answers(links, limit_s=60)), seconds, before, after)
