"""The lab machine's part of deploy/README.md, followed literally, from an empty root to new keys.

Learner, actors and evaluator run as their units say, in as much of their sandbox as can be had without systemd. What
takes the network or a booted systemd is done by rule: see `LabMachine.do`.
"""

import json
import re
import shutil
import signal
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.config.load import to_toml
from common.wire.ports import free_ports
from tests.deploy.lab import install, prepare_program
from tests.deploy.manager import Manager, wait_until
from tests.deploy.sandbox import UnitProcess, run_command
from tests.deploy.tools import ROOT
from tests.deploy.units import UNITS, Unit
from tests.runs import read_lines

README = (ROOT / "deploy" / "README.md").read_text()
SECTIONS = (
    "One lab machine, with systemd", "Upgrade and roll back", "Back up and restore a run", "Change keys",
    "More actors, or fewer",
)  # fmt: skip
LEARNER = "chord-learner.service"
NUM_ACTORS = 3
"""That README starts, numbered from 0."""
SMALL: dict[str, dict[str, Any]] = {
    "sampling": {"max_tokens": 6},
    "algorithm": {"group_size": 2},
    "actor": {"engine": "simulated", "max_groups_in_flight": 1, "drain_s": 5.0},
    "learner": {"num_steps": 100_000, "groups_per_step": 2, "num_threads": 1, "checkpoint_every_steps": 20},
    "expert": {"rows_per_step": 2},
    "eval": {"every_steps": 200, "num_problems": 4},
}
"""What the operator writes into run.toml here: a run that two cores bear beside everything else."""


def commands(section: str) -> list[str]:
    """Every line of a section's shell blocks."""
    text = README.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


