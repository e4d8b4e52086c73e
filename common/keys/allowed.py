"""The keys that are let in, as the folder says at this moment, and the authenticator that asks for them (ZAP)."""

import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from common.errors import OperatorError
from common.keys.folder import LEARNER, KeyFolder, KeyPair, read_public

log = logging.getLogger(__name__)

LOOK_S = 0.2
"""The folder is looked at again after this time."""


class AllowedKeys:
    """Names by public key. A key added to the folder or taken out of it counts within LOOK_S. Safe between threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._looked_at = float("-inf")
        self._seen: object = None
        self._names: dict[bytes, str] = {}
        self._complaints: set[str] = set()

    def name_of(self, public_key: bytes) -> str | None:
        """The name that a key is allowed under; None where it is not."""
        with self._lock:
            if time.monotonic() - self._looked_at > LOOK_S:
                self._look()
            return self._names.get(public_key)

    def callback(self, domain: str, key: bytes) -> bool:
        """What pyzmq's authenticator asks about a newcomer."""
        return self.name_of(key) is not None

    def _look(self) -> None:
        self._looked_at = time.monotonic()
        try:
            files = sorted(self._folder / name for name in os.listdir(self._folder) if name.endswith(".public"))
        except FileNotFoundError:
            files = []
        except OSError as error:  # a disk that hiccups must neither lock anybody out nor stop who asks
            self._complain(f"{self._folder}: {error.strerror}: the keys read before stay allowed")
            return
        seen = [_fingerprint(path) for path in files]
        if seen == self._seen:
            return
        self._seen, names = seen, dict[bytes, str]()
        for path in files:
            try:
                key = read_public(path)
            except OperatorError as error:  # one broken file must not lock the others out
                self._complain(str(error))
                continue
            if names.setdefault(key, path.stem) != path.stem:
                self._complain(f"{path}: got the key of {names[key]}, expected one of its own: ignored")
        self._names = names
        log.info("keys: %d allowed in %s", len(names), self._folder)

    def _complain(self, line: str) -> None:
        if line not in self._complaints:
            self._complaints = {*list(self._complaints)[-100:], line}
            log.warning("%s", line)


def _fingerprint(path: Path) -> tuple[str, int, int, int]:
    """Changes with the file, also where it is a link into a folder that is exchanged as a whole, as in Kubernetes."""
    try:
        found = os.stat(path)
    except OSError:
        return path.name, 0, 0, 0
    return path.name, found.st_ino, found.st_mtime_ns, found.st_size


class ServerKeys:
    """The learner's pair, the keys it lets in, and the thread that ZeroMQ asks about each newcomer's."""

    def __init__(self, context: "zmq.Context[Any]", folder: str, *, allowed: str = "") -> None:
        """`allowed`: as network.allowed_keys. Raises OperatorError where `folder` holds no usable pair."""
        keys = KeyFolder(Path(folder), Path(allowed) if allowed else None)
        self.pair: KeyPair = keys.pair(LEARNER)
        self.allowed = AllowedKeys(keys.allowed)
        self._authenticator: Any = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", credentials_provider=self.allowed)
        if not keys.allowed_names():
            log.warning("keys: %s allows nobody, so no actor can connect (see chord-keys allow)", keys.allowed)

    def close(self) -> None:
        """After the sockets that use it."""
        self._authenticator.stop()
