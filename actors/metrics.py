"""An actor's Prometheus metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge

from actors.fitter import Fitter
from common.version import Version
from common.wire.messages import Outcome


class ActorMetrics:
    """One registry, labelled by nothing: the scraper knows the instance."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._tokens = Counter("chord_actor_tokens_total", "Tokens sampled.", registry=self.registry)
        self._groups = Counter(
            "chord_actor_groups_total", "Groups sent, by what became of them.", ["outcome"], registry=self.registry
        )
        self._failures = Counter(
            "chord_actor_lease_failures_total",
            "Leases given back: engine, environment or prompt failed.",
            registry=self.registry,
        )
        self._version = Gauge(
            "chord_actor_version_step", "Policy version that is served; -1 before the first.", registry=self.registry
        )
        self._running = Gauge("chord_actor_groups_in_flight", "Groups being sampled or sent.", registry=self.registry)
        self._idle = Gauge(
            "chord_actor_idle_seconds", "Time without work since the first weights.", registry=self.registry
        )
        self._load = Gauge(
            "chord_actor_weight_load_seconds", "Duration of the last load of weights.", registry=self.registry
        )
        self._bytes = Gauge("chord_actor_weight_received_bytes", "Bytes of weights fetched.", registry=self.registry)

    def count_group(self, outcome: Outcome, *, num_tokens: int) -> None:
        self._groups.labels(outcome.value).inc()
        self._tokens.inc(num_tokens)

    def count_failure(self) -> None:
        self._failures.inc()

    def observe(self, version: Version | None, num_groups: int, idle_s: float, fitter: Fitter) -> None:
        self._version.set(version.step if version else -1)
        self._running.set(num_groups)
        self._idle.set(idle_s)
        self._load.set(fitter.load_s)
        self._bytes.set(fitter.received_bytes)
