"""A port for a listener that others dial while it is away."""

import socket

import pytest

from common.wire import ports
from common.wire.ports import free_ports, is_free


def test_no_outgoing_connection_is_given_the_port_that_its_listener_left() -> None:
    found = free_ports(50, "127.0.0.1")
    assert len(set(found)) == 50
    assert max(found) < int(ports.OUTGOING.read_text().split()[0])


def test_a_port_that_is_taken_is_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        assert not is_free("127.0.0.1", taken)
        monkeypatch.setattr(ports, "LOWEST", taken)
        monkeypatch.setattr(ports, "_first_outgoing", lambda: taken + 3)
        assert set(free_ports(1, "127.0.0.1")) <= {taken + 1, taken + 2}
        with pytest.raises(OSError, match="of 3 ports found free"):
            free_ports(3, "127.0.0.1")


def test_where_the_whole_range_goes_to_outgoing_connections_a_port_is_still_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ports, "_first_outgoing", lambda: 1024)
    assert free_ports(1, "127.0.0.1")[0] >= ports.LOWEST
