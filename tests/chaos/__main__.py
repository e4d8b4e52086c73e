"""`make chaos`: real runs under a seeded schedule of faults; ends with chaos.json; exit code 1: a promise broke."""

import json
import os
import platform
import random
import shutil
import statistics
import sys
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from tests.chaos.crash_points import FAULTS, WRITERS, explore
from tests.chaos.demands import unmet
from tests.chaos.faults import Faults, actor_logs
from tests.chaos.keys import make_keys
from tests.chaos.schedule import COUNTS, deal_faults, variants
from tests.chaos.scratch import scratch_folder
from tests.chaos.site import RunFailed, Site
from tests.chaos.verdict import Verdict, judge, tracebacks
from tests.tiny_model import make_tiny_model

LAST_STEPS = 5
"""Steps that a run takes in peace after its faults, to its end."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class Chaos:
    """All runs of one seed, and what they showed."""

    def __init__(self, folder: Path, *, seed: int, minutes: float, scale: float, only: str) -> None:
        self._folder = folder
        self._settings = {"seed": seed, "minutes": minutes, "scale": scale, "only": only}
        self._chance = random.Random(seed)
        self._plan = deal_faults(self._chance, scale=scale, only=only)
        self._started = time.monotonic()
        self._deadline = self._started + minutes * 60
        self._faults = Faults(self._chance, self._say)
        self._verdicts: list[Verdict] = []
        self._failures: list[str] = []
        self._operator_starts: list[str] = []
        self._ends = Counter[str]()
        self._complaints: list[str] = []
        self._skipped = Counter[str]()
        self._tracebacks = Counter[str]()
        self._crash_points: dict[str, int] = {}
        self._run = 0
        self._site: Site | None = None

    def run(self) -> dict[str, Any]:
        """Every run of the plan, then the writers' crash points; returns the content of chaos.json."""
        model = make_tiny_model(self._folder / "model")
        for number, faults in enumerate(self._plan):
            self._run = number
            self._one_run(model, variants()[number % len(variants())], faults)
        if not self._settings["only"]:
            self._try_crash_points()
        return self._report()

    def _one_run(self, model: Path, sections: dict[str, Any], faults: Sequence[str]) -> None:
        if self._run % 2:
            keys = make_keys(self._folder / f"keys-{self._run}")
            sections = {**sections, "network": {**sections["network"], "keys": str(keys)}}
        site = self._site = Site(
            self._folder / f"run-{self._run}", model, sections, seed=self._chance.randrange(1 << 30)
        )
        try:
            site.start()
            self._faults.begin(site)
            site.wait_for_steps(2, limit_s=300)
            self._strike_all(faults)
            self._end(site)
        except (RunFailed, psutil.Error, OSError) as error:
            self._failures.append(f"run {self._run}: {error}")
            self._say(f"FAILED: {str(error).splitlines()[0]}")
            traceback.print_exc(file=sys.stdout)
        finally:
            self._operator_starts += site.operator_starts
            site.ends.read()
            self._ends += site.ends.tally()
            self._complaints += [f"run {self._run}: {line}" for line in site.ends.complaints]
            found = tracebacks([*actor_logs(site), *site.run_dir.glob("logs/[el]*.log"), site.folder / "output.log"])
            self._tracebacks += found
            self._failures += [f"run {self._run}: chord-local: {line}" for line in found if line.startswith("output:")]
            self._site = None
            site.close()

    def _strike_all(self, faults: Sequence[str]) -> None:
        for position, name in enumerate(faults):
            if time.monotonic() > self._deadline:
                self._skipped.update(faults[position:])
                self._say(f"time is up: {len(faults) - position} faults left out")
                return
            self._faults.strike(name)

    def _end(self, site: Site) -> None:
        """Drain, then go on to a last step and judge."""
        if code := site.stop():
            self._failures.append(f"run {self._run}: chord-local ended with {code} when stopped: {site.last_words()}")
        last = site.steps() + LAST_STEPS
        self._say(f"drained; on to the last step, {last}")
        site.start(f"learner.num_steps={last}")
        site.wait_until(lambda: site.is_over, f"the end of the run at step {last}", limit_s=240)
        config = tomllib.loads((site.run_dir / "config.toml").read_text())
        verdict = judge(site.run_dir, actor_logs(site), config=config)
        self._verdicts.append(verdict)
        self._say(f"{'clean' if verdict.is_clean else 'NOT CLEAN'}: {asdict(verdict)}")

    def _try_crash_points(self) -> None:
        every = max(1, round(0.5 / self._settings["scale"]))
        for writer in WRITERS:
            for fault in FAULTS:
                with scratch_folder() as scratch:
                    found = explore(scratch / "trials", writer, fault, every=every)
                name = f"{writer} {fault}"
                self._crash_points[name] = found.num_trials
                self._failures += [f"{name}: {line}" for line in found.wrong]
                self._say(f"{name}: {found.num_trials} system calls, {len(found.wrong)} promises broken")

    def _report(self) -> dict[str, Any]:
        faults, verdicts = self._faults, self._verdicts
        violations = [line for verdict in verdicts for line in verdict.violations] + faults.violations
        report = {
            "kills": faults.kills.total(),
            "kills_by_component": dict(sorted(faults.kills.items())),
            "faults_by_class": dict(sorted(faults.struck.items())),
            "missed": dict(sorted(faults.missed.items())),
            "crash_points": self._crash_points,
            "lost": sum(verdict.lost for verdict in verdicts),
            "duplicates": sum(verdict.duplicates for verdict in verdicts),
            "violations": violations + self._complaints,
            "failures": self._failures,
            "skipped": dict(self._skipped),
            "recovery_s": _spread(faults.recovery_s),
            "training_again_s": _spread(faults.training_again_s),
            "black_hole_noticed_s": _spread(faults.notice_s),
            "stopped_for_good": dict(faults.stopped_found),
            "ends": dict(sorted(self._ends.items())),
            "operator_starts": dict(Counter(self._operator_starts)),
            "tracebacks": dict(self._tracebacks.most_common()),
            "runs": len(self._plan),
            "runs_ended": len(verdicts),
            "steps": sum(verdict.steps for verdict in verdicts),
            "groups_trained": sum(verdict.num_groups_trained for verdict in verdicts),
            "receipts_checked": sum(verdict.num_acknowledged for verdict in verdicts),
            "is_audited": bool(verdicts) and all(verdict.is_audited for verdict in verdicts),
            "seed": self._settings["seed"],
            "wall_s": round(time.monotonic() - self._started, 1),
            "conditions": {**self._settings, **conditions()},
        }
        report["violations"] += unmet(report)
        return report

    def _say(self, line: str) -> None:
        now = time.monotonic()
        left = max(self._deadline - now, 0) / 60
        step = self._site.steps() if self._site else 0
        done = f"{self._faults.struck.total()}/{sum(map(len, self._plan))}"
        print(
            f"{(now - self._started) / 60:5.1f} min  run {self._run + 1}/{len(self._plan)}  step {step:4d}  "
            f"faults {done}  kills {self._faults.kills.total()}  left {left:.0f} min  {line}",
            flush=True,
        )


