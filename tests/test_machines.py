"""One learner on several machines: each with a run directory of its own; they share checkpoints."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from common.wire.ports import free_ports
from learner.durable import link_or_copy
from tests.runs import PATIENCE_S, QUIET, import_experts, read_lines, read_summary, run_module, write_config

NUM_STEPS = 30
Start = Callable[[], list[subprocess.Popen[str]]]


def lose(machine: subprocess.Popen[str]) -> None:
    """Kill its launcher and its rank at once, as a loss of power does."""
    for process in [psutil.Process(machine.pid), *psutil.Process(machine.pid).children(recursive=True)]:
        process.kill()


@pytest.fixture
def start(tiny_model: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts both machines of a learner of two ranks; whatever still runs at the end is killed."""
    (port,) = free_ports(1, "127.0.0.1")
    ranks = {"num_ranks": 2, "num_nodes": 2, "rendezvous": f"127.0.0.1:{port}", "num_threads": 1}
    steps = {"zero_stage": 2, "num_steps": NUM_STEPS, "checkpoint_every_steps": 2}
    config = write_config(
        tmp_path, tiny_model, algorithm={"preset": "sft"}, eval={"every_steps": 0}, learner={**ranks, **steps}
    )
    import_experts(config)
    started: list[subprocess.Popen[str]] = []

    def start() -> list[subprocess.Popen[str]]:
        machines: list[subprocess.Popen[str]] = []
        for node in range(2):
            folder = tmp_path / f"machine-{node}"
            (tmp_path / "checkpoints").mkdir(exist_ok=True)
            folder.mkdir(exist_ok=True)
            if not (folder / "checkpoints").exists():
                (folder / "checkpoints").symlink_to(tmp_path / "checkpoints")
            command = [sys.executable, "-m", "learner", "--node-index", str(node), "--config", str(config)]
            environment = {**os.environ, **QUIET, "GLOO_SOCKET_IFNAME": "lo"}
            machines.append(
                subprocess.Popen([*command, f"run.dir={folder}"], stderr=subprocess.PIPE, text=True, env=environment)
            )
        started.extend(machines)
        return machines

    yield start
    for machine in started:
        if machine.poll() is None:
            lose(machine)
        machine.communicate()


def test_a_learner_on_two_machines_survives_the_loss_of_one(start: Start, tmp_path: Path) -> None:
    first, second = start()
    deadline = time.monotonic() + PATIENCE_S
    while not (tmp_path / "checkpoints" / "newest").exists():
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    lose(second)
    assert first.wait(60) != 0
    for machine in start():
        _, said = machine.communicate(timeout=PATIENCE_S)
        assert machine.returncode == 0, said
    lines = read_lines(tmp_path / "machine-0" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert read_summary(tmp_path / "machine-0")["steps"] == NUM_STEPS
    assert not (tmp_path / "machine-1" / "ledger.sqlite").exists()
    newest = tmp_path / "checkpoints" / f"step-{NUM_STEPS:08d}"
    assert len(list(newest.rglob("*optim_states.pt"))) == 2


def test_a_machine_that_does_not_exist_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    config = str(write_config(tmp_path, tiny_model))
    where = ["learner.num_ranks=2", "learner.num_nodes=2", "learner.rendezvous=127.0.0.1:5999"]
    done = run_module("learner", "--config", config, "--node-index", "2", *where, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("--node-index: got 2, expected 0 to 1, below learner.num_nodes")


def test_a_policy_is_kept_on_another_disk_too(tmp_path: Path) -> None:
    """Where all machines see it; /dev/shm is a disk of its own."""
    source = tmp_path / "version"
    source.write_bytes(b"weights")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        assert os.stat(folder).st_dev != source.stat().st_dev
        link_or_copy(source, Path(folder) / "kept")
        assert (Path(folder) / "kept").read_bytes() == b"weights"
    link_or_copy(source, tmp_path / "linked")
    assert (tmp_path / "linked").samefile(source)
