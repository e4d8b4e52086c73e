"""One run under faults: chord-local, far actors behind proxies, and what can be seen of them from outside."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil

from common.wire.ports import free_ports
from tests.chaos.ends import Ends
from tests.chaos.proxy import Proxy
from tests.chaos.shim import Control, Shim
from tests.runs import QUIET, import_experts, write_config

LEARNER_HOST = "127.0.0.1"
FAR_HOSTS = ("127.0.0.2", "127.0.0.3")
UNTIL_STOPPED = 1_000_000
"""num_steps of a run that is to go on until its faults are done."""
MAX_FRUITLESS_STARTS = 6
"""Starts of chord-local without a new step that end a run as failed."""
POLL_S = 0.1
GONE_S = 90.0


class RunFailed(Exception):
    """The run did not go on within its limits; the message says at what, and ends with what was logged."""


class Site:
    """Starts again what ends: as a process supervisor does for far actors, and an operator for chord-local."""

    def __init__(self, folder: Path, model: Path, sections: Mapping[str, dict[str, Any]], *, seed: int) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        folder.mkdir(parents=True)
        ports = free_ports(3, LEARNER_HOST, *FAR_HOSTS)
        self.ports = tuple(ports)
        """Front door, weights, announcements."""
        network = {"port": ports[0], "weights_port": ports[1], "announcements_port": ports[2]}
        merged = {**sections, "network": {**network, **sections.get("network", {})}}
        self._config = write_config(folder, model, **merged)
        import_experts(self._config)
        self.shim = Shim(self.run_dir, folder / "controls")
        self.proxies = {host: Proxy(host=host, target_host=LEARNER_HOST, ports=ports, seed=seed) for host in FAR_HOSTS}
        self._local: subprocess.Popen[bytes] | None = None
        self._far: dict[str, subprocess.Popen[bytes]] = {}
        self._overrides = (f"learner.num_steps={UNTIL_STOPPED}",)
        self._output = (folder / "output.log").open("ab")
        self.ends = Ends(folder / "output.log")
        self.operator_starts: list[str] = []
        """What chord-local said last, each time that it ended before its time and was started again."""
        self._fruitless = self._steps_at_start = 0
        self.is_ending = False

    @property
    def far_names(self) -> list[str]:
        return [f"far-{number}" for number in range(len(FAR_HOSTS))]

    def start(self, *overrides: str) -> None:
        """Start chord-local and the far actors; `overrides` replace those of the last start."""
        self._overrides = overrides or self._overrides
        self._start_local()
        for name in self.far_names:
            self._tend_far(name)

    def _start_local(self) -> None:
        self.wait_until_gone()
        self._steps_at_start = self.steps()
        command = [sys.executable, "-m", "common.local", "--config", str(self._config), *self._overrides]
        self._local = subprocess.Popen(command, stdout=self._output, stderr=self._output, env=self._environment())

    def _start_far(self, name: str) -> None:
        config = self.run_dir / "config.toml"
        if not config.exists():
            return
        host = FAR_HOSTS[self.far_names.index(name)]
        with (self.folder / f"{name}.log").open("ab") as log:
            command = [sys.executable, "-m", "actors", "--config", str(config), "--name", name, f"network.host={host}"]
            self._far[name] = subprocess.Popen(command, stdout=log, stderr=log, env=self._environment())

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **QUIET, **self.shim.environment(), "CHORD_LOG_LEVEL": "debug"}

    def tend(self) -> None:
        """Start again what has ended before its time. Raises RunFailed where that does not help."""
        self.ends.read()
        if self.is_ending:
            return
        for name in self.far_names:
            self._tend_far(name)
        if self._local and (code := self._local.poll()) is not None and not self.is_over:
            said = self.last_words()
            self.ends.note("chord-local", code, said)
            self.operator_starts.append(said)
            self._fruitless = 0 if self.steps() > self._steps_at_start else self._fruitless + 1
            if self._fruitless > MAX_FRUITLESS_STARTS:
                raise RunFailed(f"{self._fruitless} starts of chord-local brought no new step: {said}")
            self._start_local()

    def _tend_far(self, name: str) -> None:
        process = self._far.get(name)
        if process is None:
            self._start_far(name)
        elif (code := process.poll()) is not None:
            self.ends.note(name, code, _last_line(self.folder / f"{name}.log"))
            self._start_far(name)

    @property
    def is_over(self) -> bool:
        """The run reached its last step and chord-local has ended."""
        return self._local is not None and self._local.poll() == 0 and self.summary().get("steps") == self._last_step

    @property
    def _last_step(self) -> int:
        return int(self._overrides[0].partition("=")[2])

    @property
    def local_exit_code(self) -> int | None:
        """None while chord-local runs."""
        return self._local.poll() if self._local else None

    def wait_until(self, is_reached: Callable[[], bool], what: str, *, limit_s: float = 120) -> float:
        """Tend the run meanwhile; returns the seconds it took. Raises RunFailed naming `what`."""
        started = time.monotonic()
        while not is_reached():
            self.tend()
            if time.monotonic() - started > limit_s:
                raise RunFailed(f"waited {limit_s:.0f} s for {what}: {self.describe()}")
            time.sleep(POLL_S)
        return time.monotonic() - started

    def wait_for_steps(self, count: int = 1, *, limit_s: float = 180) -> None:
        """Until so many further steps are recorded; a replay counts only where it comes past the newest."""
        wanted = self.steps() + count
        self.wait_until(lambda: self.steps() >= wanted, f"step {wanted}", limit_s=limit_s)

    def stop(self, *, limit_s: float = 150) -> int:
        """SIGINT to chord-local, as from a terminal; returns its exit code. Raises RunFailed."""
        assert self._local
        self.is_ending = True
        try:
            if self._local.poll() is None:
                self._local.send_signal(signal.SIGINT)
            code = self._local.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise RunFailed(f"chord-local did not stop within {limit_s:.0f} s: {self.describe()}") from None
        finally:
            self.is_ending = False
        return code

    def kill_everything(self) -> dict[str, int]:
        """SIGKILL to every process, all at once; returns how many by component."""
        found = self.components()
        for process in found.values():
            process.suspend()
        for process in found.values():
            process.kill()
        for process in [self._local, *self._far.values()]:
            if process:
                process.wait()
        self.wait_until_gone()
        return dict.fromkeys(found, 1)

    def wait_until_gone(self) -> None:
        """Until nothing that an earlier chord-local started is left."""
        deadline = time.monotonic() + GONE_S
        while left := self._left_over():
            if time.monotonic() > deadline:
                raise RunFailed(f"{', '.join(map(str, left))} outlived chord-local by {GONE_S:.0f} s")
            time.sleep(POLL_S)

    def _left_over(self) -> list[int]:
        marks = {str(self.run_dir / name) for name in ("config.toml", "local.toml")}
        found: list[int] = []
        for process in psutil.process_iter(["pid", "cmdline"]):
            words = process.info["cmdline"] or []
            if marks & set(words) and not any(word.startswith("far-") for word in words):
                found.append(process.info["pid"])
        return found

    def components(self) -> dict[str, psutil.Process]:
        """Running processes by name; chord-local itself is `supervisor`."""
        found: dict[str, psutil.Process] = {}
        if self._local and self._local.poll() is None:
            found["supervisor"] = psutil.Process(self._local.pid)
            for child in found["supervisor"].children():
                try:
                    words = child.cmdline()
                except psutil.Error:
                    continue
                if "-m" in words:
                    name = words[words.index("--name") + 1] if "--name" in words else words[words.index("-m") + 1]
                    found[name] = child
        for name, process in self._far.items():
            if process.poll() is None:
                found[name] = psutil.Process(process.pid)
        return found

    def pid(self, name: str) -> int:
        """0 where the component is not running."""
        found = self.components().get(name)
        return found.pid if found else 0

    def wait_for_death(self, pid: int, *, limit_s: float = 10) -> None:
        """A killed process may still end a write: what it leaves on disk is its own, not its successor's."""
        deadline = time.monotonic() + limit_s
        while _is_alive(pid):
            if time.monotonic() > deadline:
                raise RunFailed(f"process {pid} outlived its SIGKILL by {limit_s:.0f} s")
            time.sleep(0.005)

    def control(self, name: str) -> Control:
        return self.shim.control(name)

    def status(self) -> dict[str, Any]:
        return _read_json(self.run_dir / "status.json")

    def summary(self) -> dict[str, Any]:
        return _read_json(self.run_dir / "summary.json")

    def peer_state(self, name: str) -> str:
        """As the learner sees it; empty where it knows no such peer."""
        peers = self.status().get("peers", [])
        return next((str(peer["state"]) for peer in peers if peer["peer_id"] == name), "")

    def steps(self) -> int:
        """The newest step in metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        try:
            with path.open("rb") as file:
                file.seek(max(path.stat().st_size - 8192, 0))
                lines = file.read().split(b"\n")
            return int(json.loads(lines[-2])["step"]) if len(lines) > 1 else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def newest_step(self) -> int:
        """The newest finished step, also where the learner died before it wrote the step's line."""
        with closing(sqlite3.connect(f"file:{self.run_dir / 'ledger.sqlite'}?mode=ro", uri=True)) as database:
            (newest,) = database.execute("SELECT max(step) FROM audit_groups WHERE state = 'trained'").fetchone()
        return max(self.steps(), 0 if newest is None else newest + 1)

    def last_words(self) -> str:
        """The last line that chord-local printed."""
        return _last_line(self.folder / "output.log")

    def describe(self) -> str:
        logs = sorted([*self.run_dir.glob("logs/*.log"), *self.folder.glob("far-*.log"), self.folder / "output.log"])
        tails = [f"== {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs]
        return f"step {self.steps()}, {self.status()}\n" + "\n".join(tails)

    def close(self) -> None:
        """Leave nothing behind."""
        self.is_ending = True
        for process in self.components().values():
            process.kill()
        for process in [self._local, *self._far.values()]:
            if process:
                process.wait()
        deadline = time.monotonic() + 20
        while (left := self._left_over()) and time.monotonic() < deadline:
            for pid in left:
                psutil.Process(pid).kill() if psutil.pid_exists(pid) else None
            time.sleep(POLL_S)
        for proxy in self.proxies.values():
            proxy.close()
        self._output.close()


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
