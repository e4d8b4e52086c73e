"""Starts the components of a run as processes, starts again what dies or hangs, and leaves none behind.

A component that ends with exit code 0 has done its work; one with the operator's exit code 2 must be mended by hand and
ends the run; any other end is a crash and is answered with a new start, as often as the crash budget allows. One that
gives no sign of life is killed, which is a crash like any other.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from common.config.schema import Run
from common.errors import OPERATOR_ERROR, ComponentFailure, OperatorError
from common.local.cores import handing_down
from common.local.signs import Signs
from common.log_lines import LOG_FORMAT, LogFormat
from common.watchdog import NOTIFY_SOCKET, WakingClock

LONGEST_DELAY_S = 2.0
"""Between a crash and the new start; the first crash of crash_window_s is answered at once."""
STOP_S = 20.0
"""Longest time from SIGTERM to SIGKILL for actors and evaluator, beyond the time in which they drain."""
KILL_S = 30.0
"""Longest time from SIGKILL to a component's end."""
HURRY_S = 2.0
"""Time for peers to leave by themselves once the learner is gone."""
LEARNER_STOP_S = 600.0
"""The same for the learner, which first ends its step and writes a checkpoint."""
PR_SET_PDEATHSIG = 1

QUIET_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
"""Idle compute threads sleep: on a machine whose cores are shared, spinning ones slow their neighbours down tenfold."""


@dataclass
class Component:
    """One supervised process."""

    name: str
    command: Sequence[str]
    log: Path
    cores: frozenset[int] = frozenset()
    """Where it may run, with all that it starts; empty: wherever chord-local may."""
    process: subprocess.Popen[bytes] | None = None
    signs: Signs = field(default_factory=Signs)
    heard_s: float = 0.0
    """When it gave its last sign of life, or was started, by the supervisor's clock."""
    has_signed: bool = False
    """Whether this process has given any."""
    crashes: list[float] = field(default_factory=list[float])
    due: float | None = None
    """When it is to be started again, where it is down."""
    log_start: int = 0
    """Where in the log this process began, in bytes."""

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return self.process.poll() if self.process else None

    def start(self, now_s: float) -> None:
        """`now_s`: by the supervisor's clock."""
        self.signs.forget()
        self.heard_s, self.has_signed, self.due = now_s, False, None
        with self.log.open("ab") as log, handing_down(self.cores):
            self.log_start = log.tell()
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env=self._environment(),
                preexec_fn=_die_with_parent,
            )  # fmt: skip

    def _environment(self) -> dict[str, str]:
        """Its log is read again, by `last_words`."""
        ours = {"PYTHONUNBUFFERED": "1", LOG_FORMAT: LogFormat.PLAIN, NOTIFY_SOCKET: self.signs.address}
        return {**QUIET_THREADS, **os.environ, **ours}

    def hear(self, now_s: float) -> None:
        """Take note of signs of life."""
        if self.signs.hear():
            self.heard_s, self.has_signed = now_s, True

    def terminate(self) -> None:
        if self.process and self.is_running:
            self.process.terminate()

    def kill(self) -> None:
        """It and all that it started, stopped ones too."""
        if self.process and self.is_running:
            for process in reversed(_family(self.process.pid)):
                with suppress(psutil.Error):
                    process.kill()
            try:
                self.process.wait(timeout=KILL_S)
            except subprocess.TimeoutExpired as error:
                raise ComponentFailure(
                    f"waited {KILL_S:.0f} s for {self.name} (process {self.process.pid}) to end after SIGKILL, "
                    "expected it gone: it may hang in a disk or device"
                ) from error

    def last_words(self) -> str:
        """The line with which it ended, or else the last one of its log: libraries grumble even after the end.

        An operator's error without its line is one of a full disk, which had no room for the line.
        """
        with self.log.open("rb") as log:
            log.seek(self.log_start)
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        is_last_word = [line for line in lines if line.startswith("chord-") or " CRITICAL " in line]
        if self.exit_code == OPERATOR_ERROR and not is_last_word:
            return (
                f"{self.name} ended with exit code 2 and could not write why, expected room on the disk of {self.log}"
            )
        return (is_last_word or lines or ["it wrote nothing"])[-1]


