"""The evaluator's Prometheus metrics."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge

from common.version import Version
from common.wire.messages import TaskScore


class EvaluatorMetrics:
    """One registry; `observe` is called after every evaluation."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._count = Counter("chord_evaluations_total", "Evaluations finished.", registry=self.registry)
        self._accuracy = Gauge(
            "chord_evaluation_accuracy_ratio", "Of the last evaluation, avg@k.", ["task"], registry=self.registry
        )
        self._unparsed = Gauge(
            "chord_evaluation_unparsed_ratio", "Answers without a readable result.", ["task"], registry=self.registry
        )
        self._version = Gauge(
            "chord_evaluation_version_step", "Version evaluated last; -1 before the first.", registry=self.registry
        )
        self._version.set(-1)
        self._seconds = Counter("chord_evaluation_seconds_total", "Time spent evaluating.", registry=self.registry)

    def observe(self, version: Version, scores: Sequence[TaskScore]) -> None:
        """Tasks are those of the configuration, so their labels are few."""
        self._count.inc()
        for score in scores:
            self._accuracy.labels(score.task).set(score.accuracy)
            self._unparsed.labels(score.task).set(score.num_unparsed / score.num_samples)
            self._seconds.inc(score.wall_s)
        self._version.set(version.step)
