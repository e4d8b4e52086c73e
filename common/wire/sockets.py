"""Sockets with every option set on purpose, and the one place where they are bound."""

import resource
import socket
from dataclasses import dataclass
from typing import Any

import zmq

from common.errors import OperatorError
from common.keys.folder import PeerKeys

MAX_QUEUED_MESSAGES = 64
"""High-water mark of what waits to be sent by one connection. It counts messages, not bytes."""

FRAME_S = 30.0
"""Longest time that one frame may take: libzmq hears a heartbeat, and any other sign of life, between frames only."""

SPARE_DESCRIPTORS = 4096
"""Open files beside those of counted connections: a flood is accepted before it is turned away."""


@dataclass(frozen=True)
class SocketLimits:
    """The part of the network configuration that a socket needs."""

    heartbeat_s: float
    silence_s: float
    """A path that acknowledges nothing for longer is given up; a process that is silent, after FRAME_S at least."""
    max_frame_bytes: int


def open_socket(context: "zmq.Context[Any]", kind: int, limits: SocketLimits, keys: PeerKeys | None = None) -> Any:
    """A socket that notices a dead peer, bounds what it holds, and never delays the end of its process.

    With `keys` it talks only to the learner that holds the expected key.
    """
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, MAX_QUEUED_MESSAGES)
    # No mark on this side: where libzmq has stopped reading and the connection breaks, its next heartbeat aborts the
    # process (4.3.5: `!_io_error` in stream_engine_base). Bytes are bounded instead: see common.wire.connections.
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, limits.max_frame_bytes)
    socket.setsockopt(zmq.HEARTBEAT_IVL, int(limits.heartbeat_s * 1000))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(max(limits.silence_s, FRAME_S) * 1000))
    socket.setsockopt(zmq.HEARTBEAT_TTL, int(max(limits.silence_s, FRAME_S) * 1000))
    # The kernel sees a path that acknowledges nothing long before that, and never takes a slow one for it.
    socket.setsockopt(zmq.TCP_MAXRT, int(limits.silence_s * 1000))
    socket.setsockopt(zmq.CONNECT_TIMEOUT, int(limits.silence_s * 1000))
    socket.setsockopt(zmq.HANDSHAKE_IVL, 5000)
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.IMMEDIATE, 0)
    socket.setsockopt(zmq.BACKLOG, 512)
    if kind == zmq.ROUTER:
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    if keys:
        socket.setsockopt(zmq.CURVE_SERVERKEY, keys.learner)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.pair.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.pair.secret)
    return socket


def reserve_descriptors(count: int) -> None:
    """Raise the limit of open files of this process as far as it may. Raises OperatorError below `count`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + SPARE_DESCRIPTORS
    possible = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if possible < count:
        raise OperatorError(
            f"network.max_connections: its connections take {count} open files, expected at most {hard} (ulimit -n)"
        )
    if soft != resource.RLIM_INFINITY and soft < possible:
        resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))


def address_towards(host: str) -> str:
    """This machine's own address on the way to `host`; nothing is sent."""
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def bind(socket: "zmq.Socket[bytes]", host: str, port: int, purpose: str) -> int:
    """Bind to `port` (0: a free one) and return it. Raises OperatorError where the port is taken."""
    try:
        if port == 0:
            return int(socket.bind_to_random_port(f"tcp://{host}"))
        socket.bind(f"tcp://{host}:{port}")
    except zmq.ZMQError as error:
        raise OperatorError(
            f"network.port: cannot bind {host}:{port} for {purpose} ({error.strerror}), expected a free port here"
        ) from error
    return port