def conditions() -> dict[str, Any]:
    """Of the machine, for readers of the numbers."""
    return {
        "cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {"count": 0}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 99
    return {"count": len(seconds), "p50": round(cuts[49], 2), "p99": round(cuts[98], 2), "max": round(max(seconds), 2)}


@app.command()
def chaos(
    seed: Annotated[int, typer.Option(help="Everything that is drawn by chance follows from it.")] = 0,
    minutes: Annotated[float, typer.Option(help="No new fault after so long; those left out are a failure.")] = 68.0,
    scale: Annotated[float, typer.Option(help="Share of the faults; 0.05 takes about two minutes.")] = 1.0,
    only: Annotated[str, typer.Option(help=f"One class of faults: {', '.join(COUNTS)}.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the runs and of chaos.json; emptied first.")] = Path(
        "runs/chaos"
    ),
) -> None:
    """Kill, stop, cut off, starve and damage real runs, and see whether every promise holds."""
    if only and only not in COUNTS:
        raise typer.BadParameter(f"--only: got {only!r}, expected one of {', '.join(COUNTS)}")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    report = Chaos(out.resolve(), seed=seed, minutes=minutes, scale=scale, only=only).run()
    (out / "chaos.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    is_good = not (report["lost"] or report["duplicates"] or report["violations"] or report["failures"])
    raise typer.Exit(0 if is_good and not report["skipped"] else 1)


if __name__ == "__main__":
    app()
