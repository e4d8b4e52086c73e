"""`chord-audit`: accounts for every lease and trajectory of a run; exit code 1 on any loss, duplicate or violation."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from common.command import new_command, run_command
from common.errors import COMPONENT_FAILURE
from common.run_dir import RunDir
from learner.audit.audit import Report, audit

app = new_command("Account for every lease and trajectory of a run.")


@app.command()
def command(
    run_dir: Annotated[Path, typer.Argument(help="The run directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check RUN_DIR; nothing in it is changed, and its run may go on meanwhile."""
    report = audit(RunDir(run_dir))
    if as_json:
        print(json.dumps({**asdict(report), "is_clean": report.is_clean}, indent=2))
    else:
        _show(report)
    raise typer.Exit(0 if report.is_clean else COMPONENT_FAILURE)


def _show(report: Report) -> None:
    table = Table(title=f"run {report.run_id}", title_justify="left", show_header=False)
    for name, value in _rows(report):
        table.add_row(name, value)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for line in report.violations:
        console.print(f"VIOLATION {line}", markup=False)
    console.print("every lease and trajectory is accounted for" if report.is_clean else "the run does not add up")


def _rows(report: Report) -> list[tuple[str, str]]:
    return [
        ("optimizer steps", f"{report.steps} in {report.incarnations} starts of the learner"),
        ("groups", _list(report.groups)),
        ("dropped", _list(report.dropped)),
        ("leases", _list(report.leases)),
        ("trajectories trained", str(report.trajectories_trained)),
        ("lost, duplicates", f"{report.lost}, {report.duplicates}"),
        ("redelivered", f"{report.redelivered} (harmless)"),
        ("staleness", f"{report.max_staleness_trained} at most, bound {report.max_staleness}"),
        ("checkpoints", _list(report.checkpoints)),
        *[
            (f"mean {field}", f"{_mean(report.sampled, field)} sampled, {_mean(report.trained, field)} trained")
            for field in ("reward", "answer_tokens", "sampling_s")
        ],
    ]  # fmt: skip


def _list(counts: "dict[str, int] | dict[int, str]") -> str:
    return ", ".join(f"{name} {value}" for name, value in counts.items()) or "none"


def _mean(found: object, field: str) -> str:
    value = getattr(found, field)
    return "-" if value is None else f"{value:.3f}"


def main() -> None:
    run_command("chord-audit", app)


if __name__ == "__main__":
    main()
