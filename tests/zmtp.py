"""ZeroMQ's wire protocol spoken by hand, for peers that break it on purpose."""

import socket

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
"""ZMTP 3.0 without authentication."""
CURVE_GREETING = GREETING.replace(b"NULL\0", b"CURVE")


def ready(*, kind: bytes = b"DEALER", routing_id: bytes = b"") -> bytes:
    """The command that ends a handshake without authentication."""
    body = b"\x05READY" + _property(b"Socket-Type", kind) + _property(b"Identity", routing_id)
    return bytes([4, len(body)]) + body


def frame(data: bytes, *, more: bool = False) -> bytes:
    return frame_head(len(data), more=more) + data


def frame_head(size: int, *, more: bool = False) -> bytes:
    """What goes before `size` bytes, which need not follow."""
    return (bytes([more, size])) if size < 256 else bytes([2 | more]) + size.to_bytes(8, "big")


def connect(port: int, *, routing_id: bytes = b"", kind: bytes = b"DEALER") -> socket.socket:
    """A raw connection whose handshake is done."""
    raw = socket.create_connection(("127.0.0.1", port), timeout=10)
    raw.sendall(GREETING + ready(kind=kind, routing_id=routing_id))
    raw.recv(64, socket.MSG_WAITALL)
    head = raw.recv(2, socket.MSG_WAITALL)
    raw.recv(head[1], socket.MSG_WAITALL)
    return raw


def is_closed(raw: socket.socket, *, timeout_s: float = 10.0) -> bool:
    """Whether the other side ends the connection within `timeout_s`."""
    raw.settimeout(timeout_s)
    try:
        while raw.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + len(value).to_bytes(4, "big") + value
