"""The side port of a component: /metrics for Prometheus, /healthz and /readyz for whoever keeps it running.

Answered by threads of its own, whatever the component's loops do.
"""

import logging
import socket
import threading
from collections.abc import Callable, Iterable
from importlib.metadata import version
from wsgiref.simple_server import WSGIRequestHandler, make_server
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4 as METRICS
from prometheus_client import REGISTRY, CollectorRegistry, Gauge, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

from common.errors import OperatorError
from common.metrics import Reading

log = logging.getLogger(__name__)

ANSWER_S = 10.0
"""Longest wait for one who asks, or who does not take the answer."""

Verdict = Callable[[], str]
"""A line that says what is amiss, empty where nothing is; called by any thread."""


class LibraryMetrics(Collector):
    """What others count in this process: process_* and python_* of the Prometheus client, and vLLM's own vllm:*."""

    def collect(self) -> Iterable[Metric]:
        return REGISTRY.collect()


class Handler(WSGIRequestHandler):
    """One connection; a probe every few seconds is no news for the log."""

    timeout = ANSWER_S

    def log_message(self, format: str, *args: object) -> None: ...


class SidePort:
    """Serves until `close`, or until the process ends."""

    def __init__(
        self, registry: CollectorRegistry, *, component: str, engine: str = "", health: Verdict, readiness: Verdict,
        host: str, port: int, key: str,
    ) -> None:  # fmt: skip
        """Port 0 takes a free one. Raises OperatorError, naming the configuration's `key`, where it cannot be had.

        `health`: whether the component moves; `readiness`: whether it does now what it is there for.
        """
        self._verdicts = {"/healthz": health, "/readyz": readiness}
        add_common_metrics(registry, component=component, engine=engine, readiness=readiness)
        self._registry = registry
        try:
            self._server = make_server(host, port, self._answer, _server_class(host), handler_class=Handler)
        except OSError as error:
            raise OperatorError(f"{key}: cannot bind {host}:{port} ({error.strerror}), expected a free port") from error
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="side port", daemon=True).start()
        log.info("metrics: http://%s:%d/metrics (beside it /healthz and /readyz)", host, self.port)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path, kind = environ["PATH_INFO"], "text/plain; charset=utf-8"
        if path == "/metrics":
            status, kind, body = "200 OK", METRICS, generate_latest(self._registry)
        elif path in self._verdicts:
            line = self._verdicts[path]()
            status, body = ("503 Service Unavailable", f"{line}\n".encode()) if line else ("200 OK", b"ok\n")
        else:
            status, body = "404 Not Found", b"expected /metrics, /healthz or /readyz\n"
        start_response(status, [("Content-Type", kind), ("Content-Length", str(len(body)))])
        return [body]


def add_common_metrics(registry: CollectorRegistry, *, component: str, engine: str, readiness: Verdict) -> None:
    """What every component has."""
    disable_created_metrics()  # a series more for each counter, which nobody asks for
    build = Gauge("chord_build_info", "Always 1.", ["version", "component", "engine"], registry=registry)
    build.labels(version("chord-rl"), component, engine).set(1)
    text = "1 while /readyz answers 200: the component does what it is there for."
    registry.register(Reading(GaugeMetricFamily, "chord_ready", text, lambda: float(not readiness())))
    registry.register(LibraryMetrics())


def _server_class(host: str) -> type[ThreadingWSGIServer]:
    class Server(ThreadingWSGIServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        def handle_error(self, request: object, client_address: object) -> None:
            """Whoever asks and goes, or says nothing, is no news."""
            log.debug("side port: no answer to %s", client_address, exc_info=True)

    return Server
