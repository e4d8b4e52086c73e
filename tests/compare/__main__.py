"""`make compare`: an honest comparison of methods, taken run by run, over as many sessions as it needs."""

import json
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console

from tests.compare.commands import CommandFailed
from tests.compare.committing import commit
from tests.compare.figure import draw
from tests.compare.harness import Harness
from tests.compare.outcome import describe
from tests.compare.plan import PlannedRun, fresh, make_plan
from tests.compare.results import FOLDER, Result, load_results, write_result
from tests.compare.scale import Scale
from tests.compare.table import FIGURE, write_table

ESTIMATE_S = 600.0
"""Of a run before any has been taken."""
START_ESTIMATE_S = 180.0
SHOW_EVERY_S = 60.0
"""Where there is no terminal, a line this often."""
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass
class Session:
    """One sitting of the comparison."""

    scale: Scale
    results: Path
    scratch: Path
    home: Path
    """The checkout whose README and figure are made anew."""
    console: Console
    commits: bool = False
    """After every run."""
    _failure: str = ""
    """The last one's."""

    def take_runs(self, *, deadline: float | None) -> int:
        """Take runs until there are none left or time is; returns how many failed."""
        num_failed = 0
        while True:
            plan, results = self.plan()
            run = next((run for run in plan if run.is_ready and not fresh(run, results)), None)
            if run is None:
                return num_failed
            num_left = sum(not fresh(planned, results) for planned in plan)
            estimate_s = estimate(run, results)
            if deadline is not None and time.monotonic() + estimate_s > deadline:
                self._say(
                    f"{num_left} runs are left; {run.name} would not end in time (about {in_minutes(estimate_s)})"
                )
                return num_failed
            self._say(
                f"run {len(plan) - num_left + 1} of {len(plan)}: {run.name}, about {in_minutes(estimate_s)}; "
                f"all that is left: {left_s(plan, results) / 3600:.1f} h"
            )
            num_failed += bool(self.take(run).failure)

    def take(self, run: PlannedRun) -> Result:
        """Take one run, keep its result and tell of it. Where it fails it is tried again; then that is its result."""
        result = self._try(run) or self._try_again(run)
        write_result(self.results, result)
        self.report()
        if self.commits:
            self._commit(result)
        return result

    def plan(self) -> tuple[list[PlannedRun], dict[str, Result]]:
        results = load_results(self.results)
        return make_plan(self.scale, results), results

    def report(self) -> None:
        """compare.json, README's tables and the figure, from whatever results there are."""
        plan, results = self.plan()
        outcome = describe(self.scale, plan, results)
        path = self.results.parent / "compare.json"
        path.write_text(json.dumps(outcome, indent=1, ensure_ascii=False) + "\n")
        write_table(self.home / "README.md", outcome)
        if outcome["num_done"]:
            draw(self.home / FIGURE, self.scale, plan, results, outcome)

    def tell_plan(self) -> None:
        plan, results = self.plan()
        for number, run in enumerate(plan, start=1):
            result = fresh(run, results)
            state = "to do" if run.is_ready else "waits for the choice of a learning rate"
            if result:
                state = f"failed: {result.failure}" if result.failure else f"done, {_figures(result)}"
            self.console.print(f"{number:3} {run.name:44} {state}", markup=False, highlight=False)
        num_done = sum(bool(fresh(run, results)) for run in plan)
        self._say(f"{len(plan)} runs, {num_done} done, about {left_s(plan, results) / 3600:.1f} h to go")

    def _try(self, run: PlannedRun) -> Result | None:
        """None where it fails."""
        began = time.monotonic()
        show = _Shower(self.console, run.name, began).show
        try:
            result = Harness(self.scale, self.scratch, self.results, show).take(run)
        except CommandFailed as failure:
            self._failure = str(failure)
            self._say(f"{run.name} failed: {failure}")
            return None
        self._say(f"{run.name}: {in_minutes(time.monotonic() - began)}, {_figures(result)}")
        return result

    def _try_again(self, run: PlannedRun) -> Result:
        earlier = self._failure
        result = self._try(run)
        if result is None:
            result = Result(run.name, run.part, run.label, run.seed, run.lr, run.settings_hash, failure=self._failure)
        return replace(result, earlier_failure=earlier)

    def _commit(self, result: Result) -> None:
        paths = [self.results, self.results.parent / "compare.json", self.home / "README.md", self.home / FIGURE]
        try:
            commit(self.home, [path.absolute() for path in paths], f"Compare: {result.name}, {_figures(result)}")
        except CommandFailed as failure:
            self._say(f"{result.name} is not committed: {failure}")

    def _say(self, line: str) -> None:
        self.console.print(f"{time.strftime('%H:%M')} {line}", markup=False, highlight=False)


