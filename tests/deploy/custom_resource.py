"""Checks a resource of the Prometheus operator or of KEDA, JSON on standard input, against its schema.

Strictly: an unknown field is a mistake. Run by the Python of .tools.
"""

import json
import sys

from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule

MODELS = {model.__name__: model for model in (PodMonitor, PrometheusRule, ScaledObject)}

resource = json.load(sys.stdin)
MODELS[resource["kind"]].model_validate(resource, extra="forbid")
