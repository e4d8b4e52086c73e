"""The table of all metrics in deploy/README.md, from the code: `python -m tests.deploy.metrics_table` writes it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry

from actors.engines.simulated import SimulatedEngine
from actors.evaluator.metrics import EvaluatorMetrics
from actors.guard import EngineGuard
from actors.metrics import ActorMetrics
from common.config.schema import Actor
from common.side_port import add_common_metrics
from learner.guest import step_of
from learner.metrics import LearnerMetrics
from learner.readings import readings_of

README = Path(__file__).parents[2] / "deploy" / "README.md"
SECTION = re.compile(
    r"(<!-- metrics: made by python -m tests\.deploy\.metrics_table -->\n)(.*)(<!-- end of metrics -->)", re.S
)
NOBODY: Any = None
"""In the place of parts that only a reading would touch."""


class Row(NamedTuple):
    name: str
    type: str
    labels: str
    component: str
    help: str


def registries() -> Iterator[tuple[str, CollectorRegistry]]:
    """Of every component, what it serves of its own."""
    every = CollectorRegistry()
    add_common_metrics(every, component="", engine="", readiness=str)
    yield "every", every
    learner = LearnerMetrics().registry
    for reading in readings_of(NOBODY, NOBODY):
        learner.register(reading)
    yield "learner", learner
    rank = CollectorRegistry()
    rank.register(step_of(NOBODY))
    yield "rank", rank
    yield "actor", ActorMetrics().registry
    guarded = CollectorRegistry()
    EngineGuard(SimulatedEngine(actor=Actor(), vocab_size=1, end_tokens=frozenset()), Actor(), guarded)
    yield "actor, evaluator", guarded
    yield "evaluator", EvaluatorMetrics().registry


def rows() -> list[Row]:
    found: list[Row] = []
    for component, registry in registries():
        for collector in registry._collector_to_names:  # the client tells neither collectors nor labels otherwise
            for family in getattr(collector, "describe", list)():
                labels = getattr(family, "_labelnames", ()) or getattr(collector, "_labelnames", ())
                name = f"{family.name}_total" if family.type == "counter" else family.name
                found.append(Row(name, family.type, ", ".join(labels), component, family.documentation))
    return found


def table() -> str:
    """In Markdown: by component, then by name."""
    order = [component for component, _ in registries()]
    lines = ["| name | type | labels | component | meaning |", "|---|---|---|---|---|"]
    for row in sorted(rows(), key=lambda row: (order.index(row.component), row.name)):
        labels = f"`{row.labels}`" if row.labels else ""
        lines.append(f"| `{row.name}` | {row.type} | {labels} | {row.component} | {row.help} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    README.write_text(SECTION.sub(lambda found: found[1] + table() + found[3], README.read_text()))


if __name__ == "__main__":
    main()
