"""Writes rules.yaml: the rules of deploy/prometheus as the Prometheus operator takes them.

python deploy/kubernetes/components/monitoring/write_rules.py
"""

from pathlib import Path

HERE = Path(__file__).parent
RULES = HERE.parents[2] / "prometheus" / "rules"
HEAD = """\
# Written by write_rules.py from deploy/prometheus/rules; a test compares them.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: chord
spec:
  groups:
"""


def rules() -> str:
    """What follows `groups:` in every file of rules, indented by one level more."""
    lines = [
        line
        for path in sorted(RULES.glob("*.yml"))
        for line in path.read_text().partition("\ngroups:\n")[2].splitlines()
    ]
    return HEAD + "".join(f"  {line}".rstrip() + "\n" for line in lines)


if __name__ == "__main__":
    (HERE / "rules.yaml").write_text(rules())
