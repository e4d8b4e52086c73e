"""One subscriber to weights, in a process of its own: waits for a version as it is told, and says when it had it.

`python -m tests.bench.subscriber WEIGHTS_PORT ANNOUNCEMENTS_PORT FOLDER [relay]`, which passes versions on where it is
to. Its orders come as lines: `full VERSION` fetches that one; `delta` and `full` fetch the next that is announced;
`file PATH` reads a file once it is there. Answers are times of the clock that all processes share.
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from common.version import Version
from common.weights.client import WeightClient
from common.weights.relay import Relay
from common.weights.snapshot import Snapshot
from common.wire.codec import decode
from common.wire.messages import Announcement
from common.wire.sockets import SocketLimits, open_socket

LIMITS = SocketLimits(heartbeat_s=1.0, silence_s=4.0, max_frame_bytes=64 << 20)
LOOK_S = 0.01
"""Between two looks for a file in a shared folder."""


class Subscriber:
    """As an actor has it: announcements, a weight client, and the last snapshot."""

    def __init__(self, weights_port: int, announcements_port: int, folder: Path, *, relays: bool) -> None:
        context: zmq.Context[Any] = zmq.Context.instance()
        self._announcements = open_socket(context, zmq.SUB, LIMITS)
        self._announcements.setsockopt(zmq.SUBSCRIBE, b"")
        self._announcements.connect(f"tcp://127.0.0.1:{announcements_port}")
        relay = Relay(context, host="127.0.0.1", limits=LIMITS, timeout_s=10.0) if relays else None
        self._client = WeightClient(
            context, f"tcp://127.0.0.1:{weights_port}", folder, limits=LIMITS, credit=8, timeout_s=60.0, retry_s=10.0,
            relay=relay,
        )  # fmt: skip
        self._held: Snapshot | None = None

    def obey(self, order: str) -> float:
        """When it was done."""
        kind, _, what = order.partition(" ")
        if kind == "file":
            read_file(Path(what))
            return time.monotonic()
        version = Version.model_validate_json(what) if what else self._hear()
        before, base = self._held, self._held if kind == "delta" else None
        self._held = self._client.fetch(version, base=base)
        ended = time.monotonic()
        if before and before.path != self._held.path:
            before.path.unlink(missing_ok=True)  # patched, it has become the new one
        return ended

    def _hear(self) -> Version:
        """The next that is not held already."""
        while True:
            message = decode(self._announcements.recv_multipart(), max_bytes=1 << 16).message
            assert isinstance(message, Announcement)
            if self._held is None or message.version.hash != self._held.version.hash:
                return message.version


def read_file(path: Path) -> None:
    """All of its bytes, as a reader of safetensors has them; they are not compared with anything."""
    while not path.exists():
        time.sleep(LOOK_S)
    np.fromfile(path, dtype=np.uint8)


def main() -> None:
    subscriber = Subscriber(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), relays="relay" in sys.argv[4:])
    print("ready", flush=True)
    for line in sys.stdin:
        print(subscriber.obey(line.strip()), flush=True)


if __name__ == "__main__":
    main()
