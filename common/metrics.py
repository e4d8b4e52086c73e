"""Every component's Prometheus metrics, on a port of its own."""

from prometheus_client import CollectorRegistry, start_http_server

from common.errors import OperatorError


def serve_metrics(registry: CollectorRegistry, *, host: str, port: int, key: str) -> int:
    """Serve `registry` and return the port (0: a free one). Raises OperatorError, naming the key, where it is taken."""
    try:
        server, _ = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise OperatorError(f"{key}: cannot bind {host}:{port} ({error.strerror}), expected a free port") from error
    return int(server.server_port)
