"""The evaluator's Prometheus metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge

from actors.evaluator.evaluate import Score
from common.version import Version


class EvaluatorMetrics:
    """One registry; `observe` is called after every evaluation."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._count = Counter("chord_evaluations_total", "Evaluations finished.", registry=self.registry)
        self._accuracy = Gauge("chord_evaluation_accuracy_ratio", "Of the last evaluation.", registry=self.registry)
        self._version = Gauge("chord_evaluation_version_step", "Version evaluated last.", registry=self.registry)
        self._seconds = Counter("chord_evaluation_seconds_total", "Time spent evaluating.", registry=self.registry)

    def observe(self, version: Version, score: Score) -> None:
        self._count.inc()
        self._accuracy.set(score.accuracy)
        self._version.set(version.step)
        self._seconds.inc(score.wall_s)
