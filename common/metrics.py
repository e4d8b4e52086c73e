"""Prometheus metrics that are read where they stand, when they are scraped."""

import logging
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)

Family = type[CounterMetricFamily] | type[GaugeMetricFamily]
Values = float | Mapping[tuple[str, ...], float] | None


class Reading(Collector):
    """One metric. What is not known yet has no sample: a 0 would look like a measurement."""

    def __init__(
        self, family: Family, name: str, text: str, read: Callable[[], Values], *, labels: Sequence[str] = ()
    ) -> None:
        """`read` gives a number, one for each tuple of label values, or None; any thread may call it."""
        self._family = family
        self._name = name
        self._text = text
        self._read = read
        self._labels = labels

    def describe(self) -> list[CounterMetricFamily | GaugeMetricFamily]:
        """The metric without its samples."""
        return [self._family(self._name, self._text, labels=self._labels)]

    def collect(self) -> Iterable[Metric]:
        """A disk that fails, or a ledger that was just closed, must not take the other metrics away."""
        [family] = self.describe()
        try:
            values = self._read()
        except (OSError, sqlite3.Error) as error:
            log.debug("%s cannot be read: %s", self._name, error)
            values = None
        if values is not None:
            for labels, value in (values if isinstance(values, Mapping) else {(): values}).items():
                family.add_metric(labels, value)
        return [family]
