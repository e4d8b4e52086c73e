"""`chord-local`: one machine, everything. Starts and shows learner, actors and evaluator, ends with a summary."""

import json
import os
import signal
import sys
import time
import tomllib
from io import TextIOWrapper
from pathlib import Path
from typing import Any, cast

import typer
from rich.console import Console

from common.command import CheckOption, ConfigOption, OverridesArgument, new_command, resolve_or_check, run_command
from common.config.schema import Config
from common.environments import find_environment
from common.errors import OperatorError
from common.local.cores import describe_cores, share_cores
from common.local.display import LiveView, PlainLines, can_be_drawn_on
from common.local.progress import Progress, describe_summary
from common.local.screen import View
from common.local.supervisor import Supervisor
from common.model_folder import require_model_folder
from common.run_dir import RunDir
from common.sinks import require_sinks
from common.wire.ports import free_ports, is_free

app = new_command("A whole CHORD run on this machine: learner, actors and evaluator as processes.")

POLL_S = 0.25
MEMORY_EVERY_S = 5.0
LEAVE_S = 10.0


@app.command()
def local(
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    check: CheckOption = False,
    fresh: bool = typer.Option(False, "--fresh", help="Delete an earlier run in run.dir and begin anew."),
) -> None:
    """Run learner, run.num_actors actors and an evaluator until learner.num_steps steps are done."""
    resolved = resolve_or_check(config, overrides, check=check).config
    require_parts(resolved)
    run_dir = RunDir(Path(resolved.run.dir))
    if fresh:
        run_dir.clear(named=named_paths(resolved))
    done = steps_done(run_dir)
    if done or run_dir.ledger.exists():
        require_same_run(run_dir, resolved)  # before anything is written: the record is all that tells how it began
    if done >= resolved.learner.num_steps:
        print(f"{run_dir.path} is complete ({done} steps): raise learner.num_steps to go on, or use --fresh")
        raise typer.Exit(0)
    run_dir.create()
    os.close(run_dir.lock())  # another chord-local's learner holds it: its configuration must stay
    resolved = with_port(resolved)
    run_dir.save_local_config(resolved)
    LocalRun(resolved, run_dir).run()


def require_parts(config: Config) -> None:
    """What can be known to be wrong before anything is started. Raises OperatorError."""
    require_model_folder(config.model.path)
    require_sinks(config.run.sinks)
    if config.algorithm.trains_on_groups or config.eval.every_steps:
        find_environment(config.environment.name)


def named_paths(config: Config) -> dict[str, str]:
    """By key, what of the user's own the configuration names; empty where a key is not set."""
    network = config.network
    return {
        "model.path": config.model.path, "expert.path": config.expert.path,
        "network.keys": network.keys, "network.allowed_keys": network.allowed_keys,
    }  # fmt: skip


def steps_done(run_dir: RunDir) -> int:
    """Steps of a run that came to its end; 0 where there is none."""
    if not (run_dir.summary.exists() and run_dir.final.exists()):
        return 0
    try:
        return int(json.loads(run_dir.summary.read_bytes())["steps"])
    except (ValueError, KeyError, TypeError):
        return 0  # damaged: the learner, which knows better, writes it anew


def require_same_run(run_dir: RunDir, config: Config) -> None:
    """Raises OperatorError where the folder holds a run of another method or task: it cannot go on as this one, nor is
    its result this one's."""
    try:
        begun = tomllib.loads(run_dir.config.read_text(encoding="utf-8"))  # as it stands: an older one is no error
    except (OSError, ValueError):
        return
    usual = Config().lasting
    for section, values in config.lasting.items():
        for key, value in values.items():
            noted = begun.get(section, {}).get(key)
            if noted is None and value in (None, usual[section][key]):
                continue  # it was unset, or the run is older than the key
            found, expected = spelled(value), spelled(noted)
            if found != expected:
                raise OperatorError(
                    f"{run_dir.path}: {section}.{key}: got {found}, expected {expected}, with which the run in it "
                    "began: choose another run.dir, or use --fresh"
                )


