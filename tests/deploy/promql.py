"""PromQL, read by promql-parser; run as a script, by the interpreter that has it."""

import json
import subprocess
import sys

from tests.deploy.tools import ROOT, TOOLS

PYTHON = TOOLS / "python" / "bin" / "python"


def metrics_of(expressions: list[str]) -> list[list[str]]:
    """Names of the metrics in each expression. Fails, naming it, where one cannot be parsed."""
    asked = json.dumps([without_variables(expression) for expression in expressions])
    done = subprocess.run(
        [PYTHON, "-m", "tests.deploy.promql"], cwd=ROOT, input=asked, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def without_variables(expression: str, *, run: str = "demo") -> str:
    """An expression of a dashboard as Grafana sends it, with all jobs and instances chosen."""
    for variable, value in (("$__rate_interval", "1m"), ("$job", ".*"), ("$run", run), ("$instance", ".*")):
        expression = expression.replace(variable, value)
    return expression


def _names(expression: str) -> list[str]:
    import promql_parser

    names: list[str] = []

    def note(node: promql_parser.Expr) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            names.append(node.name)
        return True

    try:
        promql_parser.walk(promql_parser.parse(expression), note)
    except ValueError as error:
        raise SystemExit(f"{expression}: {error}") from error
    return names


if __name__ == "__main__":
    print(json.dumps([_names(expression) for expression in json.load(sys.stdin)]))
