"""A folder of CURVE keys: NAME.secret and NAME.public for each pair, and allowed/ for the public keys that are let in.

A file holds one key on one line: 40 characters of Z85, ZeroMQ's text form of 32 bytes. A key speaks for the peer of its
own name and for NAME.anything, so that a pool of actors can share one.
"""

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from common.errors import OperatorError

LEARNER = "learner"
"""Name of the learner's pair; every other name is a peer's."""
SECRET_MODE, PUBLIC_MODE = 0o600, 0o644
ROOT = 0
NAME = re.compile(r"[A-Za-z0-9_-]{1,32}")
KEY_CHARACTERS = 40


@dataclass(frozen=True)
class KeyPair:
    """Both halves as Z85."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class PeerKeys:
    """What an actor or evaluator needs to connect."""

    pair: KeyPair
    learner: bytes
    """The learner's public key."""


def key_name_of(peer_id: str) -> str:
    """The name of the key that speaks for a peer."""
    return peer_id.partition(".")[0]


class KeyFolder:
    """The files of one folder. Every method raises OperatorError, one line, where a file will not do."""

    def __init__(self, path: Path, allowed: Path | None = None) -> None:
        """`allowed`: where the public keys that are let in lie, if not in `path` itself."""
        self.path = path
        self.allowed = allowed or path / "allowed"

    def create(self, name: str) -> None:
        """Make a new pair; nothing is ever overwritten."""
        check_name(name)
        secret, public = self._secret(name), self._public(name)
        for path in (secret, public, self.allowed / public.name):
            if path.exists():
                raise OperatorError(f"{path}: got a key that exists, expected a new name (keys are never overwritten)")
        public_key, secret_key = zmq.curve_keypair()
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(secret, secret_key, SECRET_MODE)
        _write(public, public_key, PUBLIC_MODE)

    def allow(self, name: str, public_key: bytes) -> None:
        """Let the holder of `public_key` in as `name`."""
        check_name(name)
        if name == LEARNER:
            raise OperatorError(f"{self.allowed}: got the name {LEARNER}, expected that of an actor or evaluator")
        if not self.allowed.exists():
            self.allowed.mkdir(mode=0o700, parents=True)
            self.allowed.chmod(0o755)  # whatever the umask: a learner that is another user lists it
        path = self.allowed / f"{name}.public"
        if path.exists():
            raise OperatorError(f"{path}: got a key that is allowed already, expected a new name (revoke it first)")
        _write(path, public_key, PUBLIC_MODE)

    def revoke(self, name: str) -> None:
        """Let the key `name` in no more; a learner that runs closes its connections within a second."""
        path = self.allowed / f"{name}.public"
        if not path.exists():
            raise OperatorError(f"{path}: got no such file, expected a key that is allowed")
        path.unlink()

    def pair(self, name: str) -> KeyPair:
        """The pair of `name`; the public half follows from the secret one, whose file nobody else may read."""
        secret = _read(self._secret(name), is_secret=True)
        return KeyPair(zmq.curve_public(secret), secret)

    def public(self, name: str) -> bytes:
        return _read(self._public(name))

    def names(self) -> list[str]:
        """Of the pairs whose secret half lies here."""
        return _stems(self.path, ".secret")

    def allowed_names(self) -> list[str]:
        return _stems(self.allowed, ".public")

    def _secret(self, name: str) -> Path:
        return self.path / f"{name}.secret"

    def _public(self, name: str) -> Path:
        return self.path / f"{name}.public"


def check_server_keys(folder: str) -> None:
    """Raises OperatorError where the learner could not serve with the keys in `folder`; empty: without."""
    if folder:
        KeyFolder(Path(folder)).pair(LEARNER)


def peer_keys(folder: str, peer_id: str) -> PeerKeys | None:
    """The keys that `peer_id` connects with; None without a folder. Raises OperatorError."""
    if not folder:
        return None
    keys, name = KeyFolder(Path(folder)), key_name_of(peer_id)
    if name not in keys.names():
        held = ", ".join(keys.names()) or "none"
        raise OperatorError(
            f"network.keys: {folder} holds no {name}.secret (it holds: {held}), expected the key that speaks for "
            f"{peer_id}: give --name KEY or --name KEY.ANYTHING"
        )
    return PeerKeys(keys.pair(name), keys.public(LEARNER))


def only_peer_name(folder: str) -> str:
    """The name of the one peer's key in `folder`. Raises OperatorError where there is not exactly one."""
    names = [name for name in KeyFolder(Path(folder)).names() if name != LEARNER]
    if len(names) != 1:
        raise OperatorError(
            f"--name: got none and {len(names)} keys of peers in {folder}, expected --name KEY or --name KEY.ANYTHING"
        )
    return names[0]


def read_public(path: Path) -> bytes:
    """The key in a file that came from elsewhere. Raises OperatorError."""
    return _read(path)


def check_name(name: str) -> None:
    """Raises OperatorError."""
    if not NAME.fullmatch(name):
        raise OperatorError(f"key name: got {name!r}, expected 1 to 32 letters, digits, '_' or '-' (no dot)")


def _stems(folder: Path, suffix: str) -> list[str]:
    """Of the files there that end so; none where there is no such folder. Raises OperatorError."""
    try:
        return sorted(path.stem for path in map(Path, os.listdir(folder)) if path.suffix == suffix)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OperatorError(f"{folder}: {error.strerror}, expected a folder of keys that can be listed") from error


def _write(path: Path, key: bytes, mode: int) -> None:
    """With `mode` at most from its very creation, so that nobody can open the file in between, and then with all of
    it: a umask must not keep a public key from a learner that is another user."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(key + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OperatorError(f"{path}: {error.strerror}, expected a folder that can be written") from error


def _read(path: Path, *, is_secret: bool = False) -> bytes:
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            mode = stat.S_IMODE(found.st_mode)
            if is_secret and mode & forbidden_bits(found.st_uid, os.geteuid()):
                raise OperatorError(
                    f"{path}: got mode {mode:04o}, expected {SECRET_MODE:04o}: others can read this secret key"
                )
            key = file.read(KEY_CHARACTERS + 8).strip()
    except OSError as error:
        raise OperatorError(f"{path}: {error.strerror}, expected a key file (see chord-keys create)") from error
    if not _is_key(key):
        raise OperatorError(f"{path}: got no key, expected one line of {KEY_CHARACTERS} characters of Z85")
    return key


def forbidden_bits(owner: int, reader: int) -> int:
    """Mode bits that a secret key must not have.

    Only its owner may read it. But what root hands to a service (a credential of systemd, a Secret of Kubernetes) is
    read through a group that root has chosen.
    """
    return 0o037 if owner == ROOT != reader else 0o077


def _is_key(text: bytes) -> bool:
    try:
        return len(text) == KEY_CHARACTERS and len(z85.decode(text)) == 32
    except Exception:  # z85 says no with whatever its arithmetic stumbles over
        return False
