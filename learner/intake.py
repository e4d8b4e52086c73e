"""The intake: drains the front door, and reads and checks what came, before anybody asks the ledger."""

from collections.abc import Callable
from dataclasses import dataclass

from common.wire.codec import WireError, decode
from common.wire.groups import GroupArrays, GroupLimits, read_group
from common.wire.listener import Arrival, Listener
from common.wire.messages import AnyMessage, GroupHeader

MAX_ROUND = 256
"""Messages handled under one commit at most."""


@dataclass(frozen=True, eq=False)
class Letter:
    """What came, read. Faults are kept until its turn comes, so that a peer's messages are answered in order."""

    arrival: Arrival
    message: AnyMessage | WireError
    group: GroupArrays | WireError | None = None
    """Of a GroupHeader."""


class Intake:
    """Used by the thread that has the socket."""

    def __init__(
        self, listener: Listener, *, max_message_bytes: int, max_round_bytes: int, limits: Callable[[], GroupLimits]
    ) -> None:
        """`limits`: of groups, as they are now."""
        self._listener = listener
        self._max_message_bytes = max_message_bytes
        self._max_round_bytes = max_round_bytes
        self._limits = limits
        self.received_bytes = 0

    def collect(self, timeout_ms: int, *, is_over: Callable[[], bool] = lambda: False) -> list[Letter]:
        """What has arrived, one round at most; waits `timeout_ms` for the first. Ends early where it `is_over`."""
        letters: list[Letter] = []
        num_bytes = 0
        for _ in range(MAX_ROUND):
            if num_bytes > self._max_round_bytes or is_over() or not self._listener.poll(timeout_ms):
                break
            timeout_ms = 0
            if arrival := self._listener.receive():
                num_bytes += arrival.num_bytes
                letters.append(self._read(arrival))
        self.received_bytes += num_bytes
        return letters

    def _read(self, arrival: Arrival) -> Letter:
        try:
            message = decode(arrival.frames, max_bytes=self._max_message_bytes).message
        except WireError as error:
            return Letter(arrival, error)
        if not isinstance(message, GroupHeader):
            return Letter(arrival, message)
        try:
            return Letter(arrival, message, read_group(message, arrival.frames[1:], self._limits()))
        except WireError as error:
            return Letter(arrival, message, error)