@dataclass
class _Shower:
    """What a run does now: on one changing line of a terminal, else a line a minute."""

    console: Console
    name: str
    began: float
    shown: float = 0.0

    def show(self, what: str) -> None:
        now = time.monotonic()
        if self.console.is_terminal:
            self.console.print(
                f"  {in_minutes(now - self.began):>8}  {what:40}", end="\r", markup=False, highlight=False
            )
        elif now - self.shown > SHOW_EVERY_S:
            self.shown = now
            self.console.print(
                f"  {in_minutes(now - self.began):>8}  {self.name}: {what}", markup=False, highlight=False
            )


def estimate(run: PlannedRun, results: dict[str, Result]) -> float:
    """Seconds that it will take, by the runs that are done: of its kind, else of its part."""
    if not run.is_trained:
        return START_ESTIMATE_S
    trained = [result for result in results.values() if result.budget and not result.failure]
    for alike in (
        [result for result in trained if (result.part, result.label) == (run.part, run.label)],
        [result for result in trained if result.part == run.part],
        trained,
    ):
        if alike:
            return median(sum(result.wall_s.values()) for result in alike)
    return ESTIMATE_S


def left_s(plan: Sequence[PlannedRun], results: dict[str, Result]) -> float:
    return sum(estimate(run, results) for run in plan if not fresh(run, results))


def in_minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


def _figures(result: Result) -> str:
    parts = [
        f"accuracy {result.test.accuracy:.3f}" if result.test else "",
        f"retention {result.retention_accuracy:.3f}" if result.retention_accuracy is not None else "",
        f"entropy {result.entropy:.2f}" if result.entropy is not None else "",
        result.failure,
    ]
    return ", ".join(filter(None, parts))


@app.command()
def main(
    minutes: Annotated[float, typer.Option(help="start no run that would not end within so many; 0: no limit")] = 0.0,
    plan: Annotated[bool, typer.Option("--plan", help="show what is done and what is to do, and stop")] = False,
    report: Annotated[bool, typer.Option("--report", help="make table and figure anew, and stop")] = False,
    commits: Annotated[bool, typer.Option("--commit", help="commit results, table and figure after every run")] = False,
    results: Annotated[Path, typer.Option(help="where results and configurations are kept")] = FOLDER,
    scratch: Annotated[Path, typer.Option(help="where runs take place")] = Path("runs/compare"),
) -> None:
    """Take what is not there yet, and make compare.json, README's table and the figure after every run."""
    console = Console(width=max(Console().width, 120))
    session = Session(Scale(), results, scratch, Path(), console, commits)
    if report:
        session.report()
        return
    session.tell_plan()
    if plan:
        return
    for ending in (signal.SIGINT, signal.SIGTERM):  # in the background, too, where a shell has SIGINT ignored
        signal.signal(ending, signal.default_int_handler)
    try:
        num_failed = session.take_runs(deadline=time.monotonic() + 60 * minutes if minutes else None)
    except KeyboardInterrupt:
        console.print("\nstopped; the run in progress is taken again from its beginning")
        raise typer.Exit(130) from None
    session.tell_plan()
    raise typer.Exit(1 if num_failed else 0)


if __name__ == "__main__":
    app()
