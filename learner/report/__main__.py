"""`chord-report`: one self-contained HTML page of one run or of several, finished or going on."""

from pathlib import Path
from typing import Annotated

import typer

from common.command import new_command, run_command
from common.errors import OperatorError

app = new_command("Make one HTML page to look at runs with: charts, and what was trained on, token by token.")


@app.command()
def command(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Run directories, drawn over another.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page. Of one run it is RUN_DIR/report.html if not given.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Tokens of answers in the page at most; steps are left out evenly where there are more.")
    ] = 4_000_000,
) -> None:
    """Write a page of all RUN_DIRs. Nothing else in them is changed, and their runs may go on meanwhile."""
    from learner.report.page import make_page
    from learner.report.run import read_run
    from learner.report.trajectories import gather

    if output is None and len(run_dirs) > 1:
        raise OperatorError(f"--output: got none for {len(run_dirs)} runs, expected the page's file")
    runs = [read_run(path, name=name) for path, name in zip(run_dirs, _names(run_dirs), strict=True)]
    page = make_page(runs, gather(runs, max_tokens=max_tokens))
    path = output or run_dirs[0] / "report.html"
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise OperatorError(f"--output: {path}: {error.strerror}, expected a file that can be written") from error
    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {note}")
    print(f"{path} ({len(page) / 1e6:.1f} MB)")


def _names(run_dirs: list[Path]) -> list[str]:
    """Folder names, or whole paths where those are not all different."""
    names = [path.resolve().name for path in run_dirs]
    return names if len(set(names)) == len(names) else [str(path) for path in run_dirs]


def main() -> None:
    run_command("chord-report", app)


if __name__ == "__main__":
    main()
