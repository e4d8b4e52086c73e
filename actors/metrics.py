"""An actor's Prometheus metrics."""

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from actors.engine import Pressure
from common.metrics import Reading
from common.wire.messages import ActorState, Outcome

GROUP_S = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)
WEIGHT_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
STATES = tuple(state for state in ActorState if state is not ActorState.GONE)


@dataclass(frozen=True)
class Report:
    """How the actor stands; made each time that its work loop comes round."""

    state: ActorState
    version_step: int
    """-1 before the first version."""
    version_lag: int
    """Versions between the newest heard of and the one served."""
    num_groups: int
    num_answers: int
    concurrency: int
    """Groups that it would work on at a time."""
    pressure: Pressure
    idle_s: float
    received_bytes: int
    """Of weights."""


GAUGES = {
    "chord_actor_version_step": ("Policy version that is served; -1 before the first.", lambda now: now.version_step),
    "chord_actor_version_lag_steps": (
        "Newest version heard of less the one that is served.",
        lambda now: now.version_lag,
    ),
    "chord_actor_groups_in_flight": ("Groups being sampled or sent.", lambda now: now.num_groups),
    "chord_actor_answers_in_flight": ("Answers under way in the engine.", lambda now: now.num_answers),
    "chord_actor_concurrency_groups": (
        "Groups that the actor would work on at a time, as its KV cache bears them.",
        lambda now: now.concurrency,
    ),
    "chord_actor_kv_cache_usage_ratio": (
        "Share of the engine's KV cache in use; 0 where it cannot tell.",
        lambda now: now.pressure.kv_cache_frac,
    ),
    "chord_actor_waiting_answers_ratio": (
        "Share of the answers under way that wait for room.",
        lambda now: now.pressure.waiting_frac,
    ),
}
"""Name → help, and the value from a Report."""

COUNTERS = {
    "chord_actor_idle_seconds_total": (
        "Time without a group to sample or score, since the first weights.",
        lambda now: now.idle_s,
    ),
    "chord_actor_preemptions_total": (
        "Answers that the engine had to begin anew.",
        lambda now: now.pressure.num_preemptions,
    ),
    "chord_actor_weight_received_bytes_total": ("Bytes of weights fetched.", lambda now: now.received_bytes),
}


class ActorMetrics:
    """One registry, labelled by nothing: the scraper knows the instance."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._report: Report | None = None
        for family, table in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for name, (text, value) in table.items():
                registry.register(Reading(family, name, text, lambda value=value: self._report and value(self._report)))
        text = "1 for the state that the actor is in, 0 for the others."
        registry.register(Reading(GaugeMetricFamily, "chord_actor_state", text, self._states, labels=["state"]))
        self._tokens = Counter("chord_actor_tokens_total", "Tokens sampled.", registry=registry)
        self._groups = Counter(
            "chord_actor_groups_total", "Groups sent, by what became of them.", ["outcome"], registry=registry
        )
        for outcome in Outcome:
            self._groups.labels(outcome.value)
        self._group_s = Histogram(
            "chord_actor_group_seconds", "From a lease to its group.", buckets=GROUP_S, registry=registry
        )
        self._failures = Counter(
            "chord_actor_lease_failures_total",
            "Leases given back: engine, environment or prompt failed.",
            registry=registry,
        )
        self._fetch_s = Histogram(
            "chord_actor_weight_fetch_seconds", "Fetching a version.", buckets=WEIGHT_S, registry=registry
        )
        self._load_s = Histogram(
            "chord_actor_weight_load_seconds",
            "Loading a version into the engine.",
            buckets=WEIGHT_S,
            registry=registry,
        )

    def _states(self) -> dict[tuple[str, ...], float] | None:
        report = self._report
        return {(state,): float(state is report.state) for state in STATES} if report else None

    def observe(self, report: Report) -> None:
        self._report = report

    def count_group(self, outcome: Outcome, *, num_tokens: int, sampling_s: float) -> None:
        self._groups.labels(outcome.value).inc()
        self._tokens.inc(num_tokens)
        self._group_s.observe(sampling_s)

    def count_failure(self) -> None:
        self._failures.inc()

    def count_version(self, *, fetch_s: float, load_s: float) -> None:
        """A version was fetched and loaded."""
        self._fetch_s.observe(fetch_s)
        self._load_s.observe(load_s)
