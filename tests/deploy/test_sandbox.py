"""The sandbox of the units and the libraries that ask most of a system: vLLM's processes, memory and compilers."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.deploy.lab import VENV, install, prepare_program
from tests.deploy.manager import Manager
from tests.deploy.sandbox import UnitProcess
from tests.deploy.units import Unit


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here")
def test_vllm_samples_in_the_sandbox_of_an_actor(tiny_model: Path, tmp_path: Path) -> None:
    root, log = tmp_path / "root", tmp_path / "log"
    prepare_program(root)
    install(root, "--program", VENV)
    for name in ("actors.secret", "learner.public"):
        (root / "etc/chord-rl/keys" / name).write_text("not needed to sample")
    shutil.copytree(tiny_model, root / "var/lib/chord-rl/models/tiny")
    manager = Manager()
    command = [
        "/usr/local/bin/chord-eval", "--config", "/etc/chord-rl/run.toml", "--model", "/var/lib/chord-rl/models/tiny",
        "--json", "scores.json", "eval.engine=vllm", "eval.num_problems=4", "actor.kv_cache_gib=0.1",
    ]  # fmt: skip
    with log.open("wb") as file:
        process = UnitProcess(
            root, Unit(root, "chord-actor@0.service"), manager, scratch=tmp_path, log=file, command=command
        )
        assert process.wait(timeout_s=600) == 0, log.read_text()
    manager.close()
    (score,) = json.loads((root / "var/lib/chord-rl/actor-0/scores.json").read_text())["tasks"]
    assert score["num_problems"] == 4
