"""Committed groups per second at a learner's front door, against what a user would put in its place, and its limits.

Everybody takes the same groups of eight answers from the same number of senders with as many groups under way. Ours
leases them, checks every value, and has synced them before it acknowledges; so has Redis, and so has HTTP + JSON.
"""

import statistics
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.bench.cargo import ANSWER_TOKENS, GROUP_SIZE, PROMPT_TOKENS, Form, make_cargo
from tests.bench.doors import OpenDoor, bare_zmq, front_door, http_door, opened, opened_redis, redis_version
from tests.bench.figure import Bar, Figure
from tests.bench.fleet import Load, sail
from tests.bench.senders import Order, send_all, send_bare, send_http, send_ours, send_redis

ROUNDS = 3
SECONDS, WARM_S = 3.0, 1.0
NUM_SENDERS = 4
WINDOW = 16
"""Groups under way of each sender."""
NUM_IDENTITIES, FLEET_GROUPS_PER_S, FLEET_S = 1000, 250.0, 10.0


@dataclass(frozen=True)
class Side:
    """One way for groups to come in."""

    name: str
    open: Callable[[Path], AbstractContextManager[OpenDoor]]
    send: Callable[[Order], int]
    bar: Bar | None = None
    """Of ours against it."""


def sides() -> list[Side]:
    """The others are given groups in the plain form, which is the bar's, and in our own, which is half as long."""
    http, redis = "HTTP + JSON into SQLite", f"Redis {redis_version()} Streams, appendfsync always"
    return [
        Side("ours", partial(opened, front_door), send_ours),
        Side(http, partial(opened, http_door), partial(send_http, form=Form.PLAIN), Bar(at_least=5)),
        Side(f"{http}, our form", partial(opened, http_door), partial(send_http, form=Form.TERSE)),
        Side(redis, opened_redis, partial(send_redis, form=Form.PLAIN), Bar(at_least=2)),
        Side(f"{redis}, our form", opened_redis, partial(send_redis, form=Form.TERSE)),
        Side("ours, the commit a no-op", partial(opened, front_door, is_journaled=False), send_ours, Bar(at_least=0.7)),
        Side(f"bare pyzmq {version('pyzmq')}", partial(opened, bare_zmq), send_bare),
    ]


def measure(say: Callable[[str], None]) -> list[Figure]:
    rates = compete(say)
    (ours, *_), cargo = sides(), make_cargo(0)
    group_bytes, plain = (statistics.mean(one.num_bytes(form) for one in cargo) for form in (Form.TERSE, Form.PLAIN))
    mine = statistics.median(rates[ours.name])
    conditions = (
        f"K = {GROUP_SIZE}, prompt {PROMPT_TOKENS}, answers {ANSWER_TOKENS[0]} to {ANSWER_TOKENS[1]} tokens, "
        f"{group_bytes / 1000:.0f} kB, {plain / 1000:.0f} kB in the plain form; {NUM_SENDERS} senders, {WINDOW} groups "
        f"under way each; median of {ROUNDS} alternating rounds of {SECONDS:g} s; ours {spread(rates[ours.name])}"
    )
    figures = [Figure("volume", "MB/s", mine * group_bytes / 1e6, conditions=conditions)]
    for side in sides()[1:]:
        found = rates[side.name]
        figures.append(
            Figure(
                "committed groups", "groups/s", mine, side.name, statistics.median(found), side.bar,
                f"its {spread(found)}",
            )
        )  # fmt: skip
    return [*figures, *memory(say)]


def compete(say: Callable[[str], None]) -> dict[str, list[float]]:
    """Groups per second of each side, in turn."""
    rates: dict[str, list[float]] = {side.name: [] for side in sides()}
    for number in range(ROUNDS):
        for side in sides():
            with tempfile.TemporaryDirectory(dir=".") as folder, side.open(Path(folder)) as door:
                rates[side.name].append(
                    send_all(
                        side.send, door.port, num_senders=NUM_SENDERS, window=WINDOW, warm_s=WARM_S, seconds=SECONDS
                    )
                )
        say(f"round {number + 1}: " + ", ".join(f"{name} {found[-1]:.0f}" for name, found in rates.items()))
    return rates


def spread(found: list[float]) -> str:
    return f"{min(found):.0f} to {max(found):.0f}"


def memory(say: Any) -> list[Figure]:
    """What a thousand identities make of the learner's memory as groups come in."""
    with tempfile.TemporaryDirectory(dir=".") as folder, opened(front_door, Path(folder)) as door:
        load: Load = sail(door, NUM_IDENTITIES, groups_per_s=FLEET_GROUPS_PER_S, seconds=FLEET_S)
    before, after = load.before.resident_bytes / 2**20, load.after.resident_bytes / 2**20
    say(f"{load.num_groups} groups of {NUM_IDENTITIES} identities: {before:.0f} to {after:.0f} MiB")
    return [
        Figure(
            f"resident memory, {NUM_IDENTITIES} identities", "MiB", after, f"{FLEET_S:g} s before", before,
            Bar(at_most=1.1), f"{load.num_groups} groups came between, in 20 processes",
        )
    ]  # fmt: skip