class LabMachine:
    """An empty root that fills as README says, and the services that run in it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.root = folder / "root"
        (self.root / "mnt").mkdir(parents=True)  # the backups' disk
        self._folder = folder
        self._model = model
        self.managers: dict[str, Manager] = {}
        self.processes: dict[str, UnitProcess] = {}

    def do(self, line: str) -> None:
        """One line of README: as it stands, in a shell that takes the root for the system; but

        - install.sh gets DESTDIR, and what it would build lies there already;
        - the demo's model is a tiny one;
        - ports are free ones, in run.toml and in drop-ins of the actors;
        - systemctl enables in the root, and starts and stops processes of this test's;
        - the checkout stays at its version;
        - there is one user.
        """
        match line.split():
            case ["deploy/systemd/install.sh", "--build", venv]:
                prepare_program(self.root, venv)
                install(self.root, "--program", venv)
            case ["deploy/systemd/install.sh", *options]:
                install(self.root, *options)
            case [_, "deploy/models/smollm2.py", destination]:
                shutil.copytree(self._model, self.root / destination.lstrip("/"))
                self.edit_configuration()
                self.move_actors()
            case ["systemctl", "enable" | "disable" as verb, *units]:
                names = [unit for unit in units if unit != "--now"]
                subprocess.run(["systemctl", f"--root={self.root}", "--quiet", verb, *names], check=True, timeout=60)
                if "--now" in units:
                    self.do(f"systemctl {'start' if verb == 'enable' else 'stop'} {' '.join(names)}")
            case ["systemctl", "start" | "stop" | "restart" as verb, *units]:
                names = [name for unit in units for name in self.services(unit.strip("'"))]
                if verb != "start":
                    self.stop(names)
                if verb != "stop":
                    self.start(names)
            case ["systemctl", "status", _]:
                self.check_signs()
            case ["journalctl", *_]:
                self.check_logs()
            case ["git", *_]:
                pass
            case _:
                run_command(self.root, line.replace("runuser -u chord-rl -- ", ""))

    def edit_configuration(self) -> None:
        path = self.root / "etc/chord-rl/run.toml"
        document = tomllib.loads(path.read_text())
        port, weights_port, announcements_port, learner_metrics, evaluator_metrics = free_ports(5, "127.0.0.1")
        ports = {"port": port, "weights_port": weights_port, "announcements_port": announcements_port}
        for section, values in (SMALL | {"network": ports}).items():
            document[section].update(values)
        document["learner"]["metrics_port"], document["eval"]["metrics_port"] = learner_metrics, evaluator_metrics
        lines = [
            f"[{section}]\n" + "".join(f"{key} = {to_toml(value)}\n" for key, value in keys.items())
            for section, keys in document.items()
        ]
        path.write_text("\n".join(lines))

    def move_actors(self) -> None:
        """To other ports for metrics than 941N, which something else on this machine may have."""
        template = self.root / UNITS / "chord-actor@.service"
        (command,) = re.findall(r"^ExecStart=.*$", template.read_text(), re.MULTILINE)
        for number, port in enumerate(free_ports(NUM_ACTORS, "127.0.0.1")):
            own, count = re.subn(r"actor\.metrics_port=941%i", f"actor.metrics_port={port}", command)
            assert count == 1, command
            path = self.root / f"etc/systemd/system/chord-actor@{number}.service.d/port.conf"
            path.parent.mkdir(parents=True)
            path.write_text(f"[Service]\nExecStart=\n{own}\n")

    def services(self, unit: str) -> list[str]:
        """The services that systemctl means by a word of README; the learner first, as After= has it."""
        wanted = sorted(path.name for path in (self.root / "etc/systemd/system/chord.target.wants").glob("*"))
        if unit.endswith("*"):
            return [name for name in self.processes if name.startswith(unit[:-1])]
        if unit == "chord.target":
            return sorted({*wanted, *self.processes}, key=lambda name: (name != LEARNER, name))
        return [f"{unit}.service"]

    def start(self, names: list[str]) -> None:
        """Returns when all have said that they are ready; peers are started when the learner has."""
        for group in ([name for name in names if name == LEARNER], [name for name in names if name != LEARNER]):
            for name in group:
                if name not in self.processes:
                    self._start(name)
            for name in group:
                self.wait_until(lambda name=name: self.managers[name].has("READY"), lambda name=name: self.log(name))

    def _start(self, name: str) -> None:
        self.check_readable()
        if name not in self.managers:
            self.managers[name] = Manager()
        self.managers[name].forget()
        scratch = Path(tempfile.mkdtemp(dir=self._folder))
        with self._log_path(name).open("ab") as log:
            self.processes[name] = UnitProcess(
                self.root, Unit(self.root, name), self.managers[name], scratch=scratch, log=log
            )

    def check_readable(self) -> None:
        """The one user of this test reads everything; the user chord-rl must be able to read what is root's."""
        for place in ("opt/chord-rl", "var/lib/chord-rl/models", "etc/chord-rl/keys/allowed"):
            for path in [self.root / place, *(self.root / place).rglob("*")]:
                wanted = 0o005 if path.is_dir() else 0o004
                assert path.stat().st_mode & wanted == wanted, f"the user chord-rl cannot read {path}"

    def stop(self, names: list[str]) -> None:
        """SIGTERM; peers first, as After= has it. Each says that it stops, and ends with exit code 0."""
        for group in ([name for name in names if name != LEARNER], [name for name in names if name == LEARNER]):
            running = [name for name in group if name in self.processes]
            for name in running:
                self.processes[name].main.send_signal(signal.SIGTERM)
            for name in running:
                code = self.processes[name].wait(timeout_s=float(self.processes[name].unit["TimeoutStopSec"]))
                assert code == 0, f"{name} ended with {code}: {self.log(name)}"
                wait_until(lambda name=name: self.managers[name].has("STOPPING"), lambda name=name: self.log(name), 5)
                del self.processes[name]

    def wait_until(self, is_reached: Callable[[], bool], what: Callable[[], str]) -> None:
        """What has ended will reach nothing any more: that is told at once."""

        def is_reached_by_the_living() -> bool:
            for name, process in self.processes.items():
                assert process.is_running, f"{name} ended with {process.wait(timeout_s=0)}: {self.log(name)}"
            return is_reached()

        wait_until(is_reached_by_the_living, what)

    def check_signs(self) -> None:
        """Everybody is alive, says what it does, and asks for no more time once it is ready."""
        for name, manager in self.managers.items():
            (ready,) = manager.times("READY")
            self.wait_until(
                lambda manager=manager, ready=ready: len(manager.times("WATCHDOG", since=ready)) >= 2,
                lambda name=name, manager=manager: f"{name}: {manager.signs}",
            )
            assert manager.times("EXTEND_TIMEOUT_USEC")
            assert len(manager.times("EXTEND_TIMEOUT_USEC", since=ready)) <= 1  # one may have been on its way
            assert manager.status
            assert not manager.has("STOPPING")

    def check_logs(self) -> None:
        for name in self.processes:
            lines = self.log(name).splitlines()
            said = [json.loads(line) for line in lines if line.startswith("{")]
            assert {"time", "level", "component", "message"} <= set(said[0])
            assert not [line for line in lines if re.match(r"chord-|\d\d:\d\d:\d\d ", line)], "a plain line of ours"

    def _log_path(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def log(self, name: str) -> str:
        return self._log_path(name).read_text()

    @property
    def num_steps(self) -> int:
        return len(read_lines(self.root / "var/lib/chord-rl/learner/runs/first/metrics.jsonl"))

    def wait_for_steps(self, count: int) -> None:
        last = self.num_steps + count
        self.wait_until(
            lambda: self.num_steps >= last, lambda: "".join(self.log(name)[-2000:] for name in self.processes)
        )

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
        for manager in self.managers.values():
            manager.close()


@pytest.fixture
def machine(tmp_path: Path, tiny_model: Path) -> Iterator[LabMachine]:
    machine = LabMachine(tmp_path, tiny_model)
    yield machine
    machine.close()


def test_readme_leads_from_an_empty_root_to_a_run_that_is_upgraded_restored_and_given_new_keys(
    machine: LabMachine,
) -> None:
    for section in SECTIONS:
        lines = commands(section)
        assert lines, section
        for line in lines:
            machine.do(line)
            if len(machine.processes) == len(machine.services("chord.target")) > 0:
                machine.wait_for_steps(3)
    assert machine.services("chord.target") == [
        LEARNER, "chord-actor@0.service", "chord-actor@1.service", "chord-eval.service",
    ]  # fmt: skip
    machine.do("systemctl stop chord.target")
    machine.do("chord-audit /var/lib/chord-rl/learner/runs/first")
    folders = sorted(path.name for path in (machine.root / "var/lib/chord-rl").iterdir())
    (broken,) = [name for name in folders if name.startswith("learner-broken-")]
    assert folders == ["actor-0", "actor-1", "actor-2", "evaluator", "learner", broken, "models"]
    (backup,) = (machine.root / "mnt/backup/chord-rl").iterdir()
    assert backup.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in backup.iterdir()) == ["etc", "learner"]
    assert {"ledger.sqlite", "checkpoints"} <= {path.name for path in (backup / "learner/runs/first").iterdir()}
    assert (backup / "etc/run.toml").exists()
    assert not (machine.root / "var/lib/chord-rl/learner/learner").exists(), (
        "a copy went into a folder, not to its name"
    )


def test_a_service_that_ends_early_is_told_of_at_once(machine: LabMachine) -> None:
    for line in commands(SECTIONS[0]):
        if "--check" in line:  # before demonstrations are imported
            break
        machine.do(line)
    since = time.monotonic()
    with pytest.raises(AssertionError, match=r"chord-learner\.service ended with 2: (.|\n)*got no such file"):
        machine.do("systemctl start chord-learner")
    assert time.monotonic() < since + 250  # and not only when nobody waits any more
