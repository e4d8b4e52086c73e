"""Writes rules.yaml: the rules of deploy/prometheus, and kube_state.yml, as the Prometheus operator takes them.

python deploy/kubernetes/components/monitoring/write_rules.py [--runbooks URL]
"""

import argparse
from pathlib import Path

HERE = Path(__file__).parent
RULES = HERE.parents[2] / "prometheus" / "rules"
RUNBOOKS = "deploy/RUNBOOKS.md"
HEAD = """\
# Written by write_rules.py from deploy/prometheus/rules and kube_state.yml; a test compares them.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: chord
spec:
  groups:
"""


def rules(runbooks: str = RUNBOOKS) -> str:
    """What follows `groups:` in every file of rules, one level further in; `runbooks`: where browsers find them."""
    lines = [
        line.replace(f"runbook_url: {RUNBOOKS}#", f"runbook_url: {runbooks}#")
        for path in [*sorted(RULES.glob("*.yml")), HERE / "kube_state.yml"]
        for line in path.read_text().partition("\ngroups:\n")[2].splitlines()
    ]
    return HEAD + "".join(f"  {line}".rstrip() + "\n" for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--runbooks", metavar="URL", default=RUNBOOKS, help="of RUNBOOKS.md, as your browsers see it")
    (HERE / "rules.yaml").write_text(rules(parser.parse_args().runbooks))
