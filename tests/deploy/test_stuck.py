"""What systemd hears of components whose loops are stuck: nothing any more, and then their end."""

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from common.wire.ports import free_ports
from tests.deploy.manager import Manager, wait_until
from tests.runs import QUIET, import_experts, read_lines, write_config

STUCK_S = 4.0
"""run.watchdog_s"""
STEP_S = 60.0
"""learner.step_timeout_s, which a start keeps to as well: 6 s on two busy cores, more beside other tests"""
STICKY = """
import time
from pathlib import Path
from actors.environment import SingleTurn
from common.chat import ChatMessage

class Sticky(SingleTurn):
    def __init__(self, *, seed, mark):
        self.mark = Path(mark)

    def task(self, split, index):
        if self.mark.exists():
            self.mark.write_text(str(time.monotonic()))
            time.sleep(1000)
        return "a", [ChatMessage(role="user", content=f"Say {index}.")]

    def score(self, task, text):
        return 0.0
"""


@dataclass(frozen=True)
class Component:
    process: "subprocess.Popen[bytes]"
    manager: Manager
    log: Path

    def wait_for_sign(self, key: str) -> None:
        wait_until(lambda: self.manager.has(key), self.log.read_text)

    def check_end(self, since: float, loop: str, *, limit_s: float = STUCK_S) -> None:
        """It has ended by itself, said whose loop it was, and gave no sign of life when its time was over."""
        assert self.process.wait(timeout=60) == 1, self.log.read_text()
        assert f"the {loop} has not moved for" in self.log.read_text()
        assert max(self.manager.times("WATCHDOG")) < since + limit_s + 2.0
        assert not self.manager.has("STOPPING")

    def rank(self, number: int) -> psutil.Process:
        """One of a learner's processes, below torchrun."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(child for child in children if child.environ().get("RANK") == str(number))


@contextmanager
def started(folder: Path, config: Path, module: str, *arguments: str) -> Iterator[Component]:
    manager, log = Manager(), folder / f"{module}.log"
    environment = {"NOTIFY_SOCKET": str(manager.path), "PYTHONPATH": f"{folder}{os.pathsep}{os.getcwd()}"}
    command = [sys.executable, "-m", module, "--config", str(config), *arguments]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **QUIET, **environment})
    try:
        yield Component(process, manager, log)
    finally:
        ranks = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait()
        for rank in ranks:  # which torchrun would have ended
            with suppress(psutil.NoSuchProcess):
                rank.kill()
        manager.close()


def install_sticky_environment(folder: Path) -> None:
    """As an installed package."""
    metadata = folder / "sticky-1.0.dist-info"
    metadata.mkdir()
    (folder / "sticky.py").write_text(STICKY)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: sticky\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[chord_rl.environments]\nsticky = sticky:Sticky\n")


def test_a_stuck_actor_and_a_stuck_learner_fall_silent_and_end(tiny_model: Path, tmp_path: Path) -> None:
    install_sticky_environment(tmp_path)
    mark = tmp_path / "mark"
    config = write_config(
        tmp_path, tiny_model, run={"watchdog_s": STUCK_S}, algorithm={"preset": "grpo"},
        environment={"name": "sticky", "options": {"mark": str(mark)}}, actor={"engine": "simulated"},
        learner={"num_steps": 100_000}, eval={"every_steps": 0}, network={"port": free_ports(1, "127.0.0.1")[0]},
    )  # fmt: skip
    with ExitStack() as stack:
        learner = stack.enter_context(started(tmp_path, config, "learner"))
        actor = stack.enter_context(started(tmp_path, config, "actors", "--name", "actor-0"))
        for component in (learner, actor):
            component.wait_for_sign("READY")
            component.wait_for_sign("WATCHDOG")
        mark.touch()  # the actor sticks at its next task, and writes down when
        wait_until(lambda: bool(mark.read_text()), actor.log.read_text)
        actor.check_end(float(mark.read_text()), "actor's event loop")
        ledger = sqlite3.connect(tmp_path / "run" / "ledger.sqlite", isolation_level=None)
        ledger.execute("BEGIN IMMEDIATE")  # a program that looks at the ledger, and hangs
        since = time.monotonic()
        assert learner.process.poll() is None
        learner.check_end(since, "learner's inbox")
        ledger.close()


def test_a_learner_whose_step_does_not_end_falls_silent_and_ends(tiny_model: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path, tiny_model, run={"watchdog_s": STUCK_S}, algorithm={"preset": "sft"},
        learner={"num_steps": 100_000, "num_ranks": 2, "num_threads": 1, "step_timeout_s": STEP_S,
                 "checkpoint_every_steps": 100_000}, eval={"every_steps": 0},
    )  # fmt: skip
    import_experts(config)
    with started(tmp_path, config, "learner") as learner:
        learner.wait_for_sign("READY")
        wait_until(lambda: len(read_lines(tmp_path / "run" / "metrics.jsonl")) >= 2, learner.log.read_text)
        other = learner.rank(1)
        other.suspend()  # the first rank waits for it in the middle of a step
        since = time.monotonic()
        try:
            wait_until(lambda: "has not moved" in learner.log.read_text(), learner.log.read_text)
        finally:
            other.kill()  # as systemd does with what hears no SIGTERM
        learner.check_end(since, "learner's train loop", limit_s=STEP_S + 2.0)
        assert 'in phase "training after step' in learner.log.read_text()
