"""A component's signs of life, as chord-local hears them: the supervisor's end of systemd's notification protocol.

The socket has a name of the kernel's choosing in the abstract namespace: it is no file, so no path can be too long and
nothing is left behind. What another user sends to it is not heard.
"""

import os
import socket
import struct

CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class Signs:
    """One component's socket, kept over its restarts."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.bind("")
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.setblocking(False)
        name: bytes = self._socket.getsockname()
        self.address = "@" + name[1:].decode()
        """What the component finds in $NOTIFY_SOCKET."""
        self.is_ready = False
        """It does what it is there for."""
        self.status = ""
        """What it said last of what it does."""

    def forget(self) -> None:
        """The process has ended: what it said is void."""
        self.hear()
        self.is_ready, self.status = False, ""

    def hear(self) -> bool:
        """Whether anything has come since the last call."""
        is_alive = False
        while datagram := self._receive():
            is_alive = True
            for line in datagram.decode(errors="replace").splitlines():
                key, _, value = line.partition("=")
                if key == "READY":
                    self.is_ready = True
                elif key == "STATUS":
                    self.status = value
        return is_alive

    def _receive(self) -> bytes:
        """The next datagram of this user's; nothing where there is none."""
        while True:
            try:
                data, extras, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(CREDENTIALS.size))
            except BlockingIOError:
                return b""
            for _, kind, value in extras:
                if kind == socket.SCM_CREDENTIALS and CREDENTIALS.unpack(value)[1] == os.getuid():
                    return data

    def close(self) -> None:
        self._socket.close()
