"""A thief: a peer with a stolen key and the run's own configuration, which is let in and abuses what it is given."""

import random
from pathlib import Path
from typing import Any

import zmq

from common.config.load import resolve_config
from common.wire.codec import WireError, decode, encode
from common.wire.messages import ActorState, Goodbye, Hello, Message, Refusal, Role, Welcome, Work, WorkRequest
from tests.chaos.payloads import good_messages, mutate

ANSWER_MS = 2000
"""Longest time for an answer that is needed to go on."""
PATIENCE_MS = 5
"""Longest time for an answer to a damaged message: most end the connection instead."""
CAPACITY = 2
"""Leases asked for: enough to abuse, too few to hold up the run."""
MAX_BYTES = 1 << 26


class Thief:
    """One after another is welcomed, takes leases, and damages requests, groups, failures and evaluation results."""

    def __init__(self, chance: random.Random, config: Path) -> None:
        """`config`: of the run. Raises ConfigError."""
        self._chance = chance
        self._config_hash = resolve_config(config).config.agreement_hash
        self.counts = {"joined": 0, "leases": 0, "let_in": 0, "answered": 0}
        """Peers welcomed, leases granted to them, messages sent by them, and of those, answered."""

    def rob(self, dealer: "zmq.Socket[Any]", address: str, name: str, *, count: int) -> int:
        """`dealer` has its keys and is not connected. Returns how many messages were sent."""
        role = Role.EVALUATOR if self._chance.random() < 0.2 else Role.ACTOR
        session = f"s{self._chance.randrange(1 << 30)}"
        hello = Hello(peer_id=name, session=session, role=role, engine="stolen", config_hash=self._config_hash)
        dealer.setsockopt(zmq.ROUTING_ID, hello.routing_id)
        dealer.connect(address)
        welcome = self._ask(dealer, hello)
        if not isinstance(welcome, Welcome) or welcome.newest is None:
            return 1
        self.counts["joined"] += 1
        version = welcome.newest
        request = WorkRequest(state=ActorState.SERVING, capacity=CAPACITY, serving=version).stamped(version)
        work = self._ask(dealer, request)
        leases = [lease.lease_id for lease in work.leases] if isinstance(work, Work) else []
        self.counts["leases"] += len(leases)
        good = [frames for lease_id in leases or ["1.a"] for frames in good_messages(version, lease_id)]
        for _ in range(count):
            dealer.send_multipart(mutate(self._chance.choice(good), self._chance) or [b""])
            self.counts["let_in"] += 1
            reply = self._reply(dealer, PATIENCE_MS)
            self.counts["answered"] += reply is not None
            if isinstance(reply, Refusal) and reply.wants_hello:
                self._ask(dealer, hello)
        dealer.send_multipart(encode(Goodbye().stamped(version)))
        return count + 3

    def _ask(self, dealer: "zmq.Socket[Any]", message: Message) -> Message | None:
        dealer.send_multipart(encode(message))
        return self._reply(dealer, ANSWER_MS)

    @staticmethod
    def _reply(dealer: "zmq.Socket[Any]", limit_ms: int) -> Message | None:
        if not dealer.poll(limit_ms):
            return None
        try:
            return decode(dealer.recv_multipart(), max_bytes=MAX_BYTES).message
        except WireError:
            return None
