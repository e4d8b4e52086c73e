"""The attendance: who has fallen silent, is said to be gone, and at last gives back its leases."""

import logging
import time

from common.wire.messages import ActorState
from learner.ledger.ledger import Ledger
from learner.peers import Peers

log = logging.getLogger(__name__)

ABSENCE_S = 1.0
"""A round that takes longer was not lived through by this thread alone."""
LOOK_S = 0.2
"""Between two looks at everybody, which take time where there are many."""


class Attendance:
    """Kept by the thread that hears the peers."""

    def __init__(self, peers: Peers, ledger: Ledger, *, silence_s: float, lease_s: float) -> None:
        """`silence_s`: a peer not heard for longer is gone; `lease_s`: its leases are given back."""
        self._peers = peers
        self._ledger = ledger
        self._silence_s = silence_s
        self._lease_s = lease_s
        self._here_at = self._looked_at = time.monotonic()

    def forgive_own_absence(self) -> None:
        """Where this process was stopped or held up, nobody could be heard: that is nobody's silence."""
        now = time.monotonic()
        if (absence_s := now - self._here_at) > ABSENCE_S:
            for peer in self._peers.all():
                peer.last_heard = min(now, peer.last_heard + absence_s)
        self._here_at = now

    def mind_the_silent(self) -> None:
        """Say who is gone, and give back the leases of those who stay away; now and then."""
        if time.monotonic() - self._looked_at < LOOK_S:
            return
        self._looked_at = time.monotonic()
        for peer in self._peers.all():
            peer.note_bytes()
        for peer in self._peers.silent(self._silence_s):
            if peer.state is not ActorState.GONE:
                peer.state = ActorState.GONE
                log.warning(
                    "%s is gone: silence of %.1f s, expected a request every second; its leases are issued again in "
                    "%.0f s", peer.peer_id, peer.silence_s, max(self._lease_s - peer.silence_s, 0),
                )  # fmt: skip
        for peer in self._peers.silent(self._lease_s):
            self._peers.leave(peer)
            given_back = self._ledger.expire(peer.session)
            log.warning("%s silent for %.0f s: %d leases given back", peer.peer_id, peer.silence_s, given_back)
