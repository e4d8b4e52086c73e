"""The rules of `deploy/prometheus/`, as they lie there."""

from dataclasses import dataclass, field
from typing import Any

import yaml

from tests.deploy.tools import ROOT

PROMETHEUS = ROOT / "deploy" / "prometheus"


@dataclass(frozen=True)
class Rule:
    name: str
    """Of the alert, or of the series that is recorded."""
    expression: str
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)


def _rules(kind: str) -> list[Rule]:
    files = [yaml.safe_load(path.read_text()) for path in sorted((PROMETHEUS / "rules").glob("*.yml"))]
    found: list[dict[str, Any]] = [rule for file in files for group in file["groups"] for rule in group["rules"]]
    return [
        Rule(rule[kind], rule["expr"], rule.get("labels", {}), rule.get("annotations", {}))
        for rule in found
        if kind in rule
    ]


def alerts() -> list[Rule]:
    return _rules("alert")


def recordings() -> list[Rule]:
    return _rules("record")
