"""The one key that a pool of actors shares, where one of them listens to the others."""

from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from common.errors import OperatorError
from common.keys.folder import KeyPair, key_name_of


class OneKey:
    """Lets the holders of one key in."""

    def __init__(self, public_key: bytes) -> None:
        self._public_key = public_key

    def name_of(self, public_key: bytes) -> str | None:
        return "pool" if public_key == self._public_key else None

    def callback(self, domain: str, key: bytes) -> bool:
        """What pyzmq's authenticator asks about a newcomer."""
        return self.name_of(key) is not None


class PoolKeys:
    """The pair, and the thread that ZeroMQ asks about each newcomer's key. One for each context."""

    def __init__(self, context: "zmq.Context[Any]", pair: KeyPair) -> None:
        self.pair = pair
        self.allowed = OneKey(pair.public)
        self._authenticator: Any = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", credentials_provider=self.allowed)

    def close(self) -> None:
        """After the sockets that use it."""
        self._authenticator.stop()


def check_pool(peer_id: str) -> None:
    """Raises OperatorError where `peer_id` cannot share its key with others."""
    if key_name_of(peer_id) == peer_id:
        raise OperatorError(
            f"weights.relay: got the key of {peer_id} alone, expected one that a pool of actors shares "
            "(--name KEY.ANYTHING), as actors know no other key than their own; or weights.relay = 0"
        )
