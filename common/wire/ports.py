"""Ports that a listener keeps while it is away: found here, bound in `sockets`."""

import random
import socket
from itertools import islice
from pathlib import Path

OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST = 20000
TRIES = 200


def is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_ports(count: int, *hosts: str) -> list[int]:
    """`count` ports, each free on all `hosts`, below those that the system gives to outgoing connections.

    Peers go on dialling a listener that is away for a while. Where its port is one of the outgoing range, the system
    may give that very port to such a dialler, who then connects to itself and keeps the listener from coming back.
    Raises OSError where there are not enough.
    """
    first_outgoing = _first_outgoing()
    candidates = range(LOWEST, first_outgoing) if first_outgoing > LOWEST else range(LOWEST, 1 << 16)
    tried = random.SystemRandom().sample(candidates, min(TRIES, len(candidates)))
    found = list(islice((port for port in tried if all(is_free(host, port) for host in hosts)), count))
    if len(found) < count:
        raise OSError(f"{len(found)} of {count} ports found free on {', '.join(hosts)} in {len(tried)} tries")
    return found


def _first_outgoing() -> int:
    try:
        return int(OUTGOING.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32768
