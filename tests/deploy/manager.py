"""systemd's end of the notification protocol: a socket in the file system, and what was said to it, with its time."""

import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sign:
    """One line of one datagram, such as WATCHDOG=1."""

    at: float
    """time.monotonic()"""
    key: str
    value: str


class Manager:
    """What one component says; kept until `forget`."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="chord-")  # a socket's path must be short
        self.path = Path(self._folder.name) / "notify"
        self.signs: list[Sign] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._socket.settimeout(0.1)
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._hear, daemon=True)
        self._thread.start()

    def _hear(self) -> None:
        while not self._is_closing.is_set():
            try:
                datagram = self._socket.recv(4096)
            except TimeoutError:
                continue
            now = time.monotonic()
            self.signs += [Sign(now, *line.split("=", 1)) for line in datagram.decode().splitlines()]

    def forget(self) -> None:
        """What the last process said is void."""
        self.signs = []

    def times(self, key: str, *, since: float = 0.0) -> list[float]:
        return [sign.at for sign in self.signs if sign.key == key and sign.at > since]

    def has(self, key: str) -> bool:
        return bool(self.times(key))

    @property
    def status(self) -> str:
        return next((sign.value for sign in reversed(self.signs) if sign.key == "STATUS"), "")

    def close(self) -> None:
        self._is_closing.set()
        self._thread.join()
        self._socket.close()
        self._folder.cleanup()


def wait_until(is_reached: Callable[[], bool], what: Callable[[], str], timeout_s: float = 300) -> None:
    """`what` tells what was seen instead."""
    deadline = time.monotonic() + timeout_s
    while not is_reached():
        assert time.monotonic() < deadline, f"not reached within {timeout_s:.0f} s: {what()}"
        time.sleep(0.05)
