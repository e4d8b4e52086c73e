"""The reception: who is let in at the front door, and what a newcomer is told."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from common.keys.folder import key_name_of
from common.version import Version
from common.wire.codec import WireError
from common.wire.listener import Arrival
from common.wire.messages import Hello, Refusal, Welcome
from learner.ledger.ledger import Ledger
from learner.peers import Peers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Door:
    """What a newcomer is told, and what it must bring."""

    config_hash: str
    weights_port: int
    announcements_port: int
    max_message_bytes: int
    max_round_bytes: int
    """Bytes handled under one commit, but for the last message."""
    silence_s: float
    """A peer not heard for longer is gone; another process may have its name."""
    courier_port: int = 0
    """0: there is no courier."""


class NotYourName(Exception):
    """A peer spoke for another than its key speaks for."""


class Reception:
    """Keeps the list of peers."""

    def __init__(self, door: Door, peers: Peers, ledger: Ledger, *, newest: Callable[[], Version | None]) -> None:
        self._door = door
        self._peers = peers
        self._ledger = ledger
        self._newest = newest

    def welcome(self, arrival: Arrival, hello: Hello) -> Welcome | Refusal:
        """Raises WireError or NotYourName where it is to be shown out."""
        check_name(arrival, hello.peer_id)
        if arrival.routing_id != hello.routing_id:
            raise WireError(f"hello: got another routing id, expected {hello.peer_id}/SESSION")
        if hello.config_hash != self._door.config_hash:
            reason = (
                f"configuration: {hello.peer_id} has hash {hello.config_hash}, expected {self._door.config_hash}: "
                "give it the learner's sampling, environment, algorithm, run.seed and eval values"
            )
            return Refusal(reason=reason, is_final=True)
        if found := self._peers.rival_of(hello, silence_s=self._door.silence_s):
            holder, wanted_s = found
            is_final = wanted_s > 2 * self._door.silence_s
            heard = f"{hello.peer_id} was heard {holder.silence_s:.1f} s ago from another process"
            return Refusal(
                reason=f"{heard}, expected a --name of its own" if is_final else f"{heard}: not yet", is_final=is_final
            )
        is_new = self._peers.get(arrival.routing_id) is None
        if earlier := self._peers.join(hello, arrival.connection):
            self._ledger.expire(earlier)
        if is_new:
            log.info("%s %s joined (%s engine)", hello.role, hello.peer_id, hello.engine)
        return Welcome(
            weights_port=self._door.weights_port,
            announcements_port=self._door.announcements_port,
            courier_port=self._door.courier_port,
            newest=self._newest(),
        )


def check_name(arrival: Arrival, peer_id: str) -> None:
    """Raises NotYourName."""
    if arrival.key_name is not None and arrival.key_name != key_name_of(peer_id):
        raise NotYourName(f"key {arrival.key_name} spoke for {peer_id}, expected {arrival.key_name} or a name below it")
