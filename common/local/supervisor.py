"""Starts the components of a run as processes, starts again what dies, and leaves none behind.

A component that ends with exit code 0 has done its work; one with the operator's exit code 2 must be mended by hand and
ends the run; any other end is a crash and is answered with a new start, a few times.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from common.errors import OPERATOR_ERROR, ComponentFailure, OperatorError

MAX_CRASHES = 5
"""Crashes of one component within CRASH_WINDOW_S that end the run."""
CRASH_WINDOW_S = 300.0
STOP_S = 30.0
"""Longest time from SIGTERM to SIGKILL for actors and evaluator."""
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
    process: subprocess.Popen[bytes] | None = None
    crashes: list[float] = field(default_factory=list[float])

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return self.process.poll() if self.process else None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**QUIET_THREADS, **os.environ, "PYTHONUNBUFFERED": "1"}, preexec_fn=_die_with_parent,
            )  # fmt: skip

    def terminate(self) -> None:
        if self.process and self.is_running:
            self.process.terminate()

    def kill(self) -> None:
        if self.process and self.is_running:
            self.process.kill()
            self.process.wait()

    def last_line(self) -> str:
        """The last line of its log."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return next((line for line in reversed(lines) if line.strip()), "it wrote nothing")


class Supervisor:
    """The components of one run; the first is the learner, whose end is the end of the run."""

    def __init__(
        self, config: Path, log_folder: Path, *, num_actors: int, has_evaluator: bool, first_metrics_port: int = 0
    ) -> None:
        """`first_metrics_port`: of actor 0, the next actor has the next one; 0 leaves each a free one."""

        def component(name: str, module: str, *options: str) -> Component:
            command = [sys.executable, "-m", module, "--config", str(config), *options]
            return Component(name, command, log_folder / f"{name}.log")

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
            component.start()

    def watch(self) -> list[str]:
        """Start again what has crashed; returns a line for each. Raises where that is of no use."""
        news: list[str] = []
        for component in self.components:
            code = component.exit_code
            if component.is_running or code == 0:
                continue
            if code == OPERATOR_ERROR:
                raise OperatorError(component.last_line())
            now = time.monotonic()
            component.crashes = [at for at in component.crashes if now - at < CRASH_WINDOW_S] + [now]
            if len(component.crashes) > MAX_CRASHES:
                raise ComponentFailure(
                    f"{component.name} crashed {len(component.crashes)} times within {CRASH_WINDOW_S:.0f} s, expected "
                    f"it to stay up; see {component.log} ({component.last_line()})"
                )
            ended = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
            news.append(f"{component.name} ended with {ended}: starting it again (log: {component.log})")
            component.start()
            self.num_restarts += 1
        return news

    def stop(self, *, is_impatient: Callable[[], bool] = lambda: False) -> None:
        """SIGTERM to all, SIGKILL to what outstays its time or the user's patience; returns when all are gone."""
        families = [psutil.Process(c.process.pid) for c in self.components if c.is_running and c.process]
        descendants = [child for parent in families for child in _children(parent)]
        for component in self.components:
            component.terminate()
        started = time.monotonic()
        while any(component.is_running for component in self.components):
            waited = time.monotonic() - started
            for component in self.components:
                limit = LEARNER_STOP_S if component is self.learner else STOP_S
                if waited > limit or is_impatient():
                    component.kill()
            time.sleep(0.1)
        _, alive = psutil.wait_procs(descendants, timeout=5)
        for process in alive:
            process.kill()

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