class Supervisor:
    """The components of one run; the first is the learner, whose end is the end of the run."""

    def __init__(
        self, config: Path, log_folder: Path, run: Run, *, num_actors: int, has_evaluator: bool,
        first_metrics_port: int = 0, drain_s: float = 0.0,
    ) -> None:  # fmt: skip
        """`first_metrics_port`: of actor 0, the next actor has the next one; 0 leaves each a free one."""

        def component(name: str, module: str, *options: str) -> Component:
            command = [sys.executable, "-m", module, "--config", str(config), *options]
            return Component(name, command, log_folder / f"{name}.log")

        self._run = run
        self._stop_s = drain_s + STOP_S
        self._clock = WakingClock()
        self.learner = component("learner", "learner")
        names = [f"actor-{i}" for i in range(num_actors)]
        ports = [first_metrics_port + i if first_metrics_port else 0 for i in range(num_actors)]
        self.peers = [
            component(name, "actors", "--name", name, f"actor.metrics_port={port}")
            for name, port in zip(names, ports, strict=True)
        ]
        if has_evaluator:
            self.peers.append(component("evaluator", "actors.evaluator", "--name", "evaluator"))
        self.num_restarts = 0

    @property
    def components(self) -> list[Component]:
        return [self.learner, *self.peers]

    def start(self) -> None:
        for component in self.components:
            component.start(self._clock.tick())

    def watch(self) -> list[str]:
        """Kill what hangs and start again what has crashed; returns a line for each. Raises where that is of no use."""
        news = self._kill_silent()
        for component in self.components:
            code = component.exit_code
            if component.is_running or code == 0:
                continue
            if code == OPERATOR_ERROR:
                raise OperatorError(component.last_words())
            if component.due is None:
                news.append(self._note_crash(component))
            if component.due is not None and time.monotonic() >= component.due:
                component.start(self._clock.tick())
                self.num_restarts += 1
        return news

    def _kill_silent(self) -> list[str]:
        """Kill components that have given no sign of life for too long: stopped ones, or with a hung interpreter."""
        now_s, news = self._clock.tick(), list[str]()
        for component in self.components:
            component.hear(now_s)
            limit_s = self._run.watchdog_s if component.has_signed else self._run.first_sign_s
            silence_s = now_s - component.heard_s
            if component.is_running and silence_s > limit_s:
                last = f" (its last: {component.signs.status})" if component.signs.status else ""
                news.append(
                    f"{component.name} has given no sign of life for {silence_s:.0f} s{last}, expected one within "
                    f"{limit_s:.0f} s: killing it"
                )
                component.kill()
        return news

    def _note_crash(self, component: Component) -> str:
        """Set the time of the new start. Raises ComponentFailure where the crash budget is spent."""
        now, code, run = time.monotonic(), component.exit_code, self._run
        component.crashes = [at for at in component.crashes if now - at < run.crash_window_s] + [now]
        num_crashes = len(component.crashes)
        if num_crashes > run.max_crashes:
            raise ComponentFailure(
                f"{component.name} crashed {num_crashes} times within {run.crash_window_s:.0f} s, expected at most "
                f"{run.max_crashes} (run.max_crashes); see {component.log} ({component.last_words()})"
            )
        delay_s = min(0.25 * 2 ** min(num_crashes - 2, 10), LONGEST_DELAY_S) if num_crashes > 1 else 0.0
        component.due = now + delay_s
        if code and code < 0:
            ended = f"signal {signal.Signals(-code).name}: starting it again"
        else:
            ended = f"exit code {code}: starting it again ({component.last_words()})"
        return f"{component.name} ended with {ended} (log: {component.log})"

    def stop(self, *, is_impatient: Callable[[], bool] = lambda: False) -> None:
        """SIGTERM to all, SIGKILL to what outstays its time or the user's patience; returns when all are gone."""
        families = [psutil.Process(c.process.pid) for c in self.components if c.is_running and c.process]
        descendants = [child for parent in families for child in _children(parent)]
        for component in self.components:
            component.terminate()
        started, is_hurried = time.monotonic(), False
        while any(component.is_running for component in self.components):
            waited = time.monotonic() - started
            if not self.learner.is_running and waited > HURRY_S and not is_hurried:
                is_hurried = True  # nobody is left to drain for: a second SIGTERM ends them at once
                for peer in self.peers:
                    peer.terminate()
            for component in self.components:
                limit = LEARNER_STOP_S if component is self.learner else self._stop_s
                if waited > limit or is_impatient():
                    component.kill()
            self._kill_silent()
            time.sleep(0.1)
        _, alive = psutil.wait_procs(descendants, timeout=5)
        for process in alive:
            process.kill()
        for component in self.components:
            component.signs.close()

    def wait_for_peers(self, timeout_s: float) -> None:
        """After the learner's end: give actors and evaluator time to leave by themselves."""
        deadline = time.monotonic() + timeout_s
        while any(peer.is_running for peer in self.peers) and time.monotonic() < deadline:
            time.sleep(0.1)

    def memory_bytes(self) -> int:
        """Proportional set size of all processes together."""
        total = 0
        for component in self.components:
            if component.is_running and component.process:
                for process in _family(component.process.pid):
                    total += _pss(process)
        return total


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *_children(parent)]
    except psutil.Error:
        return []


def _children(parent: psutil.Process) -> list[psutil.Process]:
    try:
        return parent.children(recursive=True)
    except psutil.Error:
        return []


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


def _die_with_parent() -> None:
    """In the child: be asked to end when chord-local dies, however it dies (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
