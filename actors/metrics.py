"""An actor's Prometheus metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge

from actors.engine import Pressure
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
            "chord_actor_idle_seconds",
            "Time without a group to sample or score, since the first weights.",
            registry=self.registry,
        )
        self._concurrency = Gauge(
            "chord_actor_concurrency_groups",
            "Groups that the actor would work on at a time, as its KV cache bears them.",
            registry=self.registry,
        )
        self._kv_cache = Gauge(
            "chord_actor_kv_cache_usage_ratio", "Share of the engine's KV cache in use.", registry=self.registry
        )
        self._waiting = Gauge(
            "chord_actor_waiting_answers_ratio",
            "Share of the answers under way that wait for room.",
            registry=self.registry,
        )
        self._preemptions = Counter(
            "chord_actor_preemptions_total", "Answers that the engine had to begin anew.", registry=self.registry
        )
        self._num_preemptions = 0
        self._load = Gauge(
            "chord_actor_weight_load_seconds", "Duration of the last load of weights.", registry=self.registry
        )
        self._bytes = Gauge("chord_actor_weight_received_bytes", "Bytes of weights fetched.", registry=self.registry)

    def count_group(self, outcome: Outcome, *, num_tokens: int) -> None:
        self._groups.labels(outcome.value).inc()
        self._tokens.inc(num_tokens)

    def count_failure(self) -> None:
        self._failures.inc()

    def observe(self, version: Version | None, fitter: Fitter, *, num_groups: int, idle_s: float) -> None:
        self._version.set(version.step if version else -1)
        self._running.set(num_groups)
        self._idle.set(idle_s)
        self._load.set(fitter.load_s)
        self._bytes.set(fitter.received_bytes)

    def observe_engine(self, pressure: Pressure, limit: int) -> None:
        """`limit`: groups that the actor would work on at a time."""
        self._concurrency.set(limit)
        self._kv_cache.set(pressure.kv_cache_frac)
        self._waiting.set(pressure.waiting_frac)
        self._preemptions.inc(pressure.num_preemptions - self._num_preemptions)
        self._num_preemptions = pressure.num_preemptions