def spelled(value: Any) -> str:
    """Equal exactly where two values of a key are."""
    return "unset" if value is None else json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def with_port(config: Config) -> Config:
    """The configuration with a front door for the learner; 0 becomes a free port of the moment."""
    network = config.network
    if network.port == 0:
        network = network.model_copy(update={"port": free_ports(1, network.host)[0]})
    elif not is_free(network.host, network.port):
        raise OperatorError(f"network.port: {network.host}:{network.port} is taken, expected a free port")
    return config.model_copy(update={"network": network})


class LocalRun:
    """The loop of chord-local: watch, show, end."""

    def __init__(self, config: Config, run_dir: RunDir) -> None:
        self._config = config
        self._run_dir = run_dir
        run_dir.status.unlink(missing_ok=True)  # that of an earlier start
        self._progress = Progress(run_dir)
        self._supervisor = Supervisor(
            run_dir.local_config, run_dir.logs, config.run,
            num_actors=config.run.num_actors if config.algorithm.trains_on_groups else 0,
            has_evaluator=config.eval.every_steps > 0,
            first_metrics_port=config.actor.metrics_port,
            drain_s=config.actor.drain_s,
        )  # fmt: skip
        console = Console(highlight=False)
        is_live = can_be_drawn_on(console)
        self._display = LiveView(console, self._view) if is_live else PlainLines(console, self._progress.now)
        self._pin()
        self._num_signals = 0
        self._peak_bytes = 0

    def _pin(self) -> None:
        """Say which component may run where, as run.pin_cores has it."""
        cores = sorted(os.sched_getaffinity(0))
        shares = share_cores(cores, self._config, [peer.name for peer in self._supervisor.peers])
        for component in self._supervisor.components:
            component.cores = shares.get(component.name, frozenset())
        if shares:
            self._say(f"cores: {describe_cores(shares)}")

    def _view(self, news: tuple[str, ...]) -> View:
        title = f"{self._config.run.dir}, {self._config.algorithm.preset}"
        return View(title, self._config.learner.num_steps, self._progress, self._supervisor.components, news)

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        names = ", ".join(component.name for component in self._supervisor.components)
        before = f" to go on after step {self._progress.num_steps_before}" if self._progress.num_steps_before else ""
        self._say(f"{self._config.run.dir}: starting {names}{before} (logs in {self._run_dir.logs})")
        with self._display:
            try:
                self._supervisor.start()
                self._follow()
                self._supervisor.wait_for_peers(0.0 if self._num_signals else LEAVE_S)
            finally:
                self._supervisor.stop(is_impatient=self._is_impatient)
        self._conclude()

    def _follow(self) -> None:
        """Until the learner has ended or the user has had enough."""
        measured = 0.0
        while self._supervisor.learner.exit_code != 0 and self._num_signals == 0:
            for line in self._supervisor.watch():
                self._say(line)
            self._show()
            if time.monotonic() - measured > MEMORY_EVERY_S:
                self._peak_bytes = max(self._peak_bytes, self._supervisor.memory_bytes())
                measured = time.monotonic()
            time.sleep(POLL_S)

    def _show(self) -> None:
        self._read()
        self._display.show()

    def _read(self) -> None:
        for line in self._progress.read_news():
            self._say(line)
        for line in self._progress.read_steps():
            self._display.say_step(line)

    def _is_impatient(self) -> bool:
        """Asked while everything is being stopped, which is shown too."""
        self._show()
        return self._num_signals > 1

    def _conclude(self) -> None:
        self._read()
        self._say(
            f"peak memory of all processes {self._peak_bytes / 2**30:.1f} GiB, restarts {self._supervisor.num_restarts}"
        )
        if not self._run_dir.summary.exists():
            self._say("stopped before the first summary")
            return
        self._say(describe_summary(json.loads(self._run_dir.summary.read_text())))
        self._say(f"summary: {self._run_dir.summary}")
        if self._run_dir.final.exists():
            self._say(f"trained policy: {self._run_dir.final}")

    def _stop(self, *_: object) -> None:
        self._num_signals += 1
        if self._num_signals == 1:
            self._say("stopping: actors drain, the learner ends its step and writes a checkpoint (again: stop at once)")

    def _say(self, line: str) -> None:
        self._display.say(line)


def main() -> None:
    cast(TextIOWrapper, sys.stdout).reconfigure(errors="replace")  # a terminal that knows no μ is no reason to stop
    run_command("chord-local", app)


if __name__ == "__main__":
    main()
