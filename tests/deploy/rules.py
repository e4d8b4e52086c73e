"""The rules of `deploy/prometheus/`, and those that a cluster has beside them, as they lie there."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.tools import ROOT

PROMETHEUS = ROOT / "deploy" / "prometheus"
OF_CLUSTERS = ROOT / "deploy" / "kubernetes" / "components" / "monitoring" / "kube_state.yml"


@dataclass(frozen=True)
class Rule:
    name: str
    """Of the alert, or of the series that is recorded."""
    expression: str
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)


def _rules(kind: str, paths: Iterable[Path]) -> list[Rule]:
    files = [yaml.safe_load(path.read_text()) for path in paths]
    found: list[dict[str, Any]] = [rule for file in files for group in file["groups"] for rule in group["rules"]]
    return [
        Rule(rule[kind], rule["expr"], rule.get("labels", {}), rule.get("annotations", {}))
        for rule in found
        if kind in rule
    ]


def alerts() -> list[Rule]:
    return _rules("alert", sorted((PROMETHEUS / "rules").glob("*.yml")))


def cluster_alerts() -> list[Rule]:
    """Of what Kubernetes alone knows."""
    return _rules("alert", [OF_CLUSTERS])


def recordings() -> list[Rule]:
    return _rules("record", sorted((PROMETHEUS / "rules").glob("*.yml")))
